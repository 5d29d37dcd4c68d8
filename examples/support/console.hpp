// Progress bars and tables of the example programs and of the benchmarks.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<sys/ioctl.h>) && __has_include(<unistd.h>)
#include <sys/ioctl.h>
#include <unistd.h>
#endif

namespace examples {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
  char buffer[512];
  std::va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

/// Columns of a stream where it is a terminal, otherwise 0.
inline int terminal_width(std::FILE* stream) {
#ifdef TIOCGWINSZ
  winsize size{};
  if (isatty(fileno(stream)) != 0)
    return ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
#else
  static_cast<void>(stream);
#endif
  return 0;
}

/// Seconds since its construction or the last reset.
class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  void reset() { start_ = Clock::now(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

/// A progress bar: redrawn in place on a terminal, a few lines elsewhere.
class Progress {
 public:
  explicit Progress(std::string label, int lines = 10, std::FILE* stream = stdout)
      : label_(std::move(label)), lines_(lines), stream_(stream) {}

  /// `fraction` of the work is done; `details` follow the bar. Cheap when there is nothing to draw.
  template <class Details>
  void show(double fraction, Details&& details) {
    fraction = std::clamp(fraction, 0.0, 1.0);
    const bool last = fraction >= 1;
    const int width = terminal_width(stream_);
    if (width > 0 ? drawn_.seconds() < 0.1 && !last && begun_ : fraction < next_line_ && !last) return;
    begun_ = true;
    drawn_.reset();
    next_line_ = (std::floor(fraction * lines_ + 1e-9) + 1) / lines_;

    const double seconds = clock_.seconds();
    const double left = fraction > 0 ? seconds * (1 - fraction) / fraction : 0;
    const std::string time = last ? format("%.1f s", seconds) : fraction > 0 ? format("%.0f s left", left) : "";
    const std::string tail = format("%3.0f %%  ", 100 * fraction) + details() + "  " + time;
    if (width > 0) {
      const int bar = 20, done = static_cast<int>(fraction * bar);
      std::string line = label_ + " [" + std::string(static_cast<std::size_t>(done), '#') +
                         std::string(static_cast<std::size_t>(bar - done), '.') + "] " + tail;
      if (line.size() >= static_cast<std::size_t>(width)) line.resize(static_cast<std::size_t>(width - 1));
      std::fprintf(stream_, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
    } else {
      std::fprintf(stream_, "%s %s\n", label_.c_str(), tail.c_str());
    }
    std::fflush(stream_);
  }
  void show(double fraction) {
    show(fraction, [] { return std::string(); });
  }

 private:
  std::string label_;
  double lines_;
  std::FILE* stream_;
  Stopwatch clock_, drawn_;
  double next_line_ = lines_ > 1 ? 0 : 1;
  bool begun_ = false;
};

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
    for (std::size_t width : widths) total += width + 3;
    std::printf("  %s\n", std::string(total - 3, '-').c_str());
  }
  std::fflush(stdout);
}

}  // namespace examples
