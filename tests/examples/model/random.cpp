#include "model/random.hpp"

#include "catch.hpp"

using namespace transformer;

TEST_CASE("random numbers continue from a saved state, and from nothing else") {
  Random random(3), other(4);
  for (int i = 0; i < 1000; ++i) random.uniform();
  REQUIRE(other.restore(random.state()));
  for (int i = 0; i < 700; ++i) REQUIRE(random.uniform() == other.uniform());
  const std::string before = other.state();
  for (const std::string& bad : {std::string(), std::string("1 2"), before + " 7", std::string("x")})
    REQUIRE_FALSE(other.restore(bad));
  REQUIRE(other.state() == before);
}

TEST_CASE("a random number of three numbers depends on each of them, and is uniform") {
  double sum = 0;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    const double drawn = uniform_at(1, 2, i);
    REQUIRE((drawn >= 0 && drawn < 1));
    REQUIRE(drawn == uniform_at(1, 2, i));
    REQUIRE(drawn != uniform_at(1, 3, i));
    REQUIRE(drawn != uniform_at(2, 2, i));
    sum += drawn;
  }
  REQUIRE(sum / 1000 == Approx(0.5).margin(0.03));
}
