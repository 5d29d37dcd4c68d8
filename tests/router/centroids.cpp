#include "coterie/router/centroids.hpp"

#include "catch.hpp"
#include "router.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

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

TEST_CASE("T8, T9: batch means are averaged, and the old centroid is kept where the batch has none") {
  const Index k = 4, d = 5;
  const bool renormalise = GENERATE(false, true);
  Router<double> router(
      {.clusters = k,
       .dim = d,
       .router = {.decay = 0.3, .average = Average::batch_mean, .renormalise = renormalise, .dead_share = 0}});
  router.step(random_rows<double>(200, d, 11));
  for (int t = 1; t <= 6; ++t) {
    const RowMatrix<double> rows = random_rows<double>(90, d, 20 + static_cast<std::uint64_t>(t));
    auto labels = router.assign(rows);
    for (std::int32_t& label : labels)
      if (label == t % 4) label = -1;  // one cluster gets nothing, and stays to the bit
    const double keep = t == 1 ? 2.0 / 11 : t == 2 ? 3.0 / 12 : 0.3;
    const RowMatrix<double> before = router.copy();
    RowMatrix<double> expected = before;
    for (Index c = 0; c < k; ++c) {
      double count = 0;
      Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(d);
      for (Index i = 0; i < rows.rows(); ++i)
        if (labels[static_cast<std::size_t>(i)] == c) count += 1, sum += rows.row(i);
      if (count > 0) expected.row(c) = keep * before.row(c) + (1 - keep) * sum / count;
      if (count > 0 && renormalise) expected.row(c) *= std::sqrt(5.0) / expected.row(c).norm();
    }
    router.step(rows, labels);
    REQUIRE((router.copy() - expected).cwiseAbs().maxCoeff() < 1e-12);
    REQUIRE(same_bits<double>(router.kmeans.centroids().rows(t % 4, 1), view(before).rows(t % 4, 1)));
    REQUIRE(same_bits(router.kmeans.sums(), std::span<const double>(router.kmeans.centroids().data(), 20)));
  }
}

TEST_CASE("batches weigh by their rows, or the same") {
  // The centroid at (1, 0, 0) of weight 10; then a batch of 90 rows at (0, 1, 0), with l = 0.5.
  const auto after = [](Average average) {
    Router<double> router({.clusters = 1, .dim = 3, .router = {.decay = 0.5, .average = average}});
    RowMatrix<double> start(1, 3), rows = RowMatrix<double>::Zero(90, 3);
    start << 1, 0, 0;
    rows.col(1).setOnes();
    router.kmeans.set_centroids(start, std::vector<double>{10}, 1000);
    router.step(rows);
    return router.copy();
  };
  REQUIRE(after(Average::counts_and_sums)(0, 1) == Approx(0.9));
  REQUIRE(after(Average::batch_mean)(0, 1) == Approx(0.5));
}

TEMPLATE_TEST_CASE("T9: centroids have norm sqrt(dim) where that is asked for, and the nearest is by the cosine", "",
                   float, double) {
  const Index k = 3, d = 16;
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  const RowMatrix<TestType> directions = random_rows<TestType>(k, d, 3);
  RowMatrix<TestType> rows = blob_rows<TestType>(600, directions, {0, 1, 2}, 0.05, 4);
  const RowMatrix<TestType> broad = blob_rows<TestType>(600, directions, {0}, 0.9, 5);
  for (Index i = 0; i < 600; i += 3) rows.row(i) = broad.row(i);  // one blob is broad: its mean is short
  int differ = 0;
  for (const bool renormalise : {true, false}) {
    Router<TestType> router({.clusters = k, .dim = d, .router = {.average = average, .renormalise = renormalise}});
    for (int t = 0; t < 5; ++t) {
      router.step(rows);
      double shortest = 1e9;
      for (Index c = 0; c < k; ++c) {
        if (renormalise) REQUIRE(router.norm(c) == Approx(4).epsilon(1e-6));
        shortest = std::min(shortest, router.norm(c));
      }
      if (!renormalise) REQUIRE(shortest < 3.6);
    }
    const RowMatrix<TestType> probes = random_rows<TestType>(500, d, 6);
    const auto labels = router.assign(probes);
    const RowMatrix<TestType> unit = router.copy().rowwise().normalized();
    for (Index i = 0; i < 500; ++i) {
      const RowMatrix<TestType> cosines = probes.row(i) * unit.transpose();
      const TestType chosen = cosines(0, labels[static_cast<std::size_t>(i)]);
      if (renormalise) REQUIRE(chosen >= cosines.maxCoeff() - TestType(1e-4));
      differ += !renormalise && chosen < cosines.maxCoeff() - TestType(1e-4);
    }
  }
  REQUIRE(differ > 0);
}

TEST_CASE("T9: renormalised counts and sums keep the means' directions") {
  const RowMatrix<double> rows = random_rows<double>(300, 8, 3);
  Router<double> plain(Router<double>({.clusters = 1, .dim = 8})),
      scaled({.clusters = 1, .dim = 8, .router = {.renormalise = true}});
  for (int t = 0; t < 4; ++t) {
    plain.step(rows.middleRows(t * 60, 60)), scaled.step(rows.middleRows(t * 60, 60));
    REQUIRE(same_bits(plain.kmeans.sums(), scaled.kmeans.sums()));
    REQUIRE((scaled.copy().normalized() - plain.copy().normalized()).norm() < 1e-12);
  }
}

TEST_CASE("T9: a centroid of length zero stays zero") {
  Router<double> router({.clusters = 1, .dim = 4, .router = {.decay = 0, .renormalise = true}});
  RowMatrix<double> rows(2, 4);
  rows << 1, -1, 1, -1, -1, 1, -1, 1;
  for (int t = 0; t < 3; ++t) router.step(rows);
  REQUIRE(router.copy().norm() == 0);
}

TEST_CASE("T22: averages are kept in double, so that small steps add up in float") {
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  Router<float> router({.clusters = 1, .dim = 4, .router = {.decay = 0.9999, .average = average}});
  const RowMatrix<float> start = RowMatrix<float>::Ones(1, 4), rows = RowMatrix<float>::Constant(1, 4, 1.0001f);
  router.kmeans.set_centroids(start, std::vector<double>{1}, 100000);
  // A step is 1e-8, a sixth of what moves a float of 1.
  for (int t = 0; t < 5000; ++t) router.step(rows, {0});
  const double expected = (1 - std::pow(0.9999, 5000)) * (static_cast<double>(1.0001f) - 1);
  REQUIRE(static_cast<double>(router.copy()(0, 0)) - 1 == Approx(expected).margin(7e-8));
}

TEMPLATE_TEST_CASE("T6: restored state of every setting goes on as if it had not stopped", "", float, double) {
  const Index k = 6, d = 8;
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  const bool renormalise = GENERATE(false, true);
  const KMeansConfig config{
      .clusters = k,
      .dim = d,
      .router = {.decay = 0.8, .average = average, .renormalise = renormalise, .dead_share = 0.5, .split_share = 1.1}};
  const auto batch = [&](std::uint64_t t) { return random_rows<TestType>(40, d, t); };
  Router<TestType> a(config);
  for (std::uint64_t t = 0; t < 20; ++t) {
    Router<TestType> b(config);
    b.kmeans.restore(a.kmeans.centroids(), a.kmeans.counts(), a.kmeans.sums(), a.kmeans.updates());
    REQUIRE(same_state(a.kmeans, b.kmeans));
    a.step(batch(t)), b.step(batch(t));
    REQUIRE(same_state(a.kmeans, b.kmeans));
  }
}

TEST_CASE("without a sample the first update averages, and clusters without rows stay") {
  const Average average = GENERATE(Average::counts_and_sums, Average::batch_mean);
  Router<double> router({.clusters = 3, .dim = 4, .router = {.average = average}});
  const RowMatrix<double> before = router.copy(), rows = random_rows<double>(5, 4, 2);
  router.kmeans.observe(rows, std::vector<std::int32_t>(5, 1), router.statistics, 0, router.context);
  router.statistics.sample_counts()[0] = 0;
  router.kmeans.update(router.statistics, 0);
  // l = 1/10, of a past without weight or of the random direction
  const Eigen::RowVectorXd mean = rows.colwise().mean();
  const Eigen::RowVectorXd expected =
      average == Average::batch_mean ? Eigen::RowVectorXd(0.1 * before.row(1) + 0.9 * mean) : mean;
  REQUIRE((router.copy().row(1) - expected).norm() < 1e-12);
  for (const Index c : {0, 2}) {
    REQUIRE(same_bits<double>(router.kmeans.centroids().rows(c, 1), view(before).rows(c, 1)));
    REQUIRE(router.count(c) == Approx(1.5));
  }
}
