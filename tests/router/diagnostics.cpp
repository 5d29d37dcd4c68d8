#include "coterie/router/diagnostics.hpp"

#include "catch.hpp"
#include "router.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

TEST_CASE("load tells evenness, the fullest and the empty clusters") {
  const RouterLoad even = router_load(std::vector<double>{5, 5, 5, 5});
  REQUIRE(even.perplexity == Approx(4));
  REQUIRE(even.entropy == Approx(std::log(4.0)));
  REQUIRE(even.largest == Approx(0.25));
  REQUIRE(even.empty == 0);
  REQUIRE(even.rows == 20);
  const RouterLoad skewed = router_load(std::vector<double>{3, 1, 0, 0});
  REQUIRE(skewed.perplexity == Approx(std::exp(-0.75 * std::log(0.75) - 0.25 * std::log(0.25))));
  REQUIRE(skewed.entropy == Approx(std::log(skewed.perplexity)));
  REQUIRE(skewed.largest == Approx(0.75));
  REQUIRE(skewed.empty == 2);
  const RouterLoad one = router_load(std::vector<double>{0, 7});
  REQUIRE(one.perplexity == Approx(1));
  REQUIRE(one.entropy == Approx(0).margin(1e-15));
  const RouterLoad none = router_load(std::vector<double>{0, 0});
  REQUIRE(none.perplexity == 0);
  REQUIRE(none.entropy == 0);
  REQUIRE(none.empty == 2);
}

TEMPLATE_TEST_CASE("drift tells distances, angles and who moved", "", float, double) {
  RowMatrix<TestType> before(4, 4), after(4, 4);
  before << 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0;
  after << 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 4, 0, 0, 0, 0, 0;
  const RouterDrift drift = router_drift(before, after);
  REQUIRE(drift.moved == 2);
  REQUIRE(drift.largest_distance == Approx(std::sqrt(2.0) / 2));
  REQUIRE(drift.mean_distance == Approx((std::sqrt(2.0) / 2 + 0.5) / 4));
  REQUIRE(drift.largest_angle == Approx(std::asin(1.0)));
  REQUIRE(drift.mean_angle == Approx(std::asin(1.0) / 4));
  REQUIRE(router_drift(before, after, 0.6).moved == 1);
  REQUIRE(router_drift(before, after, 0.8).moved == 0);
  RowMatrix<TestType> opposite = -before;
  opposite(3, 2) = 1;  // from zero: at a right angle
  REQUIRE(router_drift(before, opposite).largest_angle == Approx(2 * std::asin(1.0)));
  REQUIRE(router_drift(before, opposite).mean_angle == Approx(7.0 / 4 * std::asin(1.0)));
  const RouterDrift none = router_drift(before, before);
  REQUIRE((none.moved == 0 && none.largest_distance == 0 && none.largest_angle == 0 && none.mean_angle == 0));
  REQUIRE_THROWS_AS(router_drift(before, before.topRows(3)), ShapeError);
  REQUIRE(router_drift(before.topRows(0), before.topRows(0)).mean_angle == 0);
}

TEST_CASE("small angles are exact") {
  RowMatrix<double> before(1, 3), after(1, 3);
  before << 1, 0, 0;
  after << std::cos(1e-9), std::sin(1e-9), 0;
  REQUIRE(router_drift(before, after).largest_angle == Approx(1e-9).epsilon(1e-6));
}

TEST_CASE("drift of an update is that of the clusters that got rows") {
  Router<float> router(5, 8);
  const RowMatrix<float> rows = random_rows<float>(200, 8, 3);
  router.step(rows);
  const RowMatrix<float> before = router.copy();
  router.step(rows.topRows(2), {1, 3});
  const RouterDrift drift = router_drift(before, router.kmeans.centroids());
  REQUIRE(drift.moved == 2);
  REQUIRE((drift.largest_angle > 0 && drift.largest_angle >= drift.mean_angle));
}
