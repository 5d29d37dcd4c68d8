#include "coterie/core/random.hpp"

#include <set>
#include <vector>

#include "catch.hpp"

using namespace coterie;

TEST_CASE("random bits are fixed by seed, stream and counter, and differ in each") {
  // The values are part of saved behaviour: a seed gives the same model after an update of the library.
  static_assert(detail::random_bits(0, 0, 0) == 0x238275bc38fcbe91);
  static_assert(detail::random_bits(1, 2, 3) == 0x8568f7c4e53b5a35);
  REQUIRE(detail::random_normal(1, 2, 3) == Approx(1.1324423151987399));
  std::set<std::uint64_t> seen;
  for (std::uint64_t seed = 0; seed < 8; ++seed)
    for (std::uint64_t stream = 0; stream < 8; ++stream)
      for (std::uint64_t counter = 0; counter < 64; ++counter) seen.insert(detail::random_bits(seed, stream, counter));
  REQUIRE(seen.size() == 8 * 8 * 64);
}

TEST_CASE("uniform and normal numbers have their moments") {
  const int n = 200000;
  double mean = 0, square = 0, normal_mean = 0, normal_square = 0, neighbours = 0, last = 0;
  bool in_range = true;
  std::vector<int> histogram(10, 0);
  for (int i = 0; i < n; ++i) {
    const double u = detail::random_uniform(3, 1, static_cast<std::uint64_t>(i));
    const double z = detail::random_normal(3, 2, static_cast<std::uint64_t>(i));
    in_range &= u >= 0 && u < 1;
    ++histogram[static_cast<std::size_t>(detail::random_below(10, 3, 1, static_cast<std::uint64_t>(i)))];
    mean += u / n, square += u * u / n, normal_mean += z / n, normal_square += z * z / n;
    neighbours += z * last / n;
    last = z;
  }
  REQUIRE(in_range);
  // Five standard errors.
  REQUIRE(mean == Approx(0.5).margin(5 * 0.2887 / std::sqrt(n)));
  REQUIRE(square == Approx(1.0 / 3).margin(5 * 0.2981 / std::sqrt(n)));
  REQUIRE(normal_mean == Approx(0).margin(5 / std::sqrt(n)));
  REQUIRE(normal_square == Approx(1).margin(5 * 1.4142 / std::sqrt(n)));
  REQUIRE(neighbours == Approx(0).margin(5 / std::sqrt(n)));
  for (const int count : histogram) REQUIRE(std::abs(count - n / 10) < 5 * std::sqrt(n * 0.09));
}
