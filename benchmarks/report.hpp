// What the files share that have a main() of their own: interleaved runs, options, progress, tables, JSON.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "coterie/version.hpp"
#include "peak.hpp"

namespace benchmarks {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
  char buffer[512];
  std::va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

/// Seconds on the wall since some moment.
inline double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

/// A progress bar on standard error: redrawn in place on a terminal, a line every tenth elsewhere.
class Progress {
 public:
  explicit Progress(std::string label) : label_(std::move(label)) {}

  /// `fraction` of the work is done.
  void show(double fraction) {
    fraction = std::clamp(fraction, 0.0, 1.0);
    const double now = wall_seconds();
    const bool last = fraction >= 1;
    if (!last && (terminal_ ? now - drawn_ < 0.1 : fraction < next_line_)) return;
    drawn_ = now;
    next_line_ = std::floor(10 * fraction + 1e-9) / 10 + 0.1;
    const double seconds = now - begin_;
    const std::string time = last           ? format("%.0f s", seconds)
                             : fraction > 0 ? format("%.0f s left", seconds * (1 - fraction) / fraction)
                                            : "";
    const auto done = static_cast<std::size_t>(20 * fraction);
    const std::string bar = std::string(done, '#') + std::string(20 - done, '.');
    std::fprintf(stderr, "%s%s [%s] %3.0f %%  %s%s", terminal_ ? "\r\033[K" : "", label_.c_str(), bar.c_str(),
                 100 * fraction, time.c_str(), terminal_ && !last ? "" : "\n");
    std::fflush(stderr);
  }

 private:
  static bool is_terminal() {
#if defined(__unix__) || defined(__APPLE__)
    return isatty(STDERR_FILENO) != 0;
#else
    return false;
#endif
  }

  std::string label_;
  bool terminal_ = is_terminal();
  double begin_ = wall_seconds(), drawn_ = 0, next_line_ = 0;
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
/// Before each timed run comes a call that is not timed, so that none pays for what the one before left in the caches; a
/// run is as many calls as take 2 ms.
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
  const double begin = wall_seconds();
  for (int round = 0; round < rounds || wall_seconds() - begin < budget; ++round) {
    for (Timed* timed : all) {
      timed->call();
      timed->seconds.push_back(run(*timed));
    }
    const double of_budget = budget > 0 ? (wall_seconds() - begin) / budget : 1;
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

/// Prints a table: the first row is the heading; the first column is set left, the others right.
inline void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t i = 0; i < rows[r].size(); ++i) {
      const std::string pad(widths[i] - rows[r][i].size(), ' ');
      std::printf("%s%s", i == 0 ? "  " : "   ", (i == 0 ? rows[r][i] + pad : pad + rows[r][i]).c_str());
    }
    std::printf("\n");
    if (r > 0) continue;
    std::size_t total = 0;
    for (const std::size_t width : widths) total += width + 3;
    std::printf("  %s\n", std::string(total - 3, '-').c_str());
  }
  std::fflush(stdout);
}

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

}  // namespace benchmarks
