// Input of a layer, with its gradient.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"
#include "coterie/plan/builder.hpp"

namespace coterie {

/// The input of a layer; converts from every matrix that a ConstView takes, and from a list of these members in order.
/// Refers to the caller's memory and is read during the call only.
template <class T>
struct Input {
  ConstView<T> x;                         ///< tokens x model_dim
  std::span<const Index> offsets;         ///< sequence s is the rows [offsets[s], offsets[s + 1]); empty: one sequence
  ConstView<T> source;                    ///< rows x model_dim that keys and values are made from, if given
  std::span<const Index> source_offsets;  ///< as offsets, of source; as many sequences
  std::uint64_t step;                     ///< number of the step: random routing and dropout draw anew for each
  /// Labels that replace those of the routers: routed key/value heads x tokens, head by head; empty: none.
  std::span<const std::int32_t> routes;

  template <std::convertible_to<ConstView<T>> M>
  Input(const M& x_, std::span<const Index> offsets_ = {}, ConstView<T> source_ = {},  // NOLINT: converts on purpose
        std::span<const Index> source_offsets_ = {}, std::uint64_t step_ = 0,
        std::span<const std::int32_t> routes_ = {})
      : x(x_), offsets(offsets_), source(source_), source_offsets(source_offsets_), step(step_), routes(routes_) {}

  /// Whether a source is given.
  bool crosses() const { return source.cols() > 0; }
};

/// The gradient of an Input, which functions add into; converts from every matrix that a View takes.
template <class T>
struct InputGradient {
  View<T> d_x;       ///< as x
  View<T> d_source;  ///< as source, if given

  template <std::convertible_to<View<T>> M>
  InputGradient(M&& d_x_, View<T> d_source_ = {})  // NOLINT: converts on purpose
      : d_x(std::forward<M>(d_x_)), d_source(d_source_) {}
};

namespace detail {

/// The position of every row in its sequence; positions of queries are those of the keys that they are aligned with.
struct RowPositions {
  std::vector<std::int32_t> queries, keys;  ///< keys: of a source, if given
};

/// Calls of_query(row, position) and, with a source, of_key(row, position) for all rows, with their positions in their
/// sequences. Keys are numbered from 0 on; queries are aligned with the keys as the plans align them.
template <class T, class Query, class Key>
void each_position(const Input<T>& input, bool causal, const Query& of_query, const Key& of_key) {
  Pattern pattern;
  pattern.tokens = input.x.rows();
  pattern.keys = input.crosses() ? input.source.rows() : input.x.rows();
  pattern.alignment = causal ? Alignment::bottom_right : Alignment::proportional;
  pattern.offsets = input.offsets;
  pattern.key_offsets = input.crosses() ? input.source_offsets : input.offsets;
  for (Index s = 0; s < pattern.sequences(); ++s) {
    const Sequence sequence = pattern.sequence(s);
    for (Index i = sequence.query_begin; i < sequence.query_begin + sequence.tokens; ++i)
      of_query(static_cast<std::size_t>(i), static_cast<std::int32_t>(sequence.position(i)));
    for (Index j = 0; j < sequence.keys && input.crosses(); ++j)
      of_key(static_cast<std::size_t>(sequence.key_begin + j), static_cast<std::int32_t>(j));
  }
}

/// The positions of all rows. Overwrites `to`.
template <class T>
void find_positions(const Input<T>& input, bool causal, RowPositions& to) {
  to.queries.resize(static_cast<std::size_t>(input.x.rows()));
  to.keys.resize(static_cast<std::size_t>(input.crosses() ? input.source.rows() : 0));
  each_position(
      input, causal, [&](std::size_t i, std::int32_t position) { to.queries[i] = position; },
      [&](std::size_t j, std::int32_t position) { to.keys[j] = position; });
}

/// Whether the rows have these positions. Requires: as many positions as rows.
template <class T>
bool has_positions(const Input<T>& input, bool causal, const RowPositions& positions) {
  bool same = true;
  each_position(
      input, causal, [&](std::size_t i, std::int32_t position) { same = same && positions.queries[i] == position; },
      [&](std::size_t j, std::int32_t position) { same = same && positions.keys[j] == position; });
  return same;
}

/// A checked input: the rows that queries and keys are made from, and their positions.
template <class T>
struct CheckedInput {
  const Input<T>& input;
  ConstView<T> x, source;  ///< source: rows that keys and values are made from; x itself where none is given
  std::span<const std::int32_t> positions, key_positions;
  std::span<const Index> offsets, key_offsets;

  CheckedInput(const Input<T>& from, const RowPositions& where)
      : input(from),
        x(from.x),
        source(from.crosses() ? from.source : from.x),
        positions(where.queries),
        key_positions(from.crosses() ? where.keys : where.queries),
        offsets(from.offsets),
        key_offsets(from.crosses() ? from.source_offsets : from.offsets) {}
  /// Queries and keys of the same rows, at these positions.
  CheckedInput(const Input<T>& from, std::span<const std::int32_t> where)
      : input(from), x(from.x), source(from.x), positions(where), key_positions(where) {}

  bool crosses() const { return input.crosses(); }
};

}  // namespace detail

}  // namespace coterie
