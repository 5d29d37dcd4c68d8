// Shapes and first values of a layer's weights.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "coterie/core/random.hpp"
#include "coterie/layer/head_block.hpp"
#include "coterie/layer/parameters.hpp"

namespace coterie::detail {

/// Uses of random numbers in a layer; each has its own stream of the seed.
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
  local_relative_keys,
  local_relative_values,
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
  const Heads heads = head_blocks(c);
  const Index cols = static_cast<Index>(all_heads(c)) * c.head_dim, kv_cols = c.kv_heads * c.head_dim;
  const Index key_cols = heads.key_heads * c.head_dim;
  std::vector<TensorShape> shapes;
  const auto add = [&](std::string_view name, Index rows, Index n) {
    if (rows > 0 && n > 0) shapes.push_back({std::string(name), rows, n});
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
  for (const HeadBlock& block : heads.blocks) {
    if (block.count == 0) continue;
    const auto add_table = [&](const char* table, Index rows, Index n) {
      add(join(block_name(block.kind), "_", table), rows, n);
    };
    if (block.positions == PositionKind::bias) {
      add_table("distance_bias", block.count, table_distances(c, block, 1).count);
    } else if (block.positions == PositionKind::shaw) {
      const Index rows = table_distances(c, block, 1).count;
      add_table("relative_keys", rows, c.head_dim);
      add_table("relative_values", rows, c.head_dim);
    } else if (block.positions == PositionKind::t5_buckets) {
      add_table("bucket_bias", block.count, block.buckets.buckets);
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
/// N(0, 1/head_dim), gains HeadBlock::gain, biases 0. The number at (i, j) is drawn in double with the counter
/// i * cols + j, so that float and double layers of a seed agree up to rounding.
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
  // `from`: the first number of the stream to use; those before it belong to another tensor.
  const auto normal = [&](RowMatrix<T>& m, LayerStream stream, double deviation = 1, Index from = 0) {
    for (Index i = 0; i < m.size(); ++i)
      m.data()[i] = static_cast<T>(
          deviation * random_normal(c.seed, static_cast<std::uint64_t>(stream), static_cast<std::uint64_t>(from + i)));
  };
  const double relative = 1 / std::sqrt(static_cast<double>(c.head_dim));
  normal(p.local_relative_keys, LayerStream::local_relative_keys, relative);
  normal(p.local_relative_values, LayerStream::local_relative_values, relative);
  normal(p.routed_relative_keys, LayerStream::routed_relative_keys, relative);
  normal(p.routed_relative_values, LayerStream::routed_relative_values, relative);
  // Dense heads take the numbers of the stream after those of routed heads.
  normal(p.dense_relative_keys, LayerStream::routed_relative_keys, relative, p.routed_relative_keys.size());
  normal(p.dense_relative_values, LayerStream::routed_relative_values, relative, p.routed_relative_values.size());
  normal(p.memory_keys, LayerStream::memory_keys);
  normal(p.memory_values, LayerStream::memory_values);
  for (const HeadBlock& block : head_blocks(c).blocks) {
    for (Index h = 0; h < block.count && block.learned_gain; ++h)
      p.gain(0, block.gain_first + h) = static_cast<T>(block.gain);
    for (Index row = block.taps_first; row < block.taps_first + block.taps_rows(); ++row) {
      const double factor = std::pow(0.9, static_cast<double>((row - block.taps_first) % block.taps));
      for (Index j = 0; j < p.taps.cols(); ++j)
        p.taps(row, j) = static_cast<T>(factor * random_normal(c.seed, static_cast<std::uint64_t>(LayerStream::taps),
                                                               static_cast<std::uint64_t>(row * p.taps.cols() + j)));
    }
  }
  return p;
}

}  // namespace coterie::detail
