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
    wide.config.window = 70;
    wide.config.clusters = wide.config.clusters > 0 ? 1 : 0;
    if (wide.config.probes > 1) wide.config.clusters = wide.config.probes;
    if (wide.config.local_window > 0) wide.config.local_window = 90;
    if (wide.config.dense_up_to > 0) wide.config.dense_up_to = 75;
    all.push_back(wide);
  };
  for (const Kind& kind : kinds()) take(kind);
  Kind kind{"causal: two probes, shared, memory", kinds()[0].config};
  kind.config.probes = 2;
  kind.config.memory = 2;
  take(kind);
  kind.name = "causal: three probes, separate, dense up to a position";
  kind.config.shared_qk = false;
  kind.config.probes = 3;
  kind.config.memory = 0;
  kind.config.dense_up_to = 5;
  take(kind);
  kind.name = "causal: two probes, induction, soft cap";
  kind.config.shared_qk = {};
  kind.config.probes = 2;
  kind.config.dense_up_to = 0;
  kind.config.induction = true;
  kind.config.key_taps = 3;
  kind.config.soft_cap = 2;
  take(kind);
  kind.name = "causal: probes of grouped queries, never themselves";
  kind.config.induction = false;
  kind.config.key_taps = 0;
  kind.config.heads = 4;
  kind.config.kv_heads = 2;
  kind.config.routed_heads = 2;
  kind.config.self = Self::never;
  take(kind);
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
