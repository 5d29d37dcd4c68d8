// Keys as 8-bit integers, a quarter of their size: an approximate score for every key of a block.
//
// A block holds `count` keys of width d. Four neighbouring dimensions of a key share a 32-bit word, and the words of
// all keys with the same dimensions lie side by side: word g * count + j has dimensions 4 g to 4 g + 3 of key j, the
// first one in the lowest byte. So lanes are keys, nothing is transposed, and a block has no padding but that of d to a
// multiple of 4.
//
// A number x of dimension e is stored as round(x / scale[e]), in [-127, 127]. The scales of the keys go into the query:
// q.k is close to the sum over e of (q[e] scale[e]) byte[e].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "coterie/kernel/dispatch.hpp"

namespace coterie::detail {

/// Words of a key of width d.
constexpr Index int8_words(Index d) { return (d + 3) / 4; }

/// Words that must follow a block in memory, because whole vectors are loaded.
inline constexpr Index int8_slack = 16;

/// scale[e] = max |x[., e]| / 127 over finite rows of x; 0 where all are 0.
template <class T>
void int8_scales(const T* x, Index stride, Index rows, Index d, T* scale) {
  std::fill_n(scale, d, T(0));
  for (Index i = 0; i < rows; ++i)
    for (Index e = 0; e < d; ++e) scale[e] = (std::max)(scale[e], std::abs(x[i * stride + e]));
  for (Index e = 0; e < d; ++e) scale[e] /= 127;
}

/// Writes finite rows of x as a block; words: rows * int8_words(d).
/// Accuracy: a number is off by at most half its scale.
template <class T>
void int8_write(const T* x, Index stride, Index rows, Index d, const T* scale, std::int32_t* words) {
  for (Index g = 0; g < int8_words(d); ++g)
    for (Index i = 0; i < rows; ++i) {
      std::uint32_t word = 0;
      for (Index e = 4 * g; e < (std::min)(d, 4 * g + 4); ++e) {
        const T level = scale[e] > 0 ? x[i * stride + e] / scale[e] : T(0);
        const int byte = static_cast<int>(std::nearbyint((std::min)(T(127), (std::max)(T(-127), level))));
        word |= static_cast<std::uint32_t>(byte & 255) << (8 * (e - 4 * g));
      }
      words[g * rows + i] = static_cast<std::int32_t>(word);
    }
}

/// Arguments of a kernel: a query against the keys of a block.
template <class T>
struct Int8Arguments {
  const std::int32_t* words = nullptr;  // followed by int8_slack words
  Index count = 0;                      // keys
  Index depth = 0;                      // words of a key
  const T* q = nullptr;                 // 4 depth numbers: the query times the scales of the keys
  T* scores = nullptr;                  // count, and room for int8_slack more, which are overwritten
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Scores of int8 keys on the micro-kernels M.
template <class T, class M>
struct Int8Scores {
  using L = typename M::L;
  using F = typename L::F;
  using Words = typename L::Half;  // 32 bits for every lane
  static constexpr int lanes = L::count;

  template <int Byte>
  static COTERIE_INLINE void add(const Words& words, const T* q, F& sum) {
    const Words left = words << (24 - 8 * Byte);
    const F x = __builtin_convertvector(left >> 24, F);
    L::add_product(q[Byte], x, sum);
  }

  /// scores[j] = sum_e q[e] byte[e][j] for N vectors of keys.
  template <int N>
  static COTERIE_INLINE void block(const Int8Arguments<T>& a, Index first) {
    F sum[N];
    COTERIE_UNROLL for (int v = 0; v < N; ++v) sum[v] = F{};
    const std::int32_t* words = a.words + first;
    for (Index g = 0; g < a.depth; ++g, words += a.count) {
      const T* const q = a.q + 4 * g;
      COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        Words w;
        __builtin_memcpy(&w, words + v * lanes, sizeof w);
        add<0>(w, q, sum[v]);
        add<1>(w, q, sum[v]);
        add<2>(w, q, sum[v]);
        add<3>(w, q, sum[v]);
      }
    }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::store(a.scores + first + v * lanes, sum[v]);
  }

  static COTERIE_INLINE void run(const Int8Arguments<T>& a) {
    Index first = 0;
    for (; first + 3 * lanes < a.count; first += 4 * lanes) block<4>(a, first);
    for (; first < a.count; first += lanes) block<1>(a, first);
  }
};

COTERIE_KERNEL(Int8Kernel, Int8Scores, run, (const Int8Arguments<T>& arguments), (arguments))

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
