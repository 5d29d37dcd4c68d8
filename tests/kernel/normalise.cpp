#include "coterie/kernel/normalise.hpp"

#include <cstring>
#include <random>

#include "catch.hpp"

using namespace coterie;

namespace {

template <class T>
RowMatrix<T> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  RowMatrix<T> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(static_cast<double>(engine() >> 11) * 0x1p-52 - 1);
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("every segment of a row gets mean 0 and variance 1", "", float, double) {
  const double tolerance = sizeof(TestType) == 4 ? 2e-6 : 1e-14;
  Context context;
  for (const Index width : {1, 2, 3, 5, 8, 13, 24, 64, 67}) {
    RowMatrix<TestType> x = random_matrix<TestType>(5, 3 * width, 1);
    x.row(2).setConstant(TestType(0.375));
    RowMatrix<TestType> y(5, 3 * width), inverse(5, 3);
    normalise_rows(x, view(y), view(inverse), width, context);
    for (Index i = 0; i < 5; ++i)
      for (Index s = 0; s < 3; ++s) {
        const Eigen::RowVectorXd row = x.row(i).segment(s * width, width).template cast<double>();
        const double mean = row.mean(), variance = (row.array() - mean).square().mean();
        const Eigen::RowVectorXd expected = (row.array() - mean) / std::sqrt(variance + 1e-6);
        const double error =
            (y.row(i).segment(s * width, width).template cast<double>() - expected).cwiseAbs().maxCoeff();
        REQUIRE(error <= tolerance * std::sqrt(static_cast<double>(width)));
        REQUIRE(static_cast<double>(inverse(i, s)) == Approx(1 / std::sqrt(variance + 1e-6)).epsilon(10 * tolerance));
        if (i == 2) REQUIRE(y.row(i).segment(s * width, width).cwiseAbs().maxCoeff() <= TestType(1e-4));
      }
  }
}

TEMPLATE_TEST_CASE("a row's bits depend on that row alone", "", float, double) {
  const Index n = 600, width = 20;
  const RowMatrix<TestType> x = random_matrix<TestType>(n, 2 * width, 2);
  Context context;
  RowMatrix<TestType> y(n, 2 * width), inverse(n, 2);
  normalise_rows(x, view(y), view(inverse), width, context);
  const auto same = [&](const auto& a, const auto& b) {
    for (Index i = 0; i < a.rows(); ++i)
      if (std::memcmp(a.row(i).data(), b.row(i).data(), static_cast<std::size_t>(a.cols()) * sizeof(TestType)) != 0)
        return false;
    return true;
  };
  for (const Index workers : {2, 3, 8}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context threaded(pool, workspace);
    RowMatrix<TestType> z(n, 2 * width);
    normalise_rows(x, view(z), {}, width, threaded);
    REQUIRE(same(y, z));
  }
  // One row and one segment alone, unaligned, among NaN; then in place.
  RowMatrix<TestType> wide = RowMatrix<TestType>::Constant(3, width + 9, std::numeric_limits<TestType>::quiet_NaN());
  wide.block(1, 5, 1, width) = x.block(411, width, 1, width);
  RowMatrix<TestType> z(1, width);
  normalise_rows(wide.block(1, 5, 1, width), view(z), {}, width, context);
  REQUIRE(same(z, y.block(411, width, 1, width)));
  RowMatrix<TestType> in_place = x;
  normalise_rows(in_place, view(in_place), {}, width, context);
  REQUIRE(same(in_place, y));
}

TEST_CASE("the gradient agrees with central differences and adds") {
  Context context;
  for (const Index width : {3, 4, 11, 16}) {
    RowMatrix<double> x = random_matrix<double>(4, 2 * width, 3);
    x.row(3) *= 1e-3;  // a variance of the size of epsilon
    const RowMatrix<double> d_y = random_matrix<double>(4, 2 * width, 4);
    RowMatrix<double> y(4, 2 * width), inverse(4, 2);
    normalise_rows(x, view(y), view(inverse), width, context);
    const RowMatrix<double> before = random_matrix<double>(4, 2 * width, 5);
    RowMatrix<double> d_x = before;
    normalise_rows_backward(y, inverse, d_y, view(d_x), width, context);
    const auto loss = [&] {
      RowMatrix<double> out(4, 2 * width);
      normalise_rows(x, view(out), {}, width, context);
      return (out.array() * d_y.array()).sum();
    };
    for (Index i = 0; i < 4; ++i)
      for (Index j = 0; j < 2 * width; ++j) {
        const double kept = x(i, j), step = i == 3 ? 1e-7 : 1e-5;
        x(i, j) = kept + step;
        const double above = loss();
        x(i, j) = kept - step;
        const double below = loss();
        x(i, j) = kept;
        const double expected = (above - below) / (2 * step);
        REQUIRE(d_x(i, j) - before(i, j) == Approx(expected).epsilon(1e-5).margin(i == 3 ? 1e-4 : 1e-7));
      }
  }
}

TEST_CASE("wrong shapes and overlaps throw, and nothing is written") {
  Context context;
  const RowMatrix<float> x = random_matrix<float>(4, 12, 6);
  RowMatrix<float> y = RowMatrix<float>::Constant(4, 12, 7), narrow(4, 11),
                   inverse = RowMatrix<float>::Constant(4, 3, 7);
  RowMatrix<float> wrong(4, 2), d_x = RowMatrix<float>::Constant(4, 12, 7);
  REQUIRE_THROWS_AS(normalise_rows(x, view(y), {}, 5, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows(x, view(y), {}, 0, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows(x, view(narrow), {}, 4, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows(x, view(y), view(wrong), 4, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows(y.topRows(3), View<float>(view(y)).rows(1, 3), {}, 4, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows_backward(x, wrong, x, view(d_x), 4, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows_backward(x, inverse, narrow, view(d_x), 4, context), ShapeError);
  REQUIRE_THROWS_AS(normalise_rows_backward(x, inverse, d_x, view(d_x), 4, context), ShapeError);
  REQUIRE((y.array() == 7).all());
  REQUIRE((d_x.array() == 7).all());
}
