// Attention forward and backward over dense, local and routed plans.
#include <stdexcept>

#include "cases.hpp"
#include "common.hpp"
#include "head.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

struct Sizes {
  Index n = 0, d = 0, w = 0;
};

/// The pattern's plan, as the tests build it; clusters of half a window on average, the good default.
AttentionPlan plan_of(const std::string& pattern, const Sizes& sizes) {
  const std::string wanted = pattern == "dense"   ? "dense causal"
                             : pattern == "local" ? "local causal"
                                                  : "clustered causal";
  for (const test::AttentionCase& tried : test::attention_cases(
           {.tokens = sizes.n, .window = sizes.w, .clusters = std::max(Index(1), 2 * sizes.n / sizes.w)}))
    if (tried.name == wanted) {
      AttentionPlan plan;
      tried.fill(plan);
      return plan;
    }
  throw std::invalid_argument("no case of the name " + wanted);
}

template <class T>
void add(const std::string& prefix, const std::string& pattern, Sizes sizes) {
  const std::string tail =
      pattern == "dense" ? name("/n:", sizes.n, "/d:", sizes.d) : name("/n:", sizes.n, "/d:", sizes.d, "/w:", sizes.w);
  for (const bool backward : {false, true}) {
    const std::string title = name(prefix, backward ? "backward/" : "forward/", pattern, "/", scalar_name<T>(), tail);
    auto* added = benchmark::RegisterBenchmark(title.c_str(), [=](benchmark::State& state) {
      Head<T> head(plan_of(pattern, sizes), sizes.d);
      if (backward) {
        head.prepare_backward();
        measure<T>(state, head.context, head.backward_flops(), [&] { head.backward(); });
      } else {
        measure<T>(state, head.context, head.forward_flops(), [&] { head.forward(); });
      }
      state.counters["visible_pairs"] = head.pairs;
    });
    added->Unit(benchmark::kMillisecond);
  }
}

template <class T>
void add_all(Index n, Index d) {
  add<T>("attention/", "dense", {n, d, n});
  for (const char* pattern : {"local", "routed"})
    for (const Index w : {64, 256, 1024}) add<T>("attention/", pattern, {n, d, w});
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* pattern : {"dense", "local", "routed"}) {
    add<float>("attention/smoke/", pattern, {200, 24, 32});
    add<double>("attention/smoke/", pattern, {200, 24, 32});
  }
  for (const Index n : {1024, 4096, 16384}) add_all<float>(n, 64);
  add_all<float>(4096, 128);
  add_all<double>(4096, 64);
  return run(argc, argv);
}
