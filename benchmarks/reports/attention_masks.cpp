// Draws who sees whom, from plans: a picture of local, routed and dense attention over the same few tokens.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

constexpr Index tokens = 32, window = 8, clusters = 4;

// Colours that also colour-blind readers tell apart (Okabe and Ito): one for each cluster.
constexpr std::array<const char*, clusters> colours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7"};
constexpr const char* plain = "#4d5b6b";

/// The cluster of each token, as a router could have chosen it.
const std::vector<std::int32_t> labels = {0, 1, 1, 0, 2, 0, 3, 1, 2, 0, 0, 3, 1, 2, 2, 0,
                                          1, 3, 0, 2, 1, 0, 3, 2, 0, 1, 1, 3, 0, 2, 0, 1};

/// Calls f(query, key) for every pair that the plan shows, group by group.
template <class F>
void each_visible_pair(const AttentionPlan& plan, F&& f) {
  for (const AttentionPlan::Group& group : plan.groups)
    for (std::int32_t entry = group.entry_begin; entry < group.entry_end; ++entry) {
      const auto e = static_cast<std::size_t>(entry);
      for (std::int32_t rank = plan.visible[e].begin; rank < plan.visible[e].end; ++rank)
        f(plan.entries[e], plan.keys[static_cast<std::size_t>(group.key_begin + rank)]);
    }
}

struct Panel {
  std::string title, below;
  AttentionPlan plan = {};
  bool clustered = false;  ///< colours are those of clusters
};

constexpr double cell = 9, gap = 40, left = 34, top = 66, below = 78, side = cell * tokens;

std::string text(double x, double y, const char* attributes, const std::string& words) {
  return format("<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, attributes, words.c_str());
}

/// One square: queries down, keys across; a row of cluster colours above it where they matter.
std::string draw(const Panel& panel, double x0) {
  std::string out = text(x0, top - 34, "font-size=\"16\" font-weight=\"bold\"", panel.title);
  // What a causal query could see, as a staircase behind what it does see.
  std::string stairs = format("M%.1f %.1f", x0, top);
  for (Index i = 0; i < tokens; ++i) stairs += format("h%.0fv%.0f", cell, cell);
  out += "<path d=\"" + stairs + format("H%.1fz\" fill=\"#e9ecef\"/>\n", x0);
  if (panel.clustered)
    for (std::size_t i = 0; i < labels.size(); ++i)
      out += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
                    x0 + cell * (static_cast<double>(i) + 0.5), top - 9, colours[static_cast<std::size_t>(labels[i])]);

  // One path a colour, a square for each pair.
  std::array<std::string, clusters> paths;
  Index pairs = 0;
  each_visible_pair(panel.plan, [&](std::int32_t query, std::int32_t key) {
    const std::int32_t colour = panel.clustered ? labels[static_cast<std::size_t>(query)] : 0;
    paths[static_cast<std::size_t>(colour)] +=
        format("M%.1f %.1fh8v8h-8z", x0 + cell * key + 0.5, top + cell * query + 0.5);
    ++pairs;
  });
  for (std::size_t c = 0; c < paths.size(); ++c)
    if (!paths[c].empty())
      out += "<path d=\"" + paths[c] + "\" fill=\"" + (panel.clustered ? colours[c] : plain) + "\"/>\n";

  out += text(x0, top + side + 22, "", panel.below);
  out += text(
      x0, top + side + 40, "fill=\"#606060\"",
      format("%lld of %lld pairs", static_cast<long long>(pairs), static_cast<long long>(tokens * (tokens + 1) / 2)));
  return out;
}

int report(const Options& options) {
  std::array<Panel, 3> panels;
  panels[0] = {.title = "local", .below = format("itself and the %d tokens before", static_cast<int>(window - 1))};
  plan_local({.tokens = tokens, .window = window, .causal = true}, panels[0].plan);
  panels[1] = {.title = "routed",
               .below = format("itself and up to %d earlier tokens of its cluster", static_cast<int>(window - 1)),
               .clustered = true};
  plan_clustered(labels, labels, {.clusters = clusters, .window = window, .causal = true}, panels[1].plan);
  panels[2] = {.title = "dense", .below = "itself and all tokens before"};
  plan_dense({.tokens = tokens, .causal = true}, panels[2].plan);

  const double width = left + 3 * side + 2 * gap + 20, height = top + side + below;
  std::string out = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
      "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#202020\">\n"
      "<title>Who sees whom: local, routed and dense attention</title>\n"
      "<rect width=\"100%%\" height=\"100%%\" rx=\"8\" fill=\"#ffffff\"/>\n",
      width, height, width, height);
  for (std::size_t p = 0; p < panels.size(); ++p) out += draw(panels[p], left + static_cast<double>(p) * (side + gap));
  const double middle = top + side / 2;
  out += text(left - 12, middle,
              format("text-anchor=\"middle\" transform=\"rotate(-90 %.1f %.1f)\"", left - 12, middle).c_str(), "query");
  out += text(left + side / 2, top - 6, "text-anchor=\"middle\"", "key");
  out += text(left, height - 12, "font-size=\"11\" fill=\"#606060\"",
              format("Coterie %s: drawn by benchmarks/reports/attention_masks.cpp from plan_local, plan_clustered and "
                     "plan_dense; the same on any machine.",
                     coterie::version));
  options.write("attention_masks.svg", out + "</svg>\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
