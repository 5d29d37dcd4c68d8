// Presets: settings of routed heads after three public implementations.
#pragma once

#include <cmath>
#include <cstdint>

#include "coterie/layer/config.hpp"
#include "coterie/layer/resolve.hpp"

namespace coterie {

/// Presets set routing, membership, matching, routers and commitment of the routed block. Its size and positions, and
/// all settings outside of it, stay as they are given.
///
/// They reproduce what the code computes, not its faults: lists are ordered by real positions, a query that sees no key
/// gives zero and its cluster counts as absent, distances are never ranks, values are never rotated. Balanced
/// membership is not strictly causal (see balanced_members). Centroids start and move by the schedule of OnlineKMeans.
///
/// The mean over clusters is no one softmax: a config with sinks or recent keys is refused.
///
///     RoutingAttention<float> layer(presets::google(
///         {.model_dim = 256, .causal = true, .routed = {.heads = 8, .clusters = 16, .window = 512}}));
namespace presets {

namespace detail {

/// Settings that the three share: the paper's membership, no induction, no revival, no splits.
inline RoutedHeads balanced(RoutedHeads routed) {
  routed.routing = Routing::learned;
  routed.membership = {.kind = MembershipKind::balanced};
  routed.router = {.decay = 0.999, .dead_share = 0};
  routed.matching = {.shared_qk = routed.matching.shared_qk, .learned_gain = false};
  return routed;
}

/// The weight of a loss that is a mean over routers, converted to ours, which is a sum.
inline double over_routers(double weight, const RoutingAttentionConfig& c) {
  const std::int64_t each = c.kv_heads > 0 ? coterie::detail::all_heads(c) / c.kv_heads : 1;
  const std::int64_t routers = each > 0 ? c.routed.heads / each : 0;
  return routers > 0 ? weight / static_cast<double>(routers) : 0.0;
}

}  // namespace detail

/// The paper's own code (google-research, routing_transformer): queries and keys shared if causal, layer norm without
/// affine for routing and logits, no temperature (logits are q.k of vectors of norm sqrt(d)), every token sees itself,
/// the `window` best tokens of every centroid, sums over clusters divided by their number + 0.01, moving counts and
/// sums, commitment 1e-4 (counted for queries and keys, also where they are the same).
/// Source: Roy et al. 2021, and its released code.
inline RoutingAttentionConfig google(RoutingAttentionConfig c) {
  c.routed = detail::balanced(c.routed);
  const std::int64_t heads = coterie::detail::all_heads(c);
  const std::int64_t d = c.head_dim > 0 ? c.head_dim : heads > 0 ? c.model_dim / heads : 0;
  Matching& m = c.routed.matching;
  m.shared_qk = c.causal;
  m.self = Self::visible;
  m.normalisation = Normalisation::layer_norm;
  m.logits = Logits::normalised;
  m.gain = std::sqrt(static_cast<double>(d));
  c.routed.membership.mean_epsilon = 0.01;
  c.routed.router.average = Average::counts_and_sums;
  c.routed.commitment = detail::over_routers(*m.shared_qk ? 2e-4 : 1e-4, c);
  return c;
}

/// Lingvo's RoutingAttention, its fast path: queries and keys of their own, layer norm for routing and logits, scaled
/// by 1/sqrt(d), the `window` best keys and the 1.2 tokens / clusters best queries of every centroid, the mean over
/// clusters, centroids that follow the batch's means; no loss.
/// Source: the Lingvo library, batch_major_attention.
inline RoutingAttentionConfig lingvo(RoutingAttentionConfig c) {
  c.routed = detail::balanced(c.routed);
  Matching& m = c.routed.matching;
  m.shared_qk = false;
  m.self = Self::visible;
  m.normalisation = Normalisation::layer_norm;
  m.logits = Logits::normalised;
  m.gain = 1;
  c.routed.membership.query_share = 1.2;
  c.routed.router.average = Average::batch_mean;
  c.routed.commitment = 0;
  return c;
}

/// The routing transformer for PyTorch: unit length for routing, logits scaled by 1/sqrt(d), sums over clusters divided
/// by their number + 1e-5, centroids that follow the batch's directions, commitment 1e-4 (the mean over queries and
/// keys).
///
/// Queries and keys are shared if causal, unless `shared_qk` is given. Shared: raw queries against unit keys, and a
/// token sees itself only if alone, never beside memory. Not shared: raw queries and keys; causal heads then need
/// memory, which is per head here and per cluster there.
/// Source: the package routing-transformer 1.6.
inline RoutingAttentionConfig pytorch(RoutingAttentionConfig c) {
  c.routed = detail::balanced(c.routed);
  Matching& m = c.routed.matching;
  if (!m.shared_qk) m.shared_qk = c.causal;
  // A token beside memory is not alone there, whatever its cluster: ours would see both.
  m.self = !*m.shared_qk ? Self::visible : c.memory > 0 ? Self::never : Self::only_if_alone;
  m.normalisation = Normalisation::unit_length;
  m.logits = *m.shared_qk ? Logits::normalised_keys : Logits::raw;
  m.gain = 1;
  c.routed.membership.mean_epsilon = 1e-5;
  c.routed.router.average = Average::batch_direction;
  c.routed.commitment = detail::over_routers(*m.shared_qk ? 1e-4 : 0.5e-4, c);
  return c;
}

}  // namespace presets
}  // namespace coterie
