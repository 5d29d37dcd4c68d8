#pragma once

// The kinds of layers that the layer's tests go through, and inputs for them. A new option belongs in here.

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "coterie/layer/routing_attention.hpp"
#include "random.hpp"

namespace test {

using namespace coterie;

struct Kind {
  std::string name;
  RoutingAttentionConfig config;
};

inline std::vector<Kind> kinds() {
  const RoutingAttentionConfig two{
      .model_dim = 10, .heads = 2, .head_dim = 4, .routed_heads = 1, .clusters = 3, .window = 4, .seed = 3};
  std::vector<Kind> all;
  const auto add = [&](const char* name, auto change) {
    Kind kind{name, two};
    change(kind.config);
    all.push_back(kind);
  };
  add("causal: rotary, shared", [](auto& c) { c.causal = true; });
  add("causal: bias per distance, biases", [](auto& c) {
    c.causal = c.bias = true;
    c.local_positions = PositionKind::bias;
    c.local_window = 3;
  });
  add("causal: no positions, shared, sees itself", [](auto& c) {
    c.causal = true;
    c.local_positions = PositionKind::none;
    c.self = Self::visible;
  });
  add("causal: local heads only, odd width", [](auto& c) {
    c.causal = true;
    c.heads = 3;
    c.head_dim = 5;
    c.routed_heads = 0;
  });
  add("causal: routed heads only, never themselves", [](auto& c) {
    c.causal = true;
    c.routed_heads = 2;
    c.self = Self::never;
  });
  add("causal: separate queries and keys", [](auto& c) {
    c.causal = c.bias = true;
    c.shared_qk = false;
  });
  add("causal: induction with taps", [](auto& c) {
    c.causal = c.induction = c.bias = true;
    c.key_taps = 3;
  });
  add("causal: induction without taps", [](auto& c) { c.causal = c.induction = true; });
  add("causal: local induction", [](auto& c) {
    c.causal = c.local_induction = true;
    c.key_taps = 2;
  });
  add("causal: local and routed induction, four heads", [](auto& c) {
    c.causal = c.induction = c.local_induction = true;
    c.heads = 4;
    c.routed_heads = 2;
    c.key_taps = 5;
  });
  add("causal: random", [](auto& c) {
    c.causal = true;
    c.routing = Routing::random;
  });
  add("causal: random induction", [](auto& c) {
    c.causal = c.induction = true;
    c.routing = Routing::random;
  });
  add("causal: dense", [](auto& c) {
    c.causal = true;
    c.routing = Routing::dense;
  });
  add("causal: dense induction", [](auto& c) {
    c.causal = c.induction = true;
    c.key_taps = 2;
    c.routing = Routing::dense;
  });
  add("causal: memory, shared", [](auto& c) {
    c.causal = true;
    c.memory = 2;
  });
  add("causal: memory, induction, bias per distance", [](auto& c) {
    c.causal = c.induction = true;
    c.memory = 1;
    c.local_positions = PositionKind::bias;
  });
  add("two-sided: memory, dense, separate", [](auto& c) {
    c.memory = 3;
    c.routing = Routing::dense;
  });
  add("two-sided: memory with lookahead, random, separate", [](auto& c) {
    c.memory = 1;
    c.lookahead = 2;
    c.routing = Routing::random;
  });
  add("two-sided: rotary with lookahead, separate", [](auto& c) {
    c.lookahead = 2;
    c.bias = true;
  });
  add("two-sided: bias per distance with lookahead, shared", [](auto& c) {
    c.lookahead = 1;
    c.local_positions = PositionKind::bias;
    c.shared_qk = true;
  });
  add("two-sided: dense, separate", [](auto& c) { c.routing = Routing::dense; });
  add("two-sided: random, separate, never themselves", [](auto& c) {
    c.routing = Routing::random;
    c.self = Self::never;
  });
  add("causal: ALiBi of one and three heads, shared", [](auto& c) {
    c.gain = 1;
    c.causal = true;
    c.heads = 4;
    c.routed_heads = 3;
    c.local_positions = PositionKind::alibi;
    c.routed_positions = PositionKind::alibi;
  });
  add("causal: T5 buckets", [](auto& c) {
    c.gain = 1;
    c.causal = true;
    c.local_window = 11;
    c.local_positions = PositionKind::t5_buckets;
    c.routed_positions = PositionKind::t5_buckets;
    c.position_buckets = 6;
    c.max_distance = 9;
  });
  add("causal: rotary everywhere, interleaved, shared", [](auto& c) {
    c.gain = 1;
    c.causal = true;
    c.routed_positions = PositionKind::rotary;
    c.rotary_layout = RotaryLayout::interleaved;
    c.rotary_base = 50;
  });
  add("causal: routed bias, separate", [](auto& c) {
    c.causal = true;
    c.shared_qk = false;
    c.routed_positions = PositionKind::bias;
    c.routed_distances = 6;
  });
  add("causal: local induction with a bias, rotary induction", [](auto& c) {
    c.gain = 1;
    c.causal = c.induction = c.local_induction = true;
    c.key_taps = 2;
    c.local_positions = PositionKind::bias;
    c.routed_positions = PositionKind::rotary;
  });
  add("causal: dense ALiBi", [](auto& c) {
    c.gain = 1;
    c.causal = true;
    c.routing = Routing::dense;
    c.routed_positions = PositionKind::alibi;
  });
  add("two-sided: ALiBi with lookahead, rotary of odd width, separate", [](auto& c) {
    c.head_dim = 5;
    c.lookahead = 2;
    c.local_positions = PositionKind::alibi;
    c.routed_positions = PositionKind::rotary;
  });
  add("two-sided: T5 buckets with lookahead, routed bias, shared", [](auto& c) {
    c.gain = 1;
    c.lookahead = 3;
    c.shared_qk = true;
    c.local_positions = PositionKind::t5_buckets;
    c.position_buckets = 8;
    c.max_distance = 4;
    c.routed_positions = PositionKind::bias;
    c.routed_distances = 4;
  });
  add("two-sided: dense T5 buckets, separate", [](auto& c) {
    c.routing = Routing::dense;
    c.routed_positions = PositionKind::t5_buckets;
    c.position_buckets = 12;
    c.max_distance = 10;
  });
  add("causal: grouped queries, biases, rotary", [](auto& c) {
    c.causal = c.bias = true;
    c.heads = 6;
    c.kv_heads = 3;
    c.routed_heads = 4;
    c.routed_positions = PositionKind::rotary;
  });
  add("two-sided: one key and value for all, memory, learned gain", [](auto& c) {
    c.heads = 3;
    c.kv_heads = 1;
    c.routed_heads = 3;
    c.memory = 2;
    c.learned_gain = true;
  });
  add("causal: grouped queries, random, ALiBi", [](auto& c) {
    c.causal = true;
    c.heads = 4;
    c.kv_heads = 2;
    c.routed_heads = 2;
    c.routing = Routing::random;
    c.local_positions = PositionKind::alibi;
    c.routed_positions = PositionKind::alibi;
  });
  add("two-sided: grouped queries, normalised, dense", [](auto& c) {
    c.heads = 4;
    c.kv_heads = 2;
    c.routed_heads = 2;
    c.routing = Routing::dense;
    c.logits = Logits::normalised;
  });
  add("causal: global tokens, shared", [](auto& c) {
    c.causal = true;
    c.globals = 2;
  });
  add("causal: global tokens, induction, memory, bias", [](auto& c) {
    c.gain = 1;
    c.causal = c.induction = true;
    c.globals = 1;
    c.memory = 2;
    c.local_positions = PositionKind::bias;
    c.routed_positions = PositionKind::bias;
    c.routed_distances = 5;
  });
  add("two-sided: global tokens with lookahead, ALiBi, grouped queries", [](auto& c) {
    c.heads = 4;
    c.kv_heads = 2;
    c.routed_heads = 2;
    c.globals = 3;
    c.lookahead = 1;
    c.local_positions = PositionKind::alibi;
    c.routed_positions = PositionKind::alibi;
  });
  add("causal: dense up to a position, rotary", [](auto& c) {
    c.causal = true;
    c.dense_up_to = 7;
    c.routed_positions = PositionKind::rotary;
  });
  add("causal: dense up to a position, global tokens, memory, ALiBi", [](auto& c) {
    c.gain = 1;
    c.causal = true;
    c.dense_up_to = 6;
    c.globals = 1;
    c.memory = 1;
    c.local_positions = PositionKind::alibi;
  });
  add("two-sided: dense up to a length, separate", [](auto& c) { c.dense_up_to = 9; });
  add("causal: unit length, shared", [](auto& c) {
    c.causal = true;
    c.normalisation = Normalisation::unit_length;
  });
  add("causal: unit length, normalised keys, rotary", [](auto& c) {
    c.causal = true;
    c.normalisation = Normalisation::unit_length;
    c.logits = Logits::normalised_keys;
    c.routed_positions = PositionKind::rotary;
  });
  add("causal: raw logits, shared, fixed gain", [](auto& c) {
    c.causal = true;
    c.logits = Logits::raw;
    c.gain = 0.6;
    c.learned_gain = false;
  });
  add("two-sided: normalised logits, separate, grouped queries", [](auto& c) {
    c.heads = 4;
    c.kv_heads = 2;
    c.routed_heads = 2;
    c.bias = true;
    c.logits = Logits::normalised;
    c.learned_gain = true;
    c.routed_positions = PositionKind::rotary;
  });
  add("two-sided: normalised keys, separate, unit length", [](auto& c) {
    c.normalisation = Normalisation::unit_length;
    c.logits = Logits::normalised_keys;
    c.gain = -1.5;
  });
  add("causal: Shaw's vectors by distance, shared", [](auto& c) {
    c.causal = true;
    c.local_positions = PositionKind::shaw;
    c.routed_positions = PositionKind::shaw;
    c.routed_distances = 6;
  });
  add("two-sided: Shaw's vectors with lookahead, grouped queries, memory", [](auto& c) {
    c.heads = 4;
    c.kv_heads = 2;
    c.routed_heads = 2;
    c.lookahead = 2;
    c.memory = 1;
    c.local_positions = PositionKind::shaw;
    c.routed_positions = PositionKind::shaw;
    c.routed_distances = 4;
  });
  add("causal: unit length, induction with taps", [](auto& c) {
    c.causal = c.induction = c.local_induction = true;
    c.key_taps = 3;
    c.normalisation = Normalisation::unit_length;
  });
  return all;
}

/// A layer of a kind whose biases, gains and centroids are not where they start.
template <class T>
RoutingAttention<T> make_layer(const RoutingAttentionConfig& config) {
  RoutingAttention<T> layer(config);
  Random random(17);
  layer.parameters().visit([&](std::string_view name, View<T> m) {
    if (name[0] != 'b' && name != "gain" && name.find("bias") == name.npos) return;
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j) m(i, j) += static_cast<T>(0.3 * random.uniform());
  });
  return layer;
}

/// Three sequences of n tokens together, one of them empty.
inline std::vector<Index> three_sequences(Index n) { return {0, n / 3, n / 3, n}; }

template <class T>
bool same_bits(ConstView<T> a, ConstView<T> b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i)
    if (std::memcmp(a.row(i), b.row(i), static_cast<std::size_t>(a.cols()) * sizeof(T)) != 0) return false;
  return true;
}

template <class T>
bool same_bits(const Parameters<T>& a, const Parameters<T>& b) {
  bool same = true;
  for (const auto& tensor : Parameters<T>::tensors()) same = same && same_bits<T>(a.*tensor.member, b.*tensor.member);
  return same;
}

}  // namespace test
