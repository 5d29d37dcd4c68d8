// What the files share that Google Benchmark runs: counters, names, main(). See NOTES.md for the protocol.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "coterie/version.hpp"
#include "peak.hpp"
#include "random.hpp"

namespace benchmarks {

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
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// The main() of every file: what the results depend on goes into their context.
inline int run(int argc, char** argv) {
  benchmark::AddCustomContext("coterie", coterie::version);
  benchmark::AddCustomContext("instruction_set", instruction_set_name());
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
