// What heads know of places: rotated queries and keys, and tables by distance; forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/attention/config.hpp"
#include "coterie/attention/distance_bias.hpp"
#include "coterie/core/workspace.hpp"
#include "coterie/layer/initialise.hpp"

namespace coterie::detail {

/// The longest sequence of keys, at least 1.
inline Index longest_sequence(std::span<const std::int32_t> key_places) {
  Index last = 0;
  for (const std::int32_t place : key_places) last = std::max<Index>(last, place);
  return last + 1;
}

/// The learned table of a group of heads among its layer's parameters or gradients, by distance or by bucket.
template <class P>
auto& position_table(P& parameters, const HeadBlock& group) {
  if (group.positions == PositionKind::bias)
    return group.routed ? parameters.routed_distance_bias : parameters.distance_bias;
  return group.routed ? parameters.routed_bucket_bias : parameters.bucket_bias;
}

/// What a group of heads adds by distance: parameters, or a table in scratch.
template <class T>
AttentionTerms<T> position_terms(const RoutingAttentionConfig& c, const Parameters<T>& parameters,
                                 const HeadBlock& group, std::span<const std::int32_t> key_places, Arena& arena) {
  AttentionTerms<T> terms;
  if (group.positions == PositionKind::none || group.positions == PositionKind::rotary) return terms;
  const Index longest = group.positions == PositionKind::alibi ? longest_sequence(key_places) : 1;
  const DistanceRange range = table_distances(c, group, longest);
  if (group.positions == PositionKind::shaw) {
    terms.relative_keys = {group.routed ? parameters.routed_relative_keys : parameters.relative_keys, range.first};
    terms.relative_values = {group.routed ? parameters.routed_relative_values : parameters.relative_values,
                             range.first};
    return terms;
  }
  if (group.positions == PositionKind::bias) {
    terms.bias = {position_table(parameters, group), range.first};
    return terms;
  }
  const View<T> table = arena.matrix<T>(group.count, range.count);
  if (group.positions == PositionKind::alibi)
    alibi_bias<T>(table, range.first);
  else
    bucket_bias<T>(position_table(parameters, group), table, position_buckets(c), range.first);
  terms.bias = {table, range.first};
  return terms;
}

/// Where attention adds the gradients of the tables of position_terms: gradients, zeros in scratch, or nowhere.
template <class T>
AttentionTermGradients<T> position_term_gradients(const AttentionTerms<T>& terms, Parameters<T>& gradients,
                                                  const HeadBlock& group, Arena& arena) {
  AttentionTermGradients<T> d_terms;
  if (group.positions == PositionKind::bias) {
    d_terms.d_bias = position_table(gradients, group);
  } else if (group.positions == PositionKind::t5_buckets) {
    d_terms.d_bias = arena.matrix<T>(terms.bias.rows.rows(), terms.bias.rows.cols());
    d_terms.d_bias.fill(0);
  } else if (group.positions == PositionKind::shaw) {
    d_terms.d_relative_keys = group.routed ? gradients.routed_relative_keys : gradients.relative_keys;
    d_terms.d_relative_values = group.routed ? gradients.routed_relative_values : gradients.relative_values;
  }
  return d_terms;
}

/// Undoes position_terms: what attention has added to d_table reaches the gradients.
template <class T>
void position_terms_backward(const RoutingAttentionConfig& c, const AttentionTerms<T>& terms, View<T> d_table,
                             Parameters<T>& gradients, const HeadBlock& group) {
  if (group.positions == PositionKind::t5_buckets)
    bucket_bias_backward<T>(position_table(gradients, group), d_table, position_buckets(c), terms.bias.first);
}

}  // namespace coterie::detail
