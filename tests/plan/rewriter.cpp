#include "coterie/plan/rewriter.hpp"

#include "allocation.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense_up_to.hpp"
#include "coterie/plan/globals.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/plan/sinks_recent.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"

using namespace test;

namespace {

// Requires that where memory ends change() leaves the plan as it was, and that it is right when tried again.
template <class Change>
void require_all_or_nothing(const AttentionPlan& before, Change change) {
  AttentionPlan expected = before;
  change(expected);
  REQUIRE_FALSE(same(expected, before));
  AttentionPlan plan;
  const auto check = [&](bool threw) {
    REQUIRE(threw);
    REQUIRE(same(plan, before));
    change(plan);
    REQUIRE(same(plan, expected));
  };
  REQUIRE(fail_each_allocation([&] { plan = AttentionPlan(before); }, [&] { change(plan); }, check) > 10);
  REQUIRE(same(plan, expected));
  validate(plan);
}

}  // namespace

TEST_CASE("plans on top of plans: where memory ends the plan is as it was") {
  const std::vector<Index> offsets = {0, 7, 7, 16}, key_offsets = {0, 5, 9, 20};
  AttentionPlan local, clustered, crossed;
  plan_local({.tokens = 16, .window = 3, .causal = true, .offsets = offsets}, local);
  const std::vector<std::int32_t> labels = {0, 1, 2, 0, 1, 2, -1, 1, 0, 0, 2, 2, 1, 0, 1, 2};
  plan_clustered(labels, labels, {.clusters = 3, .window = 2, .offsets = offsets}, clustered);
  plan_local({.tokens = 16, .keys = 20, .window = 2, .causal = true, .offsets = offsets, .key_offsets = key_offsets},
             crossed);
  for (const AttentionPlan* plan : {&local, &clustered}) {
    const bool causal = plan == &local;
    require_all_or_nothing(
        *plan, [&](AttentionPlan& p) { plan_dense_up_to({.length = 8, .causal = causal, .offsets = offsets}, p); });
    require_all_or_nothing(
        *plan, [&](AttentionPlan& p) { plan_add_globals({.globals = 2, .causal = causal, .offsets = offsets}, p); });
    require_all_or_nothing(*plan, [&](AttentionPlan& p) { plan_add_memory(3, p); });
  }
  require_all_or_nothing(crossed, [&](AttentionPlan& p) { plan_add_memory(3, p); });
  const SinksRecentConfig by_position{.sinks = 1, .recent = 5, .offsets = offsets};
  require_all_or_nothing(local, [&](AttentionPlan& p) { plan_add_sinks_recent(by_position, p); });
}

TEST_CASE("plans on top of plans: a plan that is wrong stays as it was") {
  AttentionPlan plan;
  plan_local({.tokens = 9, .window = 3, .causal = true}, plan);
  plan.visible[8].end = 4000;
  const AttentionPlan before = plan;
  const auto refuse = [&](auto change) {
    REQUIRE(contains(message_of<ValueError>([&] { change(plan); }), "visible"));
    REQUIRE(same(plan, before));
  };
  refuse([](AttentionPlan& p) { plan_dense_up_to({.length = 4, .causal = true}, p); });
  refuse([](AttentionPlan& p) { plan_add_globals({.globals = 2, .causal = true}, p); });
  refuse([](AttentionPlan& p) { plan_add_memory(2, p); });
}
