// Time and memory over the number of tokens, with clusters = window = sqrt(n): routing, plan and forward of one head.
#include <array>
#include <memory>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "coterie/kernel/normalise.hpp"
#include "coterie/router/kmeans.hpp"
#include "head.hpp"
#include "plot.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

constexpr Index d = 64;

enum class Pattern { dense, local, routed };
constexpr const char* pattern_names[] = {"dense", "local", "routed"};

/// What one process measures and writes into a pipe: plain numbers.
struct Measured {
  double route = 0, plan = 0, forward = 0;  ///< seconds of this thread, of the median run
  double total = 0, fastest = 0;            ///< of all three
  double runs = 0;
  double peak = 0;         ///< operations per second, best of the runs between the others
  double route_flops = 0;  ///< useful operations
  double forward_flops = 0;
  double pairs = 0;
  double memory = 0;          ///< bytes: the process's most, less what it held before
  double inputs_outputs = 0;  ///< bytes of q (which are the keys too), v and the outputs
};

struct Point {
  Pattern pattern = Pattern::routed;
  Index n = 0;
  Measured measured;

  double fraction() const { return (measured.route_flops + measured.forward_flops) / measured.total / measured.peak; }
  double forward_fraction() const { return measured.forward_flops / measured.forward / measured.peak; }
  double memory_ratio() const { return measured.memory / measured.inputs_outputs; }
};

Index root(Index n) { return static_cast<Index>(std::lround(std::sqrt(static_cast<double>(n)))); }

/// Rows around `clusters` random directions, normalised as routed heads normalise their shared queries and keys.
void clustered_rows(Index clusters, RowMatrix<float>& rows, Context& context) {
  test::Random random(1);
  const RowMatrix<float> directions = random.matrix<float>(clusters, d);
  for (Index i = 0; i < rows.rows(); ++i) {
    const Index c = random.below(clusters);
    for (Index j = 0; j < d; ++j) rows(i, j) = directions(c, j) + 0.5f * static_cast<float>(random.uniform());
  }
  normalise_rows(rows, view(rows), {}, d, context);
}

Measured measure(Pattern pattern, Index n, double budget) {
  const Index k = root(n), w = root(n);
  Context context;
  RowMatrix<float> q(n, d), v = test::Random(2).matrix<float>(n, d), out(n, d);
  clustered_rows(k, q, context);

  std::vector<std::int32_t> labels;
  OnlineKMeans<float> router({.clusters = k, .dim = d});
  if (pattern == Pattern::routed) {  // centroids that know the data, as in training
    labels.resize(static_cast<std::size_t>(n));
    RouterStatistics<float> statistics(1, k, d);
    for (int update = 0; update < 3; ++update) {
      router.assign(q, labels, context);
      statistics.clear();
      router.observe(q, labels, statistics, 0, context);
      router.update(statistics, 0);
    }
  }

  AttentionPlan plan;
  struct Seconds {
    double route, plan, forward;
    double total() const { return route + plan + forward; }
  };
  const auto run = [&]() -> Seconds {
    const double begin = thread_seconds();
    if (pattern == Pattern::routed) router.assign(q, labels, context);
    const double routed = thread_seconds();
    if (pattern == Pattern::dense) plan_dense({.tokens = n, .causal = true}, plan);
    if (pattern == Pattern::local) plan_local({.tokens = n, .window = w, .causal = true}, plan);
    if (pattern == Pattern::routed) plan_clustered(labels, labels, {.clusters = k, .window = w, .causal = true}, plan);
    const double planned = thread_seconds();
    attention_forward(plan, q, q, v, out, {}, context);
    return {routed - begin, planned - routed, thread_seconds() - planned};
  };

  Measured result;
  run();  // first touches of pages, growth of buffers
  std::vector<Seconds> all;
  const Stopwatch clock;
  do {
    result.peak = std::max(result.peak, fma_peak<float>(InstructionSet::automatic));
    all.push_back(run());
    result.peak = std::max(result.peak, fma_peak<float>(InstructionSet::automatic));
  } while (clock.seconds() < budget);
  std::sort(all.begin(), all.end(), [](const Seconds& a, const Seconds& b) { return a.total() < b.total(); });
  const Seconds& middle = all[all.size() / 2];
  result.route = middle.route;
  result.plan = middle.plan;
  result.forward = middle.forward;
  result.total = middle.total();
  result.fastest = all.front().total();
  result.runs = static_cast<double>(all.size());
  result.pairs = static_cast<double>(statistics(plan).visible_pairs);
  result.forward_flops = 4 * static_cast<double>(d) * result.pairs;
  if (pattern == Pattern::routed) result.route_flops = 2 * static_cast<double>(n * k * d);
  result.inputs_outputs = static_cast<double>(q.size() + v.size() + out.size()) * sizeof(float);
  return result;
}

#if defined(__unix__) || defined(__APPLE__)

/// The most memory that this process has held so far, in bytes.
double most_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
  return static_cast<double>(usage.ru_maxrss);
#else
  return 1024 * static_cast<double>(usage.ru_maxrss);
#endif
}

/// measure() in a process of its own, whose memory is nobody else's.
Measured measure_apart(Pattern pattern, Index n, double budget) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("scaling: no pipe");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("scaling: no process");
  if (child == 0) {
    int code = 1;
    try {
      const double before = most_memory();
      Measured result = measure(pattern, n, budget);
      result.memory = most_memory() - before;
      if (write(ends[1], &result, sizeof result) == static_cast<ssize_t>(sizeof result)) code = 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
    _exit(code);
  }
  close(ends[1]);
  Measured result;
  const bool whole = read(ends[0], &result, sizeof result) == static_cast<ssize_t>(sizeof result);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!whole || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error(format("scaling: the process for %s attention over %lld tokens failed",
                                    pattern_names[static_cast<int>(pattern)], static_cast<long long>(n)));
  return result;
}

#else
#error "benchmarks/scaling.cpp measures memory in processes of its own: it needs fork()"
#endif

/// The exponent e of time = c n^e that fits best in logarithms (least squares).
double fitted_exponent(const std::vector<Point>& points) {
  double count = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (const Point& point : points) {
    const double log_n = std::log(static_cast<double>(point.n)), log_t = std::log(point.measured.total);
    count += 1, x += log_n, y += log_t, xx += log_n * log_n, xy += log_n * log_t;
  }
  return (count * xy - x * y) / (count * xx - x * x);
}

/// Plan and forward with labels of which one cluster holds half of all tokens, against even ones, in turns.
struct Skew {
  double time = 0, per_pair = 0;  ///< ratios: skewed to even
  double even_pairs = 0, skewed_pairs = 0;
};

Skew measure_skew(Index n, double budget) {
  const Index k = root(n);
  test::Random random(4);
  std::array<std::vector<std::int32_t>, 2> labels = {random.labels(n, k), random.labels(n, k)};
  for (std::int32_t& label : labels[1])
    if (random.uniform() < 0) label = 0;
  std::array<Timed, 2> timed;
  std::array<double, 2> pairs{};
  for (std::size_t i = 0; i < 2; ++i) {
    const auto head = std::make_shared<Head<float>>(routed_plan(labels[i], k), d);
    pairs[i] = head->pairs;
    timed[i].call = [head, k, &label = labels[i]] {
      plan_clustered(label, label, {.clusters = k, .window = k, .causal = true}, head->plan);
      head->forward();
    };
  }
  Progress progress("scaling: skew");
  interleave({&timed[0], &timed[1]}, budget, 5, progress);
  std::vector<double> ratios;
  for (std::size_t i = 0; i < timed[0].seconds.size(); ++i) ratios.push_back(timed[1].seconds[i] / timed[0].seconds[i]);
  const double ratio = median(ratios);
  return {ratio, ratio * pairs[0] / pairs[1], pairs[0], pairs[1]};
}

std::string tokens_label(double n) {
  return n < 1024 ? format("%.0f", n) : n < 1024 * 1024 ? format("%.0fk", n / 1024) : format("%.0fM", n / 1024 / 1024);
}

std::string seconds_label(double s) {
  return s < 1e-3 ? format("%g us", 1e6 * s) : s < 1 ? format("%g ms", 1e3 * s) : format("%g s", s);
}

std::string bytes_label(double b) {
  return b < 1e6 ? format("%g kB", b / 1e3) : b < 1e9 ? format("%g MB", b / 1e6) : format("%g GB", b / 1e9);
}

const char* verdict(bool reached) { return reached ? "reaches bar" : "below bar"; }

int report(const Options& options) {
  const std::vector<Index> sizes =
      options.smoke ? std::vector<Index>{256, 1024} : std::vector<Index>{4096, 16384, 65536, 262144, 1048576};
  const double budget = options.smoke ? 0 : 1, patience = options.smoke ? 1e9 : 20;

  // Dense goes as far as two runs of it, the warm-up being one, at half the peak stay within the patience.
  const double peak = fma_peak<float>(InstructionSet::automatic);
  struct Task {
    Pattern pattern;
    Index n;
    double expected;  ///< seconds
  };
  std::vector<Task> tasks;
  double expected = 0, done = 0;
  for (const Index n : sizes)
    for (const Pattern pattern : {Pattern::dense, Pattern::local, Pattern::routed}) {
      const double pairs = static_cast<double>(n) * static_cast<double>(pattern == Pattern::dense ? n / 2 : root(n));
      const double run = 4 * d * pairs / peak / 0.5;
      if (pattern == Pattern::dense && 2 * run > 1.5 * patience) continue;
      tasks.push_back({pattern, n, std::max(2 * run, budget)});
      expected += tasks.back().expected;
    }

  std::array<std::vector<Point>, 3> points;
  Progress progress("scaling");
  progress.show(0);
  for (const Task& task : tasks) {
    points[static_cast<std::size_t>(task.pattern)].push_back(
        {task.pattern, task.n, measure_apart(task.pattern, task.n, budget)});
    progress.show((done += task.expected) / expected);
  }
  const Skew skew = measure_skew(options.smoke ? 1024 : 65536, options.smoke ? 0 : 4);

  std::printf(
      "\nOne head, d=64, causal, float, one core, clusters = window = sqrt(n); %s, %s. Seconds of this thread, the "
      "median run;\n"
      "memory: the most that a process of its own held, less what it held at its start; in and out: q (= k), v, "
      "outputs.\n\n",
      compiler_name().c_str(), instruction_set_name());
  std::vector<std::vector<std::string>> table = {{"pattern", "n", "routing", "plan", "forward", "together", "GFLOP/s",
                                                  "of peak", "forward alone", "memory", "in and out", "ratio"}};
  std::vector<JsonObject> json_points;
  bool plausible = true;
  for (const auto& line : points)
    for (const Point& point : line) {
      const Measured& m = point.measured;
      const char* name = pattern_names[static_cast<int>(point.pattern)];
      const auto ms = [](double seconds) { return format("%.2f ms", 1e3 * seconds); };
      table.push_back({name, std::to_string(point.n), point.pattern == Pattern::routed ? ms(m.route) : "", ms(m.plan),
                       ms(m.forward), ms(m.total), format("%.1f", 1e-9 * (m.route_flops + m.forward_flops) / m.total),
                       format("%.0f %%", 100 * point.fraction()), format("%.0f %%", 100 * point.forward_fraction()),
                       format("%.1f MB", 1e-6 * m.memory), format("%.1f MB", 1e-6 * m.inputs_outputs),
                       format("%.2f", point.memory_ratio())});
      JsonObject object;
      object.add("pattern", name).add("n", point.n).add("route_seconds", m.route).add("plan_seconds", m.plan);
      object.add("forward_seconds", m.forward).add("total_seconds", m.total).add("fastest_seconds", m.fastest);
      object.add("runs", m.runs).add("visible_pairs", m.pairs).add("fma_peak", m.peak);
      object.add("fraction_of_peak", point.fraction()).add("forward_fraction_of_peak", point.forward_fraction());
      object.add("peak_memory_bytes", m.memory).add("inputs_outputs_bytes", m.inputs_outputs);
      json_points.push_back(object);
      plausible &= options.smoke || (m.route_flops + m.forward_flops) / m.fastest <= m.peak;
    }
  print_table(table);

  std::array<double, 3> exponents{};
  for (std::size_t i = 0; i < 3; ++i) exponents[i] = fitted_exponent(points[i]);
  const Point& largest = points[static_cast<std::size_t>(Pattern::routed)].back();
  const double exponent = exponents[static_cast<std::size_t>(Pattern::routed)];
  std::printf("\n");
  print_table(
      {{"case", "bar", "measured", "verdict"},
       {"exponent of time over n: routed, routing and plan included", "1.55", format("%.2f", exponent),
        verdict(exponent <= 1.55)},
       {"the same of local", "", format("%.2f", exponents[static_cast<std::size_t>(Pattern::local)]), ""},
       {"the same of dense", "", format("%.2f", exponents[static_cast<std::size_t>(Pattern::dense)]), ""},
       {format("most memory : inputs + outputs, routed, n=%lld", static_cast<long long>(largest.n)), "1.25",
        format("%.2f", largest.memory_ratio()), verdict(largest.memory_ratio() <= 1.25)},
       {format("one cluster holds half of all tokens : even, per visible pair, n=%d", options.smoke ? 1024 : 65536),
        "1.20 x", format("%.2f x", skew.per_pair), verdict(skew.per_pair <= 1.2)},
       {format("the same, per call (it has %.2f times the pairs)", skew.skewed_pairs / skew.even_pairs), "1.20 x",
        format("%.2f x", skew.time), verdict(skew.time <= 1.2)}});
  if (options.smoke) std::printf("  A smoke run, with few tokens: no figures.\n");

  std::vector<Line> times, memory;
  constexpr const char* colours[] = {red, blue, green};
  for (const Pattern pattern : {Pattern::dense, Pattern::routed, Pattern::local}) {
    const auto p = static_cast<std::size_t>(pattern);
    Line line{.name = format("%s, n^%.2f", pattern_names[p], exponents[p]), .colour = colours[p]};
    for (const Point& point : points[p]) line.points.push_back({static_cast<double>(point.n), point.measured.total});
    times.push_back(line);
  }
  Line most{.name = "routed", .colour = green};
  Line given{.name = "inputs + outputs", .colour = grey, .dashed = true};
  for (const Point& point : points[static_cast<std::size_t>(Pattern::routed)]) {
    most.points.push_back({static_cast<double>(point.n), point.measured.memory});
    given.points.push_back({static_cast<double>(point.n), point.measured.inputs_outputs});
  }
  most.name = format("routed, %+.0f %%", 100 * (largest.memory_ratio() - 1));
  memory = {most, given};
  std::vector<Tick> ticks;
  for (const Index n : sizes) ticks.push_back({static_cast<double>(n), tokens_label(static_cast<double>(n))});
  const Axis x{.title = "tokens, with clusters = window = \u221an", .ticks = ticks};
  options.write("scaling.svg", svg({{.title = "Time of routing, plan and forward of a head",
                                     .x = x,
                                     .y = {.title = "seconds of one core", .ticks = decades(times, seconds_label)},
                                     .lines = times},
                                    {.title = "Most memory held",
                                     .x = x,
                                     .y = {.title = "memory", .ticks = decades(memory, bytes_label)},
                                     .lines = memory}},
                                   caption(largest.measured.peak) + ", d=64, causal"));
  JsonObject json_skew, json;
  json_skew.add("time_ratio", skew.time).add("time_per_pair_ratio", skew.per_pair);
  json_skew.add("even_pairs", skew.even_pairs).add("skewed_pairs", skew.skewed_pairs);
  json.add("context", json_context()).add("routed_exponent", exponent).add("skew", json_skew);
  options.write("scaling.json", json.add("points", json_points).text() + "\n");
  if (!plausible) std::printf("error: more than the peak, so one of the two was measured wrongly\n");
  return plausible ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
