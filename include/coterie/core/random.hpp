// Random numbers as a function of (seed, stream, counter): no state, so the same on every machine and in every order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace coterie::detail {

// The finaliser of splitmix64: every input bit moves every output bit.
constexpr std::uint64_t mix_bits(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

/// 64 random bits. Different streams of one seed, and different counters of one stream, are unrelated.
constexpr std::uint64_t random_bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  const std::uint64_t step = 0x9e3779b97f4a7c15ULL;
  return mix_bits(mix_bits(mix_bits(seed + step) + (stream + 1) * step) + (counter + 1) * step);
}

/// Whether a (query, key) pair is dropped is a function of 32 bits of each of its rows: pair_bits(query ^ key) below a bound.
/// row_bits: those of a row for one head of one call; pair_bits: an integer hash (C. Wellons's lowbias32).
enum class RowKind : std::uint64_t { query, key, memory };
constexpr std::uint32_t row_bits(std::uint64_t call, RowKind kind, Index row) {
  return static_cast<std::uint32_t>(
      random_bits(call, static_cast<std::uint64_t>(kind), static_cast<std::uint64_t>(row)) >> 32);
}
constexpr std::uint32_t pair_bits(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/// Uniform in [0, 1).
constexpr double random_uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  return static_cast<double>(random_bits(seed, stream, counter) >> 11) * 0x1p-53;
}

/// Uniform in [0, bound), for bounds far below 2^53.
constexpr Index random_below(Index bound, std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  return static_cast<Index>(random_uniform(seed, stream, counter) * static_cast<double>(bound));
}

/// Normal with mean 0 and variance 1 (Box and Muller's cosine half).
inline double random_normal(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  const std::uint64_t bits = random_bits(seed, stream, counter);
  const double radius = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;  // in (0, 1)
  const double turn = static_cast<double>(mix_bits(bits + 0x9e3779b97f4a7c15ULL) >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(radius)) * std::cos(6.283185307179586 * turn);
}

/// `count` of [0, all), ascending, each set equally likely.
inline std::vector<Index> draw_rows(Index all, Index count, std::uint64_t seed) {
  std::vector<Index> rows;
  rows.reserve(static_cast<std::size_t>((std::min)(count, all)));
  // Knuth's algorithm S: row i is taken with probability (still wanted) / (still there).
  for (Index i = 0, wanted = (std::min)(count, all); wanted > 0; ++i)
    if (random_below(all - i, seed, 0, static_cast<std::uint64_t>(i)) < wanted) {
      rows.push_back(i);
      --wanted;
    }
  return rows;
}

}  // namespace coterie::detail
