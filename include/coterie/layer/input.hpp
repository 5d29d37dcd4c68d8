// What a layer reads, and where its gradient goes.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <utility>

#include "coterie/core/matrix.hpp"

namespace coterie {

/// The input of a layer; converts from every matrix that a ConstView takes, and from a list of these members in order.
/// Refers to the caller's memory and is read during the call only.
template <class T>
struct Input {
  ConstView<T> x;                         ///< tokens x model_dim
  std::span<const Index> offsets;         ///< sequence s is the rows [offsets[s], offsets[s + 1]); empty: one sequence
  ConstView<T> source;                    ///< rows x model_dim: where keys and values come from, if given
  std::span<const Index> source_offsets;  ///< as offsets, of source; as many sequences
  std::uint64_t step;                     ///< random routing draws anew for every step
  std::span<const std::int32_t>
      routes;  ///< routed key/value heads x tokens labels, head by head, instead of the routers'

  template <std::convertible_to<ConstView<T>> M>
  Input(const M& x_, std::span<const Index> offsets_ = {}, ConstView<T> source_ = {},  // NOLINT: converts on purpose
        std::span<const Index> source_offsets_ = {}, std::uint64_t step_ = 0,
        std::span<const std::int32_t> routes_ = {})
      : x(x_), offsets(offsets_), source(source_), source_offsets(source_offsets_), step(step_), routes(routes_) {}

  /// Whether a source is given.
  bool crosses() const { return source.cols() > 0; }
};

/// The gradient of an Input, added to; converts from every matrix that a View takes.
template <class T>
struct InputGradient {
  View<T> d_x;       ///< as x
  View<T> d_source;  ///< as source, if given

  template <std::convertible_to<View<T>> M>
  InputGradient(M&& d_x_, View<T> d_source_ = {})  // NOLINT: converts on purpose
      : d_x(std::forward<M>(d_x_)), d_source(d_source_) {}
};

}  // namespace coterie
