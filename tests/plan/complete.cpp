#include "coterie/plan/complete.hpp"

#include <functional>
#include <limits>

#include "allocation.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "plan/small_plan.hpp"

using namespace test;

namespace {

// One group of each size.
AttentionPlan plan_of_groups(const std::vector<std::int32_t>& sizes) {
  AttentionPlan plan;
  for (const std::int32_t size : sizes) {
    const auto begin = static_cast<std::int32_t>(plan.entries.size());
    plan.groups.push_back({begin, begin + size, 0, 0});
    for (std::int32_t i = 0; i < size; ++i) plan.entries.push_back(begin + i);
  }
  plan.tokens = static_cast<Index>(plan.entries.size());
  plan.visible.resize(plan.entries.size());
  complete(plan);
  validate(plan);
  return plan;
}

}  // namespace

TEST_CASE("complete: the inverse of entries") {
  const AttentionPlan plan = small_plan();
  validate(plan);
  REQUIRE(plan.row_begin == std::vector<std::int32_t>{0, 1, 2, 3, 3});
  REQUIRE(plan.row_entries == std::vector<std::int32_t>{0, 2, 1});
  REQUIRE(plan.parts.size() == 2);
  REQUIRE(plan.tasks() == 1);
  REQUIRE(mask_of(plan) == Mask{{1}, {0, 2}, {1, 3}, {}});
}

TEST_CASE("complete: rows in several groups, in order of their entries") {
  AttentionPlan plan;
  plan.tokens = 3;
  plan.key_tokens = 1;
  plan.combine = Combine::lse;
  plan.entries = {1, 2, 0, 1, 1};
  plan.groups = {{0, 2, 0, 0}, {2, 4, 0, 0}, {4, 5, 0, 0}};
  plan.visible.resize(5);
  complete(plan);
  validate(plan);
  REQUIRE(plan.row_begin == std::vector<std::int32_t>{0, 1, 4, 5});
  REQUIRE(plan.row_entries == std::vector<std::int32_t>{2, 0, 3, 4, 1});
}

TEST_CASE("complete: parts cut large groups, tasks gather small ones") {
  const std::int32_t most = AttentionPlan::part_entries;
  const AttentionPlan plan = plan_of_groups({0, 3, 2 * most + 5, most, 0, 1, most - 1, 7});
  std::vector<std::int32_t> sizes;
  for (const AttentionPlan::Part& part : plan.parts) {
    sizes.push_back(part.entry_end - part.entry_begin);
    const std::int32_t begin = plan.groups[static_cast<std::size_t>(part.group)].entry_begin;
    REQUIRE((part.entry_begin - begin) % most == 0);
  }
  REQUIRE(sizes == std::vector<std::int32_t>{3, most, most, 5, most, 1, most - 1, 7});
  REQUIRE(plan.task_begin == std::vector<std::int32_t>{0, 2, 3, 5, 7, 8});
  REQUIRE(plan_of_groups({}).tasks() == 0);
  REQUIRE(plan_of_groups({0, 0}).tasks() == 0);
  REQUIRE(plan_of_groups(std::vector<std::int32_t>(2000, 1)).tasks() == 4);
}

TEST_CASE("complete allocates nothing the second time") {
  AttentionPlan plan = small_plan();
  PlanScratch scratch;
  complete(plan, &scratch);
  const long before = allocations();
  complete(plan, &scratch);
  REQUIRE(allocations() == before);
}

TEST_CASE("complete: where memory ends nothing is derived") {
  AttentionPlan plan;
  const auto prepare = [&] {
    plan = AttentionPlan();
    plan.tokens = plan.key_tokens = 3;
    plan.combine = Combine::lse;
    plan.groups = {{0, 2, 0, 2}, {2, 4, 2, 4}};
    plan.entries = plan.keys = {0, 1, 1, 2};
    plan.visible = {{0, 1}, {0, 2}, {0, 1}, {0, 2}};
  };
  const auto check = [&](bool threw) {
    REQUIRE(threw);
    REQUIRE((plan.row_begin.empty() && plan.row_entries.empty() && plan.parts.empty() && plan.task_begin.empty()));
  };
  REQUIRE(fail_each_allocation(
              prepare, [&] { complete(plan); }, check) > 3);
  validate(plan);
}

TEST_CASE("complete: a part is alone where it is its group's only one and its keys are in no other group") {
  AttentionPlan plan;
  plan.tokens = plan.key_tokens = 6;
  plan.groups = {{0, 2, 0, 2}, {2, 4, 2, 5}, {4, 5, 5, 7}, {5, 6, 7, 8}};
  plan.entries = {0, 1, 2, 3, 4, 5};
  plan.keys = {0, 1, 2, 3, 5, 4, 5, 0};
  plan.visible = {{0, 1}, {0, 2}, {0, 1}, {0, 3}, {0, 2}, {0, 0}};  // listed is enough, also where nobody sees it
  complete(plan);
  std::vector<bool> alone;
  for (const AttentionPlan::Part& part : plan.parts) alone.push_back(part.alone);
  REQUIRE(alone == std::vector<bool>{false, false, false, false});
  plan.keys = {0, 1, 2, 3, 5, 4, 5, 2};
  complete(plan);
  REQUIRE(plan.parts[0].alone);
  REQUIRE_FALSE(plan.parts[1].alone);
  const std::int32_t most = AttentionPlan::part_entries;
  for (const AttentionPlan::Part& part : plan_of_groups({most + 1, 3}).parts) REQUIRE(part.alone == (part.group == 1));
}

TEST_CASE("complete and validate name each planted fault") {
  struct Fault {
    std::function<void(AttentionPlan&)> plant;
    std::string message;
  };
  const std::vector<Fault> faults = {
      {[](AttentionPlan& p) { p.tokens = -1; }, "tokens: expected 0 to 2147483647, got -1"},
      {[](AttentionPlan& p) { p.tokens = Index(1) << 31; }, "tokens: expected 0 to 2147483647, got 2147483648"},
      {[](AttentionPlan& p) { p.memory_tokens = std::numeric_limits<std::int32_t>::max(); },
       "key_tokens + memory_tokens"},
      {[](AttentionPlan& p) { p.tokens = 2; }, "entries[1]: expected"},
      {[](AttentionPlan& p) { p.entries[0] = -1; }, "entries[0]: expected a row in [0, 4), got -1"},
      {[](AttentionPlan& p) { p.entries[1] = 0; }, "entries[1]: expected ascending rows"},
      {[](AttentionPlan& p) { p.keys[1] = 4; }, "keys[1]: expected"},
      {[](AttentionPlan& p) { p.keys[0] = -1; }, "keys[0]: expected"},
      {[](AttentionPlan& p) { std::swap(p.keys[2], p.keys[3]); }, "keys[3]: expected ascending rows"},
      {[](AttentionPlan& p) { p.groups[1].entry_begin = 1; }, "groups[1]: expected entries from 2 on"},
      {[](AttentionPlan& p) { p.groups[1].entry_end = 4; }, "groups[1]: expected entries from 2 on"},
      {[](AttentionPlan& p) { p.groups[0].key_end = 1; }, "groups[1]: expected keys from 1 on"},
      {[](AttentionPlan& p) { p.groups[0].key_end = -1; }, "groups[0]: expected keys from 0 on"},
      {[](AttentionPlan& p) { p.groups.pop_back(); }, "groups: expected all 3 entries and 5 keys"},
      {[](AttentionPlan& p) { p.visible.pop_back(); }, "visible: expected 3 values, got 2"},
      {[](AttentionPlan& p) { p.visible_too.pop_back(); }, "visible_too: expected 3 values, got 2"},
      {[](AttentionPlan& p) {
         p.visible[1] = {0, 3};
       },
       "visible[1]: expected begin <= end inside [0, 2), got [0, 3)"},
      {[](AttentionPlan& p) {
         p.visible[0] = {-1, 1};
       },
       "visible[0]: expected"},
      {[](AttentionPlan& p) {
         p.visible[0] = {1, 0};
       },
       "visible[0]: expected"},
      {[](AttentionPlan& p) {
         p.visible_too[2] = {0, 3};
       },
       "visible_too[2]: expected begin <= end inside [1, 3)"},
      {[](AttentionPlan& p) {
         p.visible_too[2] = {2, 4};
       },
       "visible_too[2]: expected"},
      {[](AttentionPlan& p) { p.query_positions = {1}; }, "query_positions: expected 4 values, got 1"},
      {[](AttentionPlan& p) {
         p.key_positions = {1, 2, 3};
       },
       "key_positions: expected 4 values, got 3"},
      {[](AttentionPlan& p) { p.entries[2] = 2; }, "entries of row 2: expected one for Combine::single, got 2"},
  };
  for (const Fault& fault : faults) {
    INFO(fault.message);
    AttentionPlan plan = small_plan();
    fault.plant(plan);
    // What complete() derived does not fit any more either; validate() looks at the written arrays first.
    if (!contains(fault.message, "single"))
      REQUIRE(contains(message_of<std::invalid_argument>([&] { validate(plan); }), "validate: " + fault.message));
    REQUIRE(contains(message_of<std::invalid_argument>([&] { complete(plan); }), "complete: " + fault.message));
    REQUIRE(plan.tasks() == 0);
    REQUIRE(plan.row_begin.empty());
  }
}

TEST_CASE("validate: sizes are ShapeError, values are ValueError") {
  AttentionPlan plan = small_plan();
  plan.visible.pop_back();
  REQUIRE_THROWS_AS(validate(plan), ShapeError);
  plan = small_plan();
  plan.entries[0] = 9;
  REQUIRE_THROWS_AS(validate(plan), ValueError);
}

TEST_CASE("validate looks at every derived array") {
  const std::vector<std::function<void(AttentionPlan&)>> faults = {
      [](AttentionPlan& p) { p.row_begin.clear(); },
      [](AttentionPlan& p) {
        p.row_begin = {0, 2, 1, 3, 3};
      },
      [](AttentionPlan& p) {
        p.row_begin = {0, 1, 2, 2, 3};
      },
      [](AttentionPlan& p) {
        p.row_begin = {0, 9, 2, 3, 3};
      },
      [](AttentionPlan& p) { p.row_entries.pop_back(); },
      [](AttentionPlan& p) { std::swap(p.row_entries[0], p.row_entries[1]); },
      [](AttentionPlan& p) { p.row_entries[0] = 77; },
      [](AttentionPlan& p) { p.parts.pop_back(); },
      [](AttentionPlan& p) { p.parts.push_back(p.parts.back()); },
      [](AttentionPlan& p) { p.parts[0].entry_end = 1; },
      [](AttentionPlan& p) { p.parts[1].group = 0; },
      [](AttentionPlan& p) { p.task_begin.clear(); },
      [](AttentionPlan& p) {
        p.task_begin = {0, 1};
      },
      [](AttentionPlan& p) {
        p.task_begin = {0, 1, 2};
      },
      [](AttentionPlan& p) {
        p.task_begin = {1, 2};
      },
      [](AttentionPlan& p) {  // two entries for a row, completed as lse
        p.combine = Combine::lse;
        p.entries[2] = 2;
        complete(p);
        p.combine = Combine::single;
      },
  };
  for (const auto& plant : faults) {
    AttentionPlan plan = small_plan();
    plant(plan);
    REQUIRE_THROWS_AS(validate(plan), ValueError);
  }
}
