#include "coterie/attention/attention.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"

using namespace test;

TEMPLATE_TEST_CASE("attention_backward: every case, on every instruction set, as closely as the plain formula", "",
                   float, double) {
  for (const CaseSizes sizes : {CaseSizes{}, CaseSizes{200, 40, 3, 16}, CaseSizes{1100, 70, 2, 7}})
    for (const AttentionCase& c : attention_cases(sizes)) {
      if (sizes.tokens > 1000 && c.name.find("dense") != std::string::npos && c.heads > 2) continue;
      const Inputs<TestType> in(c, 2);
      const Outputs<double> expected = run_reference(in.template cast<double>());
      // The plain formula in the same scalar type. In double it is the judge itself.
      const Outputs<TestType> plain = run_reference(in);
      const double epsilon = std::numeric_limits<TestType>::epsilon();
      for (InstructionSet set : instruction_sets()) {
        Context context(set);
        Outputs<TestType> got = run(in, context);
        INFO(c.name << ", " << sizes.tokens << " tokens, instruction set " << int(set));
        // `terms`: the products of a sum. Each rounds once, here and in the judge.
        const auto close = [&](const auto& a, const auto& b, const auto& by_formula, double terms) {
          const double size = b.size() ? std::max(1.0, b.cwiseAbs().maxCoeff()) : 1;
          const double rounding = sizeof(TestType) == 8 ? std::sqrt(terms) : 1;
          return largest_difference(a, b) <= 2 * largest_difference(by_formula, b) + 4 * epsilon * rounding * size;
        };
        const double tokens = double(in.plan.tokens), pairs = double(statistics(in.plan).visible_pairs);
        CHECK(close(got.d_q, expected.d_q, plain.d_q, tokens));
        CHECK(close(got.d_k, expected.d_k, plain.d_k, tokens));
        CHECK(close(got.d_v, expected.d_v, plain.d_v, tokens));
        CHECK(close(got.d_bias, expected.d_bias, plain.d_bias, pairs));
        CHECK(close(got.d_memory_keys, expected.d_memory_keys, plain.d_memory_keys, tokens));
        CHECK(close(got.d_memory_values, expected.d_memory_values, plain.d_memory_values, tokens));
        CHECK(close(got.d_relative_keys, expected.d_relative_keys, plain.d_relative_keys, pairs));
        CHECK(close(got.d_relative_values, expected.d_relative_values, plain.d_relative_values, pairs));
        for (std::size_t h = 0; h < got.d_scales.size(); ++h)
          CHECK(std::abs(got.d_scales[h] - expected.d_scales[h]) <=
                8 * epsilon * std::sqrt(pairs) * std::max(1.0, std::abs(expected.d_scales[h])));
      }
    }
}

TEST_CASE(
    "attention_backward: an infinite key under a soft cap reaches the gradients as in the reference, in every tile") {
  for (const Index n : {29, 32, 3}) {
    AttentionPlan plan;
    plan_dense({.tokens = n}, plan);
    Random random(6);
    const RowMatrix<double> q = random.matrix<double>(n, 4).cwiseAbs(), v = random.matrix<double>(n, 4),
                            d_out = random.matrix<double>(n, 4);
    RowMatrix<double> k = random.matrix<double>(n, 4), out(n, 4);
    k(1, 0) = std::numeric_limits<double>::infinity();
    const AttentionConfig config{.soft_cap = 2};
    for (const InstructionSet set : instruction_sets()) {
      Context context(set);
      AttentionTape<double> tape;
      attention_forward(plan, q, k, v, out, tape, config, context);
      RowMatrix<double> d_q = RowMatrix<double>::Zero(n, 4), d_k = d_q, d_v = d_q, e_q = d_q, e_k = d_q, e_v = d_q;
      attention_backward(plan, q, k, v, out, tape, d_out, d_q, d_k, d_v, config, context);
      reference_backward(plan, q, k, v, d_out, e_q, e_k, e_v, config);
      REQUIRE((d_v - e_v).cwiseAbs().maxCoeff() < 1e-12);
      REQUIRE((d_k - e_k).cwiseAbs().maxCoeff() < 1e-12);
    }
  }
}
