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

/// Changes how many heads a config has; a block without heads is its default.
inline void set_heads(RoutingAttentionConfig& c, Index local, Index routed) {
  if (local == 0) c.local = {};
  if (routed == 0) c.routed = {};
  c.local.heads = local;
  c.routed.heads = routed;
}

/// Calls f(block) for every block of a config that has heads.
template <class C, class F>
void for_each_block(C& c, F f) {
  if (c.local.heads > 0) f(c.local);
  if (c.routed.heads > 0) f(c.routed);
  if (c.dense.heads > 0) f(c.dense);
}

/// Whether a block with heads has a property.
template <class F>
bool any_block(const RoutingAttentionConfig& c, F property) {
  bool any = false;
  for_each_block(c, [&](const auto& block) { any = any || property(block); });
  return any;
}

/// Turns routed heads into dense ones, which share queries and keys as routed ones would.
inline void make_dense(RoutingAttentionConfig& c) {
  c.dense = {.heads = c.routed.heads, .matching = c.routed.matching, .positions = c.routed.positions};
  if (c.causal && c.kv_heads == 0 && !c.dense.matching.shared_qk) c.dense.matching.shared_qk = true;
  if (!c.dense.positions.kind) c.dense.positions.kind = PositionKind::none;
  c.routed = {};
}

inline std::vector<Kind> kinds() {
  const RoutingAttentionConfig two{.model_dim = 10,
                                   .head_dim = 4,
                                   .seed = 3,
                                   .local = {.heads = 1, .window = 4},
                                   .routed = {.heads = 1, .clusters = 3, .window = 4}};
  std::vector<Kind> all;
  const auto add = [&](const char* name, auto change) {
    Kind kind{name, two};
    change(kind.config);
    all.push_back(kind);
  };
  add("causal: rotary, shared", [](auto& c) { c.causal = true; });
  add("causal: bias per distance, biases", [](auto& c) {
    c.causal = c.bias = true;
    c.local.positions.kind = PositionKind::bias;
    c.local.window = 3;
  });
  add("causal: no positions, shared, sees itself", [](auto& c) {
    c.causal = true;
    c.local.positions.kind = PositionKind::none;
    c.routed.matching.self = Self::visible;
  });
  add("causal: local heads only, odd width", [](auto& c) {
    set_heads(c, 3, 0);
    c.causal = true;
    c.head_dim = 5;
  });
  add("causal: routed heads only, never themselves", [](auto& c) {
    set_heads(c, 0, 2);
    c.causal = true;
    c.routed.matching.self = Self::never;
  });
  add("causal: separate queries and keys", [](auto& c) {
    c.causal = c.bias = true;
    c.routed.matching.shared_qk = false;
  });
  add("causal: induction with taps", [](auto& c) {
    c.causal = c.routed.matching.induction = c.bias = true;
    c.routed.matching.key_taps = 3;
  });
  add("causal: induction without taps", [](auto& c) { c.causal = c.routed.matching.induction = true; });
  add("causal: local induction", [](auto& c) {
    c.causal = c.local.matching.induction = true;
    c.local.matching.key_taps = 2;
  });
  add("causal: local and routed induction, four heads", [](auto& c) {
    set_heads(c, 2, 2);
    c.causal = c.routed.matching.induction = c.local.matching.induction = true;
    c.local.matching.key_taps = c.routed.matching.key_taps = 5;
  });
  add("causal: random", [](auto& c) {
    c.causal = true;
    c.routed.routing = Routing::random;
  });
  add("causal: random induction", [](auto& c) {
    c.causal = c.routed.matching.induction = true;
    c.routed.routing = Routing::random;
  });
  add("causal: dense", [](auto& c) {
    c.causal = true;
    make_dense(c);
  });
  add("causal: dense induction", [](auto& c) {
    c.causal = c.routed.matching.induction = true;
    c.routed.matching.key_taps = 2;
    make_dense(c);
  });
  add("causal: memory, shared", [](auto& c) {
    c.causal = true;
    c.memory = 2;
  });
  add("causal: memory, induction, bias per distance", [](auto& c) {
    c.causal = c.routed.matching.induction = true;
    c.memory = 1;
    c.local.positions.kind = PositionKind::bias;
  });
  add("two-sided: memory, dense, separate", [](auto& c) {
    c.memory = 3;
    make_dense(c);
  });
  add("two-sided: memory with lookahead, random, separate", [](auto& c) {
    c.memory = 1;
    c.local.lookahead = 2;
    c.routed.routing = Routing::random;
  });
  add("two-sided: rotary with lookahead, separate", [](auto& c) {
    c.local.lookahead = 2;
    c.bias = true;
  });
  add("two-sided: bias per distance with lookahead, shared", [](auto& c) {
    c.local.lookahead = 1;
    c.local.positions.kind = PositionKind::bias;
    c.routed.matching.shared_qk = true;
  });
  add("two-sided: dense, separate", [](auto& c) { make_dense(c); });
  add("two-sided: random, separate, never themselves", [](auto& c) {
    c.routed.routing = Routing::random;
    c.routed.matching.self = Self::never;
  });
  add("causal: ALiBi of one and three heads, shared", [](auto& c) {
    set_heads(c, 1, 3);
    c.routed.matching.gain = 1;
    c.causal = true;
    c.local.positions.kind = PositionKind::alibi;
    c.routed.positions.kind = PositionKind::alibi;
  });
  add("causal: T5 buckets", [](auto& c) {
    c.routed.matching.gain = 1;
    c.causal = true;
    c.local.window = 11;
    c.local.positions.kind = PositionKind::t5_buckets;
    c.routed.positions.kind = PositionKind::t5_buckets;
    c.local.positions.buckets = c.routed.positions.buckets = 6;
    c.local.positions.max_distance = c.routed.positions.max_distance = 9;
  });
  add("causal: rotary everywhere, interleaved, shared", [](auto& c) {
    c.routed.matching.gain = 1;
    c.causal = true;
    c.routed.positions.kind = PositionKind::rotary;
    c.local.positions.layout = c.routed.positions.layout = RotaryLayout::interleaved;
    c.local.positions.base = c.routed.positions.base = 50;
  });
  add("causal: routed bias, separate", [](auto& c) {
    c.causal = true;
    c.routed.matching.shared_qk = false;
    c.routed.positions.kind = PositionKind::bias;
    c.routed.positions.distances = 6;
  });
  add("causal: local induction with a bias, rotary induction", [](auto& c) {
    c.local.matching.gain = c.routed.matching.gain = 1;
    c.causal = c.routed.matching.induction = c.local.matching.induction = true;
    c.local.matching.key_taps = c.routed.matching.key_taps = 2;
    c.local.positions.kind = PositionKind::bias;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("causal: dense ALiBi", [](auto& c) {
    c.routed.matching.gain = 1;
    c.causal = true;
    c.routed.positions.kind = PositionKind::alibi;
    make_dense(c);
  });
  add("two-sided: ALiBi with lookahead, rotary of odd width, separate", [](auto& c) {
    c.head_dim = 5;
    c.local.lookahead = 2;
    c.local.positions.kind = PositionKind::alibi;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("two-sided: T5 buckets with lookahead, routed bias, shared", [](auto& c) {
    c.routed.matching.gain = 1;
    c.local.lookahead = 3;
    c.routed.matching.shared_qk = true;
    c.local.positions.kind = PositionKind::t5_buckets;
    c.local.positions.buckets = c.routed.positions.buckets = 8;
    c.local.positions.max_distance = c.routed.positions.max_distance = 4;
    c.routed.positions.kind = PositionKind::bias;
    c.routed.positions.distances = 4;
  });
  add("two-sided: dense T5 buckets, separate", [](auto& c) {
    c.routed.positions.kind = PositionKind::t5_buckets;
    c.local.positions.buckets = c.routed.positions.buckets = 12;
    c.local.positions.max_distance = c.routed.positions.max_distance = 10;
    make_dense(c);
  });
  add("causal: grouped queries, biases, rotary", [](auto& c) {
    set_heads(c, 2, 4);
    c.causal = c.bias = true;
    c.kv_heads = 3;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("two-sided: one key and value for all, memory, learned gain", [](auto& c) {
    set_heads(c, 0, 3);
    c.kv_heads = 1;
    c.memory = 2;
    c.routed.matching.learned_gain = true;
  });
  add("causal: grouped queries, random, ALiBi", [](auto& c) {
    set_heads(c, 2, 2);
    c.causal = true;
    c.kv_heads = 2;
    c.routed.routing = Routing::random;
    c.local.positions.kind = PositionKind::alibi;
    c.routed.positions.kind = PositionKind::alibi;
  });
  add("two-sided: grouped queries, normalised, dense", [](auto& c) {
    set_heads(c, 2, 2);
    c.kv_heads = 2;
    c.routed.matching.logits = Logits::normalised;
    make_dense(c);
  });
  add("causal: global tokens, shared", [](auto& c) {
    c.causal = true;
    c.globals = 2;
  });
  add("causal: global tokens, induction, memory, bias", [](auto& c) {
    c.routed.matching.gain = 1;
    c.causal = c.routed.matching.induction = true;
    c.globals = 1;
    c.memory = 2;
    c.local.positions.kind = PositionKind::bias;
    c.routed.positions.kind = PositionKind::bias;
    c.routed.positions.distances = 5;
  });
  add("two-sided: global tokens with lookahead, ALiBi, grouped queries", [](auto& c) {
    set_heads(c, 2, 2);
    c.kv_heads = 2;
    c.globals = 3;
    c.local.lookahead = 1;
    c.local.positions.kind = PositionKind::alibi;
    c.routed.positions.kind = PositionKind::alibi;
  });
  add("causal: dense up to a position, rotary", [](auto& c) {
    c.causal = true;
    c.dense_up_to = 7;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("causal: dense up to a position, global tokens, memory, ALiBi", [](auto& c) {
    c.routed.matching.gain = 1;
    c.causal = true;
    c.dense_up_to = 6;
    c.globals = 1;
    c.memory = 1;
    c.local.positions.kind = PositionKind::alibi;
  });
  add("two-sided: dense up to a length, separate", [](auto& c) { c.dense_up_to = 9; });
  add("causal: unit length, shared", [](auto& c) {
    c.causal = true;
    c.routed.matching.normalisation = Normalisation::unit_length;
  });
  add("causal: unit length, normalised keys, rotary", [](auto& c) {
    c.causal = true;
    c.routed.matching.normalisation = Normalisation::unit_length;
    c.routed.matching.logits = Logits::normalised_keys;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("causal: raw logits, shared, fixed gain", [](auto& c) {
    c.causal = true;
    c.routed.matching.logits = Logits::raw;
    c.routed.matching.gain = 0.6;
    c.routed.matching.learned_gain = false;
  });
  add("two-sided: normalised logits, separate, grouped queries", [](auto& c) {
    set_heads(c, 2, 2);
    c.kv_heads = 2;
    c.bias = true;
    c.routed.matching.logits = Logits::normalised;
    c.routed.matching.learned_gain = true;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("two-sided: normalised keys, separate, unit length", [](auto& c) {
    c.routed.matching.normalisation = Normalisation::unit_length;
    c.routed.matching.logits = Logits::normalised_keys;
    c.routed.matching.gain = -1.5;
  });
  add("causal: Shaw's vectors by distance, shared", [](auto& c) {
    c.causal = true;
    c.local.positions.kind = PositionKind::shaw;
    c.routed.positions.kind = PositionKind::shaw;
    c.routed.positions.distances = 6;
  });
  add("two-sided: Shaw's vectors with lookahead, grouped queries, memory", [](auto& c) {
    set_heads(c, 2, 2);
    c.kv_heads = 2;
    c.local.lookahead = 2;
    c.memory = 1;
    c.local.positions.kind = PositionKind::shaw;
    c.routed.positions.kind = PositionKind::shaw;
    c.routed.positions.distances = 4;
  });
  add("causal: unit length, induction with taps", [](auto& c) {
    c.causal = c.routed.matching.induction = c.local.matching.induction = true;
    c.local.matching.key_taps = c.routed.matching.key_taps = 3;
    c.local.matching.normalisation = c.routed.matching.normalisation = Normalisation::unit_length;
  });
  // Heads of all three blocks at once.
  add("causal: local, routed and dense heads", [](auto& c) {
    c.causal = c.bias = true;
    c.dense = {.heads = 2};
  });
  add("causal: three blocks share queries and keys, Shaw's vectors", [](auto& c) {
    c.causal = true;
    c.dense = {.heads = 1, .matching = {.shared_qk = true}, .positions = {.kind = PositionKind::shaw, .distances = 3}};
    c.local.matching.shared_qk = true;
    c.local.matching.gain = 1.5;
    c.local.positions.kind = PositionKind::shaw;
    c.routed.positions = {.kind = PositionKind::shaw, .distances = 6};
  });
  add("causal: induction in three blocks, each with its taps and norm", [](auto& c) {
    c.causal = true;
    c.dense = {.heads = 2, .matching = {.gain = 2, .induction = true, .key_taps = 2}};
    c.local.matching = {.normalisation = Normalisation::unit_length, .induction = true, .key_taps = 4};
    c.routed.matching = {.learned_gain = false, .induction = true, .key_taps = 3};
  });
  add("causal: three blocks, dense up to a position, global tokens, memory, rotary of three bases", [](auto& c) {
    c.causal = true;
    c.dense_up_to = 5;
    c.globals = 2;
    c.memory = 1;
    c.dense = {.heads = 1, .positions = {.base = 50, .layout = RotaryLayout::interleaved}};
    c.local.positions.base = 20;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("two-sided: three blocks, grouped queries, memory, buckets and bias", [](auto& c) {
    set_heads(c, 2, 4);
    c.dense = {.heads = 2,
               .matching = {.logits = Logits::normalised_keys, .gain = 0.7},
               .positions = {.kind = PositionKind::bias, .distances = 4}};
    c.kv_heads = 4;
    c.memory = 2;
    c.local.lookahead = 1;
    c.local.matching = {.logits = Logits::normalised, .learned_gain = true};
    c.local.positions = {.kind = PositionKind::t5_buckets, .buckets = 8, .max_distance = 5};
    c.routed.positions.kind = PositionKind::alibi;
  });
  add("two-sided: local and dense heads share and leave themselves out", [](auto& c) {
    c.routed = {};
    c.dense = {.heads = 1, .matching = {.shared_qk = true, .self = Self::never}};
    c.local.lookahead = 3;
    c.local.matching = {.shared_qk = true, .logits = Logits::raw, .learned_gain = false};
  });
  add("causal: sinks and recent keys, shared", [](auto& c) {
    c.causal = true;
    c.routed.sinks = 2;
    c.routed.recent = 3;
  });
  add("causal: sinks alone, shared, memory", [](auto& c) {
    c.causal = true;
    c.memory = 2;
    c.routed.sinks = 3;
  });
  add("causal: recent keys alone, dense up to a position, ALiBi", [](auto& c) {
    c.causal = true;
    c.dense_up_to = 6;
    c.routed.recent = 5;
    c.routed.positions.kind = PositionKind::alibi;
  });
  add("causal: one recent key, memory, many clusters, shared", [](auto& c) {
    c.causal = true;
    c.memory = 1;
    c.routed.clusters = 40;
    c.routed.recent = 1;
  });
  add("causal: sinks and recent keys, grouped queries, rotary, separate", [](auto& c) {
    set_heads(c, 2, 4);
    c.causal = c.bias = true;
    c.kv_heads = 3;
    c.routed.sinks = 1;
    c.routed.recent = 4;
    c.routed.positions.kind = PositionKind::rotary;
  });
  add("causal: sinks and recent keys, induction with taps, bias per distance", [](auto& c) {
    c.causal = c.routed.matching.induction = true;
    c.routed.matching.key_taps = 2;
    c.routed.sinks = 2;
    c.routed.recent = 4;
    c.routed.positions = {.kind = PositionKind::bias, .distances = 6};
  });
  add("causal: sinks and recent keys, random, never themselves, Shaw's vectors", [](auto& c) {
    c.causal = true;
    c.routed.sinks = 4;
    c.routed.recent = 2;
    c.routed.routing = Routing::random;
    c.routed.matching.self = Self::never;
    c.routed.positions = {.kind = PositionKind::shaw, .distances = 6};
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
