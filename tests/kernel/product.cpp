#include "coterie/kernel/product.hpp"
#include "coterie/kernel/nearest.hpp"

#include <array>
#include <cstring>

#include "attention/setup.hpp"
#include "catch.hpp"
#include "errors.hpp"

using namespace test;

namespace {

// Tokens, in, out: few rows, ends inside vectors, panels and strips, more than a block of each, several chunks of
// tokens; few rows and several chunks of columns.
constexpr Index sizes[][3] = {{0, 3, 4},      {3, 0, 4},     {3, 4, 0},       {1, 1, 1},     {1, 64, 17},
                              {6, 40, 100},   {7, 5, 3},     {97, 33, 64},    {200, 70, 49}, {300, 128, 80},
                              {193, 270, 9},  {65, 11, 517}, {200, 300, 530}, {2100, 9, 21}, {1, 20, 600},
                              {1, 700, 1001}, {5, 700, 600}};

template <class T>
double allowed(Index terms) {
  return double(std::numeric_limits<T>::epsilon()) * 2 * double(terms);
}

}  // namespace

TEMPLATE_TEST_CASE("product and its gradients: as plain sums in double, on every instruction set", "", float, double) {
  using T = TestType;
  for (const auto& [n, in, out] : sizes)
    for (InstructionSet set : instruction_sets()) {
      Random random(1);
      Context context(set);
      const RowMatrix<T> x = random.matrix<T>(n, in), w = random.matrix<T>(in, out), d_y = random.matrix<T>(n, out);
      const RowMatrix<double> exact_y = x.template cast<double>() * w.template cast<double>();
      const RowMatrix<double> exact_d_x = d_y.template cast<double>() * w.template cast<double>().transpose();
      const RowMatrix<double> exact_d_w = x.template cast<double>().transpose() * d_y.template cast<double>();
      INFO(n << " x " << in << " x " << out << ", set " << int(set));
      RowMatrix<T> y = RowMatrix<T>::Constant(n, out, 3), d_x = RowMatrix<T>::Constant(n, in, 3),
                   d_w = RowMatrix<T>::Constant(in, out, 3);
      product<T>(x, w, y, context);
      CHECK(largest_difference(y, exact_y) <= allowed<T>(in));
      product<T>(x, w, y, context, true);
      CHECK(largest_difference(y, (2 * exact_y).eval()) <= allowed<T>(4 * in));
      product_input_gradient<T>(d_y, w, d_x, context);
      CHECK(largest_difference(d_x, exact_d_x) <= allowed<T>(out));
      product_input_gradient<T>(d_y, w, d_x, context, true);
      CHECK(largest_difference(d_x, (2 * exact_d_x).eval()) <= allowed<T>(4 * out));
      product_weight_gradient<T>(x, d_y, d_w, context);
      CHECK(largest_difference(d_w, (exact_d_w.array() + 3).matrix().eval()) <= allowed<T>(n + 3));
    }
}

TEST_CASE("product: a row's bits depend on that row alone; any number of workers gives the same bits") {
  Random random(2);
  const RowMatrix<float> x = random.matrix<float>(260, 37), w = random.matrix<float>(37, 45),
                         d_y = random.matrix<float>(260, 45);
  for (InstructionSet set : instruction_sets()) {
    Context serial(set);
    RowMatrix<float> y(260, 45), d_w = RowMatrix<float>::Zero(37, 45);
    product<float>(x, w, y, serial);
    product_weight_gradient<float>(x, d_y, d_w, serial);
    const RowMatrix<float> wide = random.matrix<float>(37, 560), before = random.matrix<float>(260, 560);
    for (const RowMatrix<float>* m : {&w, &wide})
      for (bool add : {false, true}) {
        RowMatrix<float> all = before.leftCols(m->cols());
        product<float>(x, *m, all, serial, add);
        for (Index first : {0, 1, 95, 96, 251})
          for (Index rows : {1, 2, 6, 7, 9}) {  // few of them read w in place
            RowMatrix<float> some = before.block(first, 0, rows, m->cols());
            product<float>(x.middleRows(first, rows), *m, some, serial, add);
            CHECK(some == all.middleRows(first, rows));
          }
      }
    for (Index workers : {2, 3, 8}) {
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace, set);
      RowMatrix<float> other(260, 45), other_d_w = RowMatrix<float>::Zero(37, 45);
      product<float>(x, w, other, context);
      product_weight_gradient<float>(x, d_y, other_d_w, context);
      CHECK(other == y);
      CHECK(other_d_w == d_w);
    }
  }
}

TEST_CASE("product: few rows are cut by columns, with the same bits") {
  Random random(7);
  const Index in = 700, out = 1005;
  const RowMatrix<float> x = random.matrix<float>(40, in), w = random.matrix<float>(in, out),
                         before = random.matrix<float>(40, out);
  for (InstructionSet set : instruction_sets()) {
    REQUIRE(out > 2 * detail::in_place_columns(in, detail::panel_width<float>(set)));
    for (bool add : {false, true}) {
      Context serial(set);
      RowMatrix<float> all = before;
      product<float>(x, w, all, serial, add);
      for (Index workers : {1, 2, 3}) {
        ThreadPool pool(workers);
        Workspace workspace;
        Context context(pool, workspace, set);
        for (Index rows : {1, 2, 6}) {
          RowMatrix<float> some = before.middleRows(3, rows);
          product<float>(x.middleRows(3, rows), w, some, context, add);
          CHECK(some == all.middleRows(3, rows));
        }
      }
    }
  }
}

TEST_CASE("product_weight_gradient: chunks of tokens give the same bits with any number of workers") {
  Random random(6);
  for (const auto& [n, in, out] : {std::array<Index, 3>{4100, 7, 20}, {2500, 270, 3}, {600, 265, 20}}) {
    const RowMatrix<float> x = random.matrix<float>(n, in), d_y = random.matrix<float>(n, out);
    for (InstructionSet set : instruction_sets()) {
      Context serial(set);
      RowMatrix<float> d_w = RowMatrix<float>::Constant(in, out, 2);
      product_weight_gradient<float>(x, d_y, d_w, serial);
      for (Index workers : {2, 3, 8}) {
        ThreadPool pool(workers);
        Workspace workspace;
        Context context(pool, workspace, set);
        RowMatrix<float> other = RowMatrix<float>::Constant(in, out, 2);
        product_weight_gradient<float>(x, d_y, other, context);
        CHECK(other == d_w);
      }
    }
  }
}

TEST_CASE("product: strided views, nothing written outside") {
  Random random(3);
  RowMatrix<float> x = random.matrix<float>(50, 30), w = random.matrix<float>(20, 40);
  RowMatrix<float> y = RowMatrix<float>::Constant(52, 25, 7);
  Context context;
  product<float>(x.block(0, 5, 50, 20), w.block(0, 3, 20, 19), y.block(1, 3, 50, 19), context);
  const RowMatrix<float> expected = x.block(0, 5, 50, 20) * w.block(0, 3, 20, 19);
  CHECK(largest_difference(y.block(1, 3, 50, 19).eval(), expected) < 1e-5);
  y.block(1, 3, 50, 19).setConstant(7);
  CHECK((y.array() == 7).all());
}

TEST_CASE("nearest_centroids: as plain sums, the lowest index wins ties") {
  Random random(4);
  for (InstructionSet set : instruction_sets()) {
    Context context(set);
    for (const auto& [clusters, d] : {std::array<Index, 2>{1, 7}, {2, 7}, {64, 3}, {65, 21}, {150, 16}}) {
      // Columns in the midst of wider rows.
      const RowMatrix<double> wide = random.matrix<double>(531, d + 9), centroids = random.matrix<double>(clusters, d);
      std::vector<std::int32_t> labels(531, -5);
      nearest_centroids<double>(wide.middleCols(5, d), centroids, labels, context);
      const RowMatrix<double> scores = wide.middleCols(5, d) * centroids.transpose();
      for (Index i = 0; i < 531; ++i) {
        Index best = 0;
        scores.row(i).maxCoeff(&best);
        CHECK(labels[std::size_t(i)] == best);
        std::int32_t alone = -5;
        nearest_centroids<double>(wide.block(i, 5, 1, d), centroids, {&alone, 1}, context);
        CHECK(alone == best);
      }
    }
    RowMatrix<float> same = RowMatrix<float>::Ones(70, 4);
    same.row(0) *= 0.5f;
    const RowMatrix<float> x = RowMatrix<float>::Ones(3, 4);
    std::vector<std::int32_t> labels(3);
    nearest_centroids<float>(x, same, labels, context);
    CHECK(labels == std::vector<std::int32_t>{1, 1, 1});
    // Scores that only rounding tells apart: a row alone takes the same.
    RowMatrix<float> close = random.matrix<float>(1, 33).replicate(90, 1);
    close += 1e-7f * random.matrix<float>(90, 33);
    const RowMatrix<float> rows = random.matrix<float>(100, 33);
    std::vector<std::int32_t> together(100), alone(100);
    nearest_centroids<float>(rows, close, together, context);
    for (Index i = 0; i < 100; ++i)
      nearest_centroids<float>(rows.row(i), close, std::span(alone).subspan(std::size_t(i), 1), context);
    CHECK(alone == together);
  }
}

TEST_CASE("product: wrong shapes are named, and nothing is written") {
  const RowMatrix<float> x = RowMatrix<float>::Ones(4, 3), w = RowMatrix<float>::Ones(3, 5);
  RowMatrix<float> y = RowMatrix<float>::Constant(4, 5, 7), small = RowMatrix<float>::Constant(4, 4, 7);
  RowMatrix<float> square = RowMatrix<float>::Ones(3, 3);
  std::vector<std::int32_t> labels(2, 9);
  Context context;
  const auto says = [](auto&& f, const char* text) { CHECK(contains(message_of<ShapeError>(f), text)); };
  says([&] { product<float>(x, x, y, context); }, "product: w: expected 3 x 3, got 4 x 3");
  says([&] { product<float>(x, w, small, context); }, "product: y: expected 4 x 5, got 4 x 4");
  says([&] { product<float>(square, square, square, context); }, "product: y: expected storage of its own");
  says([&] { product_input_gradient<float>(y, w, small, context); }, "d_x: expected 4 x 3, got 4 x 4");
  says([&] { product_weight_gradient<float>(x, y, small, context); }, "d_w: expected 3 x 5, got 4 x 4");
  says([&] { nearest_centroids<float>(x, square, labels, context); }, "labels: expected 4 labels, got 2");
  says([&] { nearest_centroids<float>(x, w, labels, context); }, "x: expected 4 x 5, got 4 x 3");
  CHECK((small.array() == 7).all());
  CHECK(labels == std::vector<std::int32_t>{9, 9});
}
