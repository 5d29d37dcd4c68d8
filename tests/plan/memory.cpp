#include "coterie/plan/memory.hpp"

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

// What a plan shows, with `memory` rows before all others for every entry, or once for a row.
void require_added(AttentionPlan plan, Index memory) {
  const Mask before = mask_of(plan);
  const AttentionPlan old = plan;
  plan_add_memory(memory, plan);
  const Mask after = mask_of(plan);
  REQUIRE(plan.memory_tokens == memory);
  REQUIRE(plan.entries == old.entries);
  for (std::size_t i = 0; i < after.size(); ++i) {
    std::vector<Index> own, added;
    for (const Index key : after[i]) (key < plan.key_tokens ? own : added).push_back(key);
    REQUIRE(own == before[i]);
    if (!after[i].empty() && plan.combine == Combine::single) REQUIRE(after[i].front() >= plan.key_tokens);
    const Index entries = plan.row_begin[i + 1] - plan.row_begin[i];
    const Index times = plan.combine == Combine::lse ? std::min<Index>(entries, 1) : entries;
    REQUIRE(static_cast<Index>(added.size()) == times * memory);
    for (Index m = 0; m < memory; ++m) REQUIRE(std::count(added.begin(), added.end(), plan.key_tokens + m) == times);
  }
}

}  // namespace

TEST_CASE("memory is seen by every entry, beside what it saw") {
  AttentionPlan plan;
  Random random(3);
  for (const Setting& s : settings({0, 1, 9}))
    for (const Index memory : {1, 5}) {
      INFO(s.text());
      plan_dense({s.tokens, s.keys, s.causal, s.alignment, Self::visible, s.offsets, s.key_offsets}, plan);
      require_added(plan, memory);
      if (s.self != Self::visible && !s.causal) continue;  // two intervals, tested below
      const auto query_labels = random.labels(s.tokens, 3, -1), key_labels = random.labels(s.keys, 3, -1);
      plan_clustered(query_labels, key_labels, {3, 2, s.causal, s.alignment, s.self, s.offsets, s.key_offsets}, plan);
      require_added(plan, memory);
    }
}

TEST_CASE("memory before two intervals needs the first to begin with the keys") {
  AttentionPlan plan;
  plan_dense({.tokens = 6, .self = Self::never}, plan);
  require_added(plan, 2);
  plan_local({.tokens = 6, .window = 2, .lookahead = 1, .self = Self::never}, plan);
  const AttentionPlan before = plan;
  REQUIRE_THROWS_AS(plan_add_memory(2, plan), ValueError);
  REQUIRE(plan.keys == before.keys);
  REQUIRE(plan.memory_tokens == 0);
  validate(plan);
}

TEST_CASE("memory: once for a row with one softmax over several entries") {
  AttentionPlan plan;
  plan.tokens = plan.key_tokens = 3;
  plan.combine = Combine::lse;
  plan.groups = {{0, 2, 0, 2}, {2, 4, 2, 4}};
  plan.entries = plan.keys = {0, 1, 1, 2};
  plan.visible = {{0, 1}, {0, 2}, {0, 1}, {0, 2}};
  complete(plan);
  require_added(plan, 2);
  plan.combine = Combine::mean;
  require_added(plan, 2);
}

TEST_CASE("memory: errors") {
  AttentionPlan plan;
  plan_dense({.tokens = 3}, plan);
  REQUIRE_THROWS_AS(plan_add_memory(-1, plan), ValueError);
  REQUIRE_THROWS_AS(plan_add_memory(std::numeric_limits<Index>::max(), plan), ValueError);
  REQUIRE_THROWS_AS(plan_add_memory(std::numeric_limits<std::int32_t>::max(), plan), ValueError);
  plan_add_memory(0, plan);
  REQUIRE(plan.memory_tokens == 0);
  plan_add_memory(2, plan);
  REQUIRE_THROWS_AS(plan_add_memory(2, plan), ValueError);
  plan.row_begin.clear();
  REQUIRE_THROWS_AS(plan_add_memory(2, plan), ValueError);
}
