#include "coterie/router/relocation.hpp"

#include <set>

#include "catch.hpp"
#include "router.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

namespace {

// Four of five rows are one broad clump, the others four tight ones.
template <class T>
RowMatrix<T> uneven_rows(Index n, std::uint64_t seed) {
  const RowMatrix<T> directions = random_rows<T>(5, 16, 50);
  RowMatrix<T> rows =
      blob_rows<T>(n, directions, {0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4}, 0.05, seed);
  const RowMatrix<T> broad = blob_rows<T>(n, directions, {0}, 0.7, seed + 1000);
  for (Index i = 0; i < n; ++i)
    if (i % 5 != 4) rows.row(i) = broad.row(i);
  return rows;
}

// One centroid for each clump, the rest far from all rows.
template <class T>
RowMatrix<T> one_each() {
  const RowMatrix<T> directions = random_rows<T>(5, 16, 50);
  RowMatrix<T> centroids(8, 16);
  centroids << directions, RowMatrix<T>(directions.topRows(3) * T(-0.5));
  return centroids;
}

}  // namespace

TEMPLATE_TEST_CASE("T8: a dead cluster is revived and lives on where it is", "", float, double) {
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

TEST_CASE("T8: clusters that a batch merely misses are not revived") {
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

TEST_CASE("T8: the share below which a cluster is dead is a setting; zero turns revival off") {
  // The victim's average count falls to 2/11, then to 3/12 of that, then by l = 0.3: 0.18, 0.045, 0.014 of what it was.
  const RowMatrix<float> directions = random_rows<float>(4, 8, 31);
  const auto revived_after = [&](double share) {
    Router<float> router({.clusters = 4, .dim = 8, .router = {.decay = 0.3, .dead_share = share}});
    router.step(blob_rows<float>(400, directions, {0, 1, 2, 3}, 0.05, 32));
    const std::int32_t victim = router.assign(directions)[3];
    const RowMatrix<float> before = router.copy();
    for (int t = 1; t <= 40; ++t) {
      router.step(blob_rows<float>(300, directions, {0, 1, 2}, 0.05, 33));
      if (!same_bits<float>(router.kmeans.centroids().rows(victim, 1), view(before).rows(victim, 1))) return t;
    }
    return 0;
  };
  REQUIRE(revived_after(0.5) == 1);
  REQUIRE(revived_after(0.1) == 2);
  REQUIRE(revived_after(0.03) == 3);
  REQUIRE(revived_after(0) == 0);
}

TEMPLATE_TEST_CASE("T8: revived clusters live on with batch means too", "", float, double) {
  const bool renormalise = GENERATE(false, true);
  const RowMatrix<TestType> directions = random_rows<TestType>(4, 8, 31);
  Router<TestType> router(
      {.clusters = 4, .dim = 8, .router = {.decay = 0.9, .average = Average::batch_mean, .renormalise = renormalise}});
  router.step(blob_rows<TestType>(400, directions, {0, 1, 2, 3}, 0.05, 32));
  const std::int32_t victim = router.assign(directions)[3];
  const RowMatrix<TestType> before = router.copy(), rows = blob_rows<TestType>(300, directions, {0, 1, 2}, 0.05, 33);
  router.step(rows), router.step(rows);
  const RowMatrix<TestType> revived = router.copy().middleRows(victim, 1);
  REQUIRE(revived != before.middleRows(victim, 1));
  router.step(rows, std::vector<std::int32_t>(300, (victim + 1) % 4));
  REQUIRE(same_bits<TestType>(router.kmeans.centroids().rows(victim, 1), revived));
  const double keep = router.kmeans.next_decay();
  router.step(rows.topRows(1), {victim});
  RowMatrix<TestType> expected = TestType(keep) * revived + TestType(1 - keep) * rows.topRows(1);
  if (renormalise) expected *= std::sqrt(TestType(8)) / expected.norm();
  REQUIRE((router.copy().middleRows(victim, 1) - expected).norm() < TestType(1e-5));
}

TEMPLATE_TEST_CASE("an overfull cluster is split until the load is even enough", "", float, double) {
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  const bool renormalise = GENERATE(false, true);
  const auto perplexity = [&](double share) {
    Router<TestType> router(
        {.clusters = 8,
         .dim = 16,
         .router = {
             .decay = 0.7, .average = average, .renormalise = renormalise, .dead_share = 0, .split_share = share}});
    router.kmeans.set_centroids(one_each<TestType>());
    for (std::uint64_t t = 0; t < 60; ++t) router.step(uneven_rows<TestType>(500, t));
    return router.load(uneven_rows<TestType>(2000, 99));
  };
  const double off = perplexity(0), on = perplexity(2);
  INFO(off << " " << on);
  REQUIRE(off < 3);
  REQUIRE(on > 1.7 * off);
  REQUIRE(perplexity(7.9) == off);  // nothing is so overfull
}

TEST_CASE("a split shares the count, leaves the centroid and puts the other at a row of its own") {
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  Router<double> router(
      {.clusters = 3, .dim = 6, .router = {.decay = 0.5, .average = average, .dead_share = 0, .split_share = 1.5}});
  RowMatrix<double> centroids(3, 6);
  centroids << 1, -1, 0, 0, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0;
  router.kmeans.set_centroids(centroids, std::vector<double>{80, 15, 5}, 8);
  Router<double> same({.clusters = 3, .dim = 6, .router = {.decay = 0.5, .average = average, .dead_share = 0}});
  same.kmeans.set_centroids(centroids, std::vector<double>{80, 15, 5}, 8);
  const RowMatrix<double> rows = random_rows<double>(100, 6, 7);
  std::vector<std::int32_t> labels(100, 0);
  labels[99] = 1;
  router.step(rows, labels), same.step(rows, labels);
  REQUIRE(same_bits<double>(router.kmeans.centroids().rows(0, 2), same.kmeans.centroids().rows(0, 2)));
  REQUIRE(router.count(0) == same.count(0) / 2);
  REQUIRE(router.count(1) == same.count(1));
  REQUIRE(router.count(2) == same.count(0) / 2);
  const RowMatrix<double> placed = router.copy().bottomRows(1), old = same.copy();
  REQUIRE(placed.norm() == Approx(old.row(0).norm()));
  Index source = 0, nearest = 0;
  const Eigen::VectorXd cosines = rows * placed.row(0).transpose();
  REQUIRE(cosines.maxCoeff(&source) == Approx(placed.norm() * std::sqrt(6.0)));
  const Eigen::VectorXd rivals = old * rows.row(source).transpose();
  rivals.maxCoeff(&nearest);
  REQUIRE(nearest == 0);
  // The next update without rows there moves neither.
  const RowMatrix<double> before = router.copy();
  router.step(rows.topRows(1), {1});
  for (const Index c : {0, 2})
    REQUIRE(same_bits<double>(router.kmeans.centroids().rows(c, 1), view(before).rows(c, 1)));
}

TEST_CASE("splits are a function of the seed and the number of updates") {
  const auto run = [](std::uint64_t seed) {
    Router<float> router({.clusters = 8, .dim = 16, .seed = seed, .router = {.decay = 0.7, .split_share = 2}});
    router.kmeans.set_centroids(one_each<float>(), std::vector<double>(8, 60.0));
    for (std::uint64_t t = 0; t < 20; ++t) router.step(uneven_rows<float>(500, t));
    return router.copy();
  };
  REQUIRE(same_bits<float>(run(1), run(1)));
  REQUIRE_FALSE(same_bits<float>(run(1), run(2)));
}

TEST_CASE("a split cluster is not split again at once") {
  Router<double> router({.clusters = 16, .dim = 6, .router = {.decay = 0.9, .dead_share = 0, .split_share = 1.5}});
  const RowMatrix<double> start = random_rows<double>(16, 6, 5), rows = blob_rows<double>(200, start, {0}, 0.3, 4);
  router.kmeans.set_centroids(start, std::vector<double>(16, 1.0), 200);
  int splits = 0;
  Index last = -100;
  for (int t = 0; t < 60; ++t) {
    const double halved = router.count(0);
    const Index update = router.kmeans.updates();
    router.step(rows, std::vector<std::int32_t>(200, 0));  // every row insists on the first
    if (router.count(0) >= halved) continue;
    REQUIRE(update % detail::split_interval == 0);
    REQUIRE(update - last >= detail::split_interval);
    last = update;
    ++splits;
  }
  REQUIRE(splits >= 3);
}

TEST_CASE("a cluster must be overfull before an update and after it, and split_share says from when") {
  const RowMatrix<double> rows = random_rows<double>(100, 6, 8);
  const std::vector<std::int32_t> first(100, 0), second(100, 1);
  const auto split = [&](double share, Index updates, const std::vector<std::int32_t>& labels) {
    Router<double> router({.clusters = 2, .dim = 6, .router = {.decay = 0.5, .split_share = share}});
    Router<double> off({.clusters = 2, .dim = 6, .router = {.decay = 0.5}});
    RowMatrix<double> centroids(2, 6);
    centroids << 1, -1, 0, 0, 0, 0, -1, 1, 0, 0, 0, 0;
    for (auto* kmeans : {&router.kmeans, &off.kmeans})
      kmeans->set_centroids(centroids, std::vector<double>{95, 5}, updates);
    router.step(rows, labels), off.step(rows, labels);
    return !same_bits(router.kmeans.counts(), off.kmeans.counts());
  };
  REQUIRE(split(1.5, 8, first));
  REQUIRE(split(1.89, 8, first));
  REQUIRE_FALSE(split(1.91, 8, first));  // before: 1.9 times the mean
  REQUIRE_FALSE(split(1.5, 8, second));  // after: less
  for (const Index updates : {1, 7, 9, 15}) REQUIRE_FALSE(split(1.5, updates, first));
  REQUIRE(split(1.5, 16, first));
}

TEST_CASE("a revived cluster is not split in the next update, however many rows it gets") {
  // Update 7 revives the second cluster, update 8 would split the fullest.
  Router<double> router({.clusters = 3, .dim = 6, .router = {.decay = 0.01, .split_share = 1.2}});
  RowMatrix<double> centroids(3, 6);
  centroids << 1, -1, 0, 0, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0;
  router.kmeans.set_centroids(centroids, std::vector<double>(3, 100.0), 7);
  const RowMatrix<double> rows = random_rows<double>(100, 6, 8);
  std::vector<std::int32_t> halves(100, 0);
  std::fill(halves.begin() + 50, halves.end(), 2);
  router.step(rows, halves);
  REQUIRE(router.copy().row(1) != centroids.row(1));
  const double mean = (router.count(0) + router.count(2)) / 2;
  REQUIRE((router.count(1) > 0.5 * mean && router.count(1) < mean));
  std::vector<std::int32_t> taken(100, 1);
  taken[0] = 0, taken[1] = 2;
  router.step(rows, taken);
  REQUIRE(router.count(1) > 90);  // not halved
}

TEST_CASE("a row repeated all over is not split") {
  const KMeansConfig config{.clusters = 4, .dim = 6, .router = {.decay = 0.5, .split_share = 1.5}};
  KMeansConfig never = config;
  never.router.split_share = 0;
  Router<float> router(config), off(never);
  RowMatrix<float> rows(100, 6);
  const RowMatrix<float> row = random_rows<float>(1, 6, 4);
  rows << row.replicate(97, 1), blob_rows<float>(3, RowMatrix<float>(-row), {0}, 0.3, 5);
  for (int t = 0; t < 20; ++t) {
    router.step(rows), off.step(rows);
    REQUIRE(same_state(router.kmeans, off.kmeans));
  }
  REQUIRE(router_load(router.kmeans.counts()).largest > 0.9);
}

TEST_CASE("one cluster alone is never split") {
  Router<double> router({.clusters = 1, .dim = 6, .router = {.split_share = 1.01}});
  for (std::uint64_t t = 0; t < 10; ++t) router.step(random_rows<double>(30, 6, t));
  REQUIRE(router.copy().allFinite());
}
