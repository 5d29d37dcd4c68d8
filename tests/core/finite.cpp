#include "coterie/core/finite.hpp"

#include <cmath>
#include <limits>

#include "catch.hpp"

using namespace coterie;

TEMPLATE_TEST_CASE("rows are finite without NaN and infinity, and only then", "", float, double) {
  using Limits = std::numeric_limits<TestType>;
  RowMatrix<TestType> rows = RowMatrix<TestType>::Zero(3, 5);
  rows.row(0) << Limits::max(), Limits::lowest(), Limits::denorm_min(), -TestType(0), 1;
  REQUIRE(detail::finite_rows<TestType>(rows));
  for (const TestType bad : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN()})
    for (Index j = 0; j < 5; ++j) {
      RowMatrix<TestType> damaged = rows;
      damaged(1, j) = bad;
      REQUIRE(detail::finite_row(damaged.row(0).data(), Index(5)));
      REQUIRE_FALSE(detail::finite_row(damaged.row(1).data(), Index(5)));
      REQUIRE_FALSE(detail::finite_rows<TestType>(damaged));
      REQUIRE(detail::finite_rows<TestType>(view(damaged).rows(2, 1)));
    }
}
