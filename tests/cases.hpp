#pragma once

// The attention cases that drive correctness, gradients and benchmarks. A new pattern belongs in here.

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/globals.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/plan/sinks_recent.hpp"
#include "coterie/plan/strided.hpp"
#include "random.hpp"

namespace test {

using namespace coterie;

/// Sizes of the cases: small for tests, larger for benchmarks.
struct CaseSizes {
  Index tokens = 37;
  Index window = 6;
  Index clusters = 4;
  Index d = 5;
};

enum class RelativeTables { both, keys, values };

struct AttentionCase {
  std::string name = {};
  /// Writes and completes the plan; sizes of the matrices follow from it.
  std::function<void(AttentionPlan&)> fill = {};
  Index heads = 1;
  Index kv_heads = 0;        ///< 0: as heads
  Index d = 0;               ///< 0: as the sizes
  Index dv = 0;              ///< 0: as the sizes
  bool causal = false;       ///< row i depends on rows up to i only
  Index bias_distances = 0;  ///< columns of a bias table; 0: none
  Index bias_first = 0;
  bool has_lse = true;
  double soft_cap = 0;
  double mean_epsilon = 0;
  double dropout = 0;
  Index relative_distances = 0;  ///< rows of the tables of relative keys and values; 0: none
  Index relative_first = 0;
  RelativeTables relative = RelativeTables::both;
  bool relative_by_head = false;  ///< a table for every head instead of one for all
};

/// A plan by hand: the rows of each cluster, given as lists. Causal rows see their cluster up to themselves.
inline void fill_members(const std::vector<std::vector<std::int32_t>>& members, Index tokens, Combine combine,
                         bool causal, AttentionPlan& plan) {
  plan = AttentionPlan{};
  plan.tokens = plan.key_tokens = tokens;
  plan.combine = combine;
  for (const auto& rows : members) {
    const auto begin = static_cast<std::int32_t>(plan.entries.size());
    const auto count = static_cast<std::int32_t>(rows.size());
    plan.groups.push_back({begin, begin + count, begin, begin + count});
    plan.entries.insert(plan.entries.end(), rows.begin(), rows.end());
    plan.keys.insert(plan.keys.end(), rows.begin(), rows.end());
    for (std::int32_t rank = 0; rank < count; ++rank) plan.visible.push_back({0, causal ? rank + 1 : count});
  }
  complete(plan);
}

/// Clusters that overlap: a row is in some of them, one or none.
inline std::vector<std::vector<std::int32_t>> overlapping_members(Index tokens, Index clusters, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::vector<std::int32_t>> members(static_cast<std::size_t>(clusters));
  for (auto& rows : members)
    for (Index i = 0; i < tokens; ++i)
      if (random.below(clusters) < 2) rows.push_back(static_cast<std::int32_t>(i));
  return members;
}

/// The first `sinks` keys and a causal window, as two intervals of one list.
inline void fill_sinks(Index tokens, Index sinks, Index window, AttentionPlan& plan) {
  plan_local({.tokens = tokens, .window = window, .causal = true}, plan);
  plan.visible_too = plan.visible;
  for (std::size_t e = 0; e < plan.visible.size(); ++e) {
    const std::int32_t begin = plan.visible[e].begin;
    plan.visible[e] = {0, std::min(begin, static_cast<std::int32_t>(sinks))};
  }
  complete(plan);
}

/// A causal window, and `memory` rows of the second source that every query sees.
inline void fill_memory(Index tokens, Index memory, Index window, AttentionPlan& plan) {
  plan_local({.tokens = tokens, .window = window, .causal = true}, plan);
  plan_add_memory(memory, plan);
}

inline std::vector<AttentionCase> attention_cases(const CaseSizes& sizes = {}) {
  const Index n = sizes.tokens, w = sizes.window, k = sizes.clusters, d = sizes.d;
  const auto labels = [n, k](std::int32_t lowest) { return Random(5).labels(n, k, lowest); };
  const std::vector<Index> offsets = {0, n / 3, n / 3, n / 3 + 1, n};
  const std::vector<Index> key_offsets = {0, n / 2, n / 2 + 2, n / 2 + 2, n + 7};
  std::vector<AttentionCase> cases;
  const auto add = [&cases, d](const char* name, std::function<void(AttentionPlan&)> fill, AttentionCase added) {
    added.name = name;
    added.fill = std::move(fill);
    if (added.kv_heads == 0) added.kv_heads = added.heads;
    if (added.d == 0) added.d = d;
    if (added.dv == 0) added.dv = d;
    cases.push_back(std::move(added));
  };

  // Plans of several cases.
  const auto local_causal = [=](AttentionPlan& p) { plan_local({.tokens = n, .window = w, .causal = true}, p); };
  const auto dense_causal = [=](AttentionPlan& p) { plan_dense({.tokens = n, .causal = true}, p); };
  const auto dense = [=](AttentionPlan& p) { plan_dense({.tokens = n}, p); };
  const auto local_two_sided = [=](AttentionPlan& p) { plan_local({.tokens = n, .window = w, .lookahead = w / 2}, p); };
  const auto more_keys = [=](AttentionPlan& p) { plan_dense({.tokens = n, .keys = n + 5, .causal = true}, p); };
  const auto strided = [=](AttentionPlan& p) {
    plan_strided({.tokens = n, .stride = k, .window = w, .causal = true}, p);
  };
  const auto clustered_alone = [=, l = labels(-1)](AttentionPlan& p) {
    plan_clustered(l, l, {.clusters = k, .window = w, .causal = true, .self = Self::only_if_alone}, p);
  };
  const auto overlapping = [n, k](std::uint64_t seed, Combine combine, bool causal) {
    return [=](AttentionPlan& p) { fill_members(overlapping_members(n, k, seed), n, combine, causal, p); };
  };

  add("dense", dense, {});
  add("dense causal", dense_causal, {.heads = 2, .causal = true});
  add("dense causal, grouped queries, wide values", dense_causal,
      {.heads = 4, .kv_heads = 2, .dv = d + 2, .causal = true});
  add("local causal", local_causal, {.heads = 2, .kv_heads = 1, .causal = true, .bias_distances = w});
  add("local two-sided", local_two_sided, {.heads = 2, .bias_distances = w, .bias_first = -w / 2});
  add("local causal, never itself",
      [=](AttentionPlan& p) { plan_local({.tokens = n, .window = w, .causal = true, .self = Self::never}, p); },
      {.causal = true});
  add("local two-sided, never itself",
      [=](AttentionPlan& p) { plan_local({.tokens = n, .window = w, .lookahead = 2, .self = Self::never}, p); }, {});
  add("clustered causal",
      [=, l = labels(0)](AttentionPlan& p) { plan_clustered(l, l, {.clusters = k, .window = w, .causal = true}, p); },
      {.heads = 2, .causal = true});
  add("clustered causal, itself only if alone, some in no cluster", clustered_alone, {.heads = 2, .causal = true});
  add("clustered two-sided, never itself, other labels for keys",
      [=, l = labels(-1), m = Random(6).labels(n, k, -1)](AttentionPlan& p) {
        plan_clustered(l, m, {.clusters = k, .window = w, .self = Self::never}, p);
      },
      {.bias_distances = 9, .bias_first = -4});
  add("clustered causal ragged",
      [=, l = labels(0)](AttentionPlan& p) {
        plan_clustered(l, l, {.clusters = k, .window = w, .causal = true, .offsets = offsets}, p);
      },
      {.causal = true});
  add("random",
      [=](AttentionPlan& p) { plan_random({.tokens = n, .clusters = k, .window = w, .causal = true, .seed = 3}, p); },
      {.causal = true});
  add("strided", strided, {.causal = true});
  add("unequal lengths, causal", more_keys, {.bias_distances = n, .bias_first = -3});
  add("fewer keys than queries, causal",
      [=](AttentionPlan& p) { plan_dense({.tokens = n, .keys = n / 2 + 1, .causal = true}, p); }, {});
  add("ragged cross, local, proportional",
      [=](AttentionPlan& p) {
        plan_local(
            {.tokens = n, .keys = n + 7, .window = w, .lookahead = 3, .offsets = offsets, .key_offsets = key_offsets},
            p);
      },
      {.heads = 2, .bias_distances = 5, .bias_first = -1});
  add("overlapping clusters, mean", overlapping(1, Combine::mean, true),
      {.heads = 2, .causal = true, .has_lse = false});
  add("overlapping clusters, lse", overlapping(2, Combine::lse, false),
      {.heads = 2, .kv_heads = 1, .bias_distances = 7, .bias_first = -3});
  add("sinks and window", [=](AttentionPlan& p) { fill_sinks(n, 2, w, p); }, {.causal = true});
  add("local causal, capped", local_causal,
      {.heads = 2, .kv_heads = 1, .causal = true, .bias_distances = w, .soft_cap = 1.5});
  add("overlapping clusters, mean, capped", overlapping(4, Combine::mean, true),
      {.causal = true, .has_lse = false, .soft_cap = 0.3, .mean_epsilon = 0.25});
  add("local causal, with dropout", local_causal, {.heads = 2, .kv_heads = 1, .causal = true, .dropout = 0.4});
  add("overlapping clusters, lse, with dropout", overlapping(5, Combine::lse, true),
      {.heads = 2, .causal = true, .soft_cap = 2, .dropout = 0.25});
  add("overlapping clusters, mean, with dropout", overlapping(6, Combine::mean, false),
      {.has_lse = false, .dropout = 0.25});
  add("memory and window", [=](AttentionPlan& p) { fill_memory(n, 3, w, p); },
      {.heads = 2, .kv_heads = 1, .dv = d + 1, .causal = true, .bias_distances = w, .bias_first = 1});
  add("memory and clusters",
      [=, l = labels(-1)](AttentionPlan& p) {
        plan_clustered(l, l, {.clusters = k, .window = w, .causal = true, .self = Self::only_if_alone}, p);
        plan_add_memory(2, p);
      },
      {.causal = true});
  add("memory and overlapping clusters, lse",
      [=](AttentionPlan& p) {
        fill_members(overlapping_members(n, k, 3), n, Combine::lse, false, p);
        plan_add_memory(2, p);
      },
      {.bias_distances = 7, .bias_first = -3});
  add("global tokens, clusters and memory, ragged",
      [=, l = labels(0)](AttentionPlan& p) {
        plan_clustered(l, l, {.clusters = k, .offsets = offsets}, p);
        plan_add_globals({.globals = 2, .offsets = offsets}, p);
        plan_add_memory(1, p);
      },
      {.heads = 2, .bias_distances = 9, .bias_first = -4});
  add("global tokens and window, causal",
      [=](AttentionPlan& p) {
        plan_local({.tokens = n, .window = w, .causal = true}, p);
        plan_add_globals({.globals = 3, .causal = true}, p);
      },
      {.causal = true});
  add("clusters, sinks and recent keys, memory, ragged",
      [=, l = labels(-1)](AttentionPlan& p) {
        plan_clustered(l, l, {.clusters = k, .window = w, .causal = true, .offsets = offsets}, p);
        plan_add_sinks_recent({.sinks = 2, .recent = 4, .offsets = offsets}, p);
        plan_add_memory(1, p);
      },
      {.heads = 2, .kv_heads = 1, .causal = true, .bias_distances = n});
  add("dense, relative keys and values", dense,
      {.heads = 2, .dv = d + 2, .relative_distances = n, .relative_first = -n / 2});
  add("local causal, relative keys and values", local_causal,
      {.heads = 2, .kv_heads = 1, .causal = true, .relative_distances = w});
  add("local two-sided, a few relative keys and values by head, and a bias", local_two_sided,
      {.heads = 2,
       .bias_distances = 3,
       .bias_first = -1,
       .relative_distances = 3,
       .relative_first = -1,
       .relative_by_head = true});
  add("clustered causal, relative keys and values", clustered_alone,
      {.heads = 2, .causal = true, .relative_distances = n / 3});
  add("clustered two-sided, ragged, one relative key",
      [=, l = labels(0)](AttentionPlan& p) { plan_clustered(l, l, {.clusters = k, .offsets = offsets}, p); },
      {.relative_distances = 1, .relative_first = 2, .relative = RelativeTables::keys});
  add("unequal lengths, causal, relative values", more_keys,
      {.heads = 2,
       .relative_distances = 7,
       .relative_first = 2,
       .relative = RelativeTables::values,
       .relative_by_head = true});
  add("strided, capped, with dropout, relative keys and values", strided,
      {.heads = 2,
       .causal = true,
       .soft_cap = 1.5,
       .dropout = 0.25,
       .relative_distances = k * w / 2,
       .relative_first = 1});
  add("overlapping clusters, mean, relative keys and values", overlapping(7, Combine::mean, true),
      {.heads = 2, .kv_heads = 1, .causal = true, .has_lse = false, .relative_distances = n / 2});
  add("overlapping clusters, lse, with dropout, relative keys and values", overlapping(8, Combine::lse, false),
      {.dv = d + 1, .dropout = 0.25, .relative_distances = 9, .relative_first = -4});
  add("global tokens, window and memory, relative keys and values",
      [=](AttentionPlan& p) {
        plan_local({.tokens = n, .window = w, .causal = true}, p);
        plan_add_globals({.globals = 3, .causal = true}, p);
        plan_add_memory(2, p);
      },
      {.heads = 2, .causal = true, .relative_distances = 2 * w});
  return cases;
}

}  // namespace test
