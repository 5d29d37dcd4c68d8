// Cost over the size of a group and over the width of a head: useful work should cost the same at any, without a cliff.
#include <deque>
#include <memory>

#include "head.hpp"
#include "plot.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

/// One head, forward and backward.
struct Shape {
  Shape(Index at, AttentionPlan plan, Index d) : size(at), head(std::make_unique<Head<float>>(std::move(plan), d)) {
    head->prepare_backward();
    forward = {.call = [&h = *head] { h.forward(); }, .flops = head->forward_flops()};
    backward = {.call = [&h = *head] { h.backward(); }, .flops = head->backward_flops()};
  }

  Index size;  ///< what varies
  std::unique_ptr<Head<float>> head;
  Timed forward, backward;
};

/// Runs all shapes in turns and prints and returns what they cost.
struct Curve {
  Curve(const char* label, std::deque<Shape>& all, double budget, int rounds) : shapes(all), peak(timed_peak<float>()) {
    std::vector<Timed*> timed = {&peak};
    for (Shape& shape : shapes) timed.insert(timed.end(), {&shape.forward, &shape.backward});
    Progress progress(label);
    interleave(timed, budget, rounds, progress);
  }

  double fraction(const Timed& timed) const { return timed.flops / timed.typical() / peak_of(peak); }
  static double nanoseconds(const Shape& shape, const Timed& timed) {
    return 1e9 * timed.typical() / shape.head->pairs;
  }

  void print(const char* title, const char* what) const {
    std::printf("\n%s\n\n", title);
    std::vector<std::vector<std::string>> table = {
        {what, "pairs", "forward: ns a pair", "of peak", "backward: ns a pair", "of peak"}};
    for (const Shape& shape : shapes)
      table.push_back(
          {std::to_string(shape.size), format("%.0f", shape.head->pairs),
           format("%.2f", nanoseconds(shape, shape.forward)), format("%.0f %%", 100 * fraction(shape.forward)),
           format("%.2f", nanoseconds(shape, shape.backward)), format("%.0f %%", 100 * fraction(shape.backward))});
    print_table(table);
  }

  JsonObject json(const char* what) const {
    std::vector<JsonObject> list;
    for (const Shape& shape : shapes) {
      JsonObject object;
      object.add(what, shape.size).add("visible_pairs", shape.head->pairs);
      object.add("forward_seconds", shape.forward.typical()).add("forward_fraction_of_peak", fraction(shape.forward));
      object.add("backward_seconds", shape.backward.typical())
          .add("backward_fraction_of_peak", fraction(shape.backward));
      list.push_back(object);
    }
    JsonObject result;
    result.add("context", json_context().add("fma_peak_float", peak_of(peak)));
    return result.add("shapes", list);
  }

  /// Whether no run beat the peak; says so otherwise.
  bool plausible() const {
    for (const Shape& shape : shapes)
      for (const Timed* timed : {&shape.forward, &shape.backward})
        if (timed->flops / timed->best() > peak_of(peak)) {
          std::printf("error: size %d: more than the peak, so one of the two was measured wrongly\n",
                      static_cast<int>(shape.size));
          return false;
        }
    return true;
  }

  std::deque<Shape>& shapes;
  Timed peak;
};

bool group_sizes(const Options& options) {
  const Index n = options.smoke ? 512 : 16384, d = 64;
  std::deque<Shape> shapes;
  for (const Index g : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256})
    shapes.emplace_back(g, routed_plan(shuffled_labels(n / g * g, g), g), d);
  const Curve curve("shapes: group size", shapes, options.smoke ? 0 : 8, options.smoke ? 1 : 9);
  curve.print("Groups of exactly g tokens that see themselves, causal: n=16384 shuffled over them, d=64", "g");

  std::vector<Line> lines = {{.name = "backward", .colour = red}, {.name = "forward", .colour = blue}};
  for (const Shape& shape : shapes) {
    const double g = static_cast<double>(shape.size);
    lines[0].points.push_back({g, Curve::nanoseconds(shape, shape.backward)});
    lines[1].points.push_back({g, Curve::nanoseconds(shape, shape.forward)});
  }
  const double peak = peak_of(curve.peak), last = static_cast<double>(shapes.back().size);
  for (const auto& [name, flops, colour] :
       {std::tuple("backward at peak", 640.0, red), {"forward at peak", 256.0, blue}})
    lines.push_back({.name = name,
                     .colour = colour,
                     .points = {{1, 1e9 * flops / peak}, {last, 1e9 * flops / peak}},
                     .dashed = true});
  std::vector<Tick> ticks;
  for (Index g = 1; g <= 256; g *= 2) ticks.push_back({static_cast<double>(g), std::to_string(g)});
  const Panel panel{.title = "Cost of a visible pair over the size of its group",
                    .x = {.title = "tokens in a group (routed, n=16384, d=64)", .ticks = ticks},
                    .y = {.title = "nanoseconds", .ticks = decades(lines, [](double y) { return format("%g", y); })},
                    .lines = lines};
  options.write("group_size.svg", svg({panel}, caption(peak)));
  options.write("group_size.json", curve.json("group_size").text() + "\n");
  return options.smoke || curve.plausible();
}

bool head_widths(const Options& options) {
  const Index n = options.smoke ? 256 : 4096, w = 256;
  std::deque<Shape> shapes;
  for (const Index d : {16, 24, 32, 40, 64, 80, 96, 128}) shapes.emplace_back(d, local_plan(n, w), d);
  const Curve curve("shapes: head width", shapes, options.smoke ? 0 : 5, options.smoke ? 1 : 9);
  curve.print("Head widths: local, causal, n=4096, w=256", "d");

  std::vector<Line> lines = {{.name = "backward", .colour = red}, {.name = "forward", .colour = blue}};
  std::vector<Tick> ticks = {{0, "0"}};
  for (const Shape& shape : shapes) {
    const double d = static_cast<double>(shape.size);
    lines[0].points.push_back({d, 100 * curve.fraction(shape.backward)});
    lines[1].points.push_back({d, 100 * curve.fraction(shape.forward)});
    ticks.push_back({d, std::to_string(shape.size)});
  }
  const Panel panel{.title = "Fraction of the FMA peak over the width of a head",
                    .x = {.title = "head width (local, n=4096, w=256)", .ticks = ticks, .logarithmic = false},
                    .y = {.title = "percent of peak",
                          .ticks = {{0, "0"}, {20, "20"}, {40, "40"}, {60, "60"}, {80, "80"}, {100, "100"}},
                          .logarithmic = false},
                    .lines = lines};
  options.write("head_width.svg", svg({panel}, caption(peak_of(curve.peak))));
  options.write("head_width.json", curve.json("head_width").text() + "\n");
  return options.smoke || curve.plausible();
}

int report(const Options& options) {
  const bool groups = group_sizes(options), widths = head_widths(options);
  if (options.smoke) std::printf("\nA smoke run, with fewer tokens than the titles say: no figures.\n");
  return groups && widths ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
