// What the files share that have a main() of their own: interleaved runs, options, progress, tables, JSON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "coterie/version.hpp"
#include "peak.hpp"
#include "support/console.hpp"

namespace benchmarks {

using examples::format;
using examples::print_table;
using examples::Stopwatch;

/// A progress bar on standard error, for the tables go to standard output.
struct Progress : examples::Progress {
  explicit Progress(std::string label) : examples::Progress(std::move(label), 10, stderr) {}
};

/// The command line: --smoke (small sizes, to see that everything runs) and --out=DIRECTORY (where files are written).
struct Options {
  bool smoke = false;
  std::string out;  ///< empty: no files are written

  static Options read(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--smoke")
        options.smoke = true;
      else if (argument.rfind("--out=", 0) == 0)
        options.out = argument.substr(6);
      else
        throw std::invalid_argument("usage: " + std::string(argv[0]) + " [--smoke] [--out=DIRECTORY]");
    }
    return options;
  }

  /// Writes DIRECTORY/name where a directory was given, and says so.
  void write(const std::string& name, const std::string& text) const {
    if (out.empty()) return;
    std::filesystem::create_directories(out);
    const std::filesystem::path path = std::filesystem::path(out) / name;
    std::ofstream file(path);
    file << text;
    file.close();
    if (!file) throw std::runtime_error("cannot write " + path.string());
    std::fprintf(stderr, "wrote %s\n", path.string().c_str());
  }
};

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// Something to be timed, and the seconds of this thread that each of its runs took, per call.
struct Timed {
  std::function<void()> call;
  double flops = 0;                  ///< useful operations of one call
  Index calls = 1;                   ///< of one run; set by interleave()
  std::vector<double> seconds = {};  ///< per call, run by run

  double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
  double typical() const { return median(seconds); }
};

/// Runs all of them in turns, round after round, for about `budget` seconds and at least `rounds` rounds.
/// Before each timed run comes a call that is not timed, so that none pays for what the one before left in the caches;
/// a run is as many calls as take 2 ms.
inline void interleave(const std::vector<Timed*>& all, double budget, int rounds, Progress& progress) {
  const auto run = [](Timed& timed) {
    const double begin = thread_seconds();
    for (Index i = 0; i < timed.calls; ++i) timed.call();
    return (thread_seconds() - begin) / static_cast<double>(timed.calls);
  };
  for (Timed* timed : all) {
    timed->call();  // first touches of pages, growth of buffers
    while (timed->calls < 1000000 && run(*timed) * static_cast<double>(timed->calls) < 2e-3) timed->calls *= 2;
  }
  const Stopwatch clock;
  for (int round = 0; round < rounds || clock.seconds() < budget; ++round) {
    for (Timed* timed : all) {
      timed->call();
      timed->seconds.push_back(run(*timed));
    }
    const double of_budget = budget > 0 ? clock.seconds() / budget : 1;
    progress.show(std::min({0.999, of_budget, (round + 1.0) / rounds}));
  }
  progress.show(1);
}

/// The FMA routine as one of the things that run in turns: its best run is the peak.
template <class T>
Timed timed_peak(InstructionSet instructions = InstructionSet::automatic) {
  const PeakRoutines<T> routines(instructions);
  return {.call = [routines] { routines.fma(); }, .flops = routines.flops()};
}

inline double peak_of(const Timed& routine) { return routine.flops / routine.best(); }

/// One JSON object, its fields in the order in which they are added.
class JsonObject {
 public:
  JsonObject& add(const std::string& name, const std::string& value) { return add_raw(name, quote(value)); }
  JsonObject& add(const std::string& name, const char* value) { return add(name, std::string(value)); }
  JsonObject& add(const std::string& name, double value) {
    return add_raw(name, std::isfinite(value) ? format("%.9g", value) : "null");
  }
  JsonObject& add(const std::string& name, Index value) { return add_raw(name, std::to_string(value)); }
  JsonObject& add(const std::string& name, const JsonObject& value) { return add_raw(name, value.text()); }
  JsonObject& add(const std::string& name, const std::vector<JsonObject>& values) {
    std::string list;
    for (const JsonObject& value : values) list += (list.empty() ? "\n    " : ",\n    ") + value.text();
    return add_raw(name, "[" + list + "\n  ]");
  }

  std::string text() const { return "{" + fields_ + "}"; }

 private:
  static std::string quote(const std::string& value) {
    std::string quoted = "\"";
    for (const char c : value) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c;
    }
    return quoted + "\"";
  }
  JsonObject& add_raw(const std::string& name, const std::string& value) {
    fields_ += (fields_.empty() ? "" : ", ") + quote(name) + ": " + value;
    return *this;
  }

  std::string fields_;
};

/// "g++ 12.2.0", "clang 14.0.6 ..."
inline std::string compiler_name() {
#if defined(__clang__)
  return __VERSION__;
#else
  return std::string("g++ ") + __VERSION__;
#endif
}

/// What every result depends on.
inline JsonObject json_context() {
  JsonObject context;
  return context.add("coterie", coterie::version)
      .add("instruction_set", instruction_set_name())
      .add("compiler", compiler_name());
}

/// main() of the files that print a report: what it returns, or 2 and what was thrown.
inline int run_report(int argc, char** argv, int (*report)(const Options&)) {
  try {
    return report(Options::read(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

}  // namespace benchmarks
