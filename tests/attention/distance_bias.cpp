#include "coterie/attention/distance_bias.hpp"

#include <string>

#include "allocation.hpp"
#include "attention/setup.hpp"
#include "catch.hpp"
#include "gradient.hpp"

using namespace test;

namespace {

// The published T5 code, with its names and types: relative_position = memory_position - query_position.
int published_bucket(int relative_position, bool bidirectional, int num_buckets, int max_distance) {
  int ret = 0;
  int n = -relative_position;
  if (bidirectional) {
    num_buckets /= 2;
    ret += (n < 0 ? 1 : 0) * num_buckets;
    n = std::abs(n);
  } else {
    n = std::max(n, 0);
  }
  const int max_exact = num_buckets / 2;
  if (n < max_exact) return ret + n;
  const float log_ratio = std::log(static_cast<float>(n) / static_cast<float>(max_exact));
  const auto log_most = static_cast<float>(std::log(static_cast<double>(max_distance) / max_exact));
  const int if_large = max_exact + static_cast<int>(log_ratio / log_most * static_cast<float>(num_buckets - max_exact));
  return ret + std::min(if_large, num_buckets - 1);
}

struct Pattern {
  std::string name;
  bool causal;
  AttentionPlan plan;
};

// Dense, local and routed, of three sequences end to end, one of them empty.
std::vector<Pattern> patterns(Index n) {
  const std::vector<Index> offsets = {0, n / 3, n / 3, n};
  const std::vector<std::int32_t> labels = Random(4).labels(n, 3, -1);
  std::vector<Pattern> all;
  for (const bool causal : {true, false}) {
    const std::string side = causal ? "causal " : "two-sided ";
    AttentionPlan plan;
    plan_dense({.tokens = n, .causal = causal, .offsets = offsets}, plan);
    all.push_back({side + "dense", causal, plan});
    plan_local({.tokens = n, .window = 9, .lookahead = causal ? 0 : 4, .causal = causal, .offsets = offsets}, plan);
    all.push_back({side + "local", causal, plan});
    plan_clustered(labels, labels, {.clusters = 3, .window = 7, .causal = causal, .offsets = offsets}, plan);
    all.push_back({side + "clustered", causal, plan});
  }
  return all;
}

template <class T>
Inputs<T> inputs(const AttentionPlan& plan, Index heads, Index d) {
  Random random(8);
  Inputs<T> in;
  in.plan = plan;
  in.config.heads = heads;
  in.q = random.matrix<T>(plan.tokens, heads * d);
  in.k = random.matrix<T>(plan.key_tokens, heads * d);
  in.v = random.matrix<T>(plan.key_tokens, heads * d);
  in.d_out = random.matrix<T>(plan.tokens, heads * d);
  return in;
}

template <class T>
void require_reference(const Inputs<T>& in) {
  const Outputs<double> expected = run_reference(in.template cast<double>());
  for (const InstructionSet set : instruction_sets()) {
    INFO("instruction set " << int(set));
    Context context(set);
    const Outputs<T> got = run(in, context);
    const double allowed = (sizeof(T) == 4 ? 2e-5 : 2e-13) * std::max(1.0, expected.d_bias.cwiseAbs().maxCoeff());
    REQUIRE(largest_difference(got.out, expected.out) < allowed);
    REQUIRE(largest_difference(got.d_q, expected.d_q) < allowed);
    REQUIRE(largest_difference(got.d_k, expected.d_k) < allowed);
    REQUIRE(largest_difference(got.d_v, expected.d_v) < allowed);
    REQUIRE(largest_difference(got.d_bias, expected.d_bias) < allowed);
  }
}

}  // namespace

TEST_CASE("ALiBi's slopes are the published ones, also where the heads are no power of two") {
  const auto slopes = [](Index heads) {
    std::vector<double> all;
    for (Index h = 0; h < heads; ++h) all.push_back(alibi_slope(h, heads));
    return all;
  };
  REQUIRE(slopes(1) == std::vector<double>{1.0 / 256});
  REQUIRE(slopes(2) == std::vector<double>{1.0 / 16, 1.0 / 256});
  REQUIRE(slopes(3) == std::vector<double>{1.0 / 16, 1.0 / 256, 1.0 / 4});
  REQUIRE(slopes(6) == std::vector<double>{1.0 / 4, 1.0 / 16, 1.0 / 64, 1.0 / 256, 1.0 / 2, 1.0 / 8});
  REQUIRE(slopes(8) == std::vector<double>{0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625});
  // Twelve heads: those of eight, then 2^-0.5, 2^-1.5, ... of sixteen.
  const std::vector<double> twelve = slopes(12), eight = slopes(8);
  REQUIRE(std::equal(eight.begin(), eight.end(), twelve.begin()));
  for (std::size_t i = 0; i < 4; ++i)
    REQUIRE(twelve[8 + i] == Approx(std::pow(2.0, -0.5 - static_cast<double>(i))).epsilon(1e-15));
  REQUIRE_THROWS_AS(alibi_slope(3, 3), ValueError);
  REQUIRE_THROWS_AS(alibi_slope(-1, 3), ValueError);
}

TEST_CASE("ALiBi's table falls with the distance on both sides") {
  RowMatrix<double> causal(2, 5), two_sided(2, 7);
  alibi_bias(causal);
  alibi_bias(two_sided, -3);
  for (Index h = 0; h < 2; ++h) {
    for (Index c = 0; c < 5; ++c) REQUIRE(causal(h, c) == -alibi_slope(h, 2) * static_cast<double>(c));
    for (Index c = 0; c < 7; ++c)
      REQUIRE(two_sided(h, c) == -alibi_slope(h, 2) * static_cast<double>(c < 3 ? 3 - c : c - 3));
  }
}

TEST_CASE("T5's buckets are those of the published formula in float32") {
  // 32 causal buckets, 128 the largest distance: where each bucket from 16 on begins.
  const int begins[] = {16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113};
  for (Index distance = 0; distance < 300; ++distance) {
    Index expected = std::min<Index>(distance, 15);
    for (const int begin : begins) expected += distance >= begin;
    INFO("distance " << distance);
    REQUIRE(relative_position_bucket(distance, {.causal = true}) == expected);
    REQUIRE(relative_position_bucket(-distance, {.causal = true}) == 0);
  }
  // Two-sided: eight of one distance, and ties of the logarithm at 16, 32 and 64.
  const int two_sided[] = {8, 12, 16, 23, 32, 46, 64, 91};
  for (Index distance = 0; distance < 300; ++distance) {
    Index expected = std::min<Index>(distance, 7);
    for (const int begin : two_sided) expected += distance >= begin;
    INFO("distance " << distance);
    REQUIRE(relative_position_bucket(distance, {}) == expected);
    if (distance > 0) REQUIRE(relative_position_bucket(-distance, {}) == expected + 16);
  }
  for (const bool causal : {true, false})
    for (const int buckets : {4, 6, 8, 10, 32, 34, 64, 128, 320})
      for (const int most : {buckets, 100 + buckets, 128 + buckets, 800, 1024, 20000})
        for (int distance = -most - 3; distance <= most + 3; ++distance) {
          const PositionBuckets b{.buckets = buckets, .max_distance = most, .causal = causal};
          const Index got = relative_position_bucket(distance, b);
          if (got != published_bucket(-distance, !causal, buckets, most)) {
            INFO("causal " << causal << ", buckets " << buckets << ", most " << most << ", distance " << distance);
            REQUIRE(got == published_bucket(-distance, !causal, buckets, most));
          }
          if (got < 0 || got >= buckets) FAIL("no bucket");
        }
}

TEST_CASE("buckets that make no sense, and tables that do not fit, are refused") {
  for (const PositionBuckets& b :
       {PositionBuckets{.buckets = 1, .causal = true}, PositionBuckets{.buckets = 2}, PositionBuckets{.buckets = 7},
        PositionBuckets{.buckets = -4}, PositionBuckets{.buckets = 32, .max_distance = 8},
        PositionBuckets{.buckets = 32, .max_distance = 16, .causal = true}, PositionBuckets{.max_distance = -1}})
    REQUIRE_THROWS_AS(relative_position_bucket(3, b), ValueError);
  REQUIRE(relative_position_bucket(1, {.buckets = 2, .max_distance = 2, .causal = true}) == 1);
  RowMatrix<double> table = RowMatrix<double>::Zero(2, 8), bias = RowMatrix<double>::Constant(2, 9, 3);
  const RowMatrix<double> before = bias;
  const PositionBuckets eight{.buckets = 8};
  REQUIRE_THROWS_AS(bucket_bias(table, bias, {.buckets = 6}), ShapeError);
  REQUIRE_THROWS_AS(bucket_bias(table.topRows(1), bias, eight), ShapeError);
  REQUIRE_THROWS_AS(bucket_bias(bias.leftCols(8), bias, eight), ShapeError);
  REQUIRE_THROWS_AS(bucket_bias(table, bias, {.buckets = 8, .max_distance = 2}), ValueError);
  REQUIRE_THROWS_AS(bucket_bias_backward(table.leftCols(7), bias, eight), ShapeError);
  REQUIRE_THROWS_AS(bucket_bias_backward(bias.leftCols(8), bias, eight), ShapeError);
  REQUIRE(bias == before);
  REQUIRE(table.isZero(0));
}

TEST_CASE("expanding a table takes each distance's bucket, its backward adds, and neither allocates") {
  const PositionBuckets b{.buckets = 8, .max_distance = 20};
  const Index first = -25, count = 51;
  const RowMatrix<double> table = Random(1).matrix<double>(3, 8), d_bias = Random(2).matrix<double>(3, count);
  RowMatrix<double> bias(3, count), d_table = RowMatrix<double>::Constant(3, 8, 0.5), expected = d_table;
  const long before = allocations();
  bucket_bias(table, bias, b, first);
  bucket_bias_backward(d_table, d_bias, b, first);
  const long made = allocations() - before;
  REQUIRE(made == 0);
  for (Index c = 0; c < count; ++c) {
    const Index bucket = relative_position_bucket(first + c, b);
    REQUIRE(bias.col(c) == table.col(bucket));
    expected.col(bucket) += d_bias.col(c);
  }
  REQUIRE(d_table == expected);
  // Distances beyond the largest share the end columns of a table that ends there.
  REQUIRE(bias.col(0) == bias.col(5));
  REQUIRE(bias.col(45) == bias.col(50));
}

TEMPLATE_TEST_CASE("attention with ALiBi and with T5 tables is the reference, dense, local and routed", "", float,
                   double) {
  const Index n = 90, heads = 3;
  for (const Pattern& pattern : patterns(n)) {
    INFO(pattern.name);
    Inputs<TestType> in = inputs<TestType>(pattern.plan, heads, 5);
    in.bias_first = pattern.causal ? 0 : 1 - n;
    in.bias.resize(heads, pattern.causal ? n : 2 * n - 1);
    alibi_bias(in.bias, in.bias_first);
    require_reference(in);

    const PositionBuckets b{.buckets = 12, .max_distance = 40, .causal = pattern.causal};
    const RowMatrix<TestType> table = Random(2).matrix<TestType>(heads, 12);
    bucket_bias(table, in.bias, b, in.bias_first);
    require_reference(in);
    // A table up to the largest distance gives the bits of one of all distances.
    Context context;
    const Outputs<TestType> all = run(in, context, false);
    in.bias_first = pattern.causal ? 0 : -40;
    in.bias.resize(heads, pattern.causal ? 41 : 81);
    bucket_bias(table, in.bias, b, in.bias_first);
    REQUIRE(run(in, context, false).out == all.out);
  }
}

TEST_CASE(
    "T12: on routed heads distances are those of the positions in the sequence, not of the ranks in the cluster") {
  const Index n = 60, d = 4, begin = 25;
  const std::vector<Index> offsets = {0, begin, n};
  const std::vector<std::int32_t> labels = Random(4).labels(n, 4, -1);
  for (const bool causal : {true, false})
    for (const bool buckets : {false, true}) {
      INFO("causal " << causal << ", buckets " << buckets);
      AttentionPlan plan;
      plan_clustered(labels, labels, {.clusters = 4, .causal = causal, .offsets = offsets}, plan);
      Inputs<double> in = inputs<double>(plan, 1, d);
      in.bias_first = causal ? 0 : 1 - n;
      in.bias.resize(1, causal ? n : 2 * n - 1);
      const PositionBuckets b{.buckets = 8, .max_distance = 20, .causal = causal};
      const RowMatrix<double> table = 3 * Random(2).matrix<double>(1, 8);
      if (buckets)
        bucket_bias(table, in.bias, b, in.bias_first);
      else
        alibi_bias(in.bias, in.bias_first);

      // The formula with loops over tokens, by position or, as the trap has it, by rank.
      const auto formula = [&](bool by_rank) {
        RowMatrix<double> out = RowMatrix<double>::Zero(n, d);
        for (Index i = 0; i < n; ++i) {
          double total = 0;
          for (Index j = 0; j < n; ++j) {
            const auto label = [&](Index row) { return labels[static_cast<std::size_t>(row)]; };
            if (label(i) < 0 || label(i) != label(j) || (i < begin) != (j < begin) || (causal && j > i)) continue;
            Index distance = i - j;
            if (by_rank) {
              distance = 0;
              for (Index l = std::min(i, j); l < std::max(i, j); ++l) distance += label(l) == label(i);
              if (j > i) distance = -distance;
            }
            const double added = buckets ? table(0, relative_position_bucket(distance, b))
                                         : -static_cast<double>(std::abs(distance)) / 256;
            const double p = std::exp(in.q.row(i).dot(in.k.row(j)) / 2 + added);
            out.row(i) += p * in.v.row(j);
            total += p;
          }
          if (total > 0) out.row(i) /= total;
        }
        return out;
      };
      Context context;
      const Outputs<double> got = run(in, context, false), judge = run_reference(in, false);
      REQUIRE(largest_difference(got.out, formula(false)) < 1e-13);
      REQUIRE(largest_difference(judge.out, formula(false)) < 1e-13);
      REQUIRE(largest_difference(got.out, formula(true)) > 1e-3);
    }
}

TEST_CASE("gradients of T5's tables are central differences through attention, and are added") {
  const Index n = 24, heads = 2;
  for (const Pattern& pattern : patterns(n)) {
    INFO(pattern.name);
    Inputs<double> in = inputs<double>(pattern.plan, heads, 3);
    const PositionBuckets b{.buckets = 8, .max_distance = 12, .causal = pattern.causal};
    RowMatrix<double> table = Random(2).matrix<double>(heads, 8);
    in.bias_first = pattern.causal ? 0 : -12;
    in.bias.resize(heads, pattern.causal ? 13 : 25);
    Context context;
    const auto loss = [&] {
      bucket_bias(table, in.bias, b, in.bias_first);
      return run(in, context, false).out.cwiseProduct(in.d_out).sum();
    };
    loss();
    const Outputs<double> got = run(in, context);
    const RowMatrix<double> d_bias = got.d_bias.array() - 0.5;  // outputs start from 0.5
    RowMatrix<double> d_table = RowMatrix<double>::Constant(heads, 8, 0.25);
    bucket_bias_backward(d_table, d_bias, b, in.bias_first);
    d_table.array() -= 0.25;
    REQUIRE(d_table.cwiseAbs().maxCoeff() > 1e-2);
    require_gradient(table, d_table, loss);
  }
}
