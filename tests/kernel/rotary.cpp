#include "coterie/kernel/rotary.hpp"

#include <cstring>
#include <limits>

#include "catch.hpp"
#include "random.hpp"

using namespace coterie;

namespace {

constexpr RotaryLayout layouts[] = {RotaryLayout::halves, RotaryLayout::interleaved};

std::vector<std::int32_t> ascending(Index n) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int32_t>(i);
  return positions;
}

}  // namespace

TEST_CASE("rotary turns the column pairs of its layout by position and frequency, within the stated error") {
  const Index d = 8, heads = 3;
  const std::vector<std::int32_t> positions = {0,      1,       2, 63, 64, 65,  127, 128, 4095, 100000,
                                               999999, 1 << 30, 5, 64, -1, -63, -64, -65, -4000};
  const auto n = static_cast<Index>(positions.size());
  const Index pairs[2][4][2] = {{{0, 4}, {1, 5}, {2, 6}, {3, 7}}, {{0, 1}, {2, 3}, {4, 5}, {6, 7}}};
  for (const RotaryLayout layout : layouts)
    for (const double base : {10000.0, 500.0}) {
      const Rotary rotary(d, base, layout);
      REQUIRE(rotary.half() == 4);
      const RowMatrix<double> x = test::Random(1).matrix<double>(n, heads * d);
      RowMatrix<double> y = x;
      Context context;
      rotary.forward<double>(y, heads, positions, context);
      for (Index i = 0; i < n; ++i)
        for (Index h = 0; h < heads; ++h)
          for (Index j = 0; j < d / 2; ++j) {
            // The angle as the frequency in double gives it, its cosine and sine in more digits.
            const long double angle =
                static_cast<long double>(positions[static_cast<std::size_t>(i)]) *
                static_cast<long double>(std::pow(base, -static_cast<double>(j) / static_cast<double>(d / 2)));
            const auto& pair = pairs[layout == RotaryLayout::interleaved][j];
            const long double u = x(i, h * d + pair[0]), v = x(i, h * d + pair[1]);
            const long double c = std::cos(angle), s = std::sin(angle);
            const double allowed = 2 * (2e-15 + 2e-16 * std::abs(static_cast<double>(angle)));
            REQUIRE(std::abs(static_cast<double>(u * c - v * s) - y(i, h * d + pair[0])) < allowed);
            REQUIRE(std::abs(static_cast<double>(v * c + u * s) - y(i, h * d + pair[1])) < allowed);
          }
    }
}

TEMPLATE_TEST_CASE("the two layouts are one rotation under the permutation of columns", "", float, double) {
  const Index n = 150;
  for (const Index d : {6, 7, 16}) {
    // Column 2j of the interleaved one is column j of the halves, 2j + 1 is j + d/2; a last odd one keeps its place.
    std::vector<Index> from(static_cast<std::size_t>(d), d - 1);
    for (Index j = 0; j < d / 2; ++j) {
      from[static_cast<std::size_t>(2 * j)] = j;
      from[static_cast<std::size_t>(2 * j + 1)] = j + d / 2;
    }
    const auto permuted = [&](const RowMatrix<TestType>& x) {
      RowMatrix<TestType> y(n, d);
      for (Index j = 0; j < d; ++j) y.col(j) = x.col(from[static_cast<std::size_t>(j)]);
      return y;
    };
    const RowMatrix<TestType> x = test::Random(1).matrix<TestType>(n, d);
    RowMatrix<TestType> halves = x, interleaved = permuted(x);
    Context context;
    Rotary(d, 700, RotaryLayout::halves).forward<TestType>(halves, 1, ascending(n), context);
    Rotary(d, 700, RotaryLayout::interleaved).forward<TestType>(interleaved, 1, ascending(n), context);
    const double allowed = 2 * static_cast<double>(std::numeric_limits<TestType>::epsilon());
    REQUIRE((permuted(halves) - interleaved).cwiseAbs().maxCoeff() < allowed);
    REQUIRE((halves - interleaved).cwiseAbs().maxCoeff() > 0.1);
  }
}

TEST_CASE("logits of rotated queries and keys depend on their distance") {
  const RotaryLayout layout = GENERATE(RotaryLayout::halves, RotaryLayout::interleaved);
  const Rotary rotary(6, 10000, layout);
  const RowMatrix<double> q = test::Random(1).matrix<double>(1, 6), k = test::Random(2).matrix<double>(1, 6);
  Context context;
  const auto logit = [&](std::int32_t i, std::int32_t j) {
    RowMatrix<double> a = q, b = k;
    rotary.forward<double>(a, 1, {&i, 1}, context);
    rotary.forward<double>(b, 1, {&j, 1}, context);
    return a.cwiseProduct(b).sum();
  };
  REQUIRE(logit(9, 4) == Approx(logit(5, 0)).epsilon(1e-12));
  REQUIRE(logit(1009, 1004) == Approx(logit(5, 0)).epsilon(1e-11));
  REQUIRE(logit(0, 0) == Approx(q.cwiseProduct(k).sum()).epsilon(1e-14));
  REQUIRE(std::abs(logit(9, 4) - logit(4, 9)) > 1e-3);
}

TEMPLATE_TEST_CASE("rotary backward undoes forward, and the last odd column stays", "", float, double) {
  const Index n = 200, d = 7, heads = 2;
  const RotaryLayout layout = GENERATE(RotaryLayout::halves, RotaryLayout::interleaved);
  const Rotary rotary(d, 10000, layout);
  REQUIRE(rotary.half() == 3);
  const RowMatrix<TestType> x = test::Random(1).matrix<TestType>(n, heads * d),
                            g = test::Random(2).matrix<TestType>(n, heads * d);
  RowMatrix<TestType> y = x, d_x = g;
  Context context;
  rotary.forward<TestType>(y, heads, ascending(n), context);
  REQUIRE(y.col(6) == x.col(6));
  REQUIRE(y.col(13) == x.col(13));
  REQUIRE((y - x).cwiseAbs().maxCoeff() > 1);
  // <g, forward(x)> = <backward(g), x>
  rotary.backward<TestType>(d_x, heads, ascending(n), context);
  const double forward = g.template cast<double>().cwiseProduct(y.template cast<double>()).sum();
  const double backward = d_x.template cast<double>().cwiseProduct(x.template cast<double>()).sum();
  REQUIRE(forward == Approx(backward).epsilon(sizeof(TestType) == 4 ? 1e-5 : 1e-12));
  rotary.backward<TestType>(y, heads, ascending(n), context);
  REQUIRE((y - x).cwiseAbs().maxCoeff() < (sizeof(TestType) == 4 ? 1e-6 : 1e-14));
}

TEST_CASE("a rotated row's bits depend on that row and its position alone") {
  const Index n = 300, d = 10;
  const RotaryLayout layout = GENERATE(RotaryLayout::halves, RotaryLayout::interleaved);
  const Rotary rotary(d, 10000, layout);
  const RowMatrix<float> x = test::Random(1).matrix<float>(n, d);
  RowMatrix<float> all = x;
  ThreadPool pool(3);
  Workspace workspace;
  Context several(pool, workspace), one;
  rotary.forward<float>(all, 1, ascending(n), several);
  for (Index i = n - 1; i >= 0; --i) {
    RowMatrix<float> row = x.row(i);
    const auto position = static_cast<std::int32_t>(i);
    rotary.forward<float>(row, 1, {&position, 1}, one);
    REQUIRE(std::memcmp(row.data(), all.row(i).data(), sizeof(float) * static_cast<std::size_t>(d)) == 0);
  }
}

TEST_CASE("widths 0 and 1 have nothing to turn") {
  Context context;
  for (const Index d : {Index(0), Index(1)}) {
    const Rotary rotary(d);
    RowMatrix<double> x = test::Random(1).matrix<double>(5, 2 * d);
    const RowMatrix<double> before = x;
    rotary.forward<double>(x, 2, ascending(5), context);
    REQUIRE(x == before);
  }
}

TEST_CASE("rotary refuses what does not fit and leaves it alone") {
  REQUIRE_THROWS_AS(Rotary(-1), ValueError);
  REQUIRE_THROWS_AS(Rotary(4, 0), ValueError);
  REQUIRE_THROWS_AS(Rotary(4, std::nan("")), ValueError);
  REQUIRE_THROWS_AS(Rotary(4, 10000, static_cast<RotaryLayout>(2)), ValueError);
  const Rotary rotary(4);
  Context context;
  RowMatrix<double> x = test::Random(1).matrix<double>(3, 8);
  const RowMatrix<double> before = x;
  REQUIRE_THROWS_AS(rotary.forward<double>(x, 1, ascending(3), context), ShapeError);
  REQUIRE_THROWS_AS(rotary.forward<double>(x, 3, ascending(3), context), ShapeError);
  REQUIRE_THROWS_AS(rotary.forward<double>(x, 0, ascending(3), context), ShapeError);
  REQUIRE_THROWS_AS(rotary.backward<double>(x, 2, ascending(4), context), ShapeError);
  REQUIRE(x == before);
}
