#include "coterie/kernel/exponentials.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "attention/setup.hpp"
#include "catch.hpp"
#include "random.hpp"

using namespace coterie;
using namespace test;

TEST_CASE("exponentials: 2^(x - reference) times a factor, their sum, and nothing beyond", "[exponentials]") {
  Random random(2);
  const float nothing = -std::numeric_limits<float>::infinity();
  for (InstructionSet set : instruction_sets())
    for (const bool with_factor : {false, true})
      for (const Index count : {0, 1, 3, 15, 16, 17, 100}) {
        CAPTURE(count, with_factor, static_cast<int>(set));
        const std::size_t n = static_cast<std::size_t>(count);
        std::vector<float> x(n + 4, 7.0f), factor(n);
        for (std::size_t i = 0; i < n; ++i) {
          x[i] = static_cast<float>(random.uniform(-20, 3));
          factor[i] = static_cast<float>(random.uniform(0, 50));
        }
        if (count > 2) x[n - 1] = nothing;
        const std::vector<float> before = x;
        float sum = -1;
        detail::ExponentialsKernel<float>::on(set)(
            {x.data(), count, 1.5f, with_factor ? factor.data() : nullptr, &sum});
        double total = 0;
        for (std::size_t i = 0; i < n; ++i) {
          const double expected = std::exp2(double(before[i]) - 1.5) * (with_factor ? double(factor[i]) : 1.0);
          REQUIRE(std::abs(double(x[i]) - expected) <= 2e-6 * expected);
          total += expected;
        }
        REQUIRE(std::abs(double(sum) - total) <= 2e-6 * total);
        for (std::size_t i = n; i < n + 4; ++i) REQUIRE(x[i] == 7.0f);
      }
}
