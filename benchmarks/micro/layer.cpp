// A whole routing attention layer, forward and backward.
#include <algorithm>
#include <thread>

#include "common.hpp"
#include "coterie/layer/routing_attention.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

struct Sizes {
  Index n = 0, model_dim = 0, heads = 0, w = 0;
};

RoutingAttentionConfig config(const std::string& pattern, const Sizes& sizes) {
  RoutingAttentionConfig config{.model_dim = sizes.model_dim, .causal = true};
  config.local = {.heads = sizes.heads, .window = sizes.w};
  if (pattern == "local") return config;
  config.seed = 1;
  const Index half = sizes.heads / 2;
  config.local.heads -= half;
  if (pattern == "dense")
    config.dense = {.heads = half, .matching = {.shared_qk = true}, .positions = {.kind = PositionKind::none}};
  else
    config.routed = {.heads = half, .clusters = std::max(Index(1), 2 * sizes.n / sizes.w), .window = sizes.w};
  if (pattern == "induction") config.routed.matching = {.induction = true, .key_taps = 8};
  return config;
}

/// Useful operations of a forward pass: projections, pairs, and centroid scores; of a backward pass: of the first
/// twice, of the second 10 d instead of 4 d.
template <class T>
double flops(const RoutingAttention<T>& layer, const RoutingAttentionTape<T>& tape, Index n, bool backward) {
  const RoutingAttentionConfig& c = layer.config();
  double weights = 0, pairs = 0;
  const Parameters<T>& p = layer.parameters();
  for (const RowMatrix<T>* w : {&p.w_q, &p.w_k, &p.w_v, &p.w_o}) weights += static_cast<double>(w->size());
  const auto add_pairs = [&pairs](std::span<const AttentionPlan> plans, Index heads) {
    for (const AttentionPlan& plan : plans)
      pairs += static_cast<double>(heads / static_cast<Index>(plans.size()) * statistics(plan).visible_pairs);
  };
  add_pairs(tape.local_plans(), c.local.heads);
  add_pairs(tape.plans(), c.routed.heads);
  add_pairs(tape.dense_plans(), c.dense.heads);
  const double tokens = static_cast<double>(n), d = static_cast<double>(c.head_dim);
  if (backward) return 4 * tokens * weights + 10 * d * pairs;
  const double scores =
      2 * tokens * d * static_cast<double>(c.routed.clusters) * static_cast<double>(layer.routers().size());
  return 2 * tokens * weights + 4 * d * pairs + scores;
}

template <class T>
void add(const std::string& prefix, const std::string& pattern, Sizes sizes, Index workers) {
  for (const bool backward : {false, true}) {
    const std::string title =
        name(prefix, backward ? "backward/" : "forward/", pattern, "/", scalar_name<T>(), "/n:", sizes.n,
             "/model_dim:", sizes.model_dim, "/heads:", sizes.heads, "/w:", sizes.w, "/workers:", workers);
    auto* added = benchmark::RegisterBenchmark(title.c_str(), [=](benchmark::State& state) {
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace);
      RoutingAttention<T> layer(config(pattern, sizes));
      RoutingAttentionTape<T> tape;
      test::Random random(2);
      const RowMatrix<T> x = random.matrix<T>(sizes.n, sizes.model_dim);
      const RowMatrix<T> d_y = random.matrix<T>(sizes.n, sizes.model_dim);
      RowMatrix<T> y(sizes.n, sizes.model_dim), d_x = RowMatrix<T>::Zero(sizes.n, sizes.model_dim);
      for (int t = 0; t < 3; ++t) {  // centroids that know the data, as in training
        layer.forward(x, y, tape, context);
        layer.update_router(tape, context);
      }
      layer.forward(x, y, tape, context);
      const double operations = flops(layer, tape, sizes.n, backward);
      if (backward) {
        Parameters<T> gradients = layer.zero_gradients();
        measure<T>(state, context, operations, [&] { layer.backward(x, tape, d_y, d_x, gradients, context); });
      } else {
        measure<T>(state, context, operations, [&] { layer.forward(x, y, tape, context); });
      }
      state.counters["tokens"] =
          benchmark::Counter(static_cast<double>(sizes.n * state.iterations()), benchmark::Counter::kIsRate);
    });
    added->Unit(benchmark::kMillisecond);
    if (workers > 1) added->UseRealTime();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Index all = std::max(Index(1), static_cast<Index>(std::thread::hardware_concurrency()));
  for (const char* pattern : {"dense", "local", "routed", "induction"}) {
    add<float>("layer/smoke/", pattern, {200, 32, 4, 32}, 1);
    for (const Index n : {1024, 4096, 16384})
      if (n < 16384 || pattern != std::string("dense")) {
        add<float>("layer/", pattern, {n, 512, 8, 256}, 1);
        if (all > 1) add<float>("layer/", pattern, {n, 512, 8, 256}, all);
      }
    if (pattern == std::string("routed")) add<float>("layer/", pattern, {8192, 512, 8, 256}, 1);
    add<double>("layer/", pattern, {4096, 512, 8, 256}, 1);
  }
  return run(argc, argv);
}
