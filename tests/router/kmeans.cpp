#include "coterie/router/kmeans.hpp"

#include <limits>

#include "catch.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

namespace {

template <class T>
struct Router {
  Router(Index clusters, Index dim, double decay = 0.9, std::uint64_t seed = 1, Index sample = 0)
      : kmeans({.clusters = clusters, .dim = dim, .decay = decay, .seed = seed}),
        statistics(1, clusters, dim, sample) {}

  std::vector<std::int32_t> assign(const RowMatrix<T>& rows) {
    std::vector<std::int32_t> labels(static_cast<std::size_t>(rows.rows()), -7);
    kmeans.assign(rows, labels, context);
    return labels;
  }
  void observe(const RowMatrix<T>& rows) { kmeans.observe(rows, assign(rows), statistics, 0, context); }
  void step(const RowMatrix<T>& rows) {
    observe(rows);
    kmeans.update(statistics, 0);
    statistics.clear();
  }
  RowMatrix<T> copy() const { return kmeans.centroids().eigen(); }

  OnlineKMeans<T> kmeans;
  RouterStatistics<T> statistics;
  Context context;
};

}  // namespace

TEST_CASE("bad settings give one error that names them all") {
  REQUIRE_THROWS_AS(OnlineKMeans<float>({.clusters = 0, .dim = 4}), ValueError);
  REQUIRE_THROWS_AS(OnlineKMeans<float>({.clusters = 4, .dim = 2}), ValueError);
  REQUIRE_THROWS_AS(OnlineKMeans<float>({.clusters = 4, .dim = 4, .decay = 1.0}), ValueError);
  REQUIRE_THROWS_AS(OnlineKMeans<float>({.clusters = 4, .dim = 4, .decay = std::nan("")}), ValueError);
  try {
    OnlineKMeans<float>({.clusters = 0, .dim = 1, .decay = -1});
    FAIL("no error");
  } catch (const ValueError& error) {
    const std::string text = error.what();
    for (const char* name : {"clusters", "dim", "decay"}) REQUIRE(text.find(name) != std::string::npos);
  }
}

TEMPLATE_TEST_CASE("a row goes to the centroid of the largest dot product, the lowest on ties", "", float, double) {
  Router<TestType> router(4, 3);
  RowMatrix<TestType> centroids(4, 3);
  centroids << 0, 0, 0, 2, 0, 0, 2, 0, 0, 0, 1, 0;
  router.kmeans.restore(centroids, std::vector<double>(4, 1.0), std::vector<double>(12, 0.0), 3);
  RowMatrix<TestType> rows(5, 3);
  rows << 1, 0, 0, 0, 1, 0, 0, 0, 1, -1, -1, 0, 1, 2, 0;
  REQUIRE(router.assign(rows) == std::vector<std::int32_t>{1, 3, 0, 0, 1});
  REQUIRE(router.assign(RowMatrix<TestType>(0, 3)).empty());
}

TEST_CASE("a label depends on its row alone") {
  Router<float> router(19, 24);
  const RowMatrix<float> rows = random_rows<float>(301, 24, 4);
  const auto all = router.assign(rows);
  RowMatrix<float> wide = RowMatrix<float>::Constant(301, 70, std::nanf(""));
  wide.middleCols(9, 24) = rows;
  std::vector<std::int32_t> labels(301);
  router.kmeans.assign(wide.middleCols(9, 24), labels, router.context);
  REQUIRE(labels == all);
  RowMatrix<float> damaged = rows;
  damaged.row(40).setConstant(std::nanf(""));
  damaged(41, 3) = std::numeric_limits<float>::infinity();
  const auto beside = router.assign(damaged);
  for (Index i = 0; i < 301; ++i) {
    const std::int32_t label = beside[static_cast<std::size_t>(i)];
    if (i == 40 || i == 41)
      REQUIRE((label >= 0 && label < 19));
    else
      REQUIRE(label == all[static_cast<std::size_t>(i)]);
  }
  for (Index i = 0; i < 301; i += 23)
    REQUIRE(router.assign(rows.middleRows(i, 1))[0] == all[static_cast<std::size_t>(i)]);
}

TEMPLATE_TEST_CASE("the first update finds separate blobs", "", float, double) {
  const Index k = 10;
  const RowMatrix<TestType> directions = random_rows<TestType>(k, 16, 7);
  std::vector<Index> blobs{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9};
  const RowMatrix<TestType> rows = blob_rows<TestType>(1300, directions, blobs, 0.15, 8);
  Router<TestType> router(k, 16);
  router.step(rows);
  REQUIRE(router.kmeans.updates() == 1);
  const auto labels = router.assign(rows);
  std::vector<std::int32_t> label_of(static_cast<std::size_t>(k), -1);
  for (std::size_t i = 0; i < labels.size(); ++i) {
    std::int32_t& expected = label_of[static_cast<std::size_t>(blobs[i % blobs.size()])];
    if (expected < 0) expected = labels[i];
    REQUIRE(labels[i] == expected);
  }
  std::sort(label_of.begin(), label_of.end());
  for (Index c = 0; c < k; ++c) REQUIRE(label_of[static_cast<std::size_t>(c)] == c);
  double total = 0;
  for (Index c = 0; c < k; ++c) {
    const double count = router.kmeans.counts()[static_cast<std::size_t>(c)];
    total += count;
    for (Index j = 0; j < 16; ++j)
      REQUIRE(router.kmeans.sums()[static_cast<std::size_t>(c * 16 + j)] / count ==
              Approx(static_cast<double>(router.kmeans.centroids()(c, j))).margin(1e-5));
  }
  REQUIRE(total == Approx(1300));
}

TEST_CASE("later updates are moving averages of counts and sums") {
  const Index k = 3, d = 5;
  Router<double> router(k, d, 0.3);
  router.step(random_rows<double>(200, d, 11));
  for (int t = 1; t <= 6; ++t) {
    const RowMatrix<double> rows = random_rows<double>(90 + t, d, 20 + static_cast<std::uint64_t>(t));
    const auto labels = router.assign(rows);
    // The formula once more, cluster by cluster: N = l N + (1-l) n, S = l S + (1-l) s, centroid = S / N.
    const double keep = t == 1 ? 2.0 / 11 : t == 2 ? 3.0 / 12 : 0.3;
    RowMatrix<double> expected = router.copy();
    for (Index c = 0; c < k; ++c) {
      double count = router.kmeans.counts()[static_cast<std::size_t>(c)] * keep;
      Eigen::RowVectorXd sum = Eigen::Map<const Eigen::RowVectorXd>(router.kmeans.sums().data() + c * d, d) * keep;
      for (Index i = 0; i < rows.rows(); ++i)
        if (labels[static_cast<std::size_t>(i)] == c) count += 1 - keep, sum += (1 - keep) * rows.row(i);
      expected.row(c) = sum / count;
    }
    REQUIRE(router.kmeans.next_decay() == Approx(keep));
    router.step(rows);
    REQUIRE(router.kmeans.updates() == t + 1);
    REQUIRE((router.copy() - expected).cwiseAbs().maxCoeff() < 1e-12);
  }
}

TEST_CASE("the decay grows to its setting") {
  Router<float> router(2, 4, 0.99);
  const auto set = [&](Index updates) {
    router.kmeans.restore(router.kmeans.centroids(), std::vector<double>(2, 1.0), std::vector<double>(8, 0.0), updates);
    return router.kmeans.next_decay();
  };
  REQUIRE(set(0) == Approx(0.1));
  REQUIRE(set(8) == Approx(0.5));
  REQUIRE(set(880) < 0.99);
  REQUIRE(set(891) == 0.99);
  REQUIRE(set(100000) == 0.99);
}

TEMPLATE_TEST_CASE("a dead cluster is revived and lives on where it is", "", float, double) {
  const Index k = 4, d = 8;
  const RowMatrix<TestType> directions = random_rows<TestType>(k, d, 31);
  Router<TestType> router(k, d, 0.9);
  router.step(blob_rows<TestType>(400, directions, {0, 1, 2, 3}, 0.05, 32));
  const std::int32_t victim = router.assign(directions)[3];
  const RowMatrix<TestType> before = router.copy();
  const RowMatrix<TestType> rows = blob_rows<TestType>(300, directions, {0, 1, 2}, 0.05, 33);

  router.step(rows);  // average count falls to 2/11 of the mean: not dead yet
  REQUIRE(same_bits<TestType>(router.kmeans.centroids().rows(victim, 1), view(before).rows(victim, 1)));
  router.step(rows);  // 3/12 of that: dead
  const RowMatrix<TestType> revived = router.copy().middleRows(victim, 1);
  REQUIRE(revived != before.middleRows(victim, 1));
  const double cosine = static_cast<double>((rows * revived.transpose()).maxCoeff()) /
                        static_cast<double>(revived.norm()) / std::sqrt(static_cast<double>(d));
  REQUIRE(cosine == Approx(1).margin(1e-5));  // a row of the batch, but for its length
  REQUIRE(revived.norm() <= std::sqrt(static_cast<TestType>(d)) * TestType(1.0001));
  double mean = 0;
  for (const double count : router.kmeans.counts()) mean += count / static_cast<double>(k);
  REQUIRE(router.kmeans.counts()[static_cast<std::size_t>(victim)] > 0.5 * mean);

  // Rows that go elsewhere do not move it; rows of its own move it by the moving average.
  router.kmeans.observe(rows, std::vector<std::int32_t>(300, (victim + 1) % 4), router.statistics, 0, router.context);
  router.kmeans.update(router.statistics, 0);
  router.statistics.clear();
  REQUIRE(same_bits<TestType>(router.kmeans.centroids().rows(victim, 1), revived));
  REQUIRE(router.assign(RowMatrix<TestType>(revived))[0] == victim);
  router.kmeans.observe(rows.topRows(1), std::vector<std::int32_t>{victim}, router.statistics, 0, router.context);
  router.kmeans.update(router.statistics, 0);
  const RowMatrix<TestType> now = router.copy().middleRows(victim, 1);
  REQUIRE(now != revived);
  REQUIRE((now - revived).norm() < TestType(0.2) * (rows.topRows(1) - revived).norm());
}

TEST_CASE("clusters that a batch merely misses are not revived") {
  const RowMatrix<float> directions = random_rows<float>(4, 8, 31);
  Router<float> router(4, 8, 0.9);
  router.step(blob_rows<float>(400, directions, {0, 1, 2, 3}, 0.05, 32));
  std::vector<double> sums(router.kmeans.sums().begin(), router.kmeans.sums().end());
  std::vector<double> counts(router.kmeans.counts().begin(), router.kmeans.counts().end());
  router.kmeans.restore(router.kmeans.centroids(), counts, sums, 1000);  // decay 0.9
  const RowMatrix<float> before = router.copy();
  const std::int32_t missed = router.assign(directions)[3];
  for (int i = 0; i < 10; ++i) router.step(blob_rows<float>(300, directions, {0, 1, 2}, 0.05, 33));
  REQUIRE(same_bits<float>(router.kmeans.centroids().rows(missed, 1), view(before).rows(missed, 1)));
}

TEST_CASE("without rows, or frozen, an update changes nothing") {
  Router<float> router(5, 6);
  const auto check_still = [&](auto&& action) {
    const RowMatrix<float> before = router.copy();
    const std::vector<double> counts(router.kmeans.counts().begin(), router.kmeans.counts().end());
    const Index updates = router.kmeans.updates();
    action();
    REQUIRE(same_bits<float>(router.kmeans.centroids(), before));
    REQUIRE(same_bits(router.kmeans.counts(), counts));
    REQUIRE(router.kmeans.updates() == updates);
  };
  const RowMatrix<float> rows = random_rows<float>(64, 6, 3);
  check_still([&] { router.kmeans.update(router.statistics, 0); });
  router.step(rows);
  check_still([&] { router.kmeans.update(router.statistics, 0); });
  check_still([&] { router.observe(rows); });
  router.kmeans.freeze(true);
  check_still([&] { router.kmeans.update(router.statistics, 0); });
  router.kmeans.freeze(false);
  router.kmeans.update(router.statistics, 0);
  REQUIRE(router.kmeans.updates() == 2);
}

TEST_CASE("fewer rows than clusters leave random directions and no NaN") {
  Router<float> router(6, 5);
  const RowMatrix<float> start = router.copy();
  RowMatrix<float> rows = random_rows<float>(2, 5, 9).replicate(3, 1);  // two different rows
  for (int t = 0; t < 5; ++t) {
    router.step(rows);
    REQUIRE(router.copy().allFinite());
    if (t == 0) {
      REQUIRE(same_bits<float>(router.kmeans.centroids().rows(2, 4), view(start).rows(2, 4)));
      for (const double count : router.kmeans.counts()) REQUIRE(count > 0);
    }
    const auto labels = router.assign(rows);
    REQUIRE(labels[0] != labels[1]);
  }
}

TEST_CASE("rows that are not finite or have no label are left out") {
  const float inf = std::numeric_limits<float>::infinity();
  const RowMatrix<float> good = random_rows<float>(50, 6, 12);
  RowMatrix<float> rows(54, 6);
  rows << random_rows<float>(1, 6, 1), good.topRows(20), random_rows<float>(3, 6, 2), good.bottomRows(30);
  rows(0, 5) = std::nanf("");
  rows(21, 0) = inf;
  rows(22, 3) = -inf;
  Router<float> a(4, 6, 0.9, 1, 16), b(4, 6, 0.9, 1, 16);
  auto labels = a.assign(rows);
  labels[23] = -1;
  a.kmeans.observe(rows, labels, a.statistics, 0, a.context);
  b.observe(good);
  REQUIRE(same_bits(a.statistics.block(), b.statistics.block()));
  REQUIRE(same_bits<float>(a.statistics.samples(0), b.statistics.samples(0)));
}

TEMPLATE_TEST_CASE("any number of workers gives the same bits", "", float, double) {
  const Index n = 3000, d = 40, k = 9;
  const RowMatrix<TestType> rows = random_rows<TestType>(n, 3 * d, 15);
  const auto run = [&](Context& context, bool serial) {
    OnlineKMeans<TestType> kmeans({.clusters = k, .dim = d, .seed = 2});
    RouterStatistics<TestType> statistics(2, k, d, 100);
    std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
    std::vector<double> blocks;
    for (int t = 0; t < 3; ++t) {
      const auto x = rows.middleCols(t * d, d);
      kmeans.assign(x, labels, context);
      if (serial)
        kmeans.observe(x, labels, statistics, 1);
      else
        kmeans.observe(x, labels, statistics, 1, context);
      blocks.insert(blocks.end(), statistics.block().begin(), statistics.block().end());
      kmeans.update(statistics, 1);
      statistics.clear();
    }
    for (Index c = 0; c < k; ++c)
      for (Index j = 0; j < d; ++j) blocks.push_back(static_cast<double>(kmeans.centroids()(c, j)));
    return blocks;
  };
  Context one;
  const std::vector<double> expected = run(one, true);
  REQUIRE(same_bits(run(one, false), expected));
  for (const Index workers : {1, 2, 3, 8}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context context(pool, workspace);
    REQUIRE(same_bits(run(context, false), expected));
  }
}

TEST_CASE("a seed gives the same router again, another seed another one") {
  const RowMatrix<float> rows = random_rows<float>(500, 8, 18);
  const auto run = [&](std::uint64_t seed) {
    Router<float> router(7, 8, 0.9, seed, 64);
    for (int t = 0; t < 3; ++t) router.step(rows);
    return router.copy();
  };
  REQUIRE(same_bits<float>(run(1), run(1)));
  REQUIRE_FALSE(same_bits<float>(run(1), run(2)));
}

TEST_CASE("restored state goes on as if it had not stopped") {
  Router<float> a(5, 8), b(5, 8);
  for (std::uint64_t t = 0; t < 4; ++t) a.step(random_rows<float>(60, 8, t));
  b.kmeans.restore(a.kmeans.centroids(), a.kmeans.counts(), a.kmeans.sums(), a.kmeans.updates());
  for (std::uint64_t t = 4; t < 9; ++t) a.step(random_rows<float>(60, 8, t)), b.step(random_rows<float>(60, 8, t));
  REQUIRE(same_bits<float>(a.kmeans.centroids(), b.kmeans.centroids()));
  REQUIRE(same_bits(a.kmeans.sums(), b.kmeans.sums()));
}

TEST_CASE("wrong arguments throw and write nothing") {
  const Index n = 10, d = 6, k = 4;
  Router<float> router(k, d);
  const RowMatrix<float> rows = random_rows<float>(n, d, 5);
  router.step(rows);
  router.observe(rows);
  const RowMatrix<float> centroids = router.copy(), narrow = random_rows<float>(n, d - 1, 5);
  const std::vector<double> block(router.statistics.block().begin(), router.statistics.block().end());
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n), -5), shorter(static_cast<std::size_t>(n) - 1, 0);
  auto& kmeans = router.kmeans;
  auto& statistics = router.statistics;
  auto& context = router.context;

  REQUIRE_THROWS_AS(kmeans.assign(narrow, labels, context), ShapeError);
  REQUIRE_THROWS_AS(kmeans.assign(rows, shorter, context), ShapeError);
  REQUIRE(labels == std::vector<std::int32_t>(static_cast<std::size_t>(n), -5));

  std::vector<std::int32_t> good(static_cast<std::size_t>(n), 1), high = good, low = good;
  high.back() = static_cast<std::int32_t>(k);
  low.back() = -2;
  RouterStatistics<float> other(1, k + 1, d), thin(1, k, d + 1);
  REQUIRE_THROWS_AS(kmeans.observe(narrow, good, statistics, 0, context), ShapeError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, shorter, statistics, 0, context), ShapeError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, high, statistics, 0, context), ValueError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, low, statistics, 0, context), ValueError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, low, statistics, 0), ValueError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, good, statistics, 1, context), ValueError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, good, statistics, -1, context), ValueError);
  REQUIRE_THROWS_AS(kmeans.observe(rows, good, other, 0, context), ShapeError);
  REQUIRE(same_bits(statistics.block(), block));

  REQUIRE_THROWS_AS(kmeans.update(other, 0), ShapeError);
  REQUIRE_THROWS_AS(kmeans.update(thin, 0), ShapeError);
  REQUIRE_THROWS_AS(kmeans.update(statistics, 1), ValueError);
  const double nan = std::nan("");
  for (const double bad : {nan, -1.0, HUGE_VAL}) {
    RouterStatistics<float> damaged = statistics;
    damaged.block()[1] = bad;
    REQUIRE_THROWS_AS(kmeans.update(damaged, 0), ValueError);
  }
  RouterStatistics<float> damaged = statistics;
  damaged.block().back() = nan;
  REQUIRE_THROWS_AS(kmeans.update(damaged, 0), ValueError);
  damaged = statistics;
  damaged.sample_block()[0] = std::nanf("");
  REQUIRE_THROWS_AS(kmeans.update(damaged, 0), ValueError);
  damaged = statistics;
  damaged.sample_counts()[0] = damaged.sample_limit() + 1;
  REQUIRE_THROWS_AS(kmeans.update(damaged, 0), ValueError);

  const std::vector<double> counts(4, 1.0), sums(24, 0.0), bad_sums(24, nan), few(3, 1.0);
  REQUIRE_THROWS_AS(kmeans.restore(centroids.topRows(3), counts, sums, 1), ShapeError);
  REQUIRE_THROWS_AS(kmeans.restore(centroids, few, sums, 1), ShapeError);
  REQUIRE_THROWS_AS(kmeans.restore(centroids, counts, counts, 1), ShapeError);
  REQUIRE_THROWS_AS(kmeans.restore(centroids, counts, bad_sums, 1), ValueError);
  REQUIRE_THROWS_AS(kmeans.restore(centroids, counts, sums, -1), ValueError);
  REQUIRE(same_bits<float>(kmeans.centroids(), centroids));
  REQUIRE(kmeans.updates() == 1);
}
