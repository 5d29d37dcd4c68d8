// Tables by distance of a block of heads, made from parameters; forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/attention/config.hpp"
#include "coterie/attention/distance_bias.hpp"
#include "coterie/core/workspace.hpp"
#include "coterie/layer/head_block.hpp"
#include "coterie/layer/parameters.hpp"

namespace coterie::detail {

/// The longest sequence of keys, at least 1.
inline Index longest_sequence(std::span<const std::int32_t> key_positions) {
  Index last = 0;
  for (const std::int32_t position : key_positions) last = (std::max)(last, static_cast<Index>(position));
  return last + 1;
}

// The learned tables of a block of heads among its layer's parameters or gradients.

/// Picks the tensor of a block.
template <class M>
M& of_block(const HeadBlock& block, M& local, M& routed, M& dense) {
  return block.kind == BlockKind::local ? local : block.kind == BlockKind::routed ? routed : dense;
}
template <class P>
auto& distance_table(P& p, const HeadBlock& block) {
  return of_block(block, p.local_distance_bias, p.routed_distance_bias, p.dense_distance_bias);
}
template <class P>
auto& bucket_table(P& p, const HeadBlock& block) {
  return of_block(block, p.local_bucket_bias, p.routed_bucket_bias, p.dense_bucket_bias);
}
template <class P>
auto& relative_key_table(P& p, const HeadBlock& block) {
  return of_block(block, p.local_relative_keys, p.routed_relative_keys, p.dense_relative_keys);
}
template <class P>
auto& relative_value_table(P& p, const HeadBlock& block) {
  return of_block(block, p.local_relative_values, p.routed_relative_values, p.dense_relative_values);
}

/// The terms by distance of a block of heads: views of parameters, or a table in scratch.
template <class T>
AttentionTerms<T> position_terms(const RoutingAttentionConfig& c, const Parameters<T>& parameters,
                                 const HeadBlock& block, std::span<const std::int32_t> key_positions, Arena& arena) {
  AttentionTerms<T> terms;
  if (block.positions == PositionKind::none || block.positions == PositionKind::rotary) return terms;
  const Index longest = block.positions == PositionKind::alibi ? longest_sequence(key_positions) : 1;
  const DistanceRange range = table_distances(c, block, longest);
  if (block.positions == PositionKind::shaw) {
    terms.relative_keys = {relative_key_table(parameters, block), range.first};
    terms.relative_values = {relative_value_table(parameters, block), range.first};
    return terms;
  }
  if (block.positions == PositionKind::bias) {
    terms.bias = {distance_table(parameters, block), range.first};
    return terms;
  }
  const View<T> table = arena.matrix<T>(block.count, range.count);
  if (block.positions == PositionKind::alibi)
    alibi_bias<T>(table, range.first);
  else
    bucket_bias<T>(bucket_table(parameters, block), table, block.buckets, range.first);
  terms.bias = {table, range.first};
  return terms;
}

/// Where attention adds the gradients of the tables of position_terms: gradients, zeros in scratch, or nowhere.
template <class T>
AttentionTermGradients<T> position_term_gradients(const AttentionTerms<T>& terms, Parameters<T>& gradients,
                                                  const HeadBlock& block, Arena& arena) {
  AttentionTermGradients<T> d_terms;
  if (block.positions == PositionKind::bias) {
    d_terms.d_bias = distance_table(gradients, block);
  } else if (block.positions == PositionKind::t5_buckets) {
    d_terms.d_bias = arena.matrix<T>(terms.bias.rows.rows(), terms.bias.rows.cols());
    d_terms.d_bias.fill(0);
  } else if (block.positions == PositionKind::shaw) {
    d_terms.d_relative_keys = relative_key_table(gradients, block);
    d_terms.d_relative_values = relative_value_table(gradients, block);
  }
  return d_terms;
}

/// Undoes position_terms: adds into the gradients what attention has added into d_table.
template <class T>
void position_terms_backward(const AttentionTerms<T>& terms, View<T> d_table, Parameters<T>& gradients,
                             const HeadBlock& block) {
  if (block.positions == PositionKind::t5_buckets)
    bucket_bias_backward<T>(bucket_table(gradients, block), d_table, block.buckets, terms.bias.first);
}

}  // namespace coterie::detail
