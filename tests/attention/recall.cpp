#include "coterie/attention/recall.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"
#include "errors.hpp"

using namespace test;

TEST_CASE("recall is the mass of the wider plan's softmax on keys of the plan, for every case") {
  Context context;
  for (const AttentionCase& c : attention_cases()) {
    INFO(c.name);
    const Inputs<double> in(c, 4);
    AttentionPlan full;
    full.tokens = in.plan.tokens;
    full.key_tokens = in.plan.key_tokens;
    full.memory_tokens = in.plan.memory_tokens;
    full.combine = in.plan.combine;
    full.query_positions = in.plan.query_positions;
    full.key_positions = in.plan.key_positions;
    const auto rows = static_cast<std::int32_t>(full.tokens);
    const auto keys = static_cast<std::int32_t>(full.key_tokens + full.memory_tokens);
    full.groups = {{0, rows, 0, keys}};
    for (std::int32_t i = 0; i < rows; ++i) full.entries.push_back(i), full.visible.push_back({0, keys});
    for (std::int32_t j = 0; j < keys; ++j) full.keys.push_back(j);
    complete(full);
    const AttentionRecall got =
        attention_recall(in.plan, full, in.q, in.k, in.v, in.config, {.queries = 1000}, context, in.terms());
    const AttentionRecall mass =
        attention_recall(in.plan, full, in.q, in.k, in.config, {.queries = 1000}, context, in.terms());
    REQUIRE(mass.rows == got.rows);
    REQUIRE(mass.heads == got.heads);
    REQUIRE((mass.error == 0 && mass.row_errors.empty() && mass.head_errors.empty()));
    REQUIRE(static_cast<Index>(got.queries.size()) == full.tokens);
    AttentionConfig config = in.config;
    config.dropout = 0;
    const AttentionTerms<double> terms = in.terms();
    const coterie::detail::Reference<double> reference("recall", full, in.q, in.k, in.v, config, terms);
    double mean = 0, mean_error = 0, worst = 0;
    const Index dv = reference.call().dv();
    for (Index h = 0; h < config.heads; ++h) {
      double squares = 0;
      for (Index i = 0; i < full.tokens; ++i) {
        std::vector<double> p;
        const auto softmax = reference.softmaxes(h, i)[0];
        reference.probabilities(h, i, softmax, p);
        std::vector<char> sees(static_cast<std::size_t>(keys), 0);
        for (const AttentionPlan::Group& g : in.plan.groups)
          for (std::int32_t e = g.entry_begin; e < g.entry_end; ++e) {
            if (in.plan.entries[static_cast<std::size_t>(e)] != i) continue;
            const auto see = [&](Interval s) {
              for (std::int32_t r = s.begin; r < s.end; ++r)
                sees[static_cast<std::size_t>(in.plan.keys[static_cast<std::size_t>(g.key_begin + r)])] = 1;
            };
            see(in.plan.visible[static_cast<std::size_t>(e)]);
            if (!in.plan.visible_too.empty()) see(in.plan.visible_too[static_cast<std::size_t>(e)]);
          }
        double kept = 0;
        for (std::size_t j = 0; j < p.size(); ++j) kept += sees[static_cast<std::size_t>(softmax.keys[j])] ? p[j] : 0;
        CHECK(std::abs(got.rows[static_cast<std::size_t>(i * config.heads + h)] - kept) < 1e-12);
        mean += kept / static_cast<double>(full.tokens * config.heads);
        double difference = 0, square = 0;
        for (Index l = 0; l < dv; ++l) {
          double all = 0, some = 0;
          for (std::size_t j = 0; j < p.size(); ++j) {
            const double term = p[j] * reference.value(h, i, softmax.keys[j])[l];
            all += term;
            if (sees[static_cast<std::size_t>(softmax.keys[j])]) some += term;
          }
          if (kept > 0) some /= kept;
          difference += (some - all) * (some - all);
          square += all * all;
        }
        const double error = std::sqrt(difference / square);
        CHECK(std::abs(got.row_errors[static_cast<std::size_t>(i * config.heads + h)] - error) < 1e-9 * (1 + error));
        squares += error * error;
      }
      const double error = std::sqrt(squares / static_cast<double>(full.tokens));
      CHECK(std::abs(got.head_errors[static_cast<std::size_t>(h)] - error) < 1e-9 * (1 + error));
      mean_error += error / static_cast<double>(config.heads);
      worst = std::max(worst, error);
    }
    CHECK(std::abs(got.mean - mean) < 1e-12);
    CHECK(std::abs(got.error - mean_error) < 1e-9 * (1 + mean_error));
    CHECK(std::abs(got.worst_error - worst) < 1e-9 * (1 + worst));
  }
}

TEST_CASE("recall: distances are those of the wider plan, and a logit that is no number shows") {
  Random random(3);
  const RowMatrix<double> q = random.matrix<double>(4, 5);
  RowMatrix<double> k = random.matrix<double>(8, 5);
  const RowMatrix<double> bias = 3 * random.matrix<double>(1, 9);
  AttentionPlan local, dense;
  plan_local({.tokens = 4, .keys = 8, .window = 3, .causal = true}, local);  // the last query meets the last key
  plan_dense({.tokens = 4, .keys = 8}, dense);                               // queries spread over the keys
  Context context;
  const AttentionTerms<double> terms{.bias = {bias, -4}};
  const AttentionRecall got = attention_recall(local, dense, q, k, {}, {}, context, terms);
  const AttentionConfig config;
  const coterie::detail::Reference<double> reference("recall", dense, q, k, k, config, terms);
  for (Index i = 0; i < 4; ++i) {
    std::vector<double> p;
    reference.probabilities(0, i, reference.softmaxes(0, i)[0], p);
    double kept = 0;
    for (Index j = std::max<Index>(0, i + 2); j <= i + 4; ++j) kept += p[static_cast<std::size_t>(j)];
    REQUIRE(got.rows[static_cast<std::size_t>(i)] == Approx(kept));
  }
  k(3, 0) = std::numeric_limits<double>::quiet_NaN();
  const AttentionRecall bad = attention_recall(dense, dense, q, k, {}, {}, context);
  REQUIRE(bad.queries.size() == 4);
  REQUIRE(std::isnan(bad.mean));
  const AttentionRecall worse = attention_recall(dense, dense, q, k, k, {}, {}, context);
  REQUIRE(std::isnan(worse.error));
  REQUIRE(std::isnan(worse.worst_error));
}

TEST_CASE("recall: a plan keeps all of itself; samples are drawn, ascending, and the same for any workers") {
  const Index n = 300;
  AttentionPlan dense, local;
  plan_dense({.tokens = n, .causal = true}, dense);
  plan_local({.tokens = n, .window = 20, .causal = true}, local);
  Random random(2);
  const RowMatrix<float> q = random.matrix<float>(n, 8), k = random.matrix<float>(n, 8);
  Context context;
  REQUIRE(attention_recall(dense, dense, q, k, {.heads = 2}, {}, context).mean == 1);
  REQUIRE(attention_recall(dense, dense, q, k, k, {.heads = 2}, {}, context).error == 0);
  const AttentionRecall one = attention_recall(local, dense, q, k, {.heads = 2}, {.queries = 50, .seed = 3}, context);
  REQUIRE(one.queries == coterie::detail::draw_rows(n, 50, 3));
  REQUIRE(one.rows.size() == 100);
  REQUIRE(one.mean > 0.05);
  REQUIRE(one.mean < 0.95);
  ThreadPool pool(3);
  Workspace workspace;
  Context three(pool, workspace);
  REQUIRE(attention_recall(local, dense, q, k, {.heads = 2}, {.queries = 50, .seed = 3}, three).rows == one.rows);
  REQUIRE(attention_recall(local, dense, q, k, {.heads = 2}, {.queries = 50, .seed = 4}, three).rows != one.rows);
  const auto rows = coterie::detail::draw_rows(20, 7, 1);
  REQUIRE(rows.size() == 7);
  REQUIRE(std::is_sorted(rows.begin(), rows.end()));
  REQUIRE(std::adjacent_find(rows.begin(), rows.end()) == rows.end());
  REQUIRE_THROWS_AS(attention_recall(local, dense, q, k, {.heads = 2}, {.queries = 0}, context), ValueError);
  AttentionPlan other;
  plan_dense({.tokens = n - 1, .causal = true}, other);
  REQUIRE_THROWS_AS(attention_recall(local, other, q, k, {.heads = 2}, {}, context), ShapeError);
}
