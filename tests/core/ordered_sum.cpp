#include "coterie/core/ordered_sum.hpp"

#include "catch.hpp"

using namespace coterie;

TEST_CASE("a striped sum has every term once, at every length") {
  for (Index count = 0; count <= 40; ++count) {
    std::vector<int> used(static_cast<std::size_t>(count), 0);
    const double sum = detail::striped_sum<double>(count, [&](Index i) {
      ++used[static_cast<std::size_t>(i)];
      return static_cast<double>(i + 1);
    });
    REQUIRE(sum == static_cast<double>(count * (count + 1) / 2));
    for (const int times : used) REQUIRE(times == 1);
  }
}

TEST_CASE("a striped sum runs in its stated order") {
  // Eight partial sums, added as ((0+4)+(2+6)) + ((1+5)+(3+7)): 1 is lost beside 1e8 in float only where they meet first.
  const auto sum = [](std::vector<float> x) {
    return detail::striped_sum<float>(static_cast<Index>(x.size()),
                                      [&](Index i) { return x[static_cast<std::size_t>(i)]; });
  };
  std::vector<float> x(16, 0.f);
  x[0] = 1e8f, x[8] = -1e8f, x[1] = 1.f;
  REQUIRE(sum(x) == 1.f);
  x[1] = 0.f, x[4] = 1.f;
  REQUIRE(sum(x) == 1.f);
  x[8] = 0.f, x[6] = -1e8f;
  REQUIRE(sum(x) == 0.f);
}
