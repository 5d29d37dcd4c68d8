#include "coterie/plan/plan.hpp"

#include "catch.hpp"
#include "coterie/plan/complete.hpp"

using namespace coterie;

namespace {

// Two groups: rows 0, 2 see keys 1, 3; row 1 sees key 0 and key 2, in two intervals. Row 3 is in no group.
AttentionPlan counted_plan() {
  AttentionPlan plan;
  plan.tokens = 4;
  plan.key_tokens = 3;
  plan.memory_tokens = 1;
  plan.entries = {0, 2, 1};
  plan.keys = {1, 3, 0, 1, 2};
  plan.groups = {{0, 2, 0, 2}, {2, 3, 2, 5}};
  plan.visible = {{0, 1}, {0, 2}, {0, 1}};
  plan.visible_too = {{1, 1}, {2, 2}, {2, 3}};
  complete(plan);
  return plan;
}

}  // namespace

TEST_CASE("statistics") {
  PlanStatistics s = statistics(counted_plan());
  REQUIRE(s.groups == 2);
  REQUIRE(s.visible_pairs == 5);
  REQUIRE(s.keys_per_query.min == 0);
  REQUIRE(s.keys_per_query.mean == 1.25);
  REQUIRE(s.keys_per_query.max == 2);
  REQUIRE(s.entries_per_group.min == 1);
  REQUIRE(s.entries_per_group.mean == 1.5);
  REQUIRE(s.entries_per_group.max == 2);
  REQUIRE(s.keys_per_group.min == 2);
  REQUIRE(s.keys_per_group.mean == 2.5);
  REQUIRE(s.keys_per_group.max == 3);
  REQUIRE(s.tokens_seeing_nothing == 1);
  REQUIRE(s.tokens_without_entry == 1);
  REQUIRE(s.most_entries_per_row == 1);

  AttentionPlan plan = counted_plan();
  plan.visible[0] = {0, 0};
  complete(plan);
  s = statistics(plan);
  REQUIRE(s.tokens_seeing_nothing == 2);
  REQUIRE(s.tokens_without_entry == 1);

  AttentionPlan empty;
  complete(empty);
  s = statistics(empty);
  REQUIRE(s.groups == 0);
  REQUIRE(s.keys_per_query.mean == 0);
  REQUIRE_THROWS_AS(statistics(AttentionPlan{}), ValueError);
}
