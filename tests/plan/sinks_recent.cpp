#include "coterie/plan/sinks_recent.hpp"

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/dense_up_to.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/members.hpp"
#include "coterie/plan/memory.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

// By the definition: keys of a pattern with Self::visible, sinks and recent keys, once each; then the self rule.
Mask expected_union(const Mask& pattern, const Setting& s, Index sinks, Index recent) {
  return expected_mask(s, [&](Index row, Index c, Index first, Index count) {
    std::vector<Index> seen;
    const auto& shown = pattern[static_cast<std::size_t>(row)];
    for (Index j = 0; j < count && j <= c; ++j)
      if (j < sinks || j > c - recent || std::find(shown.begin(), shown.end(), first + j) != shown.end())
        seen.push_back(j);
    return seen;
  });
}

Mask sorted_mask(Mask mask) {
  for (auto& row : mask) std::sort(row.begin(), row.end());
  return mask;
}

}  // namespace

TEST_CASE("sinks and recent keys are seen beside any causal pattern, each key once") {
  AttentionPlan plan, shown;
  Random random(4);
  for (Setting s : settings({1, 2, 7, 12})) {
    if (!s.causal || s.rule() == Alignment::proportional) continue;
    const auto query_labels = random.labels(s.tokens, 3, -1), key_labels = random.labels(s.keys, 3, -1);
    for (const Index window : {0, 2})
      for (const Index sinks : {0, 1, 3, 40})
        for (const Index recent : {0, 1, 4, 40}) {
          INFO(s.text() << " window " << window << " sinks " << sinks << " recent " << recent);
          const auto check = [&](auto build) {
            build(Self::visible, shown);
            build(s.self, plan);
            const AttentionPlan before = plan;
            plan_add_sinks_recent({sinks, recent, s.alignment, s.self, s.offsets, s.key_offsets}, plan);
            if (sinks + recent == 0) {
              REQUIRE(same(plan, before));
              return;
            }
            REQUIRE(plan.combine == Combine::lse);
            REQUIRE(sorted_mask(mask_of(plan)) == expected_union(mask_of(shown), s, sinks, recent));
            require_distances(plan, s);
          };
          check([&](Self self, AttentionPlan& to) {
            const bool own = s.tokens == s.keys && s.key_offsets.empty();
            plan_clustered(query_labels, own ? query_labels : key_labels,
                           {3, window, true, s.alignment, self, s.offsets, s.key_offsets}, to);
          });
          check([&](Self self, AttentionPlan& to) {
            plan_local({s.tokens, s.keys, window + 1, 0, true, s.alignment, self, s.offsets, s.key_offsets}, to);
          });
        }
  }
}

TEST_CASE("sinks and recent keys join the softmax of several clusters, and memory and a dense beginning join them") {
  // Queries 4 and 5 are in both clusters; keys are in one each.
  const ClusterMembers queries{6, 2, 1, {0, 4, 8}, {0, 2, 4, 5, 1, 3, 4, 5}};
  const ClusterMembers keys{6, 2, 1, {0, 3, 6}, {0, 2, 4, 1, 3, 5}};
  AttentionPlan plan;
  plan_members(queries, keys, {.causal = true, .combine = Combine::lse}, plan);
  plan_add_sinks_recent({.sinks = 1, .recent = 2}, plan);
  REQUIRE(mask_of(plan)[5] == std::vector<Index>{0, 4, 5, 2, 1, 3});
  REQUIRE(mask_of(plan)[3] == std::vector<Index>{0, 2, 3, 1});
  plan_dense_up_to({.length = 4, .causal = true}, plan);
  REQUIRE(mask_of(plan)[3] == std::vector<Index>{0, 1, 2, 3});
  REQUIRE(mask_of(plan)[5] == std::vector<Index>{0, 4, 5, 2, 1, 3});
  plan_add_memory(1, plan);
  REQUIRE(mask_of(plan)[3] == std::vector<Index>{6, 0, 1, 2, 3});
  REQUIRE(mask_of(plan)[5] == std::vector<Index>{6, 0, 4, 5, 2, 1, 3});
  // Memory beside recent keys alone is a second interval.
  plan_local({.tokens = 6, .window = 1, .causal = true}, plan);
  plan_add_sinks_recent({.recent = 2}, plan);
  plan_add_memory(1, plan);
  REQUIRE(mask_of(plan)[5] == std::vector<Index>{6, 4, 5});
}

TEST_CASE("sinks and recent keys: a longer sequence leaves the first rows as they were") {
  Random random(6);
  const auto labels = random.labels(40, 3, -1);
  AttentionPlan longer, shorter;
  const auto build = [&](Index tokens, AttentionPlan& plan) {
    const std::span<const std::int32_t> own(labels.data(), static_cast<std::size_t>(tokens));
    plan_clustered(own, own, {.clusters = 3, .window = 4, .causal = true, .self = Self::only_if_alone}, plan);
    plan_add_sinks_recent({.sinks = 3, .recent = 5, .self = Self::only_if_alone}, plan);
  };
  build(40, longer);
  for (const Index tokens : {1, 2, 9, 33}) {
    build(tokens, shorter);
    Mask expected = mask_of(longer);
    expected.resize(static_cast<std::size_t>(tokens));
    REQUIRE(mask_of(shorter) == expected);
  }
}

TEST_CASE("sinks and recent keys: errors leave the plan as it was") {
  AttentionPlan plan;
  const auto refuse = [&](const SinksRecentConfig& config, const char* what) {
    const AttentionPlan before = plan;
    std::string reason;
    try {
      plan_add_sinks_recent(config, plan);
    } catch (const ValueError& error) {
      reason = error.what();
    }
    INFO(reason);
    REQUIRE(contains(reason, what));
    REQUIRE(same(plan, before));
  };
  const std::vector<Index> inside = {0, 4, 8}, bad = {0, 9};
  plan_local({.tokens = 8, .window = 3, .causal = true}, plan);
  refuse({.sinks = -1}, "sinks: expected at least 0");
  refuse({.recent = -1}, "recent: expected at least 0");
  refuse({.recent = 1, .self = static_cast<Self>(7)}, "self");
  refuse({.recent = 1, .offsets = bad}, "offsets");
  refuse({.recent = 1, .offsets = inside}, "offsets: expected sequences that no group of the plan reaches over");
  plan.visible[7].end = 400;
  refuse({.recent = 1}, "visible[7]");
  refuse({.recent = 1, .self = Self::only_if_alone}, "visible[7]");
  plan_local({.tokens = 8, .window = 3, .lookahead = 1}, plan);
  refuse({.sinks = 1}, "visible[0]: expected keys up to the query");
  plan_add_memory(1, plan);
  refuse({.sinks = 1}, "plan: expected one without memory");
  plan_members({2, 1, 1, {0, 2}, {0, 1}}, {2, 1, 1, {0, 2}, {0, 1}}, {.causal = true}, plan);
  refuse({.sinks = 1}, "plan: expected Combine::single or lse");
  plan.row_begin.clear();
  refuse({.sinks = 1}, "plan: expected a completed plan");
}
