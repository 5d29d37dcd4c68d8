#include "coterie/router/commitment.hpp"

#include <cmath>
#include <limits>

#include "allocation.hpp"
#include "catch.hpp"
#include "gradient.hpp"
#include "router.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

TEST_CASE(
    "T18: the commitment loss is the weighted mean square of the labelled rows, and its gradient stops at the "
    "centroids") {
  const Index n = 23, d = 7, k = 4;
  RowMatrix<double> x = random_rows<double>(n, d, 1);
  const RowMatrix<double> centroids = random_rows<double>(k, d, 2);
  std::vector<std::int32_t> labels;
  for (Index i = 0; i < n; ++i) labels.push_back(static_cast<std::int32_t>(i % 5) - 1);
  Context context;
  double expected = 0;
  Index rows = 0;
  for (Index i = 0; i < n; ++i)
    if (labels[static_cast<std::size_t>(i)] >= 0)
      expected += (x.row(i) - centroids.row(labels[static_cast<std::size_t>(i)])).squaredNorm(), ++rows;
  expected *= 0.3 / static_cast<double>(rows * d);
  const RowMatrix<double> start = random_rows<double>(n, d, 3), kept = centroids;
  RowMatrix<double> d_x = start;
  REQUIRE(commitment_loss(x, labels, centroids, 0.3, view(d_x), context) == Approx(expected).epsilon(1e-13));
  REQUIRE(commitment_loss(x, labels, centroids, 0.3, context) == Approx(expected).epsilon(1e-13));
  REQUIRE(same_bits<double>(centroids, kept));
  for (Index i = 0; i < n; i += 5) REQUIRE(same_bits<double>(view(d_x).rows(i, 1), view(start).rows(i, 1)));
  const RowMatrix<double> gradient = d_x - start;
  test::require_gradient(
      view(x), gradient, [&] { return commitment_loss(x, labels, centroids, 0.3, context); }, 1e-9);
}

TEMPLATE_TEST_CASE("T18: rows without a label and rows that are not finite are left out", "", float, double) {
  const Index n = 1300, d = 11, k = 5;
  const RowMatrix<TestType> good = random_rows<TestType>(n, d, 4), centroids = random_rows<TestType>(k, d, 5);
  RowMatrix<TestType> x(n + 3, d);
  x << good, random_rows<TestType>(3, d, 6);
  x(n, 2) = std::numeric_limits<TestType>::quiet_NaN();
  x(n + 1, 0) = -std::numeric_limits<TestType>::infinity();
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n + 3), 3);
  labels.back() = -1;
  Context context;
  RowMatrix<TestType> d_x = RowMatrix<TestType>::Zero(n + 3, d), d_good = RowMatrix<TestType>::Zero(n, d);
  const double loss = commitment_loss(x, labels, centroids, 1, view(d_x), context);
  const std::span<const std::int32_t> first = std::span(labels).first(static_cast<std::size_t>(n));
  REQUIRE(loss == commitment_loss(good, first, centroids, 1, view(d_good), context));
  REQUIRE(same_bits<TestType>(view(d_x).rows(0, n), d_good));
  REQUIRE(d_x.bottomRows(3).norm() == 0);
  const std::vector<std::int32_t> none(static_cast<std::size_t>(n), -1);
  REQUIRE(commitment_loss(good, none, centroids, 1, view(d_good), context) == 0);
  REQUIRE(commitment_loss(good.topRows(0), {}, centroids, 1, context) == 0);
}

TEST_CASE("T18: the centroids are those before the update") {
  Router<double> router(4, 8);
  const RowMatrix<double> rows = random_rows<double>(100, 8, 7);
  router.step(rows);
  const RowMatrix<double> before = router.copy(), next = random_rows<double>(100, 8, 8);
  const auto labels = router.assign(next);
  const double loss = commitment_loss(next, labels, router.kmeans.centroids(), 1, router.context);
  router.step(next);
  REQUIRE(loss == commitment_loss(next, labels, before, 1, router.context));
  REQUIRE(commitment_loss(next, labels, router.kmeans.centroids(), 1, router.context) < loss);  // they went to the rows
}

TEMPLATE_TEST_CASE("T18: the commitment loss has the same bits with any number of workers, and allocates nothing", "",
                   float, double) {
  const Index n = 3001, d = 19, k = 6;
  const RowMatrix<TestType> x = random_rows<TestType>(n, d, 9), centroids = random_rows<TestType>(k, d, 10);
  std::vector<std::int32_t> labels;
  for (Index i = 0; i < n; ++i) labels.push_back(static_cast<std::int32_t>(i * i % 7) - 1);
  Context one;
  RowMatrix<TestType> expected = RowMatrix<TestType>::Ones(n, d);
  const double loss = commitment_loss(x, labels, centroids, 0.7, view(expected), one);
  for (const Index workers : {1, 2, 3, 8}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context context(pool, workspace);
    RowMatrix<TestType> d_x = RowMatrix<TestType>::Ones(n, d);
    REQUIRE(commitment_loss(x, labels, centroids, 0.7, view(d_x), context) == loss);
    REQUIRE(same_bits<TestType>(d_x, expected));
    const long before = test::allocations();
    commitment_loss(x, labels, centroids, 0.7, view(d_x), context);
    REQUIRE(test::allocations() == before);
  }
}

TEST_CASE("wrong arguments of the commitment loss throw and write nothing") {
  const RowMatrix<float> x = random_rows<float>(6, 4, 1), centroids = random_rows<float>(3, 4, 2);
  RowMatrix<float> d_x = RowMatrix<float>::Ones(6, 4), narrow(6, 3), damaged = centroids;
  damaged(1, 1) = std::nanf("");
  const std::vector<std::int32_t> good(6, 0), few(5, 0), high{0, 0, 3, 0, 0, 0}, low{0, 0, -2, 0, 0, 0};
  Context context;
  const auto call = [&](ConstView<float> rows, std::span<const std::int32_t> labels, ConstView<float> c, double weight,
                        View<float> out) { commitment_loss(rows, labels, c, weight, out, context); };
  REQUIRE_THROWS_AS(call(x.topRows(5), good, centroids, 1, view(d_x)), ShapeError);
  REQUIRE_THROWS_AS(call(x, few, centroids, 1, view(d_x)), ShapeError);
  REQUIRE_THROWS_AS(call(x, good, centroids.leftCols(3), 1, view(d_x)), ShapeError);
  REQUIRE_THROWS_AS(call(x, good, centroids, 1, view(narrow)), ShapeError);
  REQUIRE_THROWS_AS(call(d_x, good, centroids, 1, view(d_x)), ShapeError);
  REQUIRE_THROWS_AS(call(x, high, centroids, 1, view(d_x)), ValueError);
  REQUIRE_THROWS_AS(call(x, low, centroids, 1, view(d_x)), ValueError);
  REQUIRE_THROWS_AS(call(x, good, damaged, 1, view(d_x)), ValueError);
  REQUIRE_THROWS_AS(call(x, good, centroids, std::nan(""), view(d_x)), ValueError);
  REQUIRE(d_x == RowMatrix<float>::Ones(6, 4));
}
