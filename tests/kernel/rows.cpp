#include "coterie/kernel/rows.hpp"

#include "catch.hpp"
#include "random.hpp"

using namespace coterie;

TEST_CASE("a bias is added to every row, and its gradient is the sum over rows") {
  for (const Index n : {Index(0), Index(1), Index(511), Index(1025), Index(40000)}) {
    Context context;
    RowMatrix<double> m = test::Random(1).matrix<double>(n, 3);
    const RowMatrix<double> before = m;
    const RowMatrix<double> bias = test::Random(2).matrix<double>(1, 3);
    detail::add_bias<double>(m, bias.data(), context);
    REQUIRE(m == before.rowwise() + bias.row(0));
    RowMatrix<double> d_bias = RowMatrix<double>::Constant(1, 3, 2);
    detail::add_bias_backward<double>(m, d_bias.data(), context);
    for (Index j = 0; j < 3; ++j) {
      double sum = 2;
      for (Index i = 0; i < n; ++i) sum += m(i, j);
      REQUIRE(d_bias(0, j) == Approx(sum).epsilon(1e-10));
    }
  }
}
