// What the kernels reach: a bar, a goal and what was measured, case by case.
#include <atomic>
#include <barrier>
#include <deque>
#include <memory>
#include <set>

#if defined(__linux__)
#include <sched.h>
#endif

#include "coterie/kernel/normalise.hpp"
#include "coterie/router/kmeans.hpp"
#include "head.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

/// How a figure is written, and whether more of it is better.
enum class Unit { fraction, speed_up, share, ratio };

/// A line of the table.
struct Row {
  std::string name;
  Unit unit = Unit::fraction;
  double bar = 0, goal = 0;
  double measured = 0, best = 0;  ///< of the median run and of the best one; both 0: could not be measured here
  double gflops = 0;              ///< of the median run, where it is about those
  std::string note = "";

  bool more_is_better() const { return unit == Unit::fraction || unit == Unit::speed_up; }
  bool reaches(double limit) const { return more_is_better() ? measured >= limit : measured <= limit; }
  std::string verdict() const {
    if (measured == 0) return "not measured";
    return reaches(goal) ? "reaches goal" : reaches(bar) ? "reaches bar" : "below bar";
  }
  std::string text(double figure) const {
    if (figure == 0) return "-";
    return unit == Unit::fraction ? format("%.0f %%", 100 * figure)
           : unit == Unit::share  ? format("%.1f %%", 100 * figure)
                                  : format("%.2f x", figure);
  }
};

/// The cases that run on one core, in turns, and the rows that follow from them.
class SingleCore {
 public:
  explicit SingleCore(bool smoke) : shrink_(smoke ? 16 : 1) {
    peak_float_ = &add(timed_peak<float>());
    peak_double_ = &add(timed_peak<double>());

    Timed& local = forward("forward, local, n=8192, w=256", local_plan(tokens(8192), 256), 64, 0.70, 0.80);
    compared("forward, routed (clusters of 512, w=256) : local, per pair, n=8192", local, tokens(8192));
    compared("forward, routed (clusters of 512, w=256) : local, per pair, n=65536",
             add_forward<float>(local_plan(tokens(65536), 256), 64), tokens(65536));
    forward("forward, routed, k=2n/w (clusters of 128, w=256), n=8192",
            routed_plan(shuffled_labels(tokens(8192), 128), 256), 64, 0.50, 0.65);
    forward("forward, dense, n=4096", dense_plan(tokens(4096)), 64, 0.72, 0.82);
    forward("forward, local, d=128, w=256, n=8192", local_plan(tokens(8192), 256), 128, 0.75, 0.85);
    forward("forward, local, w=64, n=8192", local_plan(tokens(8192), 64), 64, 0.52, 0.62);
    forward("forward, local, w=1024, n=8192", local_plan(tokens(8192), 1024), 64, 0.75, 0.82);
    backward("backward, local, w=256, n=8192", local_plan(tokens(8192), 256));
    backward("backward, routed (clusters of 512), w=256, n=8192", routed_plan(shuffled_labels(tokens(8192), 512), 256));
    fraction("double, forward, local, w=256, n=8192", add_forward<double>(local_plan(tokens(8192), 256), 64),
             *peak_double_, 0.60, 0.75);
    distances("local", local_plan(tokens(8192), 256), 1.10, 2);
    distances("routed (clusters of 512)", routed_plan(shuffled_labels(tokens(8192), 512), 256), 1.6, 2);
    avx2();
    router();
    plan_building();
    decode();
  }

  void measure(double budget, int rounds) {
    Progress progress("limits: one core  ");
    interleave(all_, budget, rounds, progress);
    for (const std::function<void()>& finish : finish_) finish();
  }

  double peak_float() const { return peak_of(*peak_float_); }
  double peak_double() const { return peak_of(*peak_double_); }
  std::size_t rounds() const { return peak_float_->seconds.size(); }
  const std::deque<Row>& rows() const { return rows_; }

 private:
  Index tokens(Index n) const { return n / shrink_; }

  Timed& add(Timed timed) {
    timed_.push_back(std::move(timed));
    all_.push_back(&timed_.back());
    return timed_.back();
  }

  template <class T>
  Timed& add_forward(AttentionPlan plan, Index d, InstructionSet instructions = InstructionSet::automatic) {
    const auto head = std::make_shared<Head<T>>(std::move(plan), d, instructions);
    return add({.call = [head] { head->forward(); }, .flops = head->forward_flops()});
  }

  /// A row: the fraction of a peak.
  void fraction(const std::string& name, Timed& timed, Timed& peak, double bar, double goal) {
    rows_.push_back({.name = name, .bar = bar, .goal = goal});
    finish_.push_back([&row = rows_.back(), &timed, &peak] {
      row.measured = timed.flops / timed.typical() / peak_of(peak);
      row.best = timed.flops / timed.best() / peak_of(peak);
      row.gflops = 1e-9 * timed.flops / timed.typical();
    });
  }

  /// A row: what one costs in units of the other, from runs that follow each other.
  void ratio(const std::string& name, Unit unit, double bar, double goal, Timed& timed, Timed& other, double scale) {
    rows_.push_back({.name = name, .unit = unit, .bar = bar, .goal = goal});
    finish_.push_back([&row = rows_.back(), &timed, &other, scale] {
      std::vector<double> ratios;
      for (std::size_t i = 0; i < timed.seconds.size(); ++i)
        ratios.push_back(timed.seconds[i] / other.seconds[i] * scale);
      row.measured = median(ratios);
      row.best = timed.best() / other.best() * scale;
      if (timed.flops > 0) row.gflops = 1e-9 * timed.flops / timed.typical();
    });
  }

  Timed& forward(const std::string& name, AttentionPlan plan, Index d, double bar, double goal) {
    Timed& timed = add_forward<float>(std::move(plan), d);
    fraction(name, timed, *peak_float_, bar, goal);
    return timed;
  }

  void compared(const std::string& name, Timed& local, Index n) {
    Timed& routed = add_forward<float>(routed_plan(shuffled_labels(n, 512), 256), 64);
    ratio(name, Unit::ratio, 1.10, 1.05, routed, local, local.flops / routed.flops);
  }

  void backward(const std::string& name, AttentionPlan plan) {
    const auto head = std::make_shared<Head<float>>(std::move(plan), 64);
    head->prepare_backward();
    Timed& timed = add({.call = [head] { head->backward(); }, .flops = head->backward_flops()});
    fraction(name, timed, *peak_float_, 0.55, 0.70);
  }

  // What a bias and Shaw's vectors of 256 distances cost: against the same plan without, which runs just before.
  void distances(const std::string& pattern, const AttentionPlan& plan, double bias_bar, double shaw_bar) {
    const auto head = [&](bool bias, bool shaw) {
      const auto made = std::make_shared<Head<float>>(plan, 64);
      if (bias) made->add_bias(256);
      if (shaw) made->add_relative(256);
      made->prepare_backward();
      return made;
    };
    const auto plain = head(false, false), bias = head(true, false), shaw = head(false, true);
    const auto add_all = [&](const char* pass, void (Head<float>::*run)()) {
      const auto timed = [&](const auto& of) -> Timed& { return add({.call = [of, run] { (*of.*run)(); }}); };
      Timed &without = timed(plain), &with_bias = timed(bias), &with_shaw = timed(shaw);
      const std::string name = std::string(pass) + ", " + pattern + ", w=256, n=8192, ";
      ratio(name + "bias by distance : without", Unit::ratio, bias_bar, 1.05, with_bias, without, 1);
      ratio(name + "Shaw's keys and values : without", Unit::ratio, shaw_bar, 1.5, with_shaw, without, 1);
    };
    add_all("forward", &Head<float>::forward);
    add_all("backward", &Head<float>::backward);
  }

  void avx2() {
    const std::string name = "AVX2 path (of the AVX2 peak), forward, local, w=256, n=8192";
    if (detail::machine_instruction_set() < InstructionSet::avx2) {
      rows_.push_back({.name = name, .bar = 0.60, .goal = 0.75, .note = "this machine has no AVX2"});
      return;
    }
    Timed& peak = add(timed_peak<float>(InstructionSet::avx2));
    fraction(name, add_forward<float>(local_plan(tokens(8192), 256), 64, InstructionSet::avx2), peak, 0.60, 0.75);
  }

  void router() {
    struct Router {
      explicit Router(Index n) : rows(test::Random(1).matrix<float>(n, 64)), labels(static_cast<std::size_t>(n)) {
        normalise_rows(rows, view(rows), {}, 64, context);
      }
      Context context;
      RowMatrix<float> rows;
      std::vector<std::int32_t> labels;
      OnlineKMeans<float> kmeans{{.clusters = 128, .dim = 64}};
    };
    const auto router = std::make_shared<Router>(tokens(32768));
    Timed& timed = add({.call = [router] { router->kmeans.assign(router->rows, router->labels, router->context); },
                        .flops = 2.0 * 64 * 128 * static_cast<double>(router->rows.rows())});
    fraction("router assign, n=32768, k=128, d=64", timed, *peak_float_, 0.60, 0.75);
  }

  void plan_building() {
    struct Builder {
      std::vector<std::int32_t> labels;
      AttentionPlan plan;
    };
    const auto builder = std::make_shared<Builder>();
    builder->labels = shuffled_labels(tokens(65536), 256);
    Timed& head = add_forward<float>(routed_plan(builder->labels, 256), 64);
    Timed& timed = add({.call = [builder] {
      plan_clustered(builder->labels, builder->labels,
                     {.clusters = static_cast<Index>(builder->labels.size()) / 256, .window = 256, .causal = true},
                     builder->plan);
    }});
    ratio("plan building, n=65536, k=256, w=256 : that head's forward", Unit::share, 0.02, 0.01, timed, head, 1);
  }

  void decode() {
    // One query at the end of 256 cached keys, against reading the keys' and the values' rows: the same buffers.
    const Index w = 256, d = 64;
    AttentionPlan plan;
    plan_local({.tokens = 1, .keys = w, .window = w, .causal = true}, plan);
    const auto head = std::make_shared<Head<float>>(std::move(plan), d);
    const PeakRoutines<float> routines(InstructionSet::automatic);
    const double expected = head->k.cast<double>().sum() + head->v.cast<double>().sum();
    const double sum = routines.read(head->k.data(), w * d) + routines.read(head->v.data(), w * d);
    if (!(std::abs(sum - expected) < 0.1)) throw std::runtime_error("the read routine does not read every number once");
    Timed& read = add({.call = [head, routines, count = w * d] {
      const float sums[2] = {routines.read(head->k.data(), count), routines.read(head->v.data(), count)};
      keep(sums);
    }});
    Timed& timed = add({.call = [head] { head->forward(); }, .flops = head->forward_flops()});
    ratio("decode: one query, w=256 keys : reading K and V once from cache", Unit::ratio, 1.5, 1.2, timed, read, 1);
  }

  Index shrink_;
  std::deque<Timed> timed_;
  std::vector<Timed*> all_;
  std::deque<Row> rows_;
  std::vector<std::function<void()>> finish_;
  Timed* peak_float_ = nullptr;
  Timed* peak_double_ = nullptr;
};

#if defined(__linux__)

/// CPUs of this process, one per core: threads of one core share its units.
std::vector<int> separate_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
  std::vector<int> cpus;
  std::set<std::string> seen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = std::to_string(cpu);
    if (seen.insert(siblings).second) cpus.push_back(cpu);
  }
  return cpus;
}

bool pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}

double process_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Two pinned threads against one, in turns, by the time on the wall: the last thing that main() measures, for the
/// calling thread stays pinned.
Row two_threads(bool smoke, double budget, int rounds) {
  Row row{.name = "two threads on two cores : one (routed, 8 heads, n=16384, w=256)",
          .unit = Unit::speed_up,
          .bar = 1.75,
          .goal = 1.95};
  const std::vector<int> cpus = separate_cores();
  if (cpus.size() < 2) return row.note = "this process has one core", row;
  Head<float> head(routed_plan(shuffled_labels(smoke ? 1024 : 16384, 512), 256), 64, InstructionSet::automatic, 8);
  ThreadPool pool(2);
  std::barrier<> both(2);  // neither worker can take both tasks
  std::atomic<int> pinned = 0;
  pool.for_each(2, [&](Index, Index worker) {
    if (pin_this_thread(cpus[static_cast<std::size_t>(worker)])) ++pinned;
    both.arrive_and_wait();
  });
  if (pinned != 2) return row.note = "this system does not pin threads", row;

  Workspace workspace;
  Context one, two(pool, workspace);
  head.forward(one);
  head.forward(two);
  // Seconds on the wall, and the share of them that the threads computed.
  const auto run = [&](Context& context) {
    head.forward(context);
    const Stopwatch wall;
    const double computed = process_seconds();
    head.forward(context);
    const double seconds = wall.seconds();
    return std::pair(seconds, (process_seconds() - computed) / seconds / static_cast<double>(context.workers()));
  };
  Progress progress("limits: two threads");
  std::vector<double> quiet, all, walls;
  double best_one = 1e30, best_two = 1e30;
  const Stopwatch clock;
  for (int round = 0; round < rounds || clock.seconds() < budget; ++round) {
    const auto [one_seconds, one_share] = run(one);
    const auto [two_seconds, two_share] = run(two);
    best_one = std::min(best_one, one_seconds);
    best_two = std::min(best_two, two_seconds);
    walls.push_back(two_seconds);
    all.push_back(one_seconds / two_seconds);
    if (one_share >= 0.95 && two_share >= 0.95) quiet.push_back(all.back());
    progress.show(std::min(0.999, budget > 0 ? clock.seconds() / budget : 1));
  }
  progress.show(1);
  row.measured = median(quiet.empty() ? all : quiet);
  row.best = best_one / best_two;
  row.gflops = 1e-9 * head.forward_flops() / median(walls);
  if (quiet.size() < all.size())
    row.note =
        format("%s in %d of %d rounds the threads computed for less than 95 %% of the time: a neighbour held a core%s",
               quiet.empty() ? "not valid:" : "", static_cast<int>(all.size() - quiet.size()),
               static_cast<int>(all.size()), quiet.empty() ? "" : "; those are left out");
  return row;
}

#else

Row two_threads(bool, double, int) {
  return {.name = "two threads on two cores : one (routed, 8 heads, n=16384, w=256)",
          .unit = Unit::speed_up,
          .bar = 1.75,
          .goal = 1.95,
          .note = "threads are pinned on Linux only"};
}

#endif

int report(const Options& options) {
  SingleCore single(options.smoke);
  single.measure(options.smoke ? 0 : 25, options.smoke ? 1 : 9);
  std::vector<Row> rows(single.rows().begin(), single.rows().end());
  const auto before_router =
      std::find_if(rows.begin(), rows.end(), [](const Row& row) { return row.name.rfind("router", 0) == 0; });
  rows.insert(before_router, two_threads(options.smoke, options.smoke ? 0 : 6, options.smoke ? 1 : 9));

  std::printf("\nCoterie %s, %s, %s, one core: FMA peak %.1f GFLOP/s float, %.1f double (best of %d runs)\n",
              coterie::version, compiler_name().c_str(), instruction_set_name(), 1e-9 * single.peak_float(),
              1e-9 * single.peak_double(), static_cast<int>(single.rounds()));
  std::printf(
      "Percentages are of that peak, by useful operations and this thread's CPU time, unless a case says otherwise;\n"
      "measured: the median of %d runs, all cases in turns; best: of the best runs. Float, d=64, causal.\n",
      static_cast<int>(single.rounds()));
  if (detail::machine_instruction_set() != InstructionSet::avx512)
    std::printf("The bars are for a machine with AVX-512; this one has %s, and the fractions are of its own peak.\n",
                instruction_set_name());
  if (options.smoke) std::printf("A smoke run, with sizes 16 times smaller than the names say: no figures.\n");
  std::printf("\n");

  std::vector<std::vector<std::string>> table = {{"case", "bar", "goal", "measured", "best", "GFLOP/s", "verdict"}};
  std::vector<JsonObject> cases;
  for (const Row& row : rows) {
    table.push_back({row.name, row.text(row.bar), row.text(row.goal), row.text(row.measured), row.text(row.best),
                     row.gflops > 0 ? format("%.1f", row.gflops) : "", row.verdict()});
    JsonObject object;
    object.add("case", row.name).add("bar", row.bar).add("goal", row.goal);
    object.add("measured", row.measured).add("best", row.best).add("gflops", row.gflops);
    cases.push_back(object.add("verdict", row.verdict()).add("note", row.note));
  }
  print_table(table);
  for (const Row& row : rows)
    if (!row.note.empty()) std::printf("  %s: %s\n", row.name.c_str(), row.note.c_str());

  JsonObject json;
  json.add("context",
           json_context().add("fma_peak_float", single.peak_float()).add("fma_peak_double", single.peak_double()));
  json.add("cases", cases);
  options.write("limits.json", json.text() + "\n");

  int wrong = 0;
  for (const Row& row : rows)
    if (!options.smoke && row.unit == Unit::fraction && row.best > 1) {
      std::printf("error: %s: more than the peak, so one of the two was measured wrongly\n", row.name.c_str());
      ++wrong;
    }
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
