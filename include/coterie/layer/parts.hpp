// What a layer owns, and what one of its passes reads.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/attention/call.hpp"
#include "coterie/kernel/rotary.hpp"
#include "coterie/layer/input.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {

/// What a layer owns.
template <class T>
struct LayerState {
  RoutingAttentionConfig config;  ///< resolved
  Heads heads;
  Parameters<T> parameters;
  Rotary rotary;
  std::vector<OnlineKMeans<T>> routers;  ///< one per routed key/value head, if learned
};

/// Requires numbers that stay numbers in the scalar type, otherwise ValueError: what attention would find out too late.
template <class T>
void check_numbers(const RoutingAttentionConfig& c, const Heads& heads) {
  Faults faults("RoutingAttentionConfig");
  faults.expect(is_soft_cap<T>(c.soft_cap), "soft_cap", "0, or a positive number that the scalar type can hold",
                c.soft_cap);
  for (const HeadBlock* group : {&heads.local, &heads.routed})
    if (group->count > 0 && !std::isfinite(static_cast<T>(group->gain))) {
      faults.expect(false, "gain", "a number that the scalar type can hold", group->gain);
      break;
    }
  faults.raise();
}

/// The layer of a resolved config, with its first weights and centroids.
template <class T>
LayerState<T> make_layer_state(const RoutingAttentionConfig& c) {
  check_numbers<T>(c, Heads(c));
  LayerState<T> layer{c, Heads(c), initial_parameters<T>(c), {}, {}};
  for (const HeadBlock* group : {&layer.heads.local, &layer.heads.routed})
    if (group->count > 0 && group->positions == PositionKind::rotary)
      layer.rotary = Rotary(c.head_dim, c.rotary_base, c.rotary_layout);
  if (c.routing != Routing::learned) return layer;
  const auto stream = static_cast<std::uint64_t>(LayerStream::centroids);
  for (Index h = 0; h < routed_kv_heads(c); ++h) {
    const std::uint64_t seed = random_bits(c.seed, stream, static_cast<std::uint64_t>(h));
    layer.routers.emplace_back(router_config(c, seed));
  }
  return layer;
}

/// An input whose arguments have been checked: where queries and keys come from, and their places in their sequences.
template <class T>
struct CheckedInput {
  const Input<T>& input;
  ConstView<T> x, keys;  ///< keys: the source, or x itself
  std::span<const std::int32_t> places, key_places;
  bool crosses = false;  ///< keys come from a source

  CheckedInput(const Input<T>& from, const Places& where)
      : input(from),
        x(from.x),
        keys(from.crosses() ? from.source : from.x),
        places(where.queries),
        key_places(from.crosses() ? where.keys : where.queries),
        crosses(from.crosses()) {}
  /// Of queries and keys of the same rows, at these places.
  CheckedInput(const Input<T>& from, std::span<const std::int32_t> where)
      : input(from), x(from.x), keys(from.x), places(where), key_places(where) {}
};

}  // namespace coterie::detail
