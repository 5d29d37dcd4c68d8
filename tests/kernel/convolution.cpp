#include "coterie/kernel/convolution.hpp"

#include "catch.hpp"
#include "random.hpp"

using namespace coterie;

TEST_CASE("the convolution and its gradients are their formulas, within sequences") {
  const Index n = 1300, heads = 2, d = 3, count = 4;
  test::Random random(1);
  std::vector<std::int32_t> positions;
  std::vector<Index> begins;
  for (Index begin = 0; begin < n;) {  // sequences of 1 to 9 rows, and a long one at the end
    const Index end = begin < 700 ? begin + 1 + random.below(9) : n;
    for (Index i = begin; i < end; ++i)
      positions.push_back(static_cast<std::int32_t>(i - begin)), begins.push_back(begin);
    begin = end;
  }
  const RowMatrix<double> x = random.matrix<double>(n, heads * d), taps = random.matrix<double>(heads * count, d);
  const RowMatrix<double> d_y = random.matrix<double>(n, heads * d);
  RowMatrix<double> y = RowMatrix<double>::Constant(n, heads * d, 7), d_x = y;
  RowMatrix<double> d_taps = RowMatrix<double>::Constant(heads * count, d, 0.5);
  RowMatrix<double> y_expected = RowMatrix<double>::Zero(n, heads * d), d_x_expected = y_expected,
                    d_taps_expected = d_taps;
  for (Index i = 0; i < n; ++i)
    for (Index t = 0; t < count; ++t) {
      if (i - t < begins[static_cast<std::size_t>(i)]) continue;
      for (Index h = 0; h < heads; ++h)
        for (Index j = 0; j < d; ++j) {
          y_expected(i, h * d + j) += taps(h * count + t, j) * x(i - t, h * d + j);
          d_x_expected(i - t, h * d + j) += taps(h * count + t, j) * d_y(i, h * d + j);
          d_taps_expected(h * count + t, j) += x(i - t, h * d + j) * d_y(i, h * d + j);
        }
    }
  RowMatrix<double> first_taps;
  for (const Index workers : {1, 3}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context context(pool, workspace);
    d_taps.setConstant(0.5);
    detail::convolve<double>(x, taps, count, positions, y, context);
    detail::convolve_backward<double>(x, taps, count, positions, d_y, d_x, d_taps, context);
    REQUIRE((y - y_expected).cwiseAbs().maxCoeff() < 1e-13);
    REQUIRE((d_x - d_x_expected).cwiseAbs().maxCoeff() < 1e-13);
    REQUIRE((d_taps - d_taps_expected).cwiseAbs().maxCoeff() < 1e-11);
    if (workers == 1) first_taps = d_taps;
    REQUIRE(d_taps == first_taps);
  }
}
