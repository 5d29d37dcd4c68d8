// Selection: which number is the n-th largest of a list.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#include "coterie/core/matrix.hpp"

namespace coterie::detail {

/// Integers that are ordered as numbers T are. Unlike numbers, NaN does not confuse them.
template <class T>
using Ordered = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <class T>
Ordered<T> ordered(T x) {
  const auto bits = std::bit_cast<Ordered<T>>(x);
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & (std::numeric_limits<Ordered<T>>::max)());
}

inline constexpr int selection_bits = 11;
inline constexpr Index selection_bins = Index(1) << selection_bits;

/// The want-th largest of `count` numbers: counts by leading bits, then selects among those that share the leading bits
/// of the one sought.
/// Requires: `want` in [1, count]. Overwrites the numbers; bins: scratch memory of selection_bins counts.
/// Cost: linear.
template <class O>
O select_largest(O* numbers, Index count, Index want, std::int32_t* bins) {
  using Unsigned = std::make_unsigned_t<O>;
  const auto [low, high] = std::minmax_element(numbers, numbers + count);
  const auto least = static_cast<Unsigned>(*low);
  const int bits = static_cast<int>(std::bit_width(static_cast<Unsigned>(static_cast<Unsigned>(*high) - least)));
  const int shift = (std::max)(0, bits - selection_bits);
  const auto bin = [least, shift](O x) {
    return static_cast<Index>(static_cast<Unsigned>(static_cast<Unsigned>(x) - least) >> shift);
  };
  std::fill_n(bins, selection_bins, 0);
  for (Index j = 0; j < count; ++j) ++bins[bin(numbers[j])];
  Index sought = bin(*high);
  for (; bins[sought] < want; --sought) want -= bins[sought];
  Index same = 0;
  for (Index j = 0; j < count; ++j) {
    const O x = numbers[j];
    numbers[same] = x;  // numbers before j have been read
    same += bin(x) == sought;
  }
  std::nth_element(numbers, numbers + want - 1, numbers + same, std::greater<O>());
  return numbers[want - 1];
}

}  // namespace coterie::detail
