// Clusters that overlap: queries see the keys of all the clusters that they are in.
#pragma once

#include "coterie/core/cluster_members.hpp"
#include "coterie/plan/clustered.hpp"

namespace coterie {

struct MembersConfig {
  Index window = 0;                         ///< members of a cluster that a query sees at most; 0: no cap
  bool causal = false;                      ///< members up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  Combine combine = Combine::mean;          ///< how the clusters of a query become one output
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

namespace detail {

/// Requires lists of the pattern's sequences, ascending in each, otherwise ValueError.
inline void check_members(const char* function, const std::string& name, const ClusterMembers& members,
                          const Pattern& pattern, bool keys) {
  const auto bad = [&](const std::string& argument, const auto& expected, const auto& got) {
    fail<ValueError>(function, (name + argument).c_str(), expected, got);
  };
  if (members.sequences != pattern.sequences()) bad(".sequences", pattern.sequences(), members.sequences);
  const Index lists = members.sequences * members.clusters;
  if (static_cast<Index>(members.begin.size()) != lists + 1)
    bad(".begin", join(lists + 1, " values"), members.begin.size());
  const auto all = static_cast<std::int32_t>(members.rows.size());
  for (std::size_t i = 0; i < members.begin.size(); ++i) {
    const bool ascends = i == 0 ? members.begin[i] == 0 : members.begin[i] >= members.begin[i - 1];
    const bool fits = i + 1 < members.begin.size() ? members.begin[i] <= all : members.begin[i] == all;
    if (!ascends || !fits) bad(join(".begin[", i, "]"), join("ascending values from 0 to ", all), members.begin[i]);
  }
  for (Index s = 0; s < members.sequences; ++s) {
    const Sequence sequence = pattern.sequence(s);
    const Index first = keys ? sequence.key_begin : sequence.query_begin;
    const Index end = first + (keys ? sequence.keys : sequence.tokens);
    for (Index c = 0; c < members.clusters; ++c) {
      const auto list = static_cast<std::size_t>(s * members.clusters + c);
      Index above = first - 1;
      for (std::int32_t i = members.begin[list]; i < members.begin[list + 1]; ++i) {
        const std::int32_t row = members.rows[static_cast<std::size_t>(i)];
        if (row <= above || row >= end)
          bad(join(".rows[", i, "]"), join("ascending rows of the sequence, above ", above, " and below ", end), row);
        above = row;
      }
    }
  }
}

/// Requires every row in one list at most, otherwise ValueError. `seen`: scratch memory.
inline void check_single(const char* function, const ClusterMembers& members, std::vector<std::int32_t>& seen) {
  const auto tokens = static_cast<std::size_t>(members.tokens);
  seen.resize((std::max)(seen.size(), tokens));
  std::fill_n(seen.begin(), tokens, 0);
  for (const std::int32_t row : members.rows)
    if (seen[static_cast<std::size_t>(row)]++ > 0)
      fail<ValueError>(function, "combine", "mean or lse, for a query is in several clusters",
                       join("single, and row ", row, " twice"));
}

}  // namespace detail

/// Writes the plan in which every query sees, for each of its clusters, the cluster's keys of its sequence.
///
/// With balanced_members for queries and keys: the paper's membership. It is not strictly causal: lists of causal plans
/// change with later tokens, and with them what earlier queries see.
///
/// With nearest_members of several probes for the
/// queries and of one for the keys, and Combine::lse: multi-probe search, strictly causal.
///
/// A query in several clusters
/// has several entries; config.combine says what becomes of them: the mean of their outputs, or one softmax over all
/// their keys, where a key that two clusters show counts twice. A query in none sees nothing.
/// Formula: in each cluster as plan_clustered. Self::only_if_alone looks at each cluster for the mean, at all of a
///   row's for one softmax.
/// Requires: lists as ClusterMembers says, of as many clusters and of the sequences that the offsets say; at most one
///   cluster of a query for Combine::single; a config as its fields say; otherwise ValueError, and the plan is
///   unchanged.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, keys, members, and sequences times clusters.
/// Source: Roy et al. 2021, section 4.1; multi-probe as in inverted-file search, ours.
inline void plan_members(const ClusterMembers& queries, const ClusterMembers& keys, const MembersConfig& config,
                         AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  const char* const function = "plan_members";
  detail::Faults faults(function);
  faults.expect(config.combine == Combine::single || config.combine == Combine::mean || config.combine == Combine::lse,
                "combine", "single, mean or lse", static_cast<int>(config.combine));
  faults.expect(keys.clusters == queries.clusters, "keys.clusters", queries.clusters, keys.clusters);
  const detail::Pattern pattern =
      detail::read_clustered(faults, config, "queries.clusters", queries.clusters, queries.tokens, keys.tokens);
  detail::check_members(function, "queries", queries, pattern, false);
  if (&keys != &queries || pattern.offsets.data() != pattern.key_offsets.data())
    detail::check_members(function, "keys", keys, pattern, true);
  detail::PlanBuilder builder(pattern, plan, scratch);
  if (config.combine == Combine::single) detail::check_single(function, queries, builder.numbers());
  builder.build(queries, keys, config.combine);
}

}  // namespace coterie
