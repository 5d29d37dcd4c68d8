// Routed heads as three public implementations have them, in one word each.
#pragma once

#include <cmath>

#include "coterie/layer/config.hpp"

namespace coterie {

/// Presets set what concerns routing, membership, logits and routers; sizes, the split of heads, positions, causality and the
/// seed are those of the config that they are given. They reproduce what the code computes, not its faults: lists go by real
/// positions, a query that sees no key gives zero and its cluster counts as absent, distances are never ranks, values are
/// never rotated. Balanced membership is not strictly causal (see balanced_members). Centroids start and follow the schedule
/// of OnlineKMeans.
///
///     RoutingAttention<float> layer(presets::google({.model_dim = 256, .heads = 8, .routed_heads = 8,
///                                                    .clusters = 16, .window = 512, .causal = true}));
namespace presets {

namespace detail {

/// What the three have in common: the paper's membership, no revival, no splits.
inline RoutingAttentionConfig balanced(RoutingAttentionConfig c) {
  c.routing = Routing::learned;
  c.membership = Membership::balanced;
  c.probes = 1;
  c.unassigned = Unassigned::left_out;
  c.combine = Combine::mean;
  c.query_share = 0;
  c.induction = c.local_induction = false;
  c.key_taps = 0;
  c.learned_gain = false;
  c.decay = 0.999;
  c.renormalise = false;
  c.dead_share = 0;
  c.split_share = 0;
  return c;
}

/// The weight of a loss that is the mean over routers, for ours is their sum.
inline double over_routers(double weight, const RoutingAttentionConfig& c) {
  const Index each = c.kv_heads > 0 ? c.heads / c.kv_heads : 1, routers = each > 0 ? c.routed_heads / each : 0;
  return routers > 0 ? weight / static_cast<double>(routers) : 0.0;
}

}  // namespace detail

/// The paper's own code (google-research, routing_transformer): queries and keys shared if causal, layer norm without affine
/// for routing and logits, no temperature (logits are q.k of vectors of norm sqrt(d)), every token sees itself, the `window`
/// best tokens of every centroid, sums over clusters divided by their number + 0.01, moving counts and sums, commitment 1e-4
/// (counted for queries and keys, also where they are the same).
/// Source: Roy et al. 2021, and its released code.
inline RoutingAttentionConfig google(RoutingAttentionConfig c) {
  c = detail::balanced(c);
  c.shared_qk = c.causal;
  c.self = Self::visible;
  c.normalisation = Normalisation::layer_norm;
  c.logits = Logits::normalised;
  const Index d = c.head_dim > 0 ? c.head_dim : c.heads > 0 ? c.model_dim / c.heads : 0;
  c.gain = std::sqrt(static_cast<double>(d));
  c.mean_epsilon = 0.01;
  c.average = Average::counts_and_sums;
  c.commitment = detail::over_routers(*c.shared_qk ? 2e-4 : 1e-4, c);
  return c;
}

/// Lingvo's RoutingAttention, its fast path: queries and keys of their own, layer norm for routing and logits, scaled by
/// 1/sqrt(d), the `window` best keys and the 1.2 tokens / clusters best queries of every centroid, the mean over clusters,
/// centroids that follow the batch's means; no loss.
/// Source: the Lingvo library, batch_major_attention.
inline RoutingAttentionConfig lingvo(RoutingAttentionConfig c) {
  c = detail::balanced(c);
  c.shared_qk = false;
  c.self = Self::visible;
  c.normalisation = Normalisation::layer_norm;
  c.logits = Logits::normalised;
  c.gain = 1;
  c.mean_epsilon = 0;
  c.query_share = 1.2;
  c.average = Average::batch_mean;
  c.commitment = 0;
  return c;
}

/// The routing transformer for PyTorch: unit length for routing; raw queries against unit keys where they are shared (if
/// causal), which see themselves only if alone, and raw ones of both otherwise; scaled by 1/sqrt(d); sums over clusters divided
/// by their number + 1e-5; centroids follow the batch's directions; commitment 1e-4 (the mean over queries and keys). Its causal
/// heads with keys of their own need memory; ours is per head, not per cluster.
/// Source: the package routing-transformer 1.6.
inline RoutingAttentionConfig pytorch(RoutingAttentionConfig c) {
  c = detail::balanced(c);
  if (!c.shared_qk) c.shared_qk = c.causal;
  c.self = *c.shared_qk ? Self::only_if_alone : Self::visible;
  c.normalisation = Normalisation::unit_length;
  c.logits = *c.shared_qk ? Logits::normalised_keys : Logits::raw;
  c.gain = 1;
  c.mean_epsilon = 1e-5;
  c.average = Average::batch_direction;
  c.commitment = detail::over_routers(*c.shared_qk ? 1e-4 : 0.5e-4, c);
  return c;
}

}  // namespace presets
}  // namespace coterie
