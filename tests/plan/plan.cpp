#include "coterie/plan/plan.hpp"

#include "catch.hpp"
#include "coterie/plan/complete.hpp"
#include "plan/small_plan.hpp"

using namespace test;

TEST_CASE("statistics") {
  PlanStatistics s = statistics(small_plan());
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

  AttentionPlan plan = small_plan();
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
