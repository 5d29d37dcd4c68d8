// What this core can do at best: multiply-adds in registers, and reading memory that is cached. And the clock for both.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <ctime>
#endif

#include "coterie/core/context.hpp"
#include "coterie/kernel/dispatch.hpp"

namespace benchmarks {

using coterie::Context;
using coterie::Index;
using coterie::InstructionSet;
using coterie::RowMatrix;

/// Makes the compiler believe that somebody reads what `p` points to.
inline void keep(const void* p) { asm volatile("" : : "g"(p) : "memory"); }

/// Seconds that this thread has computed for, where the system tells; otherwise the time of day.
inline double thread_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

/// The name of the instruction set that `asked` means on this machine.
inline const char* instruction_set_name(InstructionSet asked = InstructionSet::automatic) {
  constexpr const char* names[] = {"automatic", "baseline", "avx2", "avx512"};
  return names[static_cast<int>(coterie::detail::resolve(asked))];
}

// Two fixed routines per instruction set.
// fma: 12 independent chains s = s a + b, enough for any latency and small enough to stay in registers. Where the set
// has no fused multiply-add (the x86 baseline) it is a multiplication and an addition.
// read: the sum of an array in 8 independent chains, one load each; `count` is a multiple of 8 vectors.
#define COTERIE_PEAK_ROUTINES(name, target, bytes)                                       \
  template <class T>                                                                     \
  target __attribute__((noinline)) void fma_##name(const T* in, T* out, Index rounds) {  \
    typedef T V __attribute__((vector_size(bytes)));                                     \
    const V a = V{} + in[0], b = V{} + in[1];                                            \
    V s0 = V{} + in[2], s1 = s0 + b, s2 = s1 + b, s3 = s2 + b, s4 = s3 + b, s5 = s4 + b; \
    V s6 = s5 + b, s7 = s6 + b, s8 = s7 + b, s9 = s8 + b, s10 = s9 + b, s11 = s10 + b;   \
    for (Index i = 0; i < rounds; ++i) {                                                 \
      s0 = s0 * a + b, s1 = s1 * a + b, s2 = s2 * a + b, s3 = s3 * a + b;                \
      s4 = s4 * a + b, s5 = s5 * a + b, s6 = s6 * a + b, s7 = s7 * a + b;                \
      s8 = s8 * a + b, s9 = s9 * a + b, s10 = s10 * a + b, s11 = s11 * a + b;            \
    }                                                                                    \
    s0 = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + ((s8 + s9) + (s10 + s11));  \
    std::memcpy(out, &s0, sizeof(s0));                                                   \
  }                                                                                      \
  template <class T>                                                                     \
  target __attribute__((noinline)) void read_##name(const T* in, T* out, Index count) {  \
    typedef T V __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));     \
    constexpr Index lanes = bytes / sizeof(T);                                           \
    const V* p = reinterpret_cast<const V*>(in);                                         \
    const V* const end = p + count / lanes;                                              \
    V s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};                                    \
    for (; p < end; p += 8) {                                                            \
      s0 += p[0], s1 += p[1], s2 += p[2], s3 += p[3];                                    \
      s4 += p[4], s5 += p[5], s6 += p[6], s7 += p[7];                                    \
    }                                                                                    \
    s0 = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7));                              \
    std::memcpy(out, &s0, sizeof(s0));                                                   \
  }
COTERIE_PEAK_ROUTINES(baseline, , 16)
#if COTERIE_X86
COTERIE_PEAK_ROUTINES(avx2, __attribute__((target("avx2,fma"))), 32)
COTERIE_PEAK_ROUTINES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64)
#endif
#undef COTERIE_PEAK_ROUTINES

/// The two routines of an instruction set.
template <class T>
class PeakRoutines {
 public:
  explicit PeakRoutines(InstructionSet instructions) {
#if COTERIE_X86
    const InstructionSet set = coterie::detail::resolve(instructions);
    if (set == InstructionSet::avx2) fma_ = fma_avx2<T>, read_ = read_avx2<T>, bytes_ = 32;
    if (set == InstructionSet::avx512) fma_ = fma_avx512<T>, read_ = read_avx512<T>, bytes_ = 64;
#else
    (void)instructions;
#endif
  }

  /// Floating-point operations of one fma(): about 0.3 ms.
  double flops() const { return 2.0 * 12 * static_cast<double>(rounds * bytes_) / sizeof(T); }

  void fma() const {
    const T in[3] = {T(0.75), T(0.25), T(0.5)};
    alignas(64) T out[64 / sizeof(T)];
    fma_(in, out, rounds);
    keep(out);
  }

  /// The sum of `count` values, a multiple of 512 bytes of them, each read once.
  T read(const T* in, Index count) const {
    alignas(64) T out[64 / sizeof(T)];
    read_(in, out, count);
    T sum = 0;
    for (Index i = 0; i < bytes_ / static_cast<Index>(sizeof(T)); ++i) sum += out[i];
    return sum;
  }

 private:
  static constexpr Index rounds = 50000;
  void (*fma_)(const T*, T*, Index) = fma_baseline<T>;
  void (*read_)(const T*, T*, Index) = read_baseline<T>;
  Index bytes_ = 16;
};

/// Floating-point operations per second of the best of a few runs of the FMA routine: one core, about 3 ms.
template <class T>
double fma_peak(InstructionSet instructions) {
  const PeakRoutines<T> routines(instructions);
  double best = 0;
  for (int run = 0; run < 10; ++run) {
    const double begin = thread_seconds();
    routines.fma();
    const double seconds = thread_seconds() - begin;
    if (seconds > 0) best = std::max(best, routines.flops() / seconds);
  }
  return best;
}

}  // namespace benchmarks
