#include "coterie/router/seeding.hpp"

#include <set>

#include "catch.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

TEST_CASE("random directions are normalised, reproducible and different") {
  RowMatrix<double> a(40, 7), b(40, 7), c(40, 7);
  detail::random_directions<double>(view(a), 5);
  detail::random_directions<double>(view(b), 5);
  detail::random_directions<double>(view(c), 6);
  REQUIRE(same_bits<double>(a, b));
  REQUIRE_FALSE(same_bits<double>(a, c));
  for (Index i = 0; i < a.rows(); ++i) {
    REQUIRE(a.row(i).sum() == Approx(0).margin(1e-12));
    REQUIRE(a.row(i).squaredNorm() == Approx(7));
    for (Index j = 0; j < i; ++j) REQUIRE((a.row(i) - a.row(j)).norm() > 1e-3);
  }
}

TEMPLATE_TEST_CASE("k-means++ takes one row of every separate blob", "", float, double) {
  const Index k = 12;
  const RowMatrix<TestType> directions = random_rows<TestType>(k, 16, 1);
  std::vector<Index> blobs;
  for (Index b = 0; b < k; ++b) blobs.insert(blobs.end(), static_cast<std::size_t>(1 + b), b);  // sizes 1 to 12
  const RowMatrix<TestType> rows = blob_rows<TestType>(780, directions, blobs, 0.05, 2);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    RowMatrix<TestType> centroids = RowMatrix<TestType>::Zero(k, 16), again = centroids;
    detail::SeedingScratch<TestType> scratch;
    REQUIRE(detail::seed_centroids<TestType>(rows, view(centroids), seed, scratch) == k);
    REQUIRE(detail::seed_centroids<TestType>(rows, view(again), seed, scratch) == k);
    REQUIRE(same_bits<TestType>(centroids, again));
    std::set<Index> found;
    for (Index c = 0; c < k; ++c) {
      Index nearest = 0;
      (directions * centroids.row(c).transpose()).maxCoeff(&nearest);
      found.insert(nearest);
    }
    REQUIRE(static_cast<Index>(found.size()) == k);
  }
}

TEST_CASE("k-means++ stops when there are no more different rows") {
  RowMatrix<float> rows(6, 4);
  for (Index i = 0; i < 6; ++i) rows.row(i) << 1.f, -1.f, float(i % 2), -float(i % 2);
  RowMatrix<float> centroids = RowMatrix<float>::Constant(5, 4, 9.f);
  detail::SeedingScratch<float> scratch;
  REQUIRE(detail::seed_centroids<float>(rows, view(centroids), 3, scratch) == 2);
  REQUIRE(centroids.row(0) != centroids.row(1));
  REQUIRE((centroids.bottomRows(3).array() == 9.f).all());
  REQUIRE(detail::seed_centroids<float>(rows.topRows(0), view(centroids), 3, scratch) == 0);
}

TEST_CASE("a Lloyd step moves centroids to the means of their rows") {
  RowMatrix<double> rows(4, 2), centroids(3, 2);
  rows << 1, 0, 3, 0, 0, 2, 0, 4;
  centroids << 1, 0, 0, 1, -1, -1;
  std::vector<double> counts(3, 7.0), sums(6, 7.0);
  detail::lloyd_step<double>(rows, view(centroids), counts, sums);
  REQUIRE(counts == std::vector<double>{2, 2, 0});
  REQUIRE(sums == std::vector<double>{4, 0, 0, 6, 0, 0});
  REQUIRE(centroids == (RowMatrix<double>(3, 2) << 2, 0, 0, 3, -1, -1).finished());
}
