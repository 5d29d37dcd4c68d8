#include "model/adamw.hpp"

#include "catch.hpp"

using namespace transformer;

TEST_CASE("the learning rate rises and then falls by a cosine") {
  REQUIRE(learning_rate_factor(0, 10, 0, 0.1) == Approx(0.1));
  REQUIRE(learning_rate_factor(9, 10, 0, 0.1) == Approx(1));
  REQUIRE(learning_rate_factor(50, 10, 0.5, 0.1) == Approx(0.55));
  REQUIRE(learning_rate_factor(99, 10, 1, 0.1) == Approx(0.1));
  REQUIRE(learning_rate_factor(0, 0, 0, 0.1) == Approx(1));
}
