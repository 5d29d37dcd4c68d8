// State of a layer: weights, blocks of heads, routers.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "coterie/attention/call.hpp"
#include "coterie/kernel/rotary.hpp"
#include "coterie/layer/initialise.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {

template <class T>
struct LayerState {
  RoutingAttentionConfig config;  ///< resolved
  Heads heads;
  Parameters<T> parameters;
  std::array<Rotary, 3> rotary;          ///< of each block, where its positions are rotary
  std::vector<OnlineKMeans<T>> routers;  ///< one per routed key/value head, where routing is learned

  const Rotary& rotary_of(const HeadBlock& block) const { return rotary[Heads::index(block.kind)]; }
  /// The block of routed heads; no other has clusters.
  const HeadBlock& routed() const { return heads[BlockKind::routed]; }
};

/// Requires settings that are finite numbers in the scalar type, otherwise ValueError. Attention would check them too
/// late.
template <class T>
void check_numbers(const RoutingAttentionConfig& c, const Heads& heads) {
  Faults faults("RoutingAttentionConfig");
  faults.expect(is_soft_cap<T>(c.soft_cap), "soft_cap", "0, or a positive number that the scalar type can hold",
                c.soft_cap);
  for (const HeadBlock& block : heads.blocks)
    if (block.count > 0 && !std::isfinite(static_cast<T>(block.gain)))
      faults.expect(false, join(block_name(block.kind), ".matching.gain").c_str(),
                    "a number that the scalar type can hold", block.gain);
  faults.raise();
}

/// The layer of a resolved config, with its first weights and centroids.
template <class T>
LayerState<T> make_layer_state(const RoutingAttentionConfig& c) {
  const Heads heads = head_blocks(c);
  check_numbers<T>(c, heads);
  LayerState<T> layer{c, heads, initial_parameters<T>(c), {}, {}};
  for (const HeadBlock& block : heads.blocks)
    if (block.count > 0 && block.positions == PositionKind::rotary)
      layer.rotary[Heads::index(block.kind)] = Rotary(block.head_dim, block.rotary_base, block.rotary_layout);
  const HeadBlock& routed = layer.routed();
  if (!routed.learned()) return layer;
  const auto stream = static_cast<std::uint64_t>(LayerStream::centroids);
  for (Index h = 0; h < routed.kv_count; ++h) {
    KMeansConfig router = routed.router;
    router.seed = random_bits(c.seed, stream, static_cast<std::uint64_t>(h));
    layer.routers.emplace_back(router);
  }
  return layer;
}

}  // namespace coterie::detail
