// Clustered attention: queries see the keys of their cluster; clusters come from a router, or from a seed.
#pragma once

#include "coterie/core/random.hpp"
#include "coterie/plan/builder.hpp"

namespace coterie {

struct ClusteredConfig {
  Index clusters = 0;                       ///< labels are in [-1, clusters); at least 1
  Index window = 0;                         ///< members of its cluster that a query sees at most; 0: no cap
  bool causal = false;                      ///< members up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

struct RandomConfig {
  Index tokens = 0;                         ///< query rows
  Index keys = 0;                           ///< key rows; 0: as tokens
  Index clusters = 0;                       ///< at least 1
  Index window = 0;                         ///< members of its cluster that a query sees at most; 0: no cap
  bool causal = false;                      ///< members up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
  std::uint64_t seed = 0;                   ///< the clusters are a function of it and of positions
};

namespace detail {

/// Checks the fields that patterns with clusters share, and sets what a query sees.
template <class Config>
Pattern read_clustered(Faults& faults, const Config& config, const char* argument, Index clusters, Index tokens,
                       Index keys) {
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  faults.expect(clusters >= 1 && clusters <= most, argument, "1 to 2147483647", clusters);
  faults.expect(config.window >= 0, "window", "at least 0", config.window);
  Pattern pattern = read_pattern(faults, config, tokens, keys);
  faults.raise();
  pattern.clusters = clusters;
  const Index all = tokens + keys;
  if (config.causal)
    pattern.see(config.window, 0);
  else if (config.window == 0)
    pattern.see(0, all);
  else  // centred on the query
    pattern.see(config.window / 2 + config.window % 2, config.window / 2);
  return pattern;
}

/// Requires labels in [-1, clusters), otherwise ValueError; returns the highest.
inline std::int32_t check_labels(const char* function, const char* argument, std::span<const std::int32_t> labels,
                                 Index clusters) {
  std::int32_t lowest = -1, highest = -1;
  for (const std::int32_t label : labels) {
    lowest = (std::min)(lowest, label);
    highest = (std::max)(highest, label);
  }
  if (lowest >= -1 && highest < clusters) return highest;
  std::size_t i = 0;
  while (labels[i] >= -1 && labels[i] < clusters) ++i;
  fail<ValueError>(function, join(argument, "[", i, "]").c_str(), join("-1 to ", clusters - 1), labels[i]);
}

/// The cluster of a position: uniform in [0, clusters), a function of its arguments alone.
inline std::int32_t random_label(std::uint64_t seed, Index position, Index clusters) {
  const std::uint64_t bits = random_bits(seed, 0, static_cast<std::uint64_t>(position));
  return static_cast<std::int32_t>(((bits >> 32) * static_cast<std::uint64_t>(clusters)) >> 32);
}

}  // namespace detail

/// Writes the plan in which every query sees the keys of its sequence that have its label.
/// Shapes: one label per query row and one per key row; for self-attention the same span twice. Label -1: in no
///   cluster, so a query sees nothing and no query sees the key.
/// Formula: with r the number of the cluster's keys at positions up to c(i), a query sees the keys of ranks
///   [r - window, r) if causal, [r - (window + 1)/2, r + window/2) otherwise, all up to c(i) or all for window 0.
/// Requires: a config as its fields say and labels in [-1, clusters), otherwise ValueError, and the plan is unchanged.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, keys, sequences and the highest label.
/// Source: Roy et al. 2021, section 4.1, with causality by intervals of the sorted members: ours.
inline void plan_clustered(std::span<const std::int32_t> query_labels, std::span<const std::int32_t> key_labels,
                           const ClusteredConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  const char* const function = "plan_clustered";
  detail::Faults faults(function);
  detail::Pattern pattern =
      detail::read_clustered(faults, config, "clusters", config.clusters, static_cast<Index>(query_labels.size()),
                             static_cast<Index>(key_labels.size()));
  std::int32_t highest = detail::check_labels(function, "query_labels", query_labels, config.clusters);
  if (key_labels.data() != query_labels.data() || key_labels.size() != query_labels.size())
    highest = (std::max)(highest, detail::check_labels(function, "key_labels", key_labels, config.clusters));
  pattern.clusters = (std::max)(highest, 0) + 1;  // clusters that no label names cost nothing
  detail::PlanBuilder(pattern, plan, scratch).build(query_labels, key_labels);
}

/// Writes a clustered plan whose labels are drawn from a seed: the paper's baseline.
/// Formula: the label of a position in its sequence is a hash of (seed, position); that of a query the one of c(i).
/// Requires, Allocates: as plan_clustered.
/// Cost: linear in tokens, keys, clusters and sequences.
/// Source: Roy et al. 2021, section 5 (random Transformer).
inline void plan_random(const RandomConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  detail::Faults faults("plan_random");
  const detail::Pattern pattern = detail::read_clustered(faults, config, "clusters", config.clusters, config.tokens,
                                                         config.keys == 0 ? config.tokens : config.keys);
  detail::PlanBuilder(pattern, plan, scratch).build_by_position([&config](Index position) {
    return detail::random_label(config.seed, position, config.clusters);
  });
}

}  // namespace coterie
