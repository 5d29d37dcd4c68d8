#include "coterie/router/kmeans.hpp"

#include <limits>

#include "catch.hpp"
#include "router.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

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

TEMPLATE_TEST_CASE("T8: the first update finds separate blobs, and weighs as its batch", "", float, double) {
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

TEST_CASE("restored state of the defaults goes on as if it had not stopped") {
  Router<float> a(5, 8), b(5, 8);
  for (std::uint64_t t = 0; t < 4; ++t) a.step(random_rows<float>(60, 8, t));
  b.kmeans.restore(a.kmeans.centroids(), a.kmeans.counts(), a.kmeans.sums(), a.kmeans.updates());
  for (std::uint64_t t = 4; t < 9; ++t) a.step(random_rows<float>(60, 8, t)), b.step(random_rows<float>(60, 8, t));
  REQUIRE(same_bits<float>(a.kmeans.centroids(), b.kmeans.centroids()));
  REQUIRE(same_bits(a.kmeans.sums(), b.kmeans.sums()));
}

TEMPLATE_TEST_CASE("T6: assigning, scoring and observing move nothing", "", float, double) {
  Router<TestType> router(5, 8), still(5, 8);
  const RowMatrix<TestType> rows = random_rows<TestType>(70, 8, 1);
  RowMatrix<TestType> scores(70, 5);
  for (int t = 0; t < 3; ++t) {
    for (int again = 0; again < 4; ++again) {  // before the first update as well: nothing is made on the way
      const OnlineKMeans<TestType>& kmeans = router.kmeans;
      RouterStatistics<TestType> statistics(1, 5, 8);
      const auto labels = router.assign(rows);
      kmeans.scores(rows, view(scores), router.context);
      kmeans.observe(rows, labels, statistics, 0, router.context);
      kmeans.observe(rows, labels, statistics, 0);
      REQUIRE(same_state(router.kmeans, still.kmeans));
    }
    router.step(rows), still.step(rows);
    REQUIRE(same_state(router.kmeans, still.kmeans));
  }
}

TEMPLATE_TEST_CASE("the largest score is at the label, bit for bit", "", float, double) {
  const Index n = GENERATE(1, 5, 8, 100, 333), k = GENERATE(1, 3, 16, 37, 130), d = GENERATE(3, 16, 29, 64);
  for (const InstructionSet set : {InstructionSet::automatic, InstructionSet::baseline}) {
    Router<TestType> router(k, d);
    Context context(set);
    RowMatrix<TestType> rows = random_rows<TestType>(n, d, 5), wide(n, k + 3);
    RowMatrix<TestType> centroids = random_rows<TestType>(k, d, 6);
    // Pairs that differ by the last bit or not at all: products that round differently would show.
    for (Index c = 1; c < k; c += 2) centroids.row(c) = centroids.row(c - 1);
    for (Index c = 1; c < k; c += 4) centroids(c, c % d) = std::nextafter(centroids(c, c % d), TestType(9));
    router.kmeans.set_centroids(centroids);
    wide.setConstant(7);
    const View<TestType> scores = view(wide).columns(1, k);
    router.kmeans.scores(rows, scores, context);
    std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
    router.kmeans.assign(rows, labels, context);
    bool same = true;
    for (Index i = 0; i < n; ++i) {
      Index best = 0;
      for (Index c = 1; c < k; ++c)
        if (scores(i, c) > scores(i, best)) best = c;
      same &= best == labels[static_cast<std::size_t>(i)];
      same &= wide(i, 0) == 7 && wide(i, k + 1) == 7 && wide(i, k + 2) == 7;
    }
    REQUIRE(same);
    REQUIRE((scores.eigen() - rows * centroids.transpose()).cwiseAbs().maxCoeff() < TestType(1e-4));
    RowMatrix<TestType> alone(1, k);
    router.kmeans.scores(rows.bottomRows(1), view(alone), context);
    REQUIRE(same_bits<TestType>(alone, scores.rows(n - 1, 1)));
  }
}

TEST_CASE("scores refuse shapes that do not fit and storage that is in use") {
  Router<float> router(4, 6);
  const RowMatrix<float> rows = random_rows<float>(10, 6, 1);
  RowMatrix<float> scores(10, 4), narrow(10, 3), both(10, 10);
  REQUIRE_THROWS_AS(router.kmeans.scores(rows.leftCols(5), view(scores), router.context), ShapeError);
  REQUIRE_THROWS_AS(router.kmeans.scores(rows, view(narrow), router.context), ShapeError);
  REQUIRE_THROWS_AS(router.kmeans.scores(rows.topRows(9), view(scores), router.context), ShapeError);
  REQUIRE_THROWS_AS(router.kmeans.scores(both.leftCols(6), view(both).columns(5, 4), router.context), ShapeError);
  router.kmeans.scores(rows.topRows(0), view(scores).rows(0, 0), router.context);
}

TEMPLATE_TEST_CASE("T8: a warm start is not thrown away", "", float, double) {
  const Index k = 4, d = 8;
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  const RowMatrix<TestType> given = random_rows<TestType>(k, d, 31);
  Router<TestType> router({.clusters = k, .dim = d, .router = {.average = average}});
  router.kmeans.set_centroids(given);
  REQUIRE(router.kmeans.updates() == 1);
  REQUIRE(same_bits<TestType>(router.kmeans.centroids(), given));
  // Rows at the first two: these stay near them, in this order; the others stay where they are, and are not dead.
  const RowMatrix<TestType> rows = blob_rows<TestType>(200, given, {0, 1}, 0.05, 2);
  router.step(rows);
  for (Index c = 0; c < 2; ++c) {
    REQUIRE((router.copy().row(c) - given.row(c)).norm() < TestType(0.2));
    REQUIRE(router.copy().row(c) != given.row(c));
  }
  REQUIRE(same_bits<TestType>(router.kmeans.centroids().rows(2, 2), view(given).rows(2, 2)));
  REQUIRE(router.count(2) == Approx((router.count(0) + router.count(1)) / 4));
  REQUIRE(router.kmeans.updates() == 2);
}

TEST_CASE("a warm start weighs as its counts say, from the update that is named") {
  Router<double> router({.clusters = 2, .dim = 4, .router = {.decay = 0.9}});
  const RowMatrix<double> given = random_rows<double>(2, 4, 3), rows = random_rows<double>(10, 4, 4);
  router.kmeans.freeze(true);  // stops updates alone
  router.kmeans.set_centroids(given, std::vector<double>{30, 0}, 1000);
  router.kmeans.freeze(false);
  REQUIRE(router.kmeans.next_decay() == 0.9);
  router.step(rows, std::vector<std::int32_t>(10, 0));
  const Eigen::RowVectorXd expected = (0.9 * 30 * given.row(0) + 0.1 * rows.colwise().sum()) / (0.9 * 30 + 0.1 * 10);
  REQUIRE((router.copy().row(0) - expected).norm() < 1e-12);
  REQUIRE(router.copy().row(1) != given.row(1));  // a count of zero beside others: dead
}

TEST_CASE("T9: a warm start is renormalised too") {
  Router<float> router({.clusters = 3, .dim = 16, .router = {.renormalise = true}});
  router.kmeans.set_centroids(RowMatrix<float>(random_rows<float>(3, 16, 3) * 0.1f));
  for (Index c = 0; c < 3; ++c) REQUIRE(router.norm(c) == Approx(4));
}

TEST_CASE("a warm start refuses what no router can be in, and writes nothing") {
  Router<float> router(4, 6);
  const RowMatrix<float> before = router.copy(), given = random_rows<float>(4, 6, 3);
  RowMatrix<float> damaged = given;
  damaged(2, 2) = std::nanf("");
  const std::vector<double> few(3, 1.0), negative{1, 1, -1, 1};
  REQUIRE_THROWS_AS(router.kmeans.set_centroids(given.topRows(3)), ShapeError);
  REQUIRE_THROWS_AS(router.kmeans.set_centroids(given, few), ShapeError);
  REQUIRE_THROWS_AS(router.kmeans.set_centroids(damaged), ValueError);
  REQUIRE_THROWS_AS(router.kmeans.set_centroids(given, negative), ValueError);
  REQUIRE_THROWS_AS(router.kmeans.set_centroids(given, {}, 0), ValueError);
  REQUIRE(same_bits<float>(router.kmeans.centroids(), before));
  REQUIRE(router.kmeans.updates() == 0);
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
