// What heads know of places: rotated queries and keys, and bias tables by distance; forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/attention/config.hpp"
#include "coterie/attention/relative_bias.hpp"
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
auto& position_table(P& parameters, const HeadGroup& group) {
  if (group.positions == HeadPositions::bias)
    return group.routed ? parameters.routed_distance_bias : parameters.distance_bias;
  return group.routed ? parameters.routed_bucket_bias : parameters.bucket_bias;
}

/// The bias by distance of a group of heads: a parameter, or a table in scratch.
template <class T>
AttentionTerms<T> position_terms(const RoutingAttentionConfig& c, const Parameters<T>& parameters,
                                 const HeadGroup& group, std::span<const std::int32_t> key_places, Arena& arena) {
  AttentionTerms<T> terms;
  if (group.positions == HeadPositions::none || group.positions == HeadPositions::rotary) return terms;
  const Index longest = group.positions == HeadPositions::alibi ? longest_sequence(key_places) : 1;
  const DistanceRange range = table_distances(c, group, longest);
  terms.bias_first = range.first;
  if (group.positions == HeadPositions::bias) {
    terms.bias = position_table(parameters, group);
    return terms;
  }
  const View<T> table = arena.matrix<T>(group.count, range.count);
  if (group.positions == HeadPositions::alibi)
    alibi_bias<T>(table, range.first);
  else
    bucket_bias<T>(position_table(parameters, group), table, position_buckets(c), range.first);
  terms.bias = table;
  return terms;
}

/// Where attention adds the gradient of the table of position_terms: a gradient, zeros in scratch, or nowhere.
template <class T>
View<T> position_term_gradient(const AttentionTerms<T>& terms, Parameters<T>& gradients, const HeadGroup& group,
                               Arena& arena) {
  if (group.positions == HeadPositions::bias) return position_table(gradients, group);
  if (group.positions != HeadPositions::t5_buckets) return {};
  const View<T> d_table = arena.matrix<T>(terms.bias.rows(), terms.bias.cols());
  d_table.fill(0);
  return d_table;
}

/// Undoes position_terms: what attention has added to d_table reaches the gradients.
template <class T>
void position_terms_backward(const RoutingAttentionConfig& c, const AttentionTerms<T>& terms, View<T> d_table,
                             Parameters<T>& gradients, const HeadGroup& group) {
  if (group.positions == HeadPositions::t5_buckets)
    bucket_bias_backward<T>(position_table(gradients, group), d_table, position_buckets(c), terms.bias_first);
}

}  // namespace coterie::detail
