// Vectors of the compiler (no intrinsics) at every width: loads, exp, maximum, masks, transposes.
//
// Everything here is forced inline into the entry points of dispatch.hpp, which carry the instruction set. Vectors are
// passed and returned by reference: by value they would change the calling convention with the target (-Wpsabi).
#pragma once

#include <cstdint>
#include <limits>
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
#elif defined(__GNUC__) && !defined(__clang__) && defined(__aarch64__)
#define COTERIE_OPAQUE(x) __asm__("" : "+w"(x))
#else
#define COTERIE_OPAQUE(x)
#endif
// Hides where an address comes from: g++ would keep one register for each number behind it, and run out of them.
#if defined(__GNUC__) && !defined(__clang__)
#define COTERIE_OPAQUE_ADDRESS(x) __asm__("" : "+r"(x))
#else
#define COTERIE_OPAQUE_ADDRESS(x)
#endif

namespace coterie::detail {
/// Factors between logits to base e and to base 2.
template <class T>
inline constexpr T log2_e = T(1.442695040888963407359924681001892137);
template <class T>
inline constexpr T ln_2 = T(0.693147180559945309417232121458176568);

inline namespace COTERIE_FLAGS_NAMESPACE {

/// The vector types of `Bytes` bytes of T: numbers, the same at any address, and integers of the same width (masks: -1
/// or 0).
template <class T, int Bytes>
struct Lanes {
  static constexpr int count = Bytes / static_cast<int>(sizeof(T));
  static constexpr int quarter = 16 / static_cast<int>(sizeof(T));  // numbers in 16 bytes
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  using Unsigned = std::make_unsigned_t<Integer>;
  static constexpr int mantissa_bits = std::numeric_limits<T>::digits - 1;
  static constexpr Unsigned exponent_bits = sizeof(T) == 4 ? Unsigned(0x7f800000u) : Unsigned(0x7ff0000000000000ull);
  typedef T F __attribute__((vector_size(Bytes)));
  typedef T Loose __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  typedef Integer Ints __attribute__((vector_size(Bytes)));
  typedef Unsigned U __attribute__((vector_size(Bytes)));
  typedef std::int32_t Half __attribute__((vector_size(4 * (Bytes / static_cast<int>(sizeof(T))))));

  static COTERIE_INLINE void load(const T* p, F& x) { x = *reinterpret_cast<const Loose*>(p); }
  static COTERIE_INLINE void store(T* p, const F& x) { *reinterpret_cast<Loose*>(p) = x; }
  /// to += from, a vector of them.
  static COTERIE_INLINE void add(const T* from, T* to) {
    F x, y;
    load(from, x);
    load(to, y);
    store(to, y + x);
  }

  /// Prefetches the cache lines of a row; one more than its length has where it does not begin with a line.
  static COTERIE_INLINE void fetch(const T* row, Index columns) {
    constexpr Index line = 64 / static_cast<Index>(sizeof(T));
    for (Index c = 0; c < columns; c += line) __builtin_prefetch(row + c, 0, 2);
    if (reinterpret_cast<std::uintptr_t>(row) % 64 != 0) __builtin_prefetch(row + columns - 1, 0, 2);
  }

  static COTERIE_INLINE void fill(T value, F& x) { x = F{} + value; }

  /// sum += a x for a number or a vector a: one multiply-add wherever the machine has one. What is hidden is a copy,
  /// for g++ does not keep an array of sums in registers when their own memory is.
  template <class A>
  static COTERIE_INLINE void add_product(const A& a, const F& x, F& sum) {
    F so_far = sum;
    COTERIE_OPAQUE(so_far);
    sum = so_far + a * x;
  }

  /// Whether all numbers of x are finite. Tests bits: comparisons of NaN do not survive -ffast-math.
  static COTERIE_INLINE bool finite(const F& x) {
    // The exponent's bits carry into the sign's where all of them are set.
    const U bad = (((U)x & (U{} + exponent_bits)) + (Unsigned(1) << mantissa_bits)) >> (8 * sizeof(T) - 1);
    return !any((Ints)bad);
  }

  /// Whether any number of x is not 0.
  static COTERIE_INLINE bool any(const Ints& x) {
    std::int64_t pairs[Bytes / 8], bits = 0;
    __builtin_memcpy(pairs, &x, Bytes);
    COTERIE_UNROLL for (int i = 0; i < Bytes / 8; ++i) bits |= pairs[i];
    return bits != 0;
  }

  static COTERIE_INLINE bool any_negative(const Ints& x) { return any(x >> (8 * sizeof(T) - 1)); }

  // x = n + f, n whole, |f| < 1 with the sign of x, and 2^f = 1 + p f.
  static COTERIE_INLINE void exp2_parts(const F& x, Ints& n, F& f, F& p) {
    if constexpr (sizeof(T) == 4) {
      n = __builtin_convertvector(x, Ints);
      f = x - __builtin_convertvector(n, F);
      p = f * T(1.340493249176083975e-5) + T(1.563511993171422818e-4);
      p = p * f + T(1.336768214191319501e-3);
      p = p * f + T(9.616978080823145129e-3);
      p = p * f + T(5.550240216207655118e-2);
      p = p * f + T(2.402266490025240705e-1);
      p = p * f + T(6.931473884956809650e-1);
    } else {
      const Half narrow = __builtin_convertvector(x, Half);
      n = __builtin_convertvector(narrow, Ints);
      f = x - __builtin_convertvector(narrow, F);
      p = f * T(1.274896876739093499e-12) + T(2.589897098532496130e-11);
      p = p * f + T(4.448780068716191481e-10);
      p = p * f + T(7.054636581079483468e-9);
      p = p * f + T(1.017804503738811458e-7);
      p = p * f + T(1.321548843414115094e-6);
      p = p * f + T(1.525273404948294910e-5);
      p = p * f + T(1.540353038861155743e-4);
      p = p * f + T(1.333355814571890704e-3);
      p = p * f + T(9.618129107634398021e-3);
      p = p * f + T(5.550410866483031534e-2);
      p = p * f + T(2.402265069591005029e-1);
      p = p * f + T(6.931471805599450045e-1);
    }
  }

  // y = x 2^n for normal x and result.
  static COTERIE_INLINE void scale_by_power(const F& x, const Ints& n, F& y) {
    y = (F)((U)x + ((U)n << mantissa_bits));
  }

  /// y = 2^x for x up to 126; 0 below the smallest normal number; exactly 1 at 0; NaN stays NaN.
  /// Method: x = n + f, n whole, |f| < 1, a polynomial in f, and n added to the exponent bits.
  /// Error: float at most 1.9 units in the last place (2.3 without fused multiply-adds), all floats tried; double 1.7
  ///   (2.1).
  static COTERIE_INLINE void exp2(const F& x, F& y) {
    constexpr T low = std::numeric_limits<T>::min_exponent - 1;  // -126 or -1022
    Ints n;
    F f, p;
    exp2_parts(x, n, f, p);
    scale_by_power(p * f + T(1), n, y);
    y = x < low ? F{} : y;  // where x does not fit n too, whatever the machine made of that
  }

  /// y = tanh(x); NaN stays NaN.
  /// Method: t = 2^(-2 log2(e) |x|), tanh|x| = (1 - t) / (1 + t), with 1 - t from the polynomial where t is above 1/2.
  /// Error: at most 6.3 units in the last place in float, 10 in double.
  static COTERIE_INLINE void tanh(const F& x, F& y) {
    constexpr Unsigned sign = Unsigned(1) << (8 * sizeof(T) - 1);
    const U bits = (U)x;
    F size = (F)(bits & (U{} + Unsigned(sign - 1)));
    size *= T(2) * log2_e<T>;
    size = size > T(100) ? F{} + T(100) : size;
    Ints n;
    F f, p, t;
    exp2_parts(-size, n, f, p);
    const F little = p * f;  // 2^f - 1
    scale_by_power(little + T(1), n, t);
    const F less = n == 0 ? little : t - T(1);
    const F quotient = less / (T(-2) - less);
    y = (F)((U)quotient | (bits & (U{} + sign)));
  }

  /// y = log(x), base e, for normal x > 0; minus infinity below; infinity and NaN stay.
  /// Method: x = m 2^e with m around 1; s = (m - 1) / (m + 1), log(m) = 2 s (1 + s^2 / 3 + s^4 / 5 + ..).
  static COTERIE_INLINE void log(const F& x, F& y) {
    constexpr Unsigned root = sizeof(T) == 4 ? Unsigned(0x3f3504f3u) : Unsigned(0x3fe6a09e667f3bcdull);  // sqrt(1/2)
    const U above = (U)x - (U{} + root);
    const Ints e = (Ints)above >> mantissa_bits;
    const F m = (F)((U)x - ((U)e << mantissa_bits));
    F exponent;
    if constexpr (sizeof(T) == 4)
      exponent = __builtin_convertvector(e, F);
    else
      exponent = __builtin_convertvector(__builtin_convertvector(e, Half), F);
    const F s = (m - T(1)) / (m + T(1)), square = s * s;
    constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // s^2 < 0.0295: the next one is below a tenth of a unit
    F sum = F{} + T(1) / T(2 * terms + 1);
    COTERIE_UNROLL for (int i = terms - 1; i >= 0; --i) sum = sum * square + T(1) / T(2 * i + 1);
    F whole = exponent * ln_2<T>;
    COTERIE_OPAQUE(whole);  // or either product might be the one in a multiply-add
    y = whole + (s + s) * sum;
    const F special = x > (std::numeric_limits<T>::max)() ? x : x - std::numeric_limits<T>::infinity();
    constexpr Unsigned least = Unsigned(1) << mantissa_bits;
    const Ints normal =
        ~(Ints)((U)x - least) & (Ints)((U)x - exponent_bits);  // the sign; exponent_bits alone are infinity
    y = normal < 0 ? y : special;
  }

  /// x = pair_bits(x) of core/random.hpp, for 32 bits in every lane.
  static COTERIE_INLINE void pair_bits(U& x) {
    constexpr Unsigned low = Unsigned(0xffffffffu);
    x = ((x ^ (x >> 16)) * Unsigned(0x7feb352du)) & low;
    x = ((x ^ (x >> 15)) * Unsigned(0x846ca68bu)) & low;
    x = x ^ (x >> 16);
  }

  /// y[i] = the i-th number of a and b together that Pick::of(i) names.
  template <class Pick, int... Is>
  static COTERIE_INLINE void shuffle(const F& a, const F& b, F& y, std::integer_sequence<int, Is...>) {
    y = __builtin_shufflevector(a, b, Pick::of(Is)...);
  }

  /// a, b = what First and Second name of a and b together.
  template <class First, class Second>
  static COTERIE_INLINE void exchange(F& a, F& b) {
    constexpr auto sequence = std::make_integer_sequence<int, count>{};
    F first, second;
    shuffle<First>(a, b, first, sequence);
    shuffle<Second>(a, b, second, sequence);
    a = first;
    b = second;
  }

  /// y = a in lanes whose number has bit `Bit`, b in the others.
  template <int Bit>
  static COTERIE_INLINE void choose(const F& a, const F& b, F& y) {
    struct Pick {
      static constexpr int of(int i) { return (i & Bit) != 0 ? i : count + i; }
    };
    shuffle<Pick>(a, b, y, std::make_integer_sequence<int, count>{});
  }

  /// a, b = the blocks of `Size` numbers of a and b that have even and odd positions: a0 b0 a2 b2 .. and a1 b1 a3 b3 ..
  template <int Size>
  static COTERIE_INLINE void exchange_blocks(F& a, F& b) {
    struct Even {
      static constexpr int of(int i) { return i / Size % 2 == 0 ? i : count + i - Size; }
    };
    struct Odd {
      static constexpr int of(int i) { return Even::of(i) + Size; }
    };
    exchange<Even, Odd>(a, b);
  }

  /// a, b = blocks of `Size` numbers of a and b by turns, from the lower and the upper half of every 16 bytes.
  template <int Size>
  static COTERIE_INLINE void interleave_halves(F& a, F& b) {
    constexpr int half = quarter / 2;
    struct Low {
      static constexpr int of(int i) {
        const int within = i % quarter;
        return i / quarter * quarter + within / (2 * Size) * Size + within % Size + (within / Size % 2 ? count : 0);
      }
    };
    struct High {
      static constexpr int of(int i) { return Low::of(i) + half; }
    };
    exchange<Low, High>(a, b);
  }

  /// columns[i][l] = rows[l][i] for `quarter` columns: 16 bytes of every row go straight to their position, where only
  /// they are left to be transposed.
  static COTERIE_INLINE void load_columns(const T* const* rows, Index column, F (&columns)[quarter]) {
    COTERIE_UNROLL for (int i = 0; i < quarter; ++i) load_quarters(rows + i, column, columns[i]);
    transpose_quarters<quarter>(columns);
  }

  /// Transposes `count` vectors of `count` numbers: first inside every 16 bytes, then blocks of 16 bytes, so that every
  /// step is one shuffle.
  static COTERIE_INLINE void transpose(F (&rows)[count]) {
    constexpr int blocks = count / quarter;
    transpose_quarters<count>(rows);
    if constexpr (blocks >= 2)
      COTERIE_UNROLL for (int i = 0; i < count; ++i) if (i / quarter % 2 == 0)
          exchange_blocks<quarter>(rows[i], rows[i + quarter]);
    if constexpr (blocks >= 4)
      COTERIE_UNROLL for (int i = 0; i < count; ++i) if (i / (2 * quarter) % 2 == 0)
          exchange_blocks<2 * quarter>(rows[i], rows[i + 2 * quarter]);
    // rows[4 g + k] (16-byte blocks of four) now holds, block q, columns k of block g of rows 4 q ..: column 4 g + k.
  }

 private:
  /// Transposes `quarter` rows after `quarter` rows inside every 16 bytes.
  template <int Rows>
  static COTERIE_INLINE void transpose_quarters(F (&rows)[Rows]) {
    COTERIE_UNROLL for (int i = 0; i < Rows; i += quarter) {
      if constexpr (quarter == 4) {
        interleave_halves<1>(rows[i], rows[i + 1]);
        interleave_halves<1>(rows[i + 2], rows[i + 3]);
        interleave_halves<2>(rows[i], rows[i + 2]);
        interleave_halves<2>(rows[i + 1], rows[i + 3]);
        const F second = rows[i + 2];  // rows hold columns 0, 2, 1, 3
        rows[i + 2] = rows[i + 1];
        rows[i + 1] = second;
      } else {
        interleave_halves<1>(rows[i], rows[i + 1]);
      }
    }
  }

  /// x = 16 bytes of each of rows[0], rows[quarter], rows[2 quarter] ..
  static COTERIE_INLINE void load_quarters(const T* const* rows, Index column, F& x) {
    join_quarters(rows, column, x, std::make_integer_sequence<int, count / quarter>{});
  }

#if defined(__SIZEOF_INT128__) && !defined(__clang__)
  // g++ inserts whole numbers straight from memory; vectors it would load and shuffle.
  __extension__ typedef unsigned __int128 Whole;
  typedef Whole LooseWhole __attribute__((aligned(4), may_alias));
  typedef Whole Wholes __attribute__((vector_size(Bytes)));

  template <int... Is>
  static COTERIE_INLINE void join_quarters(const T* const* rows, Index column, F& x,
                                           std::integer_sequence<int, Is...>) {
    x = (F)Wholes{*reinterpret_cast<const LooseWhole*>(rows[Is * quarter] + column)...};
  }
#else
  typedef T Quarter __attribute__((vector_size(16)));
  typedef T LooseQuarter __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  typedef T HalfVector __attribute__((vector_size(Bytes > 16 ? Bytes / 2 : 16)));

  template <int... Is>
  static COTERIE_INLINE void join_quarters(const T* const* rows, Index column, F& x,
                                           std::integer_sequence<int, Is...>) {
    const Quarter pieces[] = {*reinterpret_cast<const LooseQuarter*>(rows[Is * quarter] + column)...};
    if constexpr (sizeof...(Is) == 1) {
      x = pieces[0];
    } else if constexpr (sizeof...(Is) == 2) {
      join(pieces[0], pieces[1], x, std::make_integer_sequence<int, count>{});
    } else {
      HalfVector low, high;
      join(pieces[0], pieces[1], low, std::make_integer_sequence<int, count / 2>{});
      join(pieces[2], pieces[3], high, std::make_integer_sequence<int, count / 2>{});
      join(low, high, x, std::make_integer_sequence<int, count>{});
    }
  }

  template <class From, class To, int... Is>
  static COTERIE_INLINE void join(const From& a, const From& b, To& y, std::integer_sequence<int, Is...>) {
    y = __builtin_shufflevector(a, b, Is...);
  }
#endif
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
