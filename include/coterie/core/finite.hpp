// Whether numbers are finite, by their bits.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "coterie/core/matrix.hpp"

namespace coterie::detail {

/// Whether all numbers of a row are finite: by their bits, for -ffast-math may assume that they are.
template <class T>
bool finite_row(const T* x, Index d) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  constexpr int digits = sizeof(T) == 4 ? 23 : 52;  // of the fraction
  constexpr Bits exponent = (std::numeric_limits<Bits>::max)() >> 1 >> digits << digits;
  // One more carries into the sign bit where the exponent is all ones, and nowhere else.
  Bits carried = 0;
  for (Index j = 0; j < d; ++j) carried |= (std::bit_cast<Bits>(x[j]) & exponent) + (Bits(1) << digits);
  return carried >> (8 * sizeof(T) - 1) == 0;
}

/// The same for all rows.
template <class T>
bool finite_rows(ConstView<T> x) {
  bool finite = true;
  for (Index i = 0; i < x.rows(); ++i) finite &= finite_row(x.row(i), x.cols());
  return finite;
}

}  // namespace coterie::detail
