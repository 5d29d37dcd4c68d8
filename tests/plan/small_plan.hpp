#pragma once

#include "coterie/plan/complete.hpp"

namespace test {

using namespace coterie;

/// Two groups: rows 0, 2 see keys 1, 3; row 1 sees key 0 and key 2, in two intervals. Row 3 is in no group.
inline AttentionPlan small_plan() {
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

}  // namespace test
