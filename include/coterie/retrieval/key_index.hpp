// An index over the key/value cache of heads that were never trained to be routed: a query looks at the few keys that
// score highest, and takes the rest from means.
//
//     KeyIndex<float> index({.kv_heads = 3});
//     index.build(k, v, context);                                             // once: k-means
//     index.attend(q, k, v, out, {.heads = 9, .budget = 0.05}, context);      // const; in place of dense attention
//     index.append(k, v, context);                                            // k and v have grown
//
// The cache stays the caller's: the index holds means, an int8 copy of the keys and row numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "coterie/retrieval/config.hpp"
#include "coterie/retrieval/index_pass.hpp"
#include "coterie/retrieval/key_parts.hpp"
#include "coterie/retrieval/known_clusters.hpp"

namespace coterie {

/// Parts of the keys of a cache, head by head, and attention over the best keys of the best parts.
///
/// The keys behind the first `sinks` are cut into segments of `segment` rows. A segment all of whose keys have left the
/// `recent` ones is clustered by k-means, together with one or three segments before it where their number makes that
/// two or four: whole fours of segments are clustered once more and stay. Keys of an unfinished segment are in pages of
/// `page` neighbours, and the last ones in none. So an index is a function of the cache alone: built at once or
/// appended to row by row, it is bit-identical.
///
/// A query sees the first keys, those in no part, and within its budget the best keys of the best parts. Nothing else
/// is dropped: a key that was ranked out counts with its own weight and the mean value of its part, one that was never
/// looked at with the weight of its part's mean key. All of it is one softmax, in which each key counts once. With
/// `tail` false the softmax is over the seen keys alone.
///
/// Keys and queries may be rotated or not; they are used as they are. Where all keys are seen, attend() is dense
/// attention. A key with NaN or infinity, in itself or in its value, is seen by every query.
/// Threads and determinism: the same parts and outputs for any number of workers. const calls may run at the same
///   time, each with a Context of its own.
/// Source: inverted-file search (Jegou et al. 2011) for the clusters of Roy et al. 2021; sinks as in Xiao et al. 2024;
///   pages as in Tang et al. 2024 (Quest); tail and ranking: ours.
template <class T>
class KeyIndex {
 public:
  /// Requires: the ranges that KeyIndexConfig names (ValueError, one for all faults).
  explicit KeyIndex(const KeyIndexConfig& config) : config_(config) {
    detail::Faults faults("KeyIndex");
    const auto at_least = [&faults](const char* name, Index least, Index got) {
      faults.expect(got >= least, name, detail::join("at least ", least), got);
    };
    at_least("kv_heads", 1, config.kv_heads);
    at_least("keys_per_cluster", 1, config.keys_per_cluster);
    at_least("page", 1, config.page);
    faults.expect(config.segment >= 1 && (config.page < 1 || config.segment % config.page == 0), "segment",
                  detail::join("a positive multiple of page = ", config.page), config.segment);
    at_least("sinks", 0, config.sinks);
    at_least("recent", 0, config.recent);
    at_least("rank", 0, config.rank);
    at_least("steps", 0, config.steps);
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();  // no sum of settings overflows
    for (const auto& [name, value] :
         {std::pair{"keys_per_cluster", config.keys_per_cluster}, std::pair{"segment", config.segment},
          std::pair{"sinks", config.sinks}, std::pair{"recent", config.recent}, std::pair{"rank", config.rank}})
      faults.expect(value <= most, name, detail::join("at most ", most), value);
    faults.raise();
    heads_.resize(static_cast<std::size_t>(config.kv_heads));
  }

  const KeyIndexConfig& config() const { return config_; }
  /// Rows of the cache that the index knows.
  Index tokens() const { return tokens_; }
  /// Width of a head's keys and values; 0 before the first keys.
  Index dim() const { return d_; }
  Index value_dim() const { return dv_; }
  /// Parts of a key/value head: clusters of whole segments, then pages.
  Index parts(Index kv_head) const { return head("KeyIndex::parts", kv_head).count(); }
  /// The keys of a part, ascending.
  std::span<const std::int32_t> members(Index kv_head, Index part) const {
    const auto& parts = head("KeyIndex::members", kv_head);
    if (part < 0 || part >= parts.count())
      detail::fail<ValueError>("KeyIndex::members", "part", detail::join("in [0, ", parts.count(), ")"), part);
    return parts.rows(part);
  }
  /// The parts of a key/value head that are clusters. With the cache and the config they are all of an index: pages
  /// follow from the cache. For restore().
  KeyClusters clusters(Index kv_head) const {
    const auto& parts = head("KeyIndex::clusters", kv_head);
    const Index runs = runs_of(segments_);
    const Index count = runs > 0 ? run_parts_[static_cast<std::size_t>((kv_head + 1) * runs - 1)] : 0;
    KeyClusters result;
    for (Index part = 0; part < count; ++part) {
      const std::span<const std::int32_t> rows = parts.rows(part);
      result.sizes.push_back(static_cast<std::int32_t>(rows.size()));
      result.rows.insert(result.rows.end(), rows.begin(), rows.end());
    }
    return result;
  }
  /// Bytes held.
  std::size_t bytes() const {
    std::size_t sum = run_parts_.capacity() * sizeof(Index);
    for (const auto& parts : heads_) sum += parts.bytes();
    return sum;
  }

  /// Replaces the index by one of these keys.
  ///
  /// k-means by distance: evenly spaced keys first, then config().steps Lloyd steps; every key joins its nearest
  /// centroid, the lowest on ties.
  /// Shapes: k tokens x kv_heads*d, v tokens x kv_heads*dv.
  /// Requires: that, d and dv at least 1, at most 2^31 - 1 rows (ShapeError). On any error, also of a task or of
  ///   memory, the index is as it was.
  /// Allocates: its result beside the old one.
  /// Cost: at most 14 steps d segment / keys_per_cluster operations for a key and head, whatever the number of keys.
  void build(ConstView<T> k, ConstView<T> v, Context& context) {
    KeyIndex made(config_);
    made.advance("KeyIndex::build", k.rows(), k, v, context);
    *this = std::move(made);
  }

  /// Replaces the index by the one of `tokens` rows whose clusters these are, without k-means: bit-identical to it.
  ///
  /// Shapes: k and v at least `tokens` rows, as in build(), of which all later ones are left out; clusters kv_heads.
  /// Requires: those (ShapeError); tokens at least 0; clusters that hold every finite key of each run of segments
  ///   once, run by run (ValueError). On any error the index is as it was.
  /// Allocates: its result beside the old one. Cost: linear in tokens.
  void restore(Index tokens, ConstView<T> k, ConstView<T> v, std::span<const KeyClusters> clusters, Context& context) {
    const char* const function = "KeyIndex::restore";
    if (tokens < 0) detail::fail<ValueError>(function, "tokens", "at least 0", tokens);
    check_rows(function, k, tokens);
    check_rows(function, v, tokens, "v");
    if (static_cast<Index>(clusters.size()) != config_.kv_heads)
      detail::fail<ShapeError>(function, "clusters", detail::join(config_.kv_heads, ", as kv_heads"), clusters.size());
    KeyIndex made(config_);
    made.advance(function, tokens, k.rows(0, tokens), v.rows(0, tokens), context, clusters);
    *this = std::move(made);
  }

  /// Takes in the rows that the cache has grown by since the last call: keys that have left the recent ones come into
  /// pages, and full segments into clusters. Bit-identical to build() of the whole cache.
  ///
  /// Shapes: k tokens x kv_heads*d, v tokens x kv_heads*dv, at least tokens() rows, of which the first are those that
  ///   the index knows; only those of unfinished segments are read.
  /// Requires: that, at most 2^31 - 1 rows (ShapeError). On any error, also of a task or of memory, the index is as it
  ///   was.
  /// Allocates: where pages or clusters are made; lists grow by doubling.
  /// Cost: that of build() for a key, on average over whole fours of segments.
  void append(ConstView<T> k, ConstView<T> v, Context& context) {
    check_rows("KeyIndex::append", k, tokens_);
    advance("KeyIndex::append", k.rows(), k, v, context);
  }

  /// Forgets the rows from `tokens` on: bit-identical to an index that has never known them.
  ///
  /// Shapes: k and v at least `tokens` rows, of which up to four segments' are read: clusters that hold later rows are
  ///   made again without them.
  /// Requires: that, `tokens` in [0, tokens()] (ValueError). On any error the index is as it was.
  /// Cost: that of build() for those keys.
  void rollback(Index tokens, ConstView<T> k, ConstView<T> v, Context& context) {
    if (tokens < 0 || tokens > tokens_)
      detail::fail<ValueError>("KeyIndex::rollback", "tokens", detail::join("in [0, ", tokens_, "]"), tokens);
    check_rows("KeyIndex::rollback", k, tokens);
    check_rows("KeyIndex::rollback", v, tokens, "v");
    advance("KeyIndex::rollback", tokens, k.rows(0, tokens), v.rows(0, tokens), context);
  }

  /// out = attention of queries over the cache, as the class says.
  ///
  /// Shapes: q queries x heads*d, k rows x kv_heads*d, v rows x kv_heads*dv, out queries x heads*dv, with at least
  ///   tokens() rows; every query sees those from tokens() on. Query head h reads key/value head h / (heads/kv_heads).
  ///   causal: the queries are those of the last rows, row rows - queries + i for query i, and see no later row. Parts
  ///   must not hold later rows than the first query's: append a block of rows after it has attended, or have at least
  ///   as many recent keys as queries.
  /// Formula: out = (sum over seen j of e^(s_j) v_j + sum over ranked out j of e^(s'_j) v_part(j) + sum over other
  ///   parts of size e^(scale q.mean key) mean value) / the same sum without values. s_j = scale q.k_j; s'_j by the
  ///   int8 copy.
  /// Requires: those, out apart from the others (ShapeError); a config as its fields say (ValueError); otherwise
  ///   nothing is written.
  /// Overwrites out, and the report if one is given. Without keys out is zero. A query with NaN or infinity gets NaN
  ///   from the keys that every query sees or from the tail.
  /// Allocates: nothing after warm-up, until parts are added; the report where it has to grow.
  /// Threads and determinism: a row's bits depend on that row, the index, its keys and values, the instruction set and
  ///   the build: a batch equals its rows one by one. Heads, and pieces of 64 queries (512 without ranking), run side
  ///   by side.
  /// Cost: per query and head 2 parts (d + dv) operations for means, 2 rank budget d for ranking, 2 budget (d + dv) for
  ///   keys seen. Blocks of a prompt cost least with rank 0, where many queries attend to a part together.
  /// Accuracy: of s'_j, half a scale in every number of a key: 1/254 of the largest one of its segment.
  void attend(ConstView<T> q, ConstView<T> k, ConstView<T> v, View<T> out, const KeyIndexQuery& query, Context& context,
              KeyIndexReport* report = nullptr) const {
    const char* const function = "KeyIndex::attend";
    const Sizes sizes = check_queries(function, q, k, query);
    const Index kv_heads = config_.kv_heads, d = sizes.d;
    if (v.cols() < kv_heads || v.cols() % kv_heads != 0)
      detail::fail<ShapeError>(function, "v", detail::join("a positive multiple of ", kv_heads, " columns"),
                               detail::join(v.cols(), " columns"));
    const Index dv = v.cols() / kv_heads;
    detail::check_shape<T>(function, "v", v, k.rows(), kv_heads * (dv_ > 0 ? dv_ : dv));
    detail::check_shape<T>(function, "out", out, q.rows(), sizes.heads * dv);
    detail::check_no_alias<T>(function, "out", out, "q", q);
    detail::check_no_alias<T>(function, "out", out, "k", k);
    detail::check_no_alias<T>(function, "out", out, "v", v);
    if (report != nullptr)
      for (auto* matrix : {&report->keys_seen, &report->ranked_mass, &report->estimated_mass, &report->sampled_mass,
                           &report->sampled_error}) {
        // Not resized: Eigen's matrices do not survive that without memory.
        RowMatrix<double> sized;
        if (matrix->rows() != q.rows() || matrix->cols() != sizes.heads)
          matrix->swap(sized = RowMatrix<double>(q.rows(), sizes.heads));
        matrix->setZero();
      }
    if (k.rows() == 0) {
      out.fill(0);
      return;
    }
    each_pass(q, k, query, sizes, context,
              [&](detail::IndexPass<T>& pass, Index kv, Index head, Index first, Index count) {
                const ConstView<T> keys = k.columns(kv * d, d);
                pass.choose(q.rows(first, count).columns(head * d, sizes.group * d), keys);
                pass.attend(keys, v.columns(kv * dv, dv), out.rows(first, count).columns(head * dv, sizes.group * dv));
                if (report != nullptr) pass.report(head, *report);
              });
  }

  /// Writes the plans of what attend() sees: a complete plan for every query head, of all queries and k's rows,
  /// Combine::lse.
  ///
  /// Use them for attention_recall() against a dense plan, or for attention_forward() with a tape or terms.
  /// Shapes: q queries x heads*d, k rows x kv_heads*d. Requires: as attend(); otherwise nothing is written. After
  ///   another error the plans have no meaning.
  /// Allocates: where the plans have to grow. Cost: the choice of keys, and linear in queries and rows.
  void plan(ConstView<T> q, ConstView<T> k, const KeyIndexQuery& query, std::vector<AttentionPlan>& plans,
            Context& context) const {
    const Sizes sizes = check_queries("KeyIndex::plan", q, k, query);
    plans.resize(static_cast<std::size_t>(sizes.heads));
    // One pass for all queries: groups of several passes would have to be joined.
    auto& scratch = context.workspace().template object<detail::IndexScratch<T>>();
    scratch.prepare(context);
    context.for_each(sizes.heads / sizes.group, [&](Index task, Index worker) {
      auto& own = scratch.workers[static_cast<std::size_t>(worker)];
      const Index head = task * sizes.group, kv = head / (sizes.heads / config_.kv_heads);
      const detail::VisibleKeys keys = visible(k, q.rows(), 0, query);
      detail::IndexPass<T> pass(heads_[static_cast<std::size_t>(kv)], keys, sizes.settings, sizes.group, own);
      pass.choose(q.columns(head * sizes.d, sizes.group * sizes.d), k.columns(kv * sizes.d, sizes.d), true);
      complete(own.plan, &own.plan_scratch);
      for (Index g = 0; g < sizes.group; ++g) plans[static_cast<std::size_t>(head + g)] = own.plan;
    });
    scratch.level();
  }

 private:
  /// Queries of a pass: many where parts are seen whole, because the queries that chose a part attend to it together.
  static Index pass_queries(const detail::IndexPassSettings& settings) { return settings.rank > 0 ? 64 : 512; }

  struct Sizes {
    Index heads, d;
    Index group;  // query heads of a pass
    detail::IndexPassSettings settings;
  };

  const detail::KeyParts<T>& head(const char* function, Index kv_head) const {
    if (kv_head < 0 || kv_head >= config_.kv_heads)
      detail::fail<ValueError>(function, "kv_head", detail::join("in [0, ", config_.kv_heads, ")"), kv_head);
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  static void check_rows(const char* function, ConstView<T> m, Index rows, const char* name = "k") {
    if (m.rows() < rows)
      detail::fail<ShapeError>(function, name, detail::join("at least ", rows, " rows"),
                               detail::join(m.rows(), " rows"));
  }

  /// Whole segments, and whole pages after them, of the keys that have left the recent ones.
  std::pair<Index, Index> whole(Index tokens) const {
    const Index ready = (std::max<Index>)(0, tokens - config_.recent - config_.sinks);
    return {ready / config_.segment, ready % config_.segment / config_.page};
  }
  /// The first key of a segment.
  Index segment_row(Index segment) const { return config_.sinks + segment * config_.segment; }

  /// Segments that are clustered together: fours, then a pair and a single one where there are any.
  static constexpr Index longest_run = 4;
  static Index runs_of(Index segments) {
    return segments / longest_run + std::popcount(static_cast<std::uint64_t>(segments % longest_run));
  }
  static detail::RowRange run_of(Index segments, Index run) {
    if (run < segments / longest_run) return {run * longest_run, (run + 1) * longest_run};
    const Index begin = segments / longest_run * longest_run, rest = segments % longest_run;
    return run == segments / longest_run && rest >= 2 ? detail::RowRange{begin, begin + 2}
                                                      : detail::RowRange{segments - 1, segments};
  }

  detail::RowRange rows_of_run(Index segments, Index run) const {
    const detail::RowRange of = run_of(segments, run);
    return {segment_row(of.begin), segment_row(of.end)};
  }

  /// Keys from this row on are in no part; where there are no parts all keys.
  Index parts_end() const { return segments_ + pages_ > 0 ? segment_row(segments_) + pages_ * config_.page : 0; }

  /// Makes the index that of the first `tokens` rows, or on error leaves it as it is.
  /// Takes clusters from `clusters`, where there are some, in place of k-means; for an index without keys.
  void advance(const char* function, Index tokens, ConstView<T> k, ConstView<T> v, Context& context,
               std::span<const KeyClusters> clusters = {}) {
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    if (k.rows() > most)
      detail::fail<ShapeError>(function, "k", detail::join("at most ", most, " rows"), detail::join(k.rows(), " rows"));
    const Index kv_heads = config_.kv_heads;
    const auto width = [kv_heads](Index known, Index columns) {
      return known > 0 ? known : (std::max<Index>)(1, columns / kv_heads);
    };
    const Index d = width(d_, k.cols()), dv = width(dv_, v.cols());
    detail::check_shape<T>(function, "k", k, k.rows(), kv_heads * d);
    detail::check_shape<T>(function, "v", v, k.rows(), kv_heads * dv);

    const auto [segments, pages] = whole(tokens);
    const Index runs = runs_of(segments), runs_before = runs_of(segments_);
    Index kept = 0;
    while (kept < (std::min)(runs, runs_before) && run_of(segments, kept).end == run_of(segments_, kept).end) ++kept;
    const Index kept_pages = segments == segments_ ? (std::min)(pages, pages_) : 0;
    const Index kept_row = segment_row(kept > 0 ? run_of(segments, kept - 1).end : 0) + kept_pages * config_.page;
    const Index tasks = runs - kept + (pages > kept_pages ? 1 : 0);
    std::vector<detail::KnownRun> known;
    if (!clusters.empty()) {
      std::vector<detail::RowRange> ranges;
      for (Index run = 0; run < runs; ++run) ranges.push_back(rows_of_run(segments, run));
      for (Index h = 0; h < kv_heads; ++h)
        detail::add_known_runs<T>(function, clusters[static_cast<std::size_t>(h)], h, ranges, k.columns(h * d, d),
                                  v.columns(h * dv, dv), known);
    }
    using Parts = detail::KeyParts<T>;
    if (tasks > 0 || kept < runs_before || kept_pages < pages_) {
      std::vector<Parts> fresh(static_cast<std::size_t>(kv_heads * tasks), Parts(d, dv));
      auto& scratch = context.workspace().template object<detail::IndexScratch<T>>();
      scratch.prepare(context);
      context.for_each(kv_heads * tasks, [&, segments = segments, pages = pages](Index task, Index worker) {
        Parts& parts = fresh[static_cast<std::size_t>(task)];
        const Index h = task / tasks, run = kept + task % tasks, row = segment_row(segments);
        const ConstView<T> keys = k.columns(h * d, d), values = v.columns(h * dv, dv);
        if (run < runs && !known.empty()) {
          const detail::KnownRun& from = known[static_cast<std::size_t>(h * runs + run)];
          parts.add_known_clusters(keys, values, rows_of_run(segments, run), from.sizes, from.rows);
        } else if (run < runs) {
          parts.add_clusters(keys, values, rows_of_run(segments, run), config_.keys_per_cluster, config_.steps,
                             scratch.workers[static_cast<std::size_t>(worker)].context);
        } else {
          parts.add_pages(keys, values, {row + kept_pages * config_.page, row + pages * config_.page}, config_.page);
        }
      });
      std::vector<Parts> first;  // of heads that have had no parts
      const bool bare = heads_.front().dim() == 0;
      if (bare) first.assign(static_cast<std::size_t>(kv_heads), Parts(d, dv));
      std::vector<Index> run_parts;
      run_parts.reserve(static_cast<std::size_t>(kv_heads * runs));
      std::vector<Parts>& heads = bare ? first : heads_;
      for (Index h = 0; h < kv_heads; ++h) {
        const std::span<const Parts> others(fresh.data() + h * tasks, static_cast<std::size_t>(tasks));
        heads[static_cast<std::size_t>(h)].reserve(others);
        Index parts = 0;
        for (Index run = 0; run < runs; ++run) {
          parts = run < kept ? run_parts_[static_cast<std::size_t>(h * runs_before + run)]
                             : parts + others[static_cast<std::size_t>(run - kept)].count();
          run_parts.push_back(parts);
        }
      }
      // Nothing fails from here on.
      for (Index h = 0; h < kv_heads; ++h) {
        Parts& parts = heads[static_cast<std::size_t>(h)];
        parts.drop_to(kept > 0 ? run_parts[static_cast<std::size_t>(h * runs + kept - 1)] : 0, kept, kept_row);
        for (Index t = 0; t < tasks; ++t) parts.take(fresh[static_cast<std::size_t>(h * tasks + t)]);
      }
      if (bare) heads_.swap(first);
      run_parts_.swap(run_parts);
    }
    d_ = d;
    dv_ = dv;
    segments_ = segments;
    pages_ = pages;
    tokens_ = tokens;
  }

  Sizes check_queries(const char* function, ConstView<T> q, ConstView<T> k, const KeyIndexQuery& query) const {
    const Index kv_heads = config_.kv_heads, heads = query.heads == 0 ? kv_heads : query.heads;
    detail::Faults faults(function);
    if (heads < 1 || heads % kv_heads != 0)
      faults.expect(false, "heads", detail::join("0, or a positive multiple of kv_heads = ", kv_heads), heads);
    faults.expect(std::isfinite(query.budget) && query.budget > 0, "budget", "a finite number above 0", query.budget);
    faults.expect(std::isfinite(static_cast<T>(query.scale)), "scale", "a finite number", query.scale);
    faults.expect(query.rank >= -1, "rank", "at least -1", query.rank);
    faults.expect(query.samples >= 0, "samples", "at least 0", query.samples);
    if (query.causal) {
      if (q.rows() > k.rows()) faults.expect(false, "q", detail::join("at most ", k.rows(), " rows"), q.rows());
      if (parts_end() > k.rows() - q.rows() + (q.rows() > 0 ? 1 : 0))  // messages allocate
        faults.expect(false, "causal", "parts that hold no row behind the first query's",
                      detail::join("parts up to row ", parts_end() - 1, ", the query's is ", k.rows() - q.rows()));
    }
    faults.raise();
    check_rows(function, k, tokens_);
    const Index d = d_ > 0 ? d_ : (std::max<Index>)(1, q.cols() / heads);  // any width will do before keys are known
    detail::check_shape<T>(function, "q", q, q.rows(), heads * d);
    detail::check_shape<T>(function, "k", k, k.rows(), kv_heads * d);
    const double scale = query.scale != 0 ? query.scale : 1 / std::sqrt(static_cast<double>(d));
    return {heads,
            d,
            config_.shared_choice ? heads / kv_heads : 1,
            {query.budget, scale, query.rank >= 0 ? query.rank : config_.rank, query.samples, config_.tail}};
  }

  detail::VisibleKeys visible(ConstView<T> k, Index queries, Index first, const KeyIndexQuery& query) const {
    return {(std::min)(config_.sinks, k.rows()), {parts_end(), k.rows()}, k.rows(), queries, first, query.causal};
  }

  /// Calls f(pass, key/value head, first query head, first query, queries) for all pieces of the queries.
  template <class F>
  void each_pass(ConstView<T> q, ConstView<T> k, const KeyIndexQuery& query, const Sizes& sizes, Context& context,
                 F&& f) const {
    auto& scratch = context.workspace().template object<detail::IndexScratch<T>>();
    scratch.prepare(context);
    const Index size = pass_queries(sizes.settings), most = (std::min)(q.rows(), size);
    const Index chunks = (q.rows() + size - 1) / size;
    Index parts = 0, keys = 0, loose = 0;
    for (const auto& head : heads_) {
      parts = (std::max)(parts, head.count());
      keys = (std::max)(keys, head.keys());
      loose = (std::max)(loose, static_cast<Index>(head.loose().size()));
    }
    const Index rows = most * sizes.group, always = config_.sinks + loose + k.rows() - parts_end();
    const double budget = query.budget <= 1 ? query.budget * static_cast<double>(k.rows()) : query.budget;
    if (sizes.settings.rank > 0)
      scratch.reserve(rows, most + 1, 2 * rows,
                      always + most * static_cast<Index>((std::min)(static_cast<double>(keys), budget + 1)));
    else
      scratch.reserve(rows, parts + 1, rows * (parts + 1), always + keys);
    context.for_each(sizes.heads / sizes.group * chunks, [&](Index task, Index worker) {
      const Index head = task / chunks * sizes.group, kv = head / (sizes.heads / config_.kv_heads);
      const Index first = task % chunks * size, count = (std::min)(q.rows() - first, size);
      const detail::VisibleKeys keys_of = visible(k, q.rows(), first, query);
      detail::IndexPass<T> pass(heads_[static_cast<std::size_t>(kv)], keys_of, sizes.settings, sizes.group,
                                scratch.workers[static_cast<std::size_t>(worker)]);
      f(pass, kv, head, first, count);
    });
    scratch.level();
  }

  KeyIndexConfig config_;
  Index tokens_ = 0, d_ = 0, dv_ = 0;  // d, dv: 0 before the first keys
  Index segments_ = 0, pages_ = 0;     // in parts
  std::vector<Index> run_parts_;       // kv_heads x runs: parts up to the end of each
  std::vector<detail::KeyParts<T>> heads_;
};

}  // namespace coterie
