#include "coterie/attention/attention.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"

using namespace test;

TEMPLATE_TEST_CASE("attention_forward: every case, on every instruction set, as closely as the plain formula", "",
                   float, double) {
  const double epsilon = std::numeric_limits<TestType>::epsilon();
  for (const CaseSizes sizes : {CaseSizes{}, CaseSizes{200, 40, 3, 16}, CaseSizes{333, 70, 2, 33}})
    for (const AttentionCase& c : attention_cases(sizes))
      for (double size : {1.0, 6.0}) {
        const Inputs<TestType> in(c, 1, size);
        const Outputs<double> expected = run_reference(in.template cast<double>(), false);
        // The plain formula in the same scalar type. In double it is the judge itself, and logits of size^2 d carry the
        // rounding of both.
        const Outputs<TestType> plain = run_reference(in, false);
        const double floor = epsilon * (sizeof(TestType) == 8 ? 32 * size * size : 8);
        const double allowed = 2 * largest_difference(plain.out, expected.out) + floor;
        const double allowed_lse = 2 * largest_difference(plain.lse, expected.lse) + floor;
        for (InstructionSet set : instruction_sets()) {
          Context context(set);
          const Outputs<TestType> got = run(in, context, false);
          INFO(c.name << ", " << sizes.tokens << " tokens, instruction set " << int(set) << ", size " << size);
          CHECK(largest_difference(got.out, expected.out) <= allowed);
          CHECK(largest_difference(got.lse, expected.lse) <= allowed_lse);
          RowMatrix<TestType> untaped = RowMatrix<TestType>::Constant(got.out.rows(), got.out.cols(), 7);
          attention_forward(in.plan, in.q, in.k, in.v, untaped, in.config, context, in.terms());
          CHECK(untaped == got.out);
        }
      }
}

TEST_CASE("attention_forward: scale and scales") {
  const Inputs<float> base(attention_cases()[1], 3);
  Context context;
  Inputs<float> in = base;
  in.config.scale = 0.3;
  const Outputs<float> one = run(in, context, false);
  const std::vector<double> scales = {0.3, 0.3};
  in.config.scale = 0;
  in.config.scales = scales;
  CHECK(run(in, context, false).out == one.out);
  CHECK(largest_difference(one.out, run_reference(in.cast<double>(), false).out) < 1e-6);
  CHECK(run(base, context, false).out != one.out);
}

TEST_CASE("attention_forward: one plan for every head equals a plan for all") {
  const Inputs<float> in(attention_cases()[2], 4);  // 4 heads, 2 key/value heads
  Context context;
  const RowMatrix<float> expected = run(in, context, false).out;
  for (std::size_t count : {2u, 4u}) {
    const std::vector<AttentionPlan> plans(count, in.plan);
    RowMatrix<float> out(expected.rows(), expected.cols());
    attention_forward(plans, in.q, in.k, in.v, out, in.config, context);
    CHECK(out == expected);
  }
}

TEST_CASE("attention_merge: any split of the keys, merged by log-sum-exp, equals the whole") {
  Random random(5);
  const Index n = 20, m = 150, heads = 2, d = 8;
  const RowMatrix<double> q = random.matrix<double>(n, heads * d), k = random.matrix<double>(m, heads * d),
                          v = random.matrix<double>(m, heads * d);
  Context context;
  const auto attend = [&](Index first, Index count, RowMatrix<double>& out, RowMatrix<double>& lse) {
    AttentionPlan plan;
    plan_dense({.tokens = n, .keys = count}, plan);
    AttentionTape<double> tape;
    attention_forward(plan, q, k.middleRows(first, count), v.middleRows(first, count), out, tape, {.heads = heads},
                      context);
    lse = tape.lse().eigen();
  };
  RowMatrix<double> whole(n, heads * d), lse;
  attend(0, m, whole, lse);
  const RowMatrix<double> nothing = RowMatrix<double>::Zero(n, heads * d);
  const RowMatrix<double> nothing_lse = RowMatrix<double>::Constant(n, heads, -std::numeric_limits<double>::infinity());
  for (Index cut : {Index(0), Index(1), Index(63), Index(64), Index(100), m}) {
    RowMatrix<double> a = nothing, b = nothing, a_lse = nothing_lse, b_lse = nothing_lse;
    if (cut > 0) attend(0, cut, a, a_lse);
    if (cut < m) attend(cut, m - cut, b, b_lse);
    attention_merge(a, a_lse, b, b_lse);
    CHECK(largest_difference(a, whole) < 1e-14);
    CHECK(largest_difference(a_lse, lse) < 1e-13);
  }
}

TEST_CASE("attention_forward: a window at the end of 34 million keys, as at the end of a thousand") {
  constexpr Index tokens = 100, few = 1000, many = 34'000'000, window = 300;
  Random random(5);
  const RowMatrix<float> q = random.matrix<float>(tokens, 1), k = random.matrix<float>(few, 1),
                         v = random.matrix<float>(few, 1);
  const auto out = [&](const RowMatrix<float>& keys, const RowMatrix<float>& values) {
    AttentionPlan plan;
    plan_local({.tokens = tokens, .keys = keys.rows(), .window = window, .causal = true}, plan);
    RowMatrix<float> y(tokens, 1);
    Context context;
    attention_forward(plan, q, keys, values, y, {}, context);
    return y;
  };
  RowMatrix<float> all_keys = RowMatrix<float>::Zero(many, 1), all_values = all_keys;
  all_keys.bottomRows(few) = k;
  all_values.bottomRows(few) = v;
  // Not the same bits: blocks begin at other keys.
  CHECK((out(all_keys, all_values) - out(k, v)).cwiseAbs().maxCoeff() < 1e-6f);
}
