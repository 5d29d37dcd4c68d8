#include "coterie/plan/globals.hpp"

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/memory.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

// By the definition: global queries see their sequence, the others see its global tokens and what they saw.
Mask expected_globals(const Mask& before, const Setting& s, Index globals) {
  Mask mask = before;
  std::vector<Index> offsets = s.offsets.empty() ? std::vector<Index>{0, s.tokens} : s.offsets;
  for (std::size_t q = 0; q + 1 < offsets.size(); ++q)
    for (Index i = offsets[q]; i < offsets[q + 1]; ++i) {
      auto& row = mask[static_cast<std::size_t>(i)];
      const Index bound = std::min(offsets[q] + globals, offsets[q + 1]);
      if (i < bound) {
        row.clear();
        for (Index j = offsets[q]; j < (s.causal ? i + 1 : offsets[q + 1]); ++j) row.push_back(j);
        const bool alone = row.size() == 1;
        if (s.self == Self::never || (s.self == Self::only_if_alone && !alone))
          row.erase(std::find(row.begin(), row.end(), i));
        continue;
      }
      for (Index j = offsets[q]; j < bound; ++j)
        if (std::find(row.begin(), row.end(), j) == row.end()) row.push_back(j);
      std::sort(row.begin(), row.end());
    }
  return mask;
}

}  // namespace

TEST_CASE("global tokens see all and are seen by all of their sequence") {
  AttentionPlan plan;
  Random random(4);
  const std::vector<Index> ragged = {0, 0, 5, 6, 6, 13};
  for (const bool causal : {false, true})
    for (const Self self : {Self::visible, Self::only_if_alone, Self::never})
      for (const Index globals : {1, 3, 20})
        for (const std::vector<Index>& offsets : {std::vector<Index>{}, ragged}) {
          const Setting s{13, 13, causal, {}, self, offsets};
          INFO(s.text() << " globals " << globals);
          const auto check = [&] {
            const Mask before = mask_of(plan);
            plan_add_globals({globals, causal, self, offsets}, plan);
            REQUIRE(mask_of(plan) == expected_globals(before, s, globals));
          };
          plan_dense({13, 0, causal, {}, self, offsets}, plan);
          check();
          if (!causal && self != Self::visible) continue;  // three intervals
          plan_local({13, 0, 3, causal ? 0 : 1, causal, {}, self, offsets}, plan);
          check();
          const auto labels = random.labels(13, 3, 0);
          for (const Index window : {0, 2}) {
            plan_clustered(labels, labels, {3, window, causal, {}, self, offsets}, plan);
            check();
          }
        }
}

TEST_CASE("global tokens: memory joins them in one interval, beside a window too") {
  AttentionPlan plan;
  plan_local({.tokens = 12, .window = 2, .causal = true}, plan);
  plan_add_globals({.globals = 2, .causal = true}, plan);
  REQUIRE(mask_of(plan)[9] == std::vector<Index>{0, 1, 8, 9});
  plan_add_memory(1, plan);
  REQUIRE(mask_of(plan)[9] == std::vector<Index>{12, 0, 1, 8, 9});
  const std::vector<std::int32_t> labels = {0, 1, 0, 1, 0, 1};
  plan_clustered(labels, labels, {.clusters = 2}, plan);
  plan_add_globals({.globals = 1}, plan);
  plan_add_memory(1, plan);
  REQUIRE(mask_of(plan)[3] == std::vector<Index>{6, 0, 1, 3, 5});
}

TEST_CASE("global tokens: errors leave the plan as it was") {
  AttentionPlan plan;
  plan_local({.tokens = 8, .window = 2, .lookahead = 2, .self = Self::never}, plan);
  const AttentionPlan before = plan;
  REQUIRE_THROWS_AS(plan_add_globals({.globals = 1, .self = Self::never}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_add_globals({.globals = -1}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_add_globals({.globals = 1, .self = static_cast<Self>(7)}, plan), ValueError);
  const std::vector<Index> bad = {0, 9}, inside = {0, 4, 8};
  REQUIRE_THROWS_AS(plan_add_globals({.globals = 1, .offsets = bad}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_add_globals({.globals = 1, .offsets = inside}, plan), ValueError);
  REQUIRE(plan.keys == before.keys);
  REQUIRE(plan.groups.size() == before.groups.size());
  validate(plan);
  plan_dense({.tokens = 3, .keys = 5}, plan);
  REQUIRE_THROWS_AS(plan_add_globals({.globals = 1}, plan), ValueError);
  plan_dense({.tokens = 3}, plan);
  plan_add_globals({}, plan);
  REQUIRE(plan.groups.size() == 1);
}
