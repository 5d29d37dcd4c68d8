// Building plans: index work only, linear in tokens.
#include "coterie/plan/plan.hpp"

#include "cases.hpp"
#include "common.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

void add(const std::string& prefix, Index n, Index w) {
  const test::CaseSizes sizes{.tokens = n, .window = w, .clusters = std::max(Index(1), 2 * n / w)};
  for (const test::AttentionCase& tried : test::attention_cases(sizes)) {
    // One of each builder; the other cases vary what is done with a plan.
    const char* pattern = tried.name == "dense causal"       ? "dense"
                          : tried.name == "local causal"     ? "local"
                          : tried.name == "clustered causal" ? "routed"
                          : tried.name == "random"           ? "random"
                          : tried.name == "strided"          ? "strided"
                                                             : nullptr;
    if (pattern == nullptr) continue;
    benchmark::RegisterBenchmark(
        name(prefix, pattern, "/n:", n, "/w:", w).c_str(), [n, fill = tried.fill](benchmark::State& state) {
          AttentionPlan plan;
          Context context;
          measure<float>(state, context, 0, [&] { fill(plan); });
          state.counters["tokens"] =
              benchmark::Counter(static_cast<double>(n * state.iterations()), benchmark::Counter::kIsRate);
        });
  }
}

}  // namespace

int main(int argc, char** argv) {
  add("plan/smoke/", 256, 32);
  for (const Index n : {1024, 4096, 16384, 262144}) add("plan/", n, 256);
  return run(argc, argv);
}
