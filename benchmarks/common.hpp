// What all benchmarks share: the FMA peak of this core, the counters, random matrices. See NOTES.md for the protocol.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <ctime>
#endif

#include "coterie/core/context.hpp"
#include "coterie/kernel/dispatch.hpp"
#include "coterie/version.hpp"
#include "random.hpp"

namespace benchmarks {

using coterie::Context;
using coterie::Index;
using coterie::InstructionSet;
using coterie::RowMatrix;

// A fixed routine per instruction set: 12 independent chains s = s a + b, enough for any latency and small enough to stay
// in registers. Where the set has no fused multiply-add (the x86 baseline) it is a multiplication and an addition.
#define COTERIE_FMA_ROUTINE(name, target, bytes)                                         \
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
  }
COTERIE_FMA_ROUTINE(baseline, , 16)
#if COTERIE_X86
COTERIE_FMA_ROUTINE(avx2, __attribute__((target("avx2,fma"))), 32)
COTERIE_FMA_ROUTINE(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64)
#endif
#undef COTERIE_FMA_ROUTINE

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

/// Floating-point operations per second of the best of a few runs of the FMA routine: one core, about 3 ms.
template <class T>
double fma_peak(InstructionSet instructions) {
  alignas(64) T out[64 / sizeof(T)];
  T in[3] = {T(0.75), T(0.25), T(0.5)};
  void (*routine)(const T*, T*, Index) = fma_baseline<T>;
  Index bytes = 16;
#if COTERIE_X86
  const InstructionSet set = coterie::detail::resolve(instructions);
  if (set == InstructionSet::avx2) routine = fma_avx2<T>, bytes = 32;
  if (set == InstructionSet::avx512) routine = fma_avx512<T>, bytes = 64;
#else
  (void)instructions;
#endif
  const Index rounds = 50000;
  double best = 0;
  for (int run = 0; run < 10; ++run) {
    const double begin = thread_seconds();
    routine(in, out, rounds);
    benchmark::DoNotOptimize(out);
    const double seconds = thread_seconds() - begin;
    const double operations = 2.0 * 12 * static_cast<double>(rounds * bytes) / sizeof(T);
    if (seconds > 0) best = std::max(best, operations / seconds);
  }
  return best;
}

/// Runs the benchmark's loop over f, after one call that warms up, between two measurements of the peak, and sets the
/// counters. `flops`: useful operations of one call; 0 leaves out the counters that need them.
template <class T, class F>
void measure(benchmark::State& state, Context& context, double flops, F&& f) {
  f();
  double peak = fma_peak<T>(context.instructions());
  const double begin = thread_seconds();
  for (auto _ : state) {
    f();
    benchmark::ClobberMemory();
  }
  const double seconds = thread_seconds() - begin;
  peak = std::max(peak, fma_peak<T>(context.instructions()));
  if (flops > 0) {
    const double total = flops * static_cast<double>(state.iterations());
    state.counters["useful_flops"] = benchmark::Counter(total, benchmark::Counter::kIsRate);
    state.counters["fma_peak"] = peak;
    // Of one core, by this thread's time: a call on several workers has no such fraction.
    if (context.workers() == 1) state.counters["fraction_of_peak"] = total / seconds / peak;
  }
  state.counters["workspace_bytes"] = static_cast<double>(context.workspace().bytes());
}

/// "float", "double".
template <class T>
const char* scalar_name() {
  return sizeof(T) == 4 ? "float" : "double";
}

template <class... Parts>
std::string name(const Parts&... parts) {
  return coterie::detail::join(parts...);
}

/// main() of every benchmark file: what the results depend on goes into their context.
inline int run(int argc, char** argv) {
  constexpr const char* sets[] = {"automatic", "baseline", "avx2", "avx512"};
  benchmark::AddCustomContext("coterie", coterie::version);
  benchmark::AddCustomContext("instruction_set",
                              sets[static_cast<int>(coterie::detail::resolve(InstructionSet::automatic))]);
  benchmark::AddCustomContext("compiler", __VERSION__);
  // Shorter than the library's half a second, for there are many; a flag given by hand comes later and wins.
  char shorter[] = "--benchmark_min_time=0.2";
  std::vector<char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + 1, shorter);
  int count = argc + 1;
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace benchmarks
