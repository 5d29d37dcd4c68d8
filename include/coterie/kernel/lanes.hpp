// Vectors of the compiler (no intrinsics) at every width: loads, exp, maximum, masks, transposes.
//
// Everything here is forced inline into the entry points of dispatch.hpp, which carry the instruction set. Vectors are
// passed and returned by reference: by value they would change the calling convention with the target (-Wpsabi).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "coterie/core/matrix.hpp"

// Kernels, and every inline function that calls one, live in an inline namespace named by the file's own flags:
// files of one program that are built with different flags must not share them.
#if defined(__FAST_MATH__)
#define COTERIE_FLAGS_MATH _fast
#else
#define COTERIE_FLAGS_MATH
#endif
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define COTERIE_FLAGS_SET flags_v4
#elif defined(__AVX512F__)
#define COTERIE_FLAGS_SET flags_avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define COTERIE_FLAGS_SET flags_v3
#elif defined(__AVX2__)
#define COTERIE_FLAGS_SET flags_avx2
#elif defined(__AVX__)
#define COTERIE_FLAGS_SET flags_avx
#elif defined(__SSE4_2__)
#define COTERIE_FLAGS_SET flags_v2
#else
#define COTERIE_FLAGS_SET flags_none
#endif
#define COTERIE_JOIN_(a, b) a##b
#define COTERIE_JOIN(a, b) COTERIE_JOIN_(a, b)
#define COTERIE_FLAGS_NAMESPACE COTERIE_JOIN(COTERIE_FLAGS_SET, COTERIE_FLAGS_MATH)

#define COTERIE_INLINE __attribute__((always_inline)) inline
#define COTERIE_UNROLL _Pragma("GCC unroll 16")
// Hides where a sum comes from. Tuned for some machines (-march=native on AMD's), g++ makes no multiply-add of a sum
// that it sees run through a loop, and does elsewhere: a row's bits would depend on how tiles are cut.
#if defined(COTERIE_OPAQUE)  // tests of vectors wider than the machine's registers
#elif defined(__GNUC__) && !defined(__clang__) && (defined(__x86_64__) || defined(__i386__))
#define COTERIE_OPAQUE(x) __asm__("" : "+v"(x))
#else
#define COTERIE_OPAQUE(x)
#endif

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The vector types of `Bytes` bytes of T: numbers, the same at any address, and integers of the same width (masks: -1 or 0).
template <class T, int Bytes>
struct Lanes {
  static constexpr int count = Bytes / static_cast<int>(sizeof(T));
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  using Unsigned = std::make_unsigned_t<Integer>;
  typedef T F __attribute__((vector_size(Bytes)));
  typedef T Loose __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  typedef Integer I __attribute__((vector_size(Bytes)));
  typedef Unsigned U __attribute__((vector_size(Bytes)));
  typedef std::int32_t Half __attribute__((vector_size(4 * (Bytes / static_cast<int>(sizeof(T))))));

  static COTERIE_INLINE void load(const T* p, F& x) { x = *reinterpret_cast<const Loose*>(p); }
  static COTERIE_INLINE void store(T* p, const F& x) { *reinterpret_cast<Loose*>(p) = x; }

  static COTERIE_INLINE void fill(T value, F& x) { x = F{} + value; }

  /// Nothing of x is non-finite. Looks at bits: comparisons of NaN do not survive -ffast-math.
  static COTERIE_INLINE bool finite(const F& x) {
    constexpr Unsigned exponent = sizeof(T) == 4 ? Unsigned(0x7f800000u) : Unsigned(0x7ff0000000000000ull);
    const U bits = (U)x & (U{} + exponent);
    const I bad = (I)bits == I{} + static_cast<Integer>(exponent);
    std::int64_t pairs[Bytes / 8], any = 0;
    __builtin_memcpy(pairs, &bad, Bytes);
    COTERIE_UNROLL for (int i = 0; i < Bytes / 8; ++i) any |= pairs[i];
    return any == 0;
  }

  /// y = e^x for x <= 0 and a little above; 0 below the smallest normal number; exactly 1 at 0; NaN stays NaN.
  /// Method: x = n ln 2 + f, |f| <= ln(2)/2, a polynomial in f, and n added to the exponent bits.
  static COTERIE_INLINE void exp(const F& argument, F& y) {
    constexpr T low = sizeof(T) == 4 ? T(-87.3365447505531) : T(-708.396418532264);
    const I normal = argument >= low;
    const F x = normal ? argument : F{} + low;  // also keeps NaN and infinity out of the conversion
    F t = x * T(1.44269504088896340736);
    // Round half away from zero by a conversion: adding 0.5 with the sign of t, then truncating.
    constexpr Unsigned sign = Unsigned(1) << (8 * sizeof(T) - 1);
    const F half = F{} + T(0.5);
    const U signed_half = ((U)t & (U{} + sign)) | (U)half;
    t += (F)signed_half;
    I n;
    F p;
    if constexpr (sizeof(T) == 4) {
      n = __builtin_convertvector(t, I);
      const F whole = __builtin_convertvector(n, F);
      const F f = (x - whole * T(0.693359375)) - whole * T(-2.12194440e-4);
      p = f * T(1.9875691500e-4) + T(1.3981999507e-3);
      p = p * f + T(8.3334519073e-3);
      p = p * f + T(4.1665795894e-2);
      p = p * f + T(1.6666665459e-1);
      p = p * f + T(5.0000001201e-1);
      p = p * (f * f) + f + T(1);
    } else {
      const Half narrow = __builtin_convertvector(t, Half);
      n = __builtin_convertvector(narrow, I);
      const F whole = __builtin_convertvector(narrow, F);
      const F f = (x - whole * T(6.93145751953125e-1)) - whole * T(1.42860682030941723212e-6);
      p = f * T(1.6059043836821614599e-10) + T(2.0876756987868098979e-9);
      p = p * f + T(2.5052108385441718775e-8);
      p = p * f + T(2.7557319223985890653e-7);
      p = p * f + T(2.7557319223985890653e-6);
      p = p * f + T(2.4801587301587301587e-5);
      p = p * f + T(1.9841269841269841270e-4);
      p = p * f + T(1.3888888888888888889e-3);
      p = p * f + T(8.3333333333333333333e-3);
      p = p * f + T(4.1666666666666666667e-2);
      p = p * f + T(1.6666666666666666667e-1);
      p = p * f + T(0.5);
      p = p * (f * f) + f + T(1);
    }
    constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
    const U bits = (U)p + ((U)n << mantissa);
    const F special = argument < low ? F{} : argument;
    y = normal ? (F)bits : special;
  }

  template <int... Is>
  static COTERIE_INLINE void interleave_low(const F& a, const F& b, F& y, std::integer_sequence<int, Is...>) {
    y = __builtin_shufflevector(a, b, (Is % 2 == 0 ? Is / 2 : count + Is / 2)...);
  }
  template <int... Is>
  static COTERIE_INLINE void interleave_high(const F& a, const F& b, F& y, std::integer_sequence<int, Is...>) {
    y = __builtin_shufflevector(a, b, (Is % 2 == 0 ? count / 2 + Is / 2 : count + count / 2 + Is / 2)...);
  }

  /// Transposes `count` vectors of `count` numbers, by log2(count) rounds of interleaving.
  static COTERIE_INLINE void transpose(F (&rows)[count]) {
    constexpr auto sequence = std::make_integer_sequence<int, count>{};
    COTERIE_UNROLL for (int stage = 1; stage < count; stage *= 2) {
      F next[count];
      COTERIE_UNROLL for (int i = 0; i < count / 2; ++i) {
        interleave_low(rows[i], rows[i + count / 2], next[2 * i], sequence);
        interleave_high(rows[i], rows[i + count / 2], next[2 * i + 1], sequence);
      }
      COTERIE_UNROLL for (int i = 0; i < count; ++i) rows[i] = next[i];
    }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
