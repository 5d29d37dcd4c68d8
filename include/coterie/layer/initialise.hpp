// Which heads a layer has, and the first values of its weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "coterie/core/random.hpp"
#include "coterie/layer/parameters.hpp"

namespace coterie::detail {

/// Consecutive heads of one kind: all the local ones, or all the routed ones.
struct HeadBlock {
  Index first = 0, count = 0;        ///< query heads
  Index kv_first = 0, kv_count = 0;  ///< key/value heads
  Index head_dim = 0;
  bool routed = false;
  bool shared = false;  ///< keys are the queries
  Logits logits = Logits::raw;
  double gain = 1;            ///< of the logits, beside 1/sqrt(d); where it is learned, its start
  bool learned_gain = false;  ///< it is a parameter
  PositionKind positions = PositionKind::none;
  bool induction = false;  ///< shared, convolved, and a key carries the next position's value
  Index key_first = 0;     ///< first of these key/value heads in w_k, unless shared
  Index gain_first = 0;    ///< first of these heads in gain, if learned
  Index taps_first = 0;    ///< first row of these heads in taps, if induction
  Index taps = 0;          ///< per head

  Index cols() const { return count * head_dim; }
  Index first_col() const { return first * head_dim; }
  Index kv_cols() const { return kv_count * head_dim; }
  Index kv_first_col() const { return kv_first * head_dim; }
  /// Query heads of a key/value head.
  Index heads_per_kv() const { return count / kv_count; }
  /// Whether normalised queries are kept; and normalised keys other than those.
  bool normalises_queries() const { return shared || logits == Logits::normalised; }
  bool normalises_keys() const { return !shared && logits != Logits::raw; }
};

/// The heads of a layer.
struct Heads {
  HeadBlock local, routed;
  Index key_heads = 0, gains = 0, taps_rows = 0;

  /// Requires a resolved config.
  explicit Heads(const RoutingAttentionConfig& c) {
    local.count = c.heads - c.routed_heads;
    local.shared = local.induction = c.local_induction;
    routed.first = local.count;
    routed.count = c.routed_heads;
    routed.routed = true;
    routed.shared = *c.shared_qk;
    routed.induction = c.induction;
    local.logits = c.local_induction ? Logits::normalised : Logits::raw;
    routed.logits = *c.logits;
    local.learned_gain = c.local_induction;
    routed.learned_gain = *c.learned_gain;
    local.positions = *c.local_positions;
    routed.positions = c.routed_positions;
    for (HeadBlock* group : {&local, &routed}) {
      group->head_dim = c.head_dim;
      group->kv_first = group->first / (c.heads / c.kv_heads);
      group->kv_count = group->count / (c.heads / c.kv_heads);
      if (group->routed || group->induction)
        group->gain = c.gain.value_or(group->logits == Logits::normalised ? 3.0 : 1.0);
      group->taps = group->induction ? c.key_taps : 0;
      group->key_first = key_heads;
      group->gain_first = gains;
      group->taps_first = taps_rows;
      if (!group->shared) key_heads += group->kv_count;
      if (group->learned_gain) gains += group->count;
      taps_rows += group->count * group->taps;
    }
  }
};

/// The distances of a bias table: first, first + 1, ...
struct DistanceRange {
  Index first = 0, count = 0;
};

/// The distances that the table of a group has to hold, where the longest sequence of keys has `longest` (at least
/// 1) of them; only ALiBi's depends on that. Others take the nearest column.
inline DistanceRange table_distances(const RoutingAttentionConfig& c, const HeadBlock& group, Index longest) {
  Index back = c.max_distance, ahead = c.causal ? 0 : c.max_distance;  // t5_buckets
  if (group.positions == PositionKind::bias || group.positions == PositionKind::shaw) {
    back = group.routed ? c.routed_distances - 1 : c.local_window - 1;
    ahead = !group.routed ? c.lookahead : c.causal ? 0 : back;
  } else if (group.positions == PositionKind::alibi) {
    const bool far = group.routed || c.globals > 0 || c.dense_up_to > 0;
    back = far ? longest - 1 : std::min(longest, c.local_window) - 1;
    ahead = c.causal ? 0 : far ? back : std::min(longest - 1, c.lookahead);
  }
  return {-ahead, ahead + 1 + back};
}

/// What a layer draws random numbers for; each has a stream of its seed of its own.
enum class LayerStream : std::uint64_t {
  w_q = 1,
  w_k,
  w_v,
  w_o,
  taps,
  centroids,
  routes,
  dropout,
  memory_keys,
  memory_values,
  relative_keys,
  relative_values,
  routed_relative_keys,
  routed_relative_values
};

/// Name and shape of a tensor.
struct TensorShape {
  std::string name;
  Index rows = 0, cols = 0;
};

/// The parameters of a resolved config.
inline std::vector<TensorShape> parameter_shapes(const RoutingAttentionConfig& c) {
  const Heads heads(c);
  const Index cols = c.heads * c.head_dim, kv_cols = c.kv_heads * c.head_dim, key_cols = heads.key_heads * c.head_dim;
  std::vector<TensorShape> shapes;
  const auto add = [&](const char* name, Index rows, Index n) {
    if (rows > 0 && n > 0) shapes.push_back({name, rows, n});
  };
  add("w_q", c.model_dim, cols);
  add("w_k", c.model_dim, key_cols);
  add("w_v", c.model_dim, kv_cols);
  add("w_o", cols, c.model_dim);
  if (c.bias) {
    add("b_q", 1, cols);
    add("b_k", 1, key_cols);
    add("b_v", 1, kv_cols);
    add("b_o", 1, c.model_dim);
  }
  add("gain", 1, heads.gains);
  add("taps", heads.taps_rows, c.head_dim);
  for (const HeadBlock* group : {&heads.local, &heads.routed}) {
    if (group->count == 0) continue;
    if (group->positions == PositionKind::bias) {
      add(group->routed ? "routed_distance_bias" : "distance_bias", group->count, table_distances(c, *group, 1).count);
    } else if (group->positions == PositionKind::shaw) {
      const Index rows = table_distances(c, *group, 1).count;
      add(group->routed ? "routed_relative_keys" : "relative_keys", rows, c.head_dim);
      add(group->routed ? "routed_relative_values" : "relative_values", rows, c.head_dim);
    } else if (group->positions == PositionKind::t5_buckets) {
      add(group->routed ? "routed_bucket_bias" : "bucket_bias", group->count, c.position_buckets);
    }
  }
  add("memory_keys", c.memory, kv_cols);
  add("memory_values", c.memory, kv_cols);
  return shapes;
}

/// Parameters of the shapes of a resolved config, all zero.
template <class T>
Parameters<T> zero_parameters(const RoutingAttentionConfig& c) {
  Parameters<T> p;
  for (const TensorShape& shape : parameter_shapes(c))
    for (const auto& tensor : Parameters<T>::tensors())
      if (tensor.name == shape.name) (p.*tensor.member).setZero(shape.rows, shape.cols);
  return p;
}

/// First values: weights uniform in +-1/sqrt(rows), taps N(0, 1) * 0.9^t, memory N(0, 1), relative keys and values
/// N(0, 1/head_dim), gains as HeadBlock has them, biases 0. The number at
/// (i, j) is drawn by the counter i * cols + j, in double: float and double layers of a seed agree up to rounding.
template <class T>
Parameters<T> initial_parameters(const RoutingAttentionConfig& c) {
  Parameters<T> p = zero_parameters<T>(c);
  const auto uniform = [&](RowMatrix<T>& w, LayerStream stream) {
    const double bound = w.rows() > 0 ? 1 / std::sqrt(static_cast<double>(w.rows())) : 0;
    for (Index i = 0; i < w.size(); ++i)
      w.data()[i] = static_cast<T>(
          bound * (2 * random_uniform(c.seed, static_cast<std::uint64_t>(stream), static_cast<std::uint64_t>(i)) - 1));
  };
  uniform(p.w_q, LayerStream::w_q);
  uniform(p.w_k, LayerStream::w_k);
  uniform(p.w_v, LayerStream::w_v);
  uniform(p.w_o, LayerStream::w_o);
  const auto normal = [&](RowMatrix<T>& m, LayerStream stream, double deviation = 1) {
    for (Index i = 0; i < m.size(); ++i)
      m.data()[i] = static_cast<T>(
          deviation * random_normal(c.seed, static_cast<std::uint64_t>(stream), static_cast<std::uint64_t>(i)));
  };
  const double relative = 1 / std::sqrt(static_cast<double>(c.head_dim));
  normal(p.relative_keys, LayerStream::relative_keys, relative);
  normal(p.relative_values, LayerStream::relative_values, relative);
  normal(p.routed_relative_keys, LayerStream::routed_relative_keys, relative);
  normal(p.routed_relative_values, LayerStream::routed_relative_values, relative);
  normal(p.memory_keys, LayerStream::memory_keys);
  normal(p.memory_values, LayerStream::memory_values);
  const Heads heads(c);
  for (const HeadBlock* group : {&heads.local, &heads.routed})
    for (Index h = 0; h < group->count && group->learned_gain; ++h)
      p.gain(0, group->gain_first + h) = static_cast<T>(group->gain);
  for (Index row = 0; row < p.taps.rows(); ++row) {
    const double factor = std::pow(0.9, static_cast<double>(row % c.key_taps));
    for (Index j = 0; j < p.taps.cols(); ++j)
      p.taps(row, j) = static_cast<T>(factor * random_normal(c.seed, static_cast<std::uint64_t>(LayerStream::taps),
                                                             static_cast<std::uint64_t>(row * p.taps.cols() + j)));
  }
  return p;
}

}  // namespace coterie::detail
