#include "coterie/router/kmeans.hpp"

#include "allocation.hpp"
#include "catch.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

TEST_CASE("after the first update the router allocates nothing, revivals included") {
  const Index k = 4, d = 8, n = 3000;
  const RowMatrix<float> directions = random_rows<float>(k, d, 31);
  const RowMatrix<float> all = blob_rows<float>(n, directions, {0, 1, 2, 3}, 0.05, 32);
  const RowMatrix<float> some = blob_rows<float>(n, directions, {0, 1, 2}, 0.05, 33);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
  ThreadPool pool(3);
  Workspace workspace;
  Context context(pool, workspace);
  OnlineKMeans<float> kmeans({.clusters = k, .dim = d, .router = {.decay = 0.5}});
  RouterStatistics<float> statistics(1, k, d);
  const auto step = [&](const RowMatrix<float>& rows) {
    statistics.clear();
    kmeans.assign(rows, labels, context);
    kmeans.observe(rows, labels, statistics, 0, context);
    kmeans.update(statistics, 0);
  };
  step(all);
  const std::int32_t rare = labels[3];
  const long before = test::allocations();
  bool revived = false;
  for (int t = 0; t < 8; ++t) {
    const double count = kmeans.counts()[static_cast<std::size_t>(rare)];
    step(some);
    revived |= kmeans.counts()[static_cast<std::size_t>(rare)] > count;
  }
  REQUIRE(test::allocations() == before);
  REQUIRE(revived);
}

TEST_CASE("splits, scores and drift allocate nothing after warm-up") {
  const Index k = 6, d = 8, n = 700;
  const RowMatrix<float> rows = random_rows<float>(n, d, 31), start = random_rows<float>(k, d, 32);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n), 0);
  RowMatrix<float> scores(n, k);
  ThreadPool pool(3);
  Workspace workspace;
  Context context(pool, workspace);
  OnlineKMeans<float> kmeans(
      {.clusters = k, .dim = d, .router = {.decay = 0.5, .average = Average::batch_mean, .split_share = 1.5}});
  RouterStatistics<float> statistics(1, k, d);
  RouterDrift drift;
  const std::vector<double> counts{500, 40, 40, 40, 40, 1};
  const auto step = [&](Index update) {
    statistics.clear();
    kmeans.set_centroids(start, counts, update);
    kmeans.scores(rows, view(scores), context);
    kmeans.observe(rows, labels, statistics, 0, context);
    kmeans.update(statistics, 0);
    drift = router_drift(start, kmeans.centroids());
  };
  step(7);
  const long before = test::allocations();
  step(8);
  REQUIRE(test::allocations() == before);
  REQUIRE(kmeans.counts()[5] == kmeans.counts()[0]);  // it was split
  REQUIRE(drift.moved >= 2);
}
