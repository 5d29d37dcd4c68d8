#include "coterie/attention/attention.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"
#include "coterie/plan/members.hpp"

using namespace test;

namespace {

// With equal logits and values of one row each: which pairs are kept, as 0 or 1.
std::vector<std::vector<int>> kept_pairs(Index n, const AttentionConfig& config, Context& context) {
  AttentionPlan plan;
  plan_dense({.tokens = n}, plan);
  const RowMatrix<float> q = RowMatrix<float>::Zero(n, config.heads), v = RowMatrix<float>::Identity(n, n);
  RowMatrix<float> values(n, n * config.heads), out(n, n * config.heads);
  for (Index h = 0; h < config.heads; ++h) values.middleCols(h * n, n) = v;
  attention_forward(plan, q, q, values, out, config, context);
  std::vector<std::vector<int>> kept;
  const double whole = 1 / ((1 - config.dropout) * static_cast<double>(n));
  for (Index i = 0; i < n; ++i) {
    kept.emplace_back();
    for (Index j = 0; j < out.cols(); ++j) {
      const double share = static_cast<double>(out(i, j)) / whole;
      REQUIRE((std::abs(share) < 1e-4 || std::abs(share - 1) < 1e-4));
      kept.back().push_back(share > 0.5);
    }
  }
  return kept;
}

double share_of(const std::vector<std::vector<int>>& kept, const std::vector<std::vector<int>>& other) {
  double same = 0, all = 0;
  for (std::size_t i = 0; i < kept.size(); ++i)
    for (std::size_t j = 0; j < kept[i].size(); ++j) {
      same += kept[i][j] == other[i][j];
      all += 1;
    }
  return same / all;
}

}  // namespace

TEST_CASE("dropout drops its share of the pairs, others for each seed, step and head, the same every time") {
  const Index n = 200;
  Context context;
  const AttentionConfig config{.heads = 2, .dropout = 0.3, .dropout_seed = 1, .dropout_step = 1};
  const auto kept = kept_pairs(n, config, context);
  double count = 0;
  std::vector<double> by_key(static_cast<std::size_t>(n), 0.0);
  std::vector<std::vector<int>> first, second;
  for (const auto& row : kept) {
    double in_row = 0;
    for (std::size_t j = 0; j < row.size(); ++j) {
      in_row += row[j];
      by_key[j % static_cast<std::size_t>(n)] += row[j];
    }
    REQUIRE(std::abs(in_row / (2.0 * n) - 0.7) < 0.13);  // five standard deviations
    count += in_row;
    first.emplace_back(row.begin(), row.begin() + n);
    second.emplace_back(row.begin() + n, row.end());
  }
  for (const double in_column : by_key) REQUIRE(std::abs(in_column / (2.0 * n) - 0.7) < 0.13);
  REQUIRE(std::abs(count / (2.0 * n * n) - 0.7) < 0.01);
  REQUIRE(kept_pairs(n, config, context) == kept);
  // Unrelated masks agree at 0.7^2 + 0.3^2 of the pairs.
  AttentionConfig other = config;
  other.dropout_step = 2;
  REQUIRE(std::abs(share_of(kept, kept_pairs(n, other, context)) - 0.58) < 0.01);
  other = config;
  other.dropout_seed = 2;
  REQUIRE(std::abs(share_of(kept, kept_pairs(n, other, context)) - 0.58) < 0.01);
  REQUIRE(std::abs(share_of(first, second) - 0.58) < 0.015);
}

TEST_CASE("dropout: what becomes of memory does not depend on later tokens") {
  Random random(4);
  const RowMatrix<double> q = random.matrix<double>(40, 4), memory = random.matrix<double>(5, 4);
  const AttentionConfig config{.dropout = 0.5, .dropout_seed = 2};
  const AttentionTerms<double> terms{.memory_keys = memory, .memory_values = memory};
  Context context;
  RowMatrix<double> out[2];
  for (const Index n : {37, 40}) {
    AttentionPlan plan;
    plan_local({.tokens = n, .window = 6, .causal = true}, plan);
    plan_add_memory(5, plan);
    RowMatrix<double>& to = out[n == 40];
    to.resize(n, 4);
    attention_forward(plan, q.topRows(n), q.topRows(n), q.topRows(n), to, config, context, terms);
  }
  REQUIRE(out[0] == out[1].topRows(37));
}

TEST_CASE("dropout: a pair's fate does not depend on the plan, the scalar type, the workers or the instruction set") {
  const Index n = 700;  // two tasks
  AttentionPlan dense, clustered;
  plan_dense({.tokens = n, .causal = true}, dense);
  ClusterMembers halves{.tokens = n, .clusters = 2, .begin = {0, n / 2, n}};  // the same pairs, of two groups
  for (Index i = 0; i < n; ++i) halves.rows.push_back(static_cast<std::int32_t>(i));
  ClusterMembers queries{.tokens = n, .clusters = 2, .begin = {0, n, 2 * n}, .rows = halves.rows};
  queries.rows.insert(queries.rows.end(), halves.rows.begin(), halves.rows.end());
  plan_members(queries, halves, {.causal = true, .combine = Combine::lse}, clustered);
  Random random(1);
  const RowMatrix<double> q = random.matrix<double>(n, 4), k = random.matrix<double>(n, 4),
                          v = random.matrix<double>(n, 4);
  const AttentionConfig config{.dropout = 0.5, .dropout_seed = 9};
  RowMatrix<double> expected(n, 4);
  reference_forward(dense, q, k, v, expected, {}, config);
  ThreadPool pool(2);
  Workspace workspace;
  for (const InstructionSet set : instruction_sets())
    for (const AttentionPlan* plan : {&dense, &clustered}) {
      Context context(pool, workspace, set);
      RowMatrix<double> out(n, 4);
      attention_forward(*plan, q, k, v, out, config, context);
      REQUIRE((out - expected).cwiseAbs().maxCoeff() < 1e-12);
      RowMatrix<float> narrow(n, 4);
      attention_forward(*plan, RowMatrix<float>(q.cast<float>()), RowMatrix<float>(k.cast<float>()),
                        RowMatrix<float>(v.cast<float>()), narrow, config, context);
      REQUIRE((narrow.cast<double>() - expected).cwiseAbs().maxCoeff() < 1e-5);
    }
}
