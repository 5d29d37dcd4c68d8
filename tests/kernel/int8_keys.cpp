#include "coterie/kernel/int8_keys.hpp"

#include <cmath>
#include <vector>

#include "attention/setup.hpp"
#include "catch.hpp"
#include "random.hpp"

using namespace coterie;
using namespace test;

TEST_CASE(
    "int8 keys: scores are those of the rounded keys, whatever their number and width, and the rounding is as stated",
    "[int8]") {
  Random random(1);
  for (InstructionSet set : instruction_sets())
    for (const Index d : {1, 3, 4, 7, 64, 80})
      for (const Index count : {1, 2, 15, 16, 17, 63, 64, 65, 200}) {
        CAPTURE(d, count, static_cast<int>(set));
        RowMatrix<float> keys = 3 * random.matrix<float>(count, d);
        if (d > 3) keys.col(1).setZero();
        const RowMatrix<float> q = random.matrix<float>(1, d);
        std::vector<float> scale(static_cast<std::size_t>(d));
        detail::int8_scales(keys.data(), d, count, d, scale.data());
        const Index depth = detail::int8_words(d);
        std::vector<std::int32_t> words(static_cast<std::size_t>(count * depth + detail::int8_slack), 0x7f7f7f7f);
        detail::int8_write(keys.data(), d, count, d, scale.data(), words.data());
        std::vector<float> scaled(static_cast<std::size_t>(4 * depth), 0.0f);
        for (Index e = 0; e < d; ++e) scaled[std::size_t(e)] = q(0, e) * scale[std::size_t(e)];
        std::vector<float> scores(static_cast<std::size_t>(count + detail::int8_slack), 9.0f);
        detail::Int8Kernel<float>::on(set)({words.data(), count, depth, scaled.data(), scores.data()});
        for (Index j = 0; j < count; ++j) {
          double rounded = 0, error = 0, size = 0;
          for (Index e = 0; e < d; ++e) {
            const double s = scale[std::size_t(e)],
                         level = s > 0 ? double(std::nearbyint(keys(j, e) / scale[std::size_t(e)])) : 0.0;
            rounded += double(q(0, e)) * s * level;
            error += std::abs(double(q(0, e))) * s / 2;
            size += std::abs(double(q(0, e)) * double(keys(j, e)));
          }
          REQUIRE(std::abs(double(scores[std::size_t(j)]) - rounded) < 1e-6 * (1 + size));
          const double exact = keys.row(j).cast<double>().dot(q.row(0).cast<double>());
          REQUIRE(std::abs(rounded - exact) < error * 1.0001 + 1e-9);
        }
        std::vector<double> wide(static_cast<std::size_t>(count + detail::int8_slack)),
            q64(scaled.begin(), scaled.end());
        detail::Int8Kernel<double>::on(set)({words.data(), count, depth, q64.data(), wide.data()});
        for (Index j = 0; j < count; ++j)
          REQUIRE(std::abs(wide[std::size_t(j)] - double(scores[std::size_t(j)])) < 1e-4);
      }
}
