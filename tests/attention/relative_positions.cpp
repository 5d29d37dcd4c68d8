#include "coterie/attention/attention.hpp"

#include <cstring>

#include "attention/setup.hpp"
#include "catch.hpp"
#include "errors.hpp"
#include "gradient.hpp"

using namespace test;

namespace {

template <class T>
struct Tables {
  Index heads = 1, kv_heads = 1, d = 5, dv = 5, count = 9, first = 0;
  bool by_head = false;
};

template <class T>
Inputs<T> inputs(const AttentionPlan& plan, const Tables<T>& t, std::uint64_t seed = 3) {
  Random random(seed);
  Inputs<T> in;
  in.plan = plan;
  in.config = {.heads = t.heads, .kv_heads = t.kv_heads};
  in.q = random.matrix<T>(plan.tokens, t.heads * t.d);
  in.k = random.matrix<T>(plan.key_tokens, t.kv_heads * t.d);
  in.v = random.matrix<T>(plan.key_tokens, t.kv_heads * t.dv);
  in.memory_keys = random.matrix<T>(plan.memory_tokens, t.kv_heads * t.d);
  in.memory_values = random.matrix<T>(plan.memory_tokens, t.kv_heads * t.dv);
  in.relative_keys = random.matrix<T>(t.count, (t.by_head ? t.heads : 1) * t.d);
  in.relative_values = random.matrix<T>(t.count, (t.by_head ? t.heads : 1) * t.dv);
  in.relative_first = t.first;
  in.d_out = random.matrix<T>(plan.tokens, t.heads * t.dv);
  if (plan.combine != Combine::mean) in.d_lse = random.matrix<T>(plan.tokens, t.heads);
  return in;
}

template <class M>
bool same_bits(const M& a, const M& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(*a.data())) == 0);
}

/// The same attention without relative terms: as many keys for every query as there are distances, each the sum of both.
/// One head, and every query in a sequence of its own.
template <class T>
RowMatrix<T> spelled_out(const Inputs<T>& in, Context& context) {
  const Index n = in.plan.tokens, m = in.plan.key_tokens, d = in.q.cols(), dv = in.v.cols();
  RowMatrix<T> k(n * m, d), v(n * m, dv), out(n, dv);
  std::vector<Index> offsets = {0}, key_offsets = {0};
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < m; ++j) {
      const Index at = std::clamp<Index>(i - j - in.relative_first, 0, in.relative_keys.rows() - 1);
      k.row(i * m + j) = in.k.row(j) + in.relative_keys.row(at);
      v.row(i * m + j) = in.v.row(j) + in.relative_values.row(at);
    }
    offsets.push_back(i + 1);
    key_offsets.push_back((i + 1) * m);
  }
  AttentionPlan plan;
  plan_dense({.tokens = n, .keys = n * m, .offsets = offsets, .key_offsets = key_offsets}, plan);
  attention_forward(plan, in.q, k, v, out, in.config, context);
  return out;
}

AttentionPlan local(Index n, Index window, Index lookahead = 0) {
  AttentionPlan plan;
  plan_local({.tokens = n, .window = window, .lookahead = lookahead, .causal = lookahead == 0}, plan);
  return plan;
}

AttentionPlan routed(Index n, Index clusters, std::uint64_t seed = 4) {
  const std::vector<std::int32_t> labels = Random(seed).labels(n, clusters);
  AttentionPlan plan;
  plan_clustered(labels, labels, {.clusters = clusters, .causal = true}, plan);
  return plan;
}

}  // namespace

TEMPLATE_TEST_CASE("relative keys and values are keys and values that every query has of its own", "", float, double) {
  const Index n = 41;
  AttentionPlan plan;
  plan_dense({.tokens = n}, plan);
  for (const InstructionSet set : instruction_sets())
    for (const auto& [count, first] : {std::pair<Index, Index>{2 * n - 1, 1 - n},  // a row for every distance
                                       {11, -5},                                   // clamped at both ends
                                       {11, 3},
                                       {5, 100},  // all before the first row
                                       {5, -100},
                                       {2, 0},
                                       {1, 7}}) {
      INFO("instruction set " << int(set) << ", " << count << " rows from " << first);
      const Inputs<TestType> in = inputs<TestType>(plan, {.count = count, .first = first});
      Context context(set);
      const RowMatrix<TestType> got = run(in, context, false).out;
      REQUIRE(largest_difference(got, spelled_out(in, context)) < 16 * std::numeric_limits<TestType>::epsilon());
    }
}

TEST_CASE("relative keys and values: distances are those of the positions, never of ranks or rows") {
  const Index n = 60;
  AttentionPlan plan = routed(n, 3);
  Context context;
  Inputs<double> in = inputs<double>(plan, {.count = 30});
  const RowMatrix<double> by_row = run(in, context, false).out;
  REQUIRE(largest_difference(by_row, run_reference(in, false).out) < 1e-13);
  // Positions given by the plan: unordered, repeated, and the keys' others than the queries'.
  Random random(9);
  for (Index i = 0; i < n; ++i) {
    in.plan.query_positions.push_back(static_cast<std::int32_t>(random.below(40) - 7));
    in.plan.key_positions.push_back(static_cast<std::int32_t>(random.below(40)));
  }
  const Outputs<double> got = run(in, context), expected = run_reference(in);
  REQUIRE(largest_difference(got.out, by_row) > 1e-2);
  REQUIRE(largest_difference(got.out, expected.out) < 1e-13);
  REQUIRE(largest_difference(got.d_q, expected.d_q) < 1e-12);
  REQUIRE(largest_difference(got.d_relative_keys, expected.d_relative_keys) < 1e-12);
  REQUIRE(largest_difference(got.d_relative_values, expected.d_relative_values) < 1e-12);
  // The same distances, further on.
  for (std::int32_t& position : in.plan.query_positions) position += 1000;
  for (std::int32_t& position : in.plan.key_positions) position += 1000;
  REQUIRE(same_bits(run(in, context, false).out, got.out));
  // Queries that ascend by one against repeated keys, which take the paths of diagonals.
  for (Index i = 0; i < n; ++i) in.plan.query_positions[std::size_t(i)] = static_cast<std::int32_t>(i);
  for (const Index window : {7, 60}) {
    AttentionPlan rows = local(n, window);
    rows.query_positions = in.plan.query_positions;
    rows.key_positions = in.plan.key_positions;
    in.plan = rows;
    const Outputs<double> ours = run(in, context), judge = run_reference(in);
    REQUIRE(largest_difference(ours.out, judge.out) < 1e-13);
    REQUIRE(largest_difference(ours.d_relative_keys, judge.d_relative_keys) < 1e-12);
    REQUIRE(largest_difference(ours.d_relative_values, judge.d_relative_values) < 1e-12);
  }
}

TEST_CASE("relative keys and values: every gradient is that of central differences") {
  const Index n = 21;
  std::vector<AttentionPlan> plans = {local(n, 5), local(n, 4, 3), routed(n, 3), local(n, 6)};
  plan_add_memory(2, plans[3]);
  for (std::size_t p = 0; p < plans.size(); ++p)
    for (const bool capped : {false, true}) {
      INFO("plan " << p << ", capped " << capped);
      Inputs<double> in = inputs<double>(
          plans[p],
          {.heads = 2, .kv_heads = p == 1 ? 1 : 2, .d = 3, .dv = 4, .count = 6, .first = -2, .by_head = p % 2 == 0});
      std::vector<double> scales = {0.7, 1.2};
      in.config.scales = scales;
      in.config.soft_cap = capped ? 1.5 : 0;
      in.config.dropout = p == 2 ? 0.3 : 0;
      Context context;
      Outputs<double> got = run(in, context);
      const auto loss = [&] {
        const Outputs<double> at = run(in, context, false);
        double sum = at.out.cwiseProduct(in.d_out).sum();
        for (Index i = 0; i < at.lse.rows(); ++i)
          for (Index h = 0; h < at.lse.cols(); ++h)
            if (std::isfinite(at.lse(i, h))) sum += at.lse(i, h) * in.d_lse(i, h);
        return sum;
      };
      const auto require = [&](RowMatrix<double>& x, RowMatrix<double> gradient) {
        gradient.array() -= 0.5;  // outputs start from it
        REQUIRE(gradient.cwiseAbs().maxCoeff() > 1e-2);
        require_gradient(x, gradient, loss);
      };
      require(in.q, got.d_q);
      require(in.k, got.d_k);
      require(in.v, got.d_v);
      require(in.relative_keys, got.d_relative_keys);
      require(in.relative_values, got.d_relative_values);
      RowMatrix<double> scale_row = Eigen::Map<RowMatrix<double>>(scales.data(), 1, 2);
      RowMatrix<double> d_scales = Eigen::Map<RowMatrix<double>>(got.d_scales.data(), 1, 2);
      d_scales.array() -= 0.5;
      require_gradient(scale_row, d_scales, [&] {
        scales = {scale_row(0, 0), scale_row(0, 1)};
        return loss();
      });
    }
}

TEST_CASE("relative keys and values: one table for all heads is the same table for every head") {
  const Index n = 70, heads = 3;
  Context context;
  Inputs<double> one = inputs<double>(routed(n, 2), {.heads = heads, .kv_heads = heads, .count = 20});
  Inputs<double> each = one;
  each.relative_keys = one.relative_keys.replicate(1, heads);
  each.relative_values = one.relative_values.replicate(1, heads);
  const Outputs<double> a = run(one, context), b = run(each, context);
  REQUIRE(same_bits(a.out, b.out));
  REQUIRE(same_bits(a.d_q, b.d_q));
  RowMatrix<double> sum = RowMatrix<double>::Constant(20, 5, 0.5);
  for (Index h = 0; h < heads; ++h) sum.array() += b.d_relative_keys.middleCols(5 * h, 5).array() - 0.5;
  REQUIRE(largest_difference(a.d_relative_keys, sum) < 1e-12);
  // Tables may lie inside wider matrices, at any address.
  RowMatrix<double> wide = RowMatrix<double>::Constant(22, 9, std::nan(""));
  wide.block(1, 3, 20, 5) = one.relative_keys;
  RowMatrix<double> out(n, heads * 5);
  AttentionTerms<double> terms = one.terms();
  terms.relative_keys = wide.block(1, 3, 20, 5);
  attention_forward(one.plan, one.q, one.k, one.v, out, one.config, context, terms);
  REQUIRE(same_bits(out, a.out));
}

TEST_CASE("relative keys and values: what is given alone, and gradients that are not wanted") {
  const Index n = 50;
  Context context;
  for (const bool keys : {false, true}) {
    Inputs<double> in = inputs<double>(local(n, 20), {.count = 12}), zero = in;
    (keys ? zero.relative_values : zero.relative_keys).setZero();
    (keys ? in.relative_values : in.relative_keys).resize(0, 0);
    const Outputs<double> alone = run(in, context), both = run(zero, context);
    REQUIRE(largest_difference(alone.out, both.out) < 1e-14);
    REQUIRE(largest_difference(alone.d_q, both.d_q) < 1e-13);
    // Without a place for the tables' gradients the others stay the same.
    Outputs<double> got(in);
    AttentionTape<double> tape;
    attention_forward(in.plan, in.q, in.k, in.v, got.out, tape, in.config, context, in.terms());
    attention_backward(in.plan, in.q, in.k, in.v, got.out, tape, in.d_out, got.d_q, got.d_k, got.d_v, in.config,
                       context, in.terms(), {.d_lse = in.d_lse});
    REQUIRE(same_bits(got.d_q, alone.d_q));
    REQUIRE(same_bits(got.d_k, alone.d_k));
    REQUIRE(same_bits(got.d_v, alone.d_v));
  }
}

TEST_CASE(
    "relative keys and values: a prefix gives the full run's rows, and sequences end to end those of each alone") {
  const Index n = 700;
  for (const InstructionSet set : instruction_sets())
    for (const bool clustered : {false, true}) {
      INFO("instruction set " << int(set) << ", clustered " << clustered);
      const std::vector<std::int32_t> labels = Random(4).labels(n, 3);
      const auto build = [&](Index first, Index count, std::span<const Index> offsets) {
        AttentionPlan plan;
        const std::span<const std::int32_t> some(labels.data() + first, std::size_t(count));
        if (clustered)
          plan_clustered(some, some, {.clusters = 3, .window = 60, .causal = true, .offsets = offsets}, plan);
        else
          plan_local({.tokens = count, .window = 60, .causal = true, .offsets = offsets}, plan);
        return plan;
      };
      Context context(set);
      Inputs<float> in = inputs<float>(build(0, n, {}), {.d = 11, .dv = 13, .count = 80, .first = 1});
      const auto part_of = [&](Index first, Index count) {
        Inputs<float> part = in;
        part.plan = build(first, count, {});
        for (RowMatrix<float>* m : {&part.q, &part.k, &part.v, &part.d_out, &part.d_lse})
          *m = RowMatrix<float>(m->middleRows(first, count));
        return part;
      };
      const Outputs<float> full = run(in, context);
      for (const Index length : {Index(1), Index(5), Index(130), n - 1}) {
        const Outputs<float> prefix = run(part_of(0, length), context);
        CHECK(same_bits(prefix.out, RowMatrix<float>(full.out.topRows(length))));
        CHECK(same_bits(prefix.d_q, RowMatrix<float>(full.d_q.topRows(length))));
      }
      const std::vector<Index> offsets = {0, 3, 3, 250, 251, n};
      in.plan = build(0, n, offsets);
      const Outputs<float> whole = run(in, context);
      for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
        const Index first = offsets[s], count = offsets[s + 1] - first;
        const Outputs<float> one = run(part_of(first, count), context);
        CHECK(same_bits(one.out, RowMatrix<float>(whole.out.middleRows(first, count))));
        CHECK(same_bits(one.d_q, RowMatrix<float>(whole.d_q.middleRows(first, count))));
      }
    }
}

TEST_CASE(
    "relative keys and values: a row of a table that is no number reaches the pairs of its distance and no others") {
  const Index n = 150, window = 40, count = 60;
  constexpr float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
  for (const InstructionSet set : instruction_sets())
    for (const bool clustered : {false, true})
      for (const bool keys : {false, true})
        for (const Index at : {0, 1, 17, 38, 58, 59})
          for (const float value : bad) {
            INFO("set " << int(set) << ", clustered " << clustered << ", keys " << keys << ", row " << at << ", "
                        << value);
            Inputs<float> in = inputs<float>(clustered ? routed(n, 4) : local(n, window), {.count = count});
            Context context(set);
            const Outputs<float> expected = run(in, context);
            (keys ? in.relative_keys : in.relative_values)(at, 2) = value;
            const Outputs<float> got = run(in, context);
            Index hits = 0;
            for (Index e = 0; e < n; ++e) {
              const Index i = in.plan.entries[std::size_t(e)];
              const auto& group = coterie::detail::group_of(in.plan, static_cast<std::int32_t>(e));
              bool hit = false;
              for (Index rank = in.plan.visible[std::size_t(e)].begin; rank < in.plan.visible[std::size_t(e)].end;
                   ++rank)
                hit |= std::min(i - in.plan.keys[std::size_t(group.key_begin + rank)], count - 1) == at;
              hits += hit;
              if (hit) {
                CHECK(!std::isfinite(keys ? got.d_q(i, 2) : got.out(i, 2)));
              } else {
                CHECK(same_bits(RowMatrix<float>(got.out.row(i)), RowMatrix<float>(expected.out.row(i))));
                CHECK(same_bits(RowMatrix<float>(got.d_q.row(i)), RowMatrix<float>(expected.d_q.row(i))));
              }
            }
            if (!clustered) REQUIRE(hits == (at < window ? n - at : 0));
          }
}

TEST_CASE("relative keys and values: a query that is no number spoils the table rows of its pairs and no others") {
  const Index n = 90, count = 60;
  for (const InstructionSet set : instruction_sets())
    for (const bool clustered : {false, true})
      for (const bool query : {false, true}) {
        INFO("set " << int(set) << ", clustered " << clustered << ", query " << query);
        Inputs<float> in = inputs<float>(clustered ? routed(n, 4) : local(n, 30), {.count = count});
        Context context(set);
        const Outputs<float> expected = run(in, context);
        const Index at = 45;
        (query ? in.q : in.d_out)(at, 1) = std::numeric_limits<float>::quiet_NaN();
        const Outputs<float> got = run(in, context);
        std::vector<bool> hit(std::size_t(count), false);
        for (Index e = 0; e < n; ++e)
          if (in.plan.entries[std::size_t(e)] == at) {
            const auto& group = coterie::detail::group_of(in.plan, static_cast<std::int32_t>(e));
            const Interval seen = in.plan.visible[std::size_t(e)];
            for (Index rank = seen.begin; rank < seen.end; ++rank)
              hit[std::size_t(at - in.plan.keys[std::size_t(group.key_begin + rank)])] = true;
          }
        for (Index r = 0; r < count; ++r) {
          INFO("row " << r);
          if (hit[std::size_t(r)]) {
            CHECK(got.d_relative_keys.row(r).array().isNaN().all());
            CHECK(std::isnan(got.d_relative_values(r, 1)));
          } else {
            CHECK(same_bits(RowMatrix<float>(got.d_relative_keys.row(r)),
                            RowMatrix<float>(expected.d_relative_keys.row(r))));
            CHECK(same_bits(RowMatrix<float>(got.d_relative_values.row(r)),
                            RowMatrix<float>(expected.d_relative_values.row(r))));
          }
        }
      }
}

TEST_CASE("relative keys and values: tables that do not fit are named, and nothing is written") {
  const Index n = 20;
  Inputs<float> in = inputs<float>(local(n, 5), {.heads = 2, .kv_heads = 2, .dv = 4});
  Context context;
  Outputs<float> out(in);
  AttentionTape<float> tape;
  AttentionTerms<float> terms = in.terms();
  const auto forward = [&] {
    const RowMatrix<float> before = out.out;
    const std::string text = message_of<ShapeError>(
        [&] { attention_forward(in.plan, in.q, in.k, in.v, out.out, tape, in.config, context, terms); });
    if (!text.empty()) CHECK(out.out == before);
    return text;
  };
  REQUIRE(forward().empty());
  const RowMatrix<float> wide = RowMatrix<float>::Zero(9, 11), short_one = RowMatrix<float>::Zero(8, 4),
                         no_columns(9, 0);
  terms.relative_keys = wide;
  CHECK(forward() == "attention_forward: relative_keys: expected 5 columns, or 10 for 2 heads, got 11");
  terms.relative_keys = no_columns;
  CHECK(contains(forward(), "relative_keys: expected 5 columns, or 10 for 2 heads, got 0"));
  terms = in.terms();
  terms.relative_values = in.relative_keys;  // d columns where dv differs
  CHECK(contains(forward(), "relative_values: expected 4 columns, or 8 for 2 heads, got 5"));
  terms.relative_values = short_one;
  CHECK(forward() == "attention_forward: relative_values: expected 9 rows, as relative_keys, got 8");
  terms = in.terms();
  terms.relative_values.first = terms.relative_keys.first + 1;
  CHECK(message_of<ValueError>([&] {
          attention_forward(in.plan, in.q, in.k, in.v, out.out, tape, in.config, context, terms);
        }) == coterie::detail::join("attention_forward: relative_values: expected distances from ",
                                    terms.relative_keys.first, " on, as relative_keys, got ",
                                    terms.relative_values.first));
  terms = in.terms();
  terms.relative_values = out.out.topRows(9).leftCols(4);
  CHECK(contains(forward(), "out: expected storage of its own, got an overlap with relative_values"));

  terms = in.terms();
  REQUIRE(forward().empty());
  AttentionTermGradients<float> gradients = out.terms(in);
  const auto backward = [&] {
    const RowMatrix<float> before = out.d_q;
    const std::string text = message_of<ShapeError>([&] {
      attention_backward(in.plan, in.q, in.k, in.v, out.out, tape, in.d_out, out.d_q, out.d_k, out.d_v, in.config,
                         context, terms, gradients);
    });
    if (!text.empty()) CHECK(out.d_q == before);
    return text;
  };
  gradients.d_relative_keys = out.d_relative_keys.topRows(8);
  CHECK(contains(backward(), "attention_backward: d_relative_keys: expected 9 x 5, got 8 x 5"));
  gradients.d_relative_keys = in.relative_keys;
  CHECK(contains(backward(), "d_relative_keys: expected storage of its own, got an overlap with relative_keys"));
  gradients.d_relative_keys = out.d_q.topRows(9).leftCols(5);
  CHECK(contains(backward(), "d_relative_keys: expected storage of its own, got an overlap with d_q"));
  gradients = out.terms(in);
  terms.relative_values = {};
  CHECK(contains(backward(), "d_relative_values: expected 0 x 0, got 9 x 4"));
}
