// Strided attention: queries see the keys that are a multiple of the stride away.
#pragma once

#include "coterie/plan/clustered.hpp"

namespace coterie {

struct StridedConfig {
  Index tokens = 0;                         ///< query rows
  Index keys = 0;                           ///< key rows; 0: as tokens
  Index stride = 0;                         ///< at least 1
  Index window = 0;                         ///< keys that a query sees at most; 0: no cap
  bool causal = false;                      ///< keys up to the query's position c(i) only
  std::optional<Alignment> alignment = {};  ///< default: bottom_right if causal, else proportional
  Self self = Self::visible;                ///< whether a query sees the key at its own position
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds of the sequences in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

/// Writes the clustered plan whose label is the residue of the position modulo the stride.
/// Requires, Allocates: as plan_clustered.
/// Cost: linear in tokens, keys and sequences.
/// Source: Child et al. 2019 (Sparse Transformer), the strided pattern.
inline void plan_strided(const StridedConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  detail::Faults faults("plan_strided");
  const Index keys = config.keys == 0 ? config.tokens : config.keys;
  detail::Pattern pattern = detail::read_clustered(faults, config, "stride", config.stride, config.tokens, keys);
  // No two positions are further apart: a longer stride groups them no differently, and would cost its length.
  const Index stride = (std::min)(config.stride, config.tokens + keys + 1);
  pattern.clusters = stride;
  detail::PlanBuilder(pattern, plan, scratch).build_by_position([stride](Index position) {
    const Index residue = position % stride;
    return static_cast<std::int32_t>(residue < 0 ? residue + stride : residue);
  });
}

}  // namespace coterie
