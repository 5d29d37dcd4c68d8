#include "coterie/plan/builder.hpp"

#include "allocation.hpp"
#include "cases.hpp"
#include "coterie/plan/dense_up_to.hpp"
#include "coterie/plan/members.hpp"
#include "plan/masks.hpp"

using namespace test;

TEST_CASE("builders allocate nothing the second time") {
  const Index n = 300;
  const auto labels = Random(1).labels(n, 8, -1);
  const std::vector<Index> offsets = {0, 100, 100, n};
  AttentionPlan plan;
  PlanScratch scratch;
  ClusterMembers members;
  members.tokens = n;
  members.clusters = 2;
  for (std::int32_t row = 0; row < n; ++row) members.rows.push_back(row);
  for (std::int32_t row = 0; row < n; row += 3) members.rows.push_back(row);
  members.begin = {0, n, static_cast<std::int32_t>(members.rows.size())};
  const auto build_all = [&] {
    plan_dense({.tokens = n, .keys = n + 5, .causal = true}, plan, &scratch);
    plan_local({.tokens = n, .window = 7, .lookahead = 3, .self = Self::never, .offsets = offsets}, plan, &scratch);
    plan_clustered(labels, labels, {.clusters = 8, .window = 7, .causal = true, .offsets = offsets}, plan, &scratch);
    plan_random({.tokens = n, .clusters = 8, .offsets = offsets, .seed = 1}, plan, &scratch);
    plan_strided({.tokens = n, .stride = 9}, plan, &scratch);
    plan_members(members, members, {.causal = true, .combine = Combine::lse}, plan, &scratch);
    plan_local({.tokens = n, .window = 7, .causal = true, .offsets = offsets}, plan, &scratch);
    plan_dense_up_to({.length = 20, .causal = true, .offsets = offsets}, plan, &scratch);
    plan_add_globals({.globals = 2, .causal = true, .offsets = offsets}, plan, &scratch);
    plan_add_memory(3, plan, &scratch);
  };
  build_all();
  const long before = allocations();
  build_all();
  REQUIRE(allocations() == before);

  AttentionPlan fresh;  // the counter counts
  plan_dense({.tokens = n}, fresh);
  REQUIRE(allocations() > before);
}

TEST_CASE("builders: where memory ends the plan is refused, and the next build is right") {
  const Index n = 60;
  const auto labels = Random(1).labels(n, 8, -1);
  const std::vector<Index> offsets = {0, 25, 25, n};
  const ClusteredConfig config{.clusters = 8, .window = 7, .causal = true, .offsets = offsets};
  AttentionPlan expected, plan;
  plan_clustered(labels, labels, config, expected);
  const auto prepare = [&] {
    plan = AttentionPlan();
    plan_dense({.tokens = n, .causal = true}, plan);  // of another pattern, for as many rows
  };
  const auto check = [&](bool threw) {
    REQUIRE(threw);
    REQUIRE((plan.row_begin.empty() || plan.groups.size() == 1));  // refused, or still the one before
    plan_clustered(labels, labels, config, plan);
    REQUIRE(same(plan, expected));
  };
  REQUIRE(fail_each_allocation(
              prepare, [&] { plan_clustered(labels, labels, config, plan); }, check) > 3);
  REQUIRE(same(plan, expected));
}

TEST_CASE("builders: a scratch serves plans of any kind and size, and is no part of them") {
  PlanScratch scratch;
  AttentionPlan plan, fresh;
  for (const Index n : {90, 7, 200}) {
    const auto labels = Random(1).labels(n, 3, -1);
    plan_clustered(labels, labels, {.clusters = 3, .window = 4}, plan, &scratch);
    plan_clustered(labels, labels, {.clusters = 3, .window = 4}, fresh);
    REQUIRE(same(plan, fresh));
    plan_strided({.tokens = n, .stride = 4, .causal = true}, plan, &scratch);
    plan_strided({.tokens = n, .stride = 4, .causal = true}, fresh);
    plan_add_globals({.globals = 2, .causal = true}, plan, &scratch);
    plan_add_globals({.globals = 2, .causal = true}, fresh);
    REQUIRE(same(plan, fresh));
  }
}

TEST_CASE("builders: a plan that held another pattern keeps nothing of it") {
  AttentionPlan fresh, used;
  for (const AttentionCase& previous : attention_cases())
    for (const AttentionCase& next : attention_cases({.tokens = 11})) {
      INFO(previous.name << ", then " << next.name);
      fresh = AttentionPlan{};
      previous.fill(used);
      next.fill(used);
      next.fill(fresh);
      REQUIRE(used.combine == fresh.combine);
      REQUIRE(used.memory_tokens == fresh.memory_tokens);
      REQUIRE(used.query_positions == fresh.query_positions);
      REQUIRE(used.key_positions == fresh.key_positions);
      REQUIRE(mask_of(used) == mask_of(fresh));
    }
}

TEST_CASE("builders: a ragged plan is its sequences' plans, one after the other") {
  const Index n = 60;
  const auto labels = Random(2).labels(n, 4, -1);
  const std::vector<Index> offsets = {0, 7, 7, 8, 41, n};
  AttentionPlan whole, one;
  for (const bool causal : {false, true})
    for (const Self self : {Self::visible, Self::only_if_alone, Self::never}) {
      plan_clustered(labels, labels, {.clusters = 4, .window = 3, .causal = causal, .self = self, .offsets = offsets},
                     whole);
      Mask expected;
      for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
        const auto slice = std::span(labels).subspan(static_cast<std::size_t>(offsets[s]),
                                                     static_cast<std::size_t>(offsets[s + 1] - offsets[s]));
        plan_clustered(slice, slice, {.clusters = 4, .window = 3, .causal = causal, .self = self}, one);
        for (auto row : mask_of(one)) {
          for (Index& j : row) j += offsets[s];
          expected.push_back(row);
        }
      }
      REQUIRE(mask_of(whole) == expected);
    }
}

TEST_CASE("builders: no sequences at all, and only empty ones") {
  AttentionPlan plan;
  const std::vector<Index> none = {0}, empty = {0, 0, 0}, keys = {0, 3, 5};
  plan_dense({.tokens = 0, .offsets = none}, plan);
  REQUIRE(plan.groups.empty());
  REQUIRE(plan.tasks() == 0);
  plan_local({.tokens = 0, .window = 2, .offsets = empty}, plan);
  REQUIRE(plan.groups.empty());
  plan_dense({.tokens = 0, .keys = 5, .offsets = empty, .key_offsets = keys}, plan);
  REQUIRE(plan.groups.size() == 2);
  REQUIRE(plan.parts.empty());
  validate(plan);
}

TEST_CASE("builders: many short sequences and many clusters in linear time") {
  const Index n = 20000;
  std::vector<Index> offsets;
  for (Index i = 0; i <= n; ++i) offsets.push_back(i);
  const auto labels = Random(3).labels(n, n);
  AttentionPlan plan;
  plan_clustered(labels, labels, {.clusters = n, .offsets = offsets}, plan);  // 4e8 steps if it were not
  REQUIRE(statistics(plan).groups == n);
}
