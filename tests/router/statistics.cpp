#include "coterie/router/statistics.hpp"

#include <set>

#include "catch.hpp"
#include "coterie/router/kmeans.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

TEST_CASE("the block is one piece, head by head, counts before sums") {
  const Index heads = 3, k = 4, d = 5;
  RouterStatistics<float> statistics(heads, k, d);
  REQUIRE(static_cast<Index>(statistics.block().size()) == heads * k * (1 + d));
  for (std::size_t i = 0; i < statistics.block().size(); ++i) statistics.block()[i] = static_cast<double>(i);
  for (Index h = 0; h < heads; ++h) {
    REQUIRE(statistics.counts(h).data() == statistics.block().data() + h * k * (1 + d));
    REQUIRE(statistics.sums(h).data() == statistics.counts(h).data() + k);
    REQUIRE(static_cast<Index>(statistics.counts(h).size()) == k);
    REQUIRE(static_cast<Index>(statistics.sums(h).size()) == k * d);
  }
  statistics.clear();
  for (const double value : statistics.block()) REQUIRE(value == 0);
  REQUIRE(statistics.sample_limit() == 2048);
  REQUIRE(RouterStatistics<float>(1, 1000, 3).sample_limit() == 8000);
  REQUIRE_THROWS_AS(RouterStatistics<float>(1, 0, 3), ValueError);
  REQUIRE_THROWS_AS(RouterStatistics<float>(-1, 2, 3), ValueError);
  REQUIRE_THROWS_AS(RouterStatistics<float>(1, 2, 0), ValueError);
  REQUIRE_THROWS_AS(RouterStatistics<float>(1, 2, 3, -1), ValueError);
}

TEST_CASE("observing adds every row to its cluster of its head only") {
  const Index n = 70, k = 4, d = 21;
  const OnlineKMeans<float> kmeans({.clusters = k, .dim = d});
  const RowMatrix<float> rows = random_rows<float>(n, d, 3);
  std::vector<std::int32_t> labels;
  for (Index i = 0; i < n; ++i) labels.push_back(static_cast<std::int32_t>((i * i) % 3));
  RouterStatistics<float> statistics(3, k, d);
  Context context;
  kmeans.observe(rows, labels, statistics, 1, context);
  RowMatrix<double> sums = RowMatrix<double>::Zero(k, d);
  std::vector<double> counts(static_cast<std::size_t>(k), 0.0);
  for (Index i = 0; i < n; ++i) {
    const std::int32_t c = labels[static_cast<std::size_t>(i)];
    counts[static_cast<std::size_t>(c)] += 1;
    sums.row(c) += rows.row(i).cast<double>();
  }
  REQUIRE(same_bits(statistics.counts(1), counts));
  REQUIRE(same_bits(statistics.sums(1), std::span<const double>(sums.data(), static_cast<std::size_t>(sums.size()))));
  for (const Index head : {0, 2}) {
    for (const double value : statistics.counts(head)) REQUIRE(value == 0);
    for (const double value : statistics.sums(head)) REQUIRE(value == 0);
    REQUIRE(statistics.samples(head).rows() == 0);
  }
}

TEST_CASE("micro-batches one after the other equal the whole batch, bit for bit") {
  const Index n = 1200, k = 5, d = 12;
  const OnlineKMeans<float> kmeans({.clusters = k, .dim = d});
  const RowMatrix<float> rows = random_rows<float>(n, d, 6);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
  Context context;
  kmeans.assign(rows, labels, context);
  RouterStatistics<float> whole(1, k, d, 200), halves(1, k, d, 200);
  kmeans.observe(rows, labels, whole, 0, context);
  const std::span<const std::int32_t> all(labels);
  kmeans.observe(rows.topRows(700), all.first(700), halves, 0, context);
  kmeans.observe(rows.bottomRows(500), all.last(500), halves, 0, context);
  REQUIRE(same_bits(whole.block(), halves.block()));
  REQUIRE(same_bits<float>(whole.samples(0), halves.samples(0)));
}

TEST_CASE("T7: machines that add blocks and share a sample move to the same centroids") {
  const Index n = 400, k = 6, d = 9;
  const KMeansConfig config = GENERATE_COPY(
      KMeansConfig{.clusters = k, .dim = d},
      KMeansConfig{
          .clusters = k, .dim = d, .router = {.average = Average::batch_mean, .renormalise = true, .dead_share = 0.8}},
      KMeansConfig{.clusters = k, .dim = d, .router = {.decay = 0.5, .dead_share = 0.8, .split_share = 1.05}});
  OnlineKMeans<double> one(config), two(config), whole(config);
  RouterStatistics<double> first(1, k, d), second(1, k, d), all(1, k, d);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
  Context context;
  for (std::uint64_t t = 0; t < 10; ++t) {
    const RowMatrix<double> rows = random_rows<double>(n, d, 40 + t);
    one.assign(rows, labels, context);
    const std::span<const std::int32_t> spans(labels);
    one.observe(rows.topRows(150), spans.first(150), first, 0, context);
    two.observe(rows.bottomRows(250), spans.last(250), second, 0, context);
    whole.observe(rows, labels, all, 0, context);
    std::vector<double> sum(first.block().begin(), first.block().end());
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += second.block()[i];
    for (RouterStatistics<double>* statistics : {&first, &second}) {
      std::copy(sum.begin(), sum.end(), statistics->block().begin());
      std::copy(first.sample_block().begin(), first.sample_block().end(), statistics->sample_block().begin());
      std::copy(first.sample_counts().begin(), first.sample_counts().end(), statistics->sample_counts().begin());
    }
    for (std::size_t i = 0; i < sum.size(); ++i) REQUIRE(sum[i] == Approx(all.block()[i]).margin(1e-10));
    one.update(first, 0);
    two.update(second, 0);
    REQUIRE(one.updates() == static_cast<Index>(t) + 1);
    REQUIRE(same_bits(one.counts(), two.counts()));
    REQUIRE(same_bits(one.sums(), two.sums()));
    REQUIRE(same_bits<double>(one.centroids(), two.centroids()));
    for (RouterStatistics<double>* statistics : {&first, &second, &all}) statistics->clear();
  }
}

TEST_CASE("the sample is bounded, fair and repeatable") {
  const Index n = 600, d = 3, limit = 60;
  const OnlineKMeans<double> kmeans({.clusters = 2, .dim = d, .seed = 4});
  RowMatrix<double> rows(n, d);
  for (Index i = 0; i < n; ++i) rows.row(i) << static_cast<double>(i), 0, 1;
  const std::vector<std::int32_t> labels(static_cast<std::size_t>(n), 0);
  RouterStatistics<double> a(2, 2, d, limit), b(2, 2, d, limit);
  kmeans.observe(rows.topRows(limit), std::span(labels).first(static_cast<std::size_t>(limit)), a, 1);
  REQUIRE(same_bits<double>(a.samples(1), rows.topRows(limit)));  // few rows: all of them
  a.clear();
  REQUIRE(a.samples(1).rows() == 0);

  kmeans.observe(rows, labels, a, 1);
  kmeans.observe(rows, labels, b, 1);
  REQUIRE(a.samples(1).rows() == limit);
  REQUIRE(same_bits<double>(a.samples(1), b.samples(1)));
  std::set<double> different;
  for (Index i = 0; i < limit; ++i) different.insert(a.samples(1)(i, 0));
  REQUIRE(static_cast<Index>(different.size()) == limit);

  // Over 400 seeds every third of the batch is drawn equally often: 8000 expected, standard deviation below 80.
  std::vector<int> thirds(3, 0);
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    const OnlineKMeans<double> seeded({.clusters = 2, .dim = d, .seed = seed});
    a.clear();
    seeded.observe(rows, labels, a, 1);
    for (Index i = 0; i < limit; ++i) ++thirds[static_cast<std::size_t>(a.samples(1)(i, 0) / 200)];
  }
  for (const int count : thirds) REQUIRE(std::abs(count - 8000) < 320);
}
