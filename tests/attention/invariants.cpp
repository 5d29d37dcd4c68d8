#include "coterie/attention/attention.hpp"

#include <cstring>

#include "allocation.hpp"
#include "attention/setup.hpp"
#include "catch.hpp"

using namespace test;

namespace {

template <class M>
bool same_bits(const M& a, const M& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(*a.data())) == 0);
}

template <class T>
bool same_bits(const Outputs<T>& a, const Outputs<T>& b) {
  return same_bits(a.out, b.out) && same_bits(a.lse, b.lse) && same_bits(a.d_q, b.d_q) && same_bits(a.d_k, b.d_k) &&
         same_bits(a.d_v, b.d_v) && same_bits(a.d_bias, b.d_bias) && same_bits(a.d_memory_keys, b.d_memory_keys) &&
         same_bits(a.d_memory_values, b.d_memory_values) && same_bits(a.d_relative_keys, b.d_relative_keys) &&
         same_bits(a.d_relative_values, b.d_relative_values) && a.d_scales == b.d_scales;
}

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float infinite = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("attention: the same bits for 1, 2, 3 and 8 workers, forward and backward") {
  for (const AttentionCase& c : attention_cases({.tokens = 1300, .window = 40, .clusters = 5, .d = 9})) {
    const Inputs<float> in(c, 7);
    Context serial;
    const Outputs<float> expected = run(in, serial);
    for (Index workers : {2, 3, 8}) {
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace);
      INFO(c.name << ", " << workers << " workers");
      CHECK(same_bits(run(in, context), expected));
    }
  }
}

TEST_CASE("attention: a later token, also NaN or infinite, changes no earlier bit of a causal plan") {
  for (const AttentionCase& c : attention_cases({.tokens = 150, .window = 20, .clusters = 3, .d = 13})) {
    if (!c.causal) continue;
    const Inputs<float> in(c, 8);
    for (InstructionSet set : instruction_sets()) {
      Context context(set);
      const Outputs<float> expected = run(in, context, false);
      for (Index from : {Index(1), Index(77), Index(149)})
        for (float value : {3.0f, not_a_number, infinite}) {
          Inputs<float> changed = in;
          changed.q.bottomRows(150 - from).setConstant(value);
          changed.k.bottomRows(150 - from).setConstant(value);
          changed.v.bottomRows(150 - from).setConstant(value);
          const Outputs<float> got = run(changed, context, false);
          INFO(c.name << ", from " << from << ", " << value << ", set " << int(set));
          CHECK(same_bits(got.out.topRows(from).eval(), expected.out.topRows(from).eval()));
          if (c.has_lse) CHECK(same_bits(got.lse.topRows(from).eval(), expected.lse.topRows(from).eval()));
        }
    }
  }
}

TEST_CASE("attention: a NaN reaches the rows that see it, and their gradients, and no others") {
  const Index n = 200, window = 30, at = 100;
  AttentionPlan plan;
  plan_local({.tokens = n, .window = window, .causal = true}, plan);
  for (InstructionSet set : instruction_sets())
    for (int which : {0, 1, 2, 3}) {
      Inputs<float> in(attention_cases({.tokens = n, .window = window, .clusters = 1, .d = 11})[0], 9);
      in.plan = plan;
      Context context(set);
      const Outputs<float> expected = run(in, context);
      (which == 0 ? in.q : which == 1 ? in.k : which == 2 ? in.v : in.d_out)(at, 5) = not_a_number;
      const Outputs<float> got = run(in, context);
      const Index first_hit = at, last_hit = which == 1 || which == 2 ? at + window - 1 : at;
      INFO("set " << int(set) << ", " << which);
      for (Index i = 0; i < n; ++i) {
        const bool hit = i >= first_hit && i <= last_hit;
        if (which < 3) {
          const bool poisoned = which == 2 ? std::isnan(got.out(i, 5)) : got.out.row(i).array().isNaN().all();
          CHECK(poisoned == hit);
        }
        if (!hit) CHECK(same_bits(got.out.row(i).eval(), expected.out.row(i).eval()));
        if (!hit) CHECK(same_bits(got.d_q.row(i).eval(), expected.d_q.row(i).eval()));
        // Keys that no poisoned row sees keep their gradients.
        const bool key_hit = i > first_hit - window && i <= last_hit;
        if (!key_hit) CHECK(same_bits(got.d_k.row(i).eval(), expected.d_k.row(i).eval()));
        if (!key_hit) CHECK(same_bits(got.d_v.row(i).eval(), expected.d_v.row(i).eval()));
        if (key_hit && which != 2) CHECK(std::isnan(got.d_v(i, 5)));
      }
    }
}

TEST_CASE("attention: ragged sequences equal the same sequences one by one, bit for bit") {
  Random random(10);
  const std::vector<Index> offsets = {0, 5, 5, 140, 141, 900};
  const Index n = offsets.back(), d = 10;
  Inputs<float> in(attention_cases({.tokens = n, .window = 1, .clusters = 1, .d = d})[1], 11);
  const std::vector<std::int32_t> labels = random.labels(n, 3);
  const auto build = [&](Index first, Index count, std::span<const Index> cut, int pattern, AttentionPlan& plan) {
    const std::span<const std::int32_t> part(labels.data() + first, std::size_t(count));
    if (pattern == 0) plan_local({.tokens = count, .window = 50, .causal = true, .offsets = cut}, plan);
    if (pattern == 1) plan_clustered(part, part, {.clusters = 3, .window = 30, .causal = true, .offsets = cut}, plan);
    if (pattern == 2) plan_dense({.tokens = count, .offsets = cut}, plan);
    if (pattern == 3) plan_random({.tokens = count, .clusters = 4, .causal = true, .offsets = cut, .seed = 3}, plan);
  };
  Context context;
  for (int pattern : {0, 1, 2, 3}) {
    build(0, n, offsets, pattern, in.plan);
    const Outputs<float> whole = run(in, context);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const Index first = offsets[s], count = offsets[s + 1] - offsets[s];
      Inputs<float> one = in;
      build(first, count, {}, pattern, one.plan);
      one.q = in.q.middleRows(first, count);
      one.k = in.k.middleRows(first, count);
      one.v = in.v.middleRows(first, count);
      one.d_out = in.d_out.middleRows(first, count);
      one.d_lse = in.d_lse.middleRows(first, count);
      const Outputs<float> got = run(one, context);
      INFO("pattern " << pattern << ", sequence " << s);
      CHECK(same_bits(got.out, whole.out.middleRows(first, count).eval()));
      CHECK(same_bits(got.d_q, whole.d_q.middleRows(first, count).eval()));
      CHECK(same_bits(got.d_k, whole.d_k.middleRows(first, count).eval()));
      CHECK(same_bits(got.d_v, whole.d_v.middleRows(first, count).eval()));
    }
  }
}

TEST_CASE("attention: a window equals the dense plan with the same mask, every length") {
  Context context;
  for (Index w : {1, 2, 3, 7})
    for (Index n = 1; n <= 3 * w + 1; ++n)
      for (bool clustered : {false, true}) {
        Inputs<double> in(attention_cases({.tokens = n, .window = w, .clusters = 1, .d = 6})[1], 12);
        const std::vector<std::int32_t> one_cluster(std::size_t(n), 0);
        if (clustered)
          plan_clustered(one_cluster, one_cluster, {.clusters = 1, .window = w, .causal = true}, in.plan);
        else
          plan_local({.tokens = n, .window = w, .causal = true}, in.plan);
        const Outputs<double> got = run(in, context);
        plan_dense({.tokens = n}, in.plan);
        for (Index i = 0; i < n; ++i) {
          in.plan.visible[std::size_t(i)] = {std::int32_t(std::max<Index>(0, i - w + 1)), std::int32_t(i + 1)};
        }
        complete(in.plan);
        const Outputs<double> dense = run(in, context);
        INFO("window " << w << ", " << n << " tokens, clustered " << clustered);
        CHECK(same_bits(got, dense));
        if (w >= n) {
          plan_dense({.tokens = n, .causal = true}, in.plan);
          CHECK(same_bits(got, run(in, context)));
        }
      }
}

TEST_CASE("attention: nothing allocates after warm-up") {
  for (const AttentionCase& c : attention_cases({.tokens = 700, .window = 40, .clusters = 5, .d = 9})) {
    const Inputs<float> in(c, 13);
    Context context;
    Outputs<float> result(in);
    AttentionTape<float> tape;
    const auto step = [&] {
      attention_forward(in.plan, in.q, in.k, in.v, result.out, tape, in.config, context, in.terms());
      attention_backward(in.plan, in.q, in.k, in.v, result.out, tape, in.d_out, result.d_q, result.d_k, result.d_v,
                         in.config, context, in.terms(), result.terms(in));
    };
    step();
    step();
    const long before = allocations();
    step();
    const long after = allocations();
    INFO(c.name);
    CHECK(after == before);
  }
}

TEST_CASE("attention: strided and unaligned views with guard zones, exact sizes") {
  const AttentionCase c = attention_cases({.tokens = 90, .window = 20, .clusters = 3, .d = 7})[1];
  const Inputs<float> in(c, 14);
  Context context;
  const Outputs<float> expected = run(in, context);
  const Index n = 90, width = in.q.cols(), guard = 3;
  const auto framed = [&](const RowMatrix<float>& m) {
    RowMatrix<float> frame = RowMatrix<float>::Constant(m.rows() + 2, m.cols() + 2 * guard, not_a_number);
    frame.block(1, guard, m.rows(), m.cols()) = m;
    return frame;
  };
  RowMatrix<float> q = framed(in.q), k = framed(in.k), v = framed(in.v), d_out = framed(in.d_out);
  const RowMatrix<float> half = RowMatrix<float>::Constant(n, width, 0.5f);
  RowMatrix<float> out = framed(half), d_q = framed(half), d_k = framed(half), d_v = framed(half);
  const auto inside = [&](RowMatrix<float>& m) { return m.block(1, guard, n, width); };
  AttentionTape<float> tape;
  attention_forward(in.plan, inside(q), inside(k), inside(v), inside(out), tape, in.config, context);
  attention_backward(in.plan, inside(q), inside(k), inside(v), inside(out), tape, inside(d_out), inside(d_q),
                     inside(d_k), inside(d_v), in.config, context, {}, {.d_lse = in.d_lse});
  CHECK(same_bits(inside(out).eval(), expected.out));
  CHECK(same_bits(inside(d_q).eval(), expected.d_q));
  CHECK(same_bits(inside(d_k).eval(), expected.d_k));
  CHECK(same_bits(inside(d_v).eval(), expected.d_v));
  for (RowMatrix<float>* m : {&out, &d_q, &d_k, &d_v}) {
    inside(*m).setConstant(not_a_number);
    CHECK(m->array().isNaN().all());  // nothing was written outside
  }
}

TEST_CASE("attention: backward on a context of its own, whose scratch memory is exactly what it asks for") {
  for (const AttentionCase& c : attention_cases()) {
    const Inputs<float> in(c, 15);
    Context forward_context, backward_context;
    const Outputs<float> expected = run(in, forward_context);
    Outputs<float> got(in);
    AttentionTape<float> tape;
    attention_forward(in.plan, in.q, in.k, in.v, got.out, tape, in.config, forward_context, in.terms());
    attention_backward(in.plan, in.q, in.k, in.v, got.out, tape, in.d_out, got.d_q, got.d_k, got.d_v, in.config,
                       backward_context, in.terms(), got.terms(in));
    INFO(c.name);
    CHECK(same_bits(got.d_q, expected.d_q));
    CHECK(same_bits(got.d_k, expected.d_k));
    CHECK(same_bits(got.d_v, expected.d_v));
  }
}

TEST_CASE("attention: a large bias does not reach the gradients of keys through lanes without a query") {
  AttentionCase c = attention_cases({.tokens = 13, .window = 4, .clusters = 1, .d = 5})[3];  // local, with a bias
  Inputs<float> in(c, 16);
  in.bias.setConstant(88.7f);
  Context context;
  const Outputs<float> got = run(in, context);
  CHECK(largest_difference(got.d_k, run_reference(in.cast<double>()).d_k) < 1e-5);
  CHECK(largest_difference(got.d_v, run_reference(in.cast<double>()).d_v) < 1e-5);
}

TEST_CASE("attention: an entry without weight does not spoil its row's one softmax") {
  // Two entries of one row; a bias of minus infinity takes all weight from the second one's key.
  AttentionPlan plan;
  plan.tokens = 1;
  plan.key_tokens = 2;
  plan.combine = Combine::lse;
  plan.entries = {0, 0};
  plan.keys = {0, 1};
  plan.groups = {{0, 1, 0, 1}, {1, 2, 1, 2}};
  plan.visible = {{0, 1}, {0, 1}};
  complete(plan);
  const RowMatrix<float> q = RowMatrix<float>::Ones(1, 4), k = RowMatrix<float>::Ones(2, 4), v = 3 * k;
  RowMatrix<float> out(1, 4), bias(1, 2);
  bias << -infinite, 0;  // distances -1, 0
  Context context;
  attention_forward(plan, q, k, v, out, {}, context, {.bias = {bias, -1}});
  CHECK(out == RowMatrix<float>::Constant(1, 4, 3));
}
