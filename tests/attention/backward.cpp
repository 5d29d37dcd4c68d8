#include "coterie/attention/attention.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"

using namespace test;

TEMPLATE_TEST_CASE("attention_backward: every case, on every instruction set, as the reference", "", float, double) {
  for (const CaseSizes sizes : {CaseSizes{}, CaseSizes{200, 40, 3, 16}, CaseSizes{1100, 70, 2, 7}})
    for (const AttentionCase& c : attention_cases(sizes)) {
      if (sizes.tokens > 1000 && c.name.find("dense") != std::string::npos && c.heads > 2) continue;
      const Inputs<TestType> in(c, 2);
      const Outputs<double> expected = run_reference(in.template cast<double>());
      const double epsilon = std::numeric_limits<TestType>::epsilon();
      for (InstructionSet set : instruction_sets()) {
        Context context(set);
        Outputs<TestType> got = run(in, context);
        INFO(c.name << ", " << sizes.tokens << " tokens, instruction set " << int(set));
        // Rounding of a sum of `terms` products.
        const auto close = [&](const auto& a, const auto& b, double terms) {
          const double size = b.size() ? std::max(1.0, b.cwiseAbs().maxCoeff()) : 1;
          return largest_difference(a, b) <= 8 * epsilon * std::sqrt(terms) * size;
        };
        const double tokens = double(in.plan.tokens), pairs = double(statistics(in.plan).visible_pairs);
        CHECK(close(got.d_q, expected.d_q, tokens));
        CHECK(close(got.d_k, expected.d_k, tokens));
        CHECK(close(got.d_v, expected.d_v, tokens));
        CHECK(close(got.d_bias, expected.d_bias, pairs));
        CHECK(close(got.d_memory_keys, expected.d_memory_keys, tokens));
        CHECK(close(got.d_memory_values, expected.d_memory_values, tokens));
        for (std::size_t h = 0; h < got.d_scales.size(); ++h)
          CHECK(std::abs(got.d_scales[h] - expected.d_scales[h]) <=
                8 * epsilon * std::sqrt(pairs) * std::max(1.0, std::abs(expected.d_scales[h])));
      }
    }
}
