// Local attention: a window that moves with the query.
#pragma once

#include "coterie/plan/builder.hpp"

namespace coterie {

struct LocalConfig {
  Index tokens = 0;                         ///< query rows
  Index keys = 0;                           ///< key rows; 0: as tokens
  Index window = 0;                         ///< keys up to the query's position, itself included; at least 1
  Index lookahead = 0;                      ///< keys after the query's position; 0 if causal
  bool causal = false;                      ///< keys up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

/// Writes the plan in which query i sees the keys of its sequence at positions (c(i) - window, c(i) + lookahead].
/// Requires: a config as its fields say, otherwise ValueError, and the plan is unchanged.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, keys and sequences.
inline void plan_local(const LocalConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  detail::Faults faults("plan_local");
  faults.expect(config.window >= 1, "window", "at least 1", config.window);
  faults.expect(config.lookahead >= 0, "lookahead", "at least 0", config.lookahead);
  faults.expect(!config.causal || config.lookahead <= 0, "lookahead", "0 where causal", config.lookahead);
  detail::Pattern pattern =
      detail::read_pattern(faults, config, config.tokens, config.keys == 0 ? config.tokens : config.keys);
  faults.raise();
  pattern.see(config.window, config.lookahead);
  detail::PlanBuilder(pattern, plan, scratch).build({}, {});
}

}  // namespace coterie
