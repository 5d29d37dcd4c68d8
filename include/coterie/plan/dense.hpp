// Dense attention: every query sees its whole sequence, or all of it up to itself.
#pragma once

#include "coterie/plan/builder.hpp"

namespace coterie {

struct DenseConfig {
  Index tokens = 0;                         ///< query rows
  Index keys = 0;                           ///< key rows; 0: as tokens
  bool causal = false;                      ///< keys up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

/// Writes the plan in which every query sees all keys of its sequence: [0, keys), or [0, c(i)] if causal.
/// Requires: a config as its fields say, otherwise ValueError, and the plan is unchanged.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, keys and sequences.
inline void plan_dense(const DenseConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  detail::Faults faults("plan_dense");
  detail::Pattern pattern =
      detail::read_pattern(faults, config, config.tokens, config.keys == 0 ? config.tokens : config.keys);
  faults.raise();
  pattern.see(0, config.causal ? 0 : pattern.tokens + pattern.keys);
  detail::PlanBuilder(pattern, plan, scratch).build({}, {});
}

}  // namespace coterie
