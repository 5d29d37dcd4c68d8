// An index over the key/value cache of a head that was never trained to be routed: a query sees the few clusters of
// keys that score highest.
//
//     KeyIndex<float> index({.clusters = 256});
//     index.build(k, context);                                    // once: k-means
//     index.attend(q, k, v, out, {.probes = 8}, context);         // const; instead of dense attention over all keys
//     index.append(k, context);                                   // k has grown: a constant cost for every new key
//
// The cache stays the caller's: the index holds centroids and lists of row numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/plan/complete.hpp"
#include "coterie/retrieval/key_clusters.hpp"
#include "coterie/router/members.hpp"

namespace coterie {

/// Settings of KeyIndex; designated initialisers in this order.
struct KeyIndexConfig {
  Index kv_heads = 1;  ///< key/value heads side by side in the cache, each with clusters of its own
  Index clusters = 0;  ///< clusters of every head, at least 1; the square root of the number of keys is a good number
  Index sinks = 4;     ///< first keys, which every query sees; at least 0
  Index recent = 64;   ///< last keys, which every query sees; at least 0
  Index sample = 0;    ///< most keys of a head that k-means sees; 0: 32 * clusters
  Index steps = 5;     ///< Lloyd steps; at least 0
  std::uint64_t seed = 0;  ///< seed of the sample and of k-means++
};

/// Settings of one call of a KeyIndex; designated initialisers in this order.
struct ProbeConfig {
  Index heads = 0;   ///< query heads, a multiple of the index's kv_heads; 0: as those
  Index probes = 8;  ///< clusters that a query sees, 0 to clusters; all of them where build() found fewer
  double scale = 0;  ///< factor of q.k; 0: 1/sqrt(d)
};

namespace detail {

/// Number of queries of a task.
inline constexpr Index probe_chunk = 256;

/// Scratch of the tasks of KeyIndex: one for each worker, kept from call to call.
struct ProbeScratch {
  struct Worker {
    explicit Worker(InstructionSet instructions) : context(instructions) {}
    Context context;  // serial, with a workspace of its own: heads run side by side
    AttentionPlan plan;
    PlanScratch plan_scratch;
    ClusterMembers members;
  };
  std::deque<Worker> workers;

  /// Makes scratch for the workers of a context.
  void prepare(const Context& context) {
    if (!workers.empty() && workers.front().context.instructions() != context.instructions()) workers.clear();
    while (static_cast<Index>(workers.size()) < context.workers()) workers.emplace_back(context.instructions());
  }

  /// Reserves memory for the largest task in every worker, because any of them can get it.
  void reserve(Index queries, Index probes, Index clusters, Index keys) {
    const auto entries = static_cast<std::size_t>(queries * (probes + 1)),
               probed = static_cast<std::size_t>(queries * probes);
    const auto groups = static_cast<std::size_t>((std::min)(queries * probes, clusters) + 1);
    for (Worker& w : workers) {
      w.members.rows.reserve(probed);
      w.members.begin.reserve(static_cast<std::size_t>(clusters) + 1);
      for (auto* list : {&w.plan.entries, &w.plan.row_entries, &w.plan_scratch.numbers}) list->reserve(entries);
      w.plan.row_begin.reserve(static_cast<std::size_t>(queries) + 1);
      w.plan.visible.reserve(entries);
      w.plan.keys.reserve(std::bit_ceil(static_cast<std::size_t>(keys)));  // it grows with every key
      w.plan.groups.reserve(groups);
      w.plan.parts.reserve(groups);
      w.plan.task_begin.reserve(groups + 1);
    }
  }

  /// Makes the arenas of all workers as large as the largest.
  void level() {
    std::size_t shared = 0, own = 0;
    for (Worker& w : workers) {
      w.context.workspace().prepare(1);
      shared = (std::max)(shared, w.context.workspace().shared().bytes());
      own = (std::max)(own, w.context.workspace().worker(0).bytes());
    }
    for (Worker& w : workers) {
      w.context.workspace().shared().reserve(shared);
      w.context.workspace().worker(0).reserve(own);
    }
  }
};

}  // namespace detail

/// Clusters of the keys of a cache, head by head, and attention over a few of them.
///
/// A query sees the first `sinks` keys, the last `recent` ones, and of the keys between those the `probes` clusters
/// whose centroids have the largest dot products with it; one softmax over all of these, each key once. Keys enter
/// clusters as they leave the recent ones. Until build() has found clusters, a query sees all keys: attend() is dense
/// attention.
///
/// Keys and queries may be rotated or not; they are used as they are. The share of attention kept depends on the heads:
/// peaked ones lose little, flat ones keep about the share of keys that they see. Measure it with plan() and
/// attention_recall().
/// Threads and determinism: the same clusters and outputs for any number of workers. const calls may run at the same
///   time, each with a Context of its own.
/// Source: inverted-file search (Jegou et al. 2011) for the clusters of Roy et al. 2021; sinks as in Xiao et al. 2024;
///   ours.
template <class T>
class KeyIndex {
 public:
  /// Requires: the ranges that KeyIndexConfig names (ValueError, one for all faults).
  explicit KeyIndex(const KeyIndexConfig& config) : clusters_(config) {}

  const KeyIndexConfig& config() const { return clusters_.config(); }
  /// Rows of the cache that the index knows.
  Index tokens() const { return clusters_.tokens(); }
  /// Clusters of a key/value head: config().clusters, or fewer where build() found fewer different keys; 0 before.
  Index clusters(Index kv_head) const { return clusters_.of("KeyIndex::clusters", kv_head).count; }
  /// The keys of a cluster, ascending.
  std::span<const std::int32_t> members(Index kv_head, Index cluster) const {
    const auto& head = clusters_.of("KeyIndex::members", kv_head);
    if (cluster < 0 || cluster >= head.count)
      detail::fail<ValueError>("KeyIndex::members", "cluster", detail::join("in [0, ", head.count, ")"), cluster);
    return head.members[static_cast<std::size_t>(cluster)];
  }

  /// Replaces all clusters by new ones of the keys between the first and the recent ones.
  ///
  /// k-means by distance (k-means++, then config().steps Lloyd steps) on a sample of config().sample keys; then every
  /// key joins its nearest centroid, the lowest on ties. Distances, unlike dot products, do not depend on the mean of
  /// all keys; nor do the probabilities of attention.
  ///
  /// A key with NaN or infinity moves no centroid; it is in some cluster, and reaches the queries that see that
  /// cluster.
  ///
  /// Shapes: k tokens x kv_heads*d.
  /// Requires: that, d at least 1, at most 2^31 - 1 rows (ShapeError). On any error, also of a task or of memory, the
  ///   index is as it was.
  /// Allocates: its result beside the old one, and the sample.
  /// Cost: 2 tokens clusters d operations for the keys, and (2 + steps) of that for the sample in place of all keys,
  ///   for each head; up to 128 clusters k-means++ takes 2 + log clusters times as long.
  void build(ConstView<T> k, Context& context) { clusters_.build(k, context); }

  /// Takes in the rows that the cache has grown by since the last call of build() or append(): those that are not among
  /// the recent ones any more join their nearest centroid. Centroids stay where they are, and keys in their clusters.
  ///
  /// Clusters grow with the cache, and the cost of a query with them. Call build() again whenever the cache has
  /// doubled: its cost per key is then constant on average.
  ///
  /// Shapes: k tokens x kv_heads*d, at least tokens() rows, of which the first are those that the index knows; only
  ///   those that leave the recent ones are read.
  /// Requires: that, at most 2^31 - 1 rows (ShapeError). On any error, also of a task or of memory, the index is as it
  ///   was.
  /// Allocates: where lists have to grow, by doubling.
  /// Threads and determinism: row by row or many at once, the same clusters.
  /// Cost: 2 clusters d operations a key and head.
  void append(ConstView<T> k, Context& context) { clusters_.append(k, context); }

  /// out = softmax(scale q k^T) v over the keys that each query sees.
  ///
  /// Shapes: q queries x heads*d, k tokens() x kv_heads*d, v tokens() x kv_heads*dv, out queries x heads*dv. Query head
  ///   h reads key/value head h / (heads/kv_heads), in clusters of its own choice. All queries see all of the cache:
  ///   none lies before a key.
  /// Requires: those, out apart from the others (ShapeError); a config as its fields say (ValueError); otherwise
  ///   nothing is written.
  /// Overwrites out. Without keys it is zero. NaN and infinity of a key or value reach the queries that see it and no
  ///   others.
  /// Allocates: nothing after warm-up, until clusters grow.
  /// Threads and determinism: a row's bits depend on that row, the index, its keys and values, the instruction set and
  ///   the build: a batch equals its rows one by one. Heads, and pieces of 256 queries, run side by side.
  /// Cost: per query and head 2 clusters d operations to choose, 4 d per key seen to attend; none of it grows with
  ///   tokens().
  void attend(ConstView<T> q, ConstView<T> k, ConstView<T> v, View<T> out, const ProbeConfig& config,
              Context& context) const {
    const char* const function = "KeyIndex::attend";
    const Sizes sizes = check_queries(function, q, config);
    const Index kv_heads = this->config().kv_heads, d = sizes.d;
    detail::check_shape<T>(function, "k", k, tokens(), kv_heads * d);
    if (v.cols() < kv_heads || v.cols() % kv_heads != 0)
      detail::fail<ShapeError>(function, "v", detail::join("a positive multiple of ", kv_heads, " columns"),
                               detail::join(v.cols(), " columns"));
    const Index dv = v.cols() / kv_heads;
    detail::check_shape<T>(function, "v", v, tokens(), v.cols());
    detail::check_shape<T>(function, "out", out, q.rows(), sizes.heads * dv);
    detail::check_no_alias<T>(function, "out", out, "q", q);
    detail::check_no_alias<T>(function, "out", out, "k", k);
    detail::check_no_alias<T>(function, "out", out, "v", v);
    if (q.rows() == 0) return;
    if (tokens() == 0) {
      out.fill(0);
      return;
    }

    auto& scratch = context.workspace().template object<detail::ProbeScratch>();
    scratch.prepare(context);
    const Index most = (std::min)(q.rows(), detail::probe_chunk);
    scratch.reserve(most, config.probes, this->config().clusters, clusters_.most_listed(most * config.probes));
    const Index chunks = (q.rows() + detail::probe_chunk - 1) / detail::probe_chunk;
    context.for_each(sizes.heads * chunks, [&](Index task, Index worker) {
      detail::ProbeScratch::Worker& own = scratch.workers[static_cast<std::size_t>(worker)];
      const Index head = task / chunks, kv = head / (sizes.heads / kv_heads),
                  first = task % chunks * detail::probe_chunk;
      const Index count = (std::min)(q.rows() - first, detail::probe_chunk);
      const ConstView<T> rows = q.rows(first, count).columns(head * d, d);
      write_plan(rows, kv, config.probes, own.members, own.plan, own.context);
      // Not complete(): its time for all key rows is more than a query of a long cache may cost.
      detail::derive(own.plan, own.plan_scratch.numbers);
      attention_forward(own.plan, rows, k.columns(kv * d, d), v.columns(kv * dv, dv),
                        out.rows(first, count).columns(head * dv, dv), {.scale = config.scale}, own.context);
    });
    scratch.level();
  }

  /// Writes the plans of attend(): a complete plan for every query head, of all queries and tokens() keys,
  /// Combine::lse.
  ///
  /// Use them for attention_recall() against a dense plan, or for attention_forward() with a tape (log-sum-exp) or
  /// terms.
  /// Shapes: q queries x heads*d. Requires: that (ShapeError); a config as its fields say (ValueError); otherwise
  ///   nothing is written.
  /// Allocates: where the plans have to grow. Cost: the choice of clusters, and linear in queries and tokens().
  void plan(ConstView<T> q, const ProbeConfig& config, std::vector<AttentionPlan>& plans, Context& context) const {
    const Sizes sizes = check_queries("KeyIndex::plan", q, config);
    auto& scratch = context.workspace().template object<detail::ProbeScratch>();
    scratch.prepare(context);
    plans.resize(static_cast<std::size_t>(sizes.heads));
    context.for_each(sizes.heads, [&](Index head, Index worker) {
      detail::ProbeScratch::Worker& own = scratch.workers[static_cast<std::size_t>(worker)];
      AttentionPlan& plan = plans[static_cast<std::size_t>(head)];
      plan.memory_tokens = 0;
      for (auto* list : {&plan.query_positions, &plan.key_positions}) list->clear();
      plan.visible_too.clear();
      write_plan(q.columns(head * sizes.d, sizes.d), head / (sizes.heads / this->config().kv_heads), config.probes,
                 own.members, plan, own.context);
      complete(plan, &own.plan_scratch);
    });
    scratch.level();
  }

 private:
  struct Sizes {
    Index heads, d;
  };

  Sizes check_queries(const char* function, ConstView<T> q, const ProbeConfig& config) const {
    const Index kv_heads = this->config().kv_heads, heads = config.heads == 0 ? kv_heads : config.heads;
    detail::Faults faults(function);
    if (heads < 1 || heads % kv_heads != 0)
      faults.expect(false, "heads", detail::join("0, or a positive multiple of kv_heads = ", kv_heads), heads);
    if (config.probes < 0 || config.probes > this->config().clusters)
      faults.expect(false, "probes", detail::join("0 to clusters = ", this->config().clusters), config.probes);
    faults.expect(std::isfinite(static_cast<T>(config.scale)), "scale", "a finite number", config.scale);
    faults.raise();
    // Any width will do before the first keys are known.
    const Index d = clusters_.dim() > 0 ? clusters_.dim() : q.cols() / heads;
    detail::check_shape<T>(function, "q", q, q.rows(), heads * (std::max<Index>)(d, 1));
    return {heads, d};
  }

  /// Writes all but what complete() derives.
  void write_plan(ConstView<T> q, Index kv_head, Index probes, ClusterMembers& members, AttentionPlan& plan,
                  Context& context) const {
    const auto& head = clusters_.of("KeyIndex", kv_head);
    const auto count = static_cast<std::int32_t>(q.rows());
    plan.tokens = count;
    plan.key_tokens = tokens();
    plan.combine = Combine::lse;
    plan.entries.clear();
    plan.keys.clear();
    plan.groups.clear();
    plan.visible.clear();
    const auto add_group = [&plan](std::size_t entries_before, std::size_t keys_before) {
      plan.groups.push_back({static_cast<std::int32_t>(entries_before), static_cast<std::int32_t>(plan.entries.size()),
                             static_cast<std::int32_t>(keys_before), static_cast<std::int32_t>(plan.keys.size())});
      plan.visible.resize(plan.entries.size(), {0, static_cast<std::int32_t>(plan.keys.size() - keys_before)});
    };

    // All queries see the keys that are in no cluster.
    for (std::int32_t i = 0; i < count; ++i) plan.entries.push_back(i);
    for (Index i = 0; i < clusters_.clustered().begin; ++i) plan.keys.push_back(static_cast<std::int32_t>(i));
    for (Index i = clusters_.clustered().end; i < tokens(); ++i) plan.keys.push_back(static_cast<std::int32_t>(i));
    add_group(0, 0);
    probes = (std::min)(probes, head.count);
    if (probes == 0) return;

    // scores = q centroids^T
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const View<T> scores = arena.template matrix<T>(q.rows(), head.count);
    product<T>(q, view(head.centroids), scores, context);
    nearest_members(ConstView<T>(scores), {.probes = probes}, members, context);
    for (Index c = 0; c < head.count; ++c) {
      const std::span<const std::int32_t> rows = members.of(c);
      if (rows.empty()) continue;
      const std::vector<std::int32_t>& keys = head.members[static_cast<std::size_t>(c)];
      const std::size_t entries_before = plan.entries.size(), keys_before = plan.keys.size();
      plan.entries.insert(plan.entries.end(), rows.begin(), rows.end());
      plan.keys.insert(plan.keys.end(), keys.begin(), keys.end());
      add_group(entries_before, keys_before);
    }
  }

  detail::KeyClusters<T, KeyIndexConfig> clusters_;
};

}  // namespace coterie
