// One query of 8 heads through a KeyIndex against dense attention over the same cache, over the number of keys; what
// the index holds, and what adding a key costs.
#include <deque>
#include <memory>

#include "coterie/attention/attention.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/retrieval/key_index.hpp"
#include "random.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

constexpr Index heads = 8, d = 64, kinds = 200, queries = 16;

/// Keys around `kinds` centres, values, and queries near some of the centres: heads that are neither flat nor sharp.
struct Cache {
  RowMatrix<float> q, k, v;

  explicit Cache(Index tokens) : q(queries, heads * d), k(tokens, heads * d), v(tokens, heads * d) {
    test::Random random(7);
    const RowMatrix<float> centres = 1.5f * random.matrix<float>(kinds, heads * d);
    for (Index i = 0; i < tokens; ++i) k.row(i) = centres.row(random.below(kinds)) + random.matrix<float>(1, heads * d);
    v = random.matrix<float>(tokens, heads * d);
    for (Index i = 0; i < queries; ++i)
      q.row(i) = centres.row(random.below(kinds)) + random.matrix<float>(1, heads * d);
  }
};

struct Case {
  Index tokens;
  double budget;
  Index keys_per_cluster;
  std::unique_ptr<Cache> cache;
  std::unique_ptr<KeyIndex<float>> index;
  double append_seconds = 0;  // of a key and head
  double keys_seen = 0;
  Timed dense = {}, indexed = {};
};

int report(const Options& options) {
  const int rounds = options.smoke ? 1 : 11;
  Context context;
  std::deque<Case> cases;
  std::vector<std::pair<Index, double>> sizes = {{8192, 0.1}, {32768, 0.05}, {131072, 0.02}};
  if (options.smoke) sizes = {{1500, 0.1}};
  Progress building("key_index: build");
  for (const auto& [tokens, budget] : sizes)
    for (const Index keys_per_cluster : {64, 16}) {
      Case& c = cases.emplace_back(Case{tokens, budget, keys_per_cluster, std::make_unique<Cache>(tokens), nullptr});
      c.index =
          std::make_unique<KeyIndex<float>>(KeyIndexConfig{.kv_heads = heads, .keys_per_cluster = keys_per_cluster});
      // Four whole segments, page by page: every key is clustered as often as it ever is.
      const Index from = (std::max<Index>)(0, (tokens - 68) / 4096 * 4096 + 68 - 4096), to = from + 4096;
      const auto rows = [&](const RowMatrix<float>& m, Index count) { return view(m).rows(0, count); };
      c.index->build(rows(c.cache->k, from), rows(c.cache->v, from), context);
      if (to <= tokens) {
        const double begin = thread_seconds();
        for (Index i = from + 1; i <= to; ++i) c.index->append(rows(c.cache->k, i), rows(c.cache->v, i), context);
        c.append_seconds = (thread_seconds() - begin) / static_cast<double>((to - from) * heads);
      }
      c.index->append(c.cache->k, c.cache->v, context);
      building.show(static_cast<double>(cases.size()) / static_cast<double>(2 * sizes.size()));
    }

  Progress progress("key_index: turns");
  RowMatrix<float> out(1, heads * d);
  for (int round = 0; round < rounds; ++round) {
    for (Case& c : cases) {
      AttentionPlan plan;
      plan_dense({.tokens = 1, .keys = c.tokens}, plan);
      // The first calls of each bring the cache to where it will be.
      for (int turn = 0; turn < 2; ++turn) {
        const Index count = turn == 0 ? 1 : queries;
        double begin = thread_seconds();
        for (Index i = 0; i < count; ++i)
          attention_forward(plan, c.cache->q.row(i), c.cache->k, c.cache->v, view(out), {.heads = heads}, context);
        if (turn > 0) c.dense.seconds.push_back((thread_seconds() - begin) / static_cast<double>(count));
      }
      KeyIndexReport seen;
      for (int turn = 0; turn < 2; ++turn) {
        const Index count = turn == 0 ? 1 : queries;
        double begin = thread_seconds();
        for (Index i = 0; i < count; ++i)
          c.index->attend(c.cache->q.row(i), c.cache->k, c.cache->v, view(out), {.heads = heads, .budget = c.budget},
                          context, turn == 0 ? &seen : nullptr);
        if (turn > 0) c.indexed.seconds.push_back((thread_seconds() - begin) / static_cast<double>(count));
      }
      c.keys_seen = seen.keys_seen.mean() / static_cast<double>(c.tokens);
    }
    progress.show((round + 1.0) / rounds);
  }

  std::printf(
      "\nOne query of %lld heads of width %lld over a cache of float, one core; %s, %s.\n"
      "Seconds of this thread, the median of %d runs; memory: of the index, beside the cache; append: per key and "
      "head,\n"
      "row by row over 4096 rows.\n\n",
      static_cast<long long>(heads), static_cast<long long>(d), compiler_name().c_str(), instruction_set_name(),
      rounds);
  std::vector<std::vector<std::string>> table = {
      {"keys", "budget", "cluster", "keys seen", "dense us", "index us", "ratio", "memory", "append us"}};
  std::vector<JsonObject> json_cases;
  for (const Case& c : cases) {
    const double cache_bytes = static_cast<double>(c.tokens * heads * 2 * d) * sizeof(float);
    const double memory = static_cast<double>(c.index->bytes()) / cache_bytes;
    table.push_back({std::to_string(c.tokens), format("%.0f %%", 100 * c.budget), std::to_string(c.keys_per_cluster),
                     format("%.1f %%", 100 * c.keys_seen), format("%.0f", 1e6 * c.dense.typical()),
                     format("%.0f", 1e6 * c.indexed.typical()), format("%.1f", c.dense.typical() / c.indexed.typical()),
                     format("%.0f %%", 100 * memory),
                     c.append_seconds > 0 ? format("%.1f", 1e6 * c.append_seconds) : "-"});
    JsonObject object;
    object.add("keys", c.tokens).add("budget", c.budget).add("keys_per_cluster", c.keys_per_cluster);
    object.add("dense_seconds", c.dense.typical()).add("index_seconds", c.indexed.typical()).add("memory", memory);
    object.add("append_seconds", c.append_seconds);
    json_cases.push_back(object);
  }
  print_table(table);
  if (options.smoke) std::printf("  A smoke run, with few keys: no figures.\n");
  JsonObject json;
  json.add("context", json_context()).add("cases", json_cases);
  options.write("key_index.json", json.text() + "\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
