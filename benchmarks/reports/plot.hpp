// Line charts as SVG: panels side by side, each with labelled axes and lines that carry their names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "report.hpp"

namespace benchmarks {

struct Tick {
  double value = 0;
  std::string label;
};

/// From the first tick to the last, with a grid line at each.
struct Axis {
  std::string title;
  std::vector<Tick> ticks;
  bool logarithmic = true;

  /// Where a value lies: 0 at the first tick, 1 at the last.
  double fraction(double value) const {
    const auto scaled = [&](double x) { return logarithmic ? std::log(x) : x; };
    const double low = scaled(ticks.front().value), high = scaled(ticks.back().value);
    return (scaled(value) - low) / (high - low);
  }
};

struct Line {
  std::string name;  ///< written at the line's last point
  std::string colour = "#000000";
  std::vector<std::pair<double, double>> points = {};
  bool dashed = false;  ///< a line to compare with: dashed, without points
};

struct Panel {
  std::string title;
  Axis x, y;
  std::vector<Line> lines;
};

// Colours that also colour-blind readers tell apart (Okabe and Ito).
inline constexpr const char* blue = "#0072b2";
inline constexpr const char* green = "#009e73";
inline constexpr const char* red = "#d55e00";
inline constexpr const char* grey = "#707070";

/// Ticks at the powers of ten around all y of the lines.
template <class Label>
std::vector<Tick> decades(const std::vector<Line>& lines, Label&& label) {
  double low = INFINITY, high = 0;
  for (const Line& line : lines)
    for (const auto& [x, y] : line.points) low = std::min(low, y), high = std::max(high, y);
  std::vector<Tick> ticks;
  const int first = static_cast<int>(std::floor(std::log10(low)));
  const int last = std::max(first + 1, static_cast<int>(std::ceil(std::log10(high))));
  for (int power = first; power <= last; ++power)
    ticks.push_back({std::pow(10.0, power), label(std::pow(10.0, power))});
  return ticks;
}

/// The picture: `caption` in small print below the panels.
inline std::string svg(const std::vector<Panel>& panels, const std::string& caption) {
  constexpr double left = 76, right = 150, top = 52, bottom = 66, wide = 360, high = 320, below = 24;
  const double panel_width = left + wide + right;
  const double width = panel_width * static_cast<double>(panels.size()), height = top + high + bottom + below;
  const auto escape = [](const std::string& text) {
    std::string escaped;
    for (const char c : text) escaped += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
    return escaped;
  };
  const auto text = [&](double x, double y, const char* attributes, const std::string& words) {
    return format("<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, attributes) + escape(words) + "</text>\n";
  };
  std::string out = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
      "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#202020\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
      width, height, width, height);

  for (std::size_t p = 0; p < panels.size(); ++p) {
    const Panel& panel = panels[p];
    const double x0 = panel_width * static_cast<double>(p) + left, y0 = top + high;
    const auto at_x = [&](double value) { return x0 + wide * panel.x.fraction(value); };
    const auto at_y = [&](double value) { return y0 - high * panel.y.fraction(value); };
    out += text(x0, top - 24, "font-size=\"15\" font-weight=\"bold\"", panel.title);

    for (const Tick& tick : panel.x.ticks) {
      const double x = at_x(tick.value);
      out += format("<path d=\"M%.1f %.1fV%.1f\" stroke=\"#e4e4e4\"/>\n", x, top, y0);
      out += text(x, y0 + 19, "text-anchor=\"middle\"", tick.label);
    }
    for (const Tick& tick : panel.y.ticks) {
      const double y = at_y(tick.value);
      out += format("<path d=\"M%.1f %.1fH%.1f\" stroke=\"#e4e4e4\"/>\n", x0, y, x0 + wide);
      out += text(x0 - 8, y + 4.5, "text-anchor=\"end\"", tick.label);
    }
    out += format("<path d=\"M%.1f %.1fV%.1fH%.1f\" fill=\"none\" stroke=\"#202020\"/>\n", x0, top, y0, x0 + wide);
    out += text(x0 + wide / 2, y0 + 42, "text-anchor=\"middle\"", panel.x.title);
    const double middle = top + high / 2;
    out += text(x0 - 58, middle,
                format("text-anchor=\"middle\" transform=\"rotate(-90 %.1f %.1f)\"", x0 - 58, middle).c_str(),
                panel.y.title);

    // Names stand at the lines' ends, from the top down, apart from each other where ends are close.
    struct Name {
      double x = 0, y = 0;
      const Line* line = nullptr;
    };
    std::vector<Name> names;
    for (const Line& line : panel.lines) {
      std::string path;
      for (const auto& [x, y] : line.points) path += format("%s%.1f %.1f", path.empty() ? "M" : "L", at_x(x), at_y(y));
      out += "<path d=\"" + path + "\" fill=\"none\" stroke=\"" + line.colour + "\" " +
             (line.dashed ? "stroke-width=\"1.3\" stroke-dasharray=\"5 4\"" : "stroke-width=\"2.2\"") + "/>\n";
      if (!line.dashed)
        for (const auto& [x, y] : line.points)
          out += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\" fill=\"%s\"/>\n", at_x(x), at_y(y),
                        line.colour.c_str());
      names.push_back({at_x(line.points.back().first) + 9, at_y(line.points.back().second) + 4.5, &line});
    }
    std::sort(names.begin(), names.end(), [](const Name& a, const Name& b) { return a.y < b.y; });
    for (std::size_t i = 1; i < names.size(); ++i)
      for (std::size_t j = 0; j < i; ++j)
        if (std::abs(names[i].x - names[j].x) < right) names[i].y = std::max(names[i].y, names[j].y + 16);
    for (const Name& name : names)
      out += text(name.x, name.y, ("fill=\"" + name.line->colour + "\" font-weight=\"bold\"").c_str(), name.line->name);
  }
  out += text(left, height - 12, "font-size=\"11\" fill=\"#606060\"", caption);
  return out + "</svg>\n";
}

/// The compiler, the instruction set and the peak: the caption of every picture.
inline std::string caption(double peak) {
  return format("Coterie %s, one core, %s, %s, float, FMA peak %.0f GFLOP/s", coterie::version, instruction_set_name(),
                compiler_name().c_str(), 1e-9 * peak);
}

}  // namespace benchmarks
