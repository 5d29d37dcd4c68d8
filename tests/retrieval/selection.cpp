#include "coterie/retrieval/selection.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "random.hpp"

using namespace coterie;
using namespace test;

TEST_CASE("selection: the n-th largest, among equal numbers, of both signs, and with infinity and NaN", "[selection]") {
  Random random(3);
  std::vector<std::int32_t> bins(static_cast<std::size_t>(detail::selection_bins));
  for (const int kind : {0, 1, 2, 3})
    for (const Index count : {1, 2, 3, 50, 3000}) {
      std::vector<detail::Ordered<float>> numbers;
      for (Index i = 0; i < count; ++i) {
        float x = static_cast<float>(random.uniform(-50, 50));
        if (kind == 1) x = static_cast<float>(random.below(3)) - 1;
        if (kind == 2) x = 7;
        if (kind == 3 && random.below(5) == 0)
          x = random.below(2) == 0 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
        numbers.push_back(detail::ordered(x));
      }
      std::vector<detail::Ordered<float>> sorted = numbers;
      std::sort(sorted.rbegin(), sorted.rend());
      for (const Index want : {Index(1), (count + 1) / 2, count}) {
        std::vector<detail::Ordered<float>> scratch = numbers;
        REQUIRE(detail::select_largest(scratch.data(), count, want, bins.data()) == sorted[std::size_t(want - 1)]);
      }
    }
  REQUIRE(detail::ordered(-1.0) < detail::ordered(-0.5));
  REQUIRE(detail::ordered(-0.5) < detail::ordered(0.0));
  REQUIRE(detail::ordered(2.0) < detail::ordered(std::numeric_limits<double>::infinity()));
  std::vector<detail::Ordered<double>> wide = {detail::ordered(-3.0), detail::ordered(1e300), detail::ordered(-1e300)};
  REQUIRE(detail::select_largest(wide.data(), 3, 2, bins.data()) == detail::ordered(-3.0));
}
