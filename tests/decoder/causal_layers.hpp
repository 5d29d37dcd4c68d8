#pragma once

// Layers that decoders can continue, and the rows that they have to give.

#include <string>
#include <vector>

#include "coterie/decoder/decoder.hpp"
#include "layer/kinds.hpp"

namespace test {

/// The causal kinds, with several probes as well, and some with windows and clusters that reach over blocks of keys.
inline std::vector<Kind> causal_kinds() {
  std::vector<Kind> all;
  const auto take = [&all](const Kind& kind) {
    if (!kind.config.causal) return;
    all.push_back(kind);
    Kind wide = kind;
    wide.name += ", wide";
    if (wide.config.routed.heads > 0) {
      wide.config.routed.window = 70;
      wide.config.routed.clusters = wide.config.routed.membership.probes;
    }
    if (wide.config.local.heads > 0) wide.config.local.window = wide.config.local.window == 4 ? 70 : 90;
    if (wide.config.routed.sinks > 0) wide.config.routed.sinks = 67;
    if (wide.config.routed.recent > 0) wide.config.routed.recent = 71;
    if (wide.config.dense_up_to > 0) wide.config.dense_up_to = 75;
    all.push_back(wide);
  };
  for (const Kind& kind : kinds()) take(kind);
  Kind kind{"causal: two probes, shared, memory", kinds()[0].config};
  kind.config.routed.membership.probes = 2;
  kind.config.memory = 2;
  take(kind);
  kind.name = "causal: three probes, separate, dense up to a position";
  kind.config.routed.matching.shared_qk = false;
  kind.config.routed.membership.probes = 3;
  kind.config.memory = 0;
  kind.config.dense_up_to = 5;
  take(kind);
  kind.name = "causal: two probes, induction, soft cap";
  kind.config.routed.matching.shared_qk = {};
  kind.config.routed.membership.probes = 2;
  kind.config.dense_up_to = 0;
  kind.config.routed.matching.induction = true;
  kind.config.routed.matching.key_taps = 3;
  kind.config.soft_cap = 2;
  take(kind);
  kind.name = "causal: probes of grouped queries, never themselves";
  kind.config.routed.matching.induction = false;
  kind.config.routed.matching.key_taps = 0;
  set_heads(kind.config, 2, 2);
  kind.config.kv_heads = 2;
  kind.config.routed.matching.self = Self::never;
  take(kind);
  kind.name = "causal: three probes, sinks and many recent keys, memory";
  kind.config.routed = {.heads = 2,
                        .clusters = 4,
                        .window = 3,
                        .sinks = 2,
                        .recent = 40,
                        .membership = {.probes = 3},
                        .matching = {.shared_qk = false},
                        .positions = {.kind = PositionKind::rotary}};
  kind.config.memory = 2;
  take(kind);
  Kind blocks{"causal: local, routed and dense heads at once, memory, global tokens", kinds()[0].config};
  blocks.config.dense = {.heads = 1};
  blocks.config.memory = 1;
  blocks.config.globals = 2;
  take(blocks);
  blocks.name = "causal: induction in all three blocks, biases";
  blocks.config.memory = blocks.config.globals = 0;
  blocks.config.bias = true;
  for (Matching* matching :
       {&blocks.config.local.matching, &blocks.config.routed.matching, &blocks.config.dense.matching}) {
    matching->induction = true;
    matching->key_taps = 2;
  }
  take(blocks);
  return all;
}

/// A layer whose centroids have moved away from their first values.
template <class T>
RoutingAttention<T> moved_layer(const RoutingAttentionConfig& config) {
  RoutingAttention<T> layer = make_layer<T>(config);
  const RowMatrix<T> x = 2 * Random(31).matrix<T>(200, config.model_dim);
  RowMatrix<T> y(200, config.model_dim);
  Context context;
  typename RoutingAttention<T>::Tape tape;
  layer.forward(x, y, tape, context);
  layer.update_router(tape, context);
  return layer;
}

/// The layer's outputs for x.
template <class T>
RowMatrix<T> forward_rows(const RoutingAttention<T>& layer, const RowMatrix<T>& x) {
  RowMatrix<T> y(x.rows(), x.cols());
  Context context;
  layer.forward(x, y, context);
  return y;
}

}  // namespace test
