// One block of heads of a layer, token by token: the steps of HeadsPass for the newest token of each sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "coterie/decoder/cache.hpp"
#include "coterie/layer/heads_pass.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The newest tokens of some sequences.
struct StepTokens {
  std::span<const std::int32_t> sequences, places;  ///< row by row; places in the sequence
  Index count() const { return static_cast<Index>(places.size()); }
};

template <class T>
class DecoderHeads {
 public:
  DecoderHeads() = default;

  DecoderHeads(const LayerState<T>& layer, const HeadBlock& block, const DecoderConfig& sizes)
      : clustered_(block.clustered()), history_(sizes.max_rollback + std::max<Index>(block.taps, 2)) {
    if (block.count == 0) return;
    const RoutingAttentionConfig& c = layer.config;
    const bool dense = block.kind == BlockKind::dense;
    globals_ = dense ? 0 : c.globals;
    beginning_ = dense ? 0 : std::max(c.globals, c.dense_up_to);
    lists_ = clustered_ ? block.clusters : 1;
    positions_ = block.positions == PositionKind::alibi ? StepPositions::listed
                 : block.positions == PositionKind::none || block.positions == PositionKind::rotary
                     ? StepPositions::none
                     : StepPositions::places;
    window_ = dense ? 0 : block.window;
    capacity_ = cache_capacity(window_, sizes.max_rollback);
    units_.resize(static_cast<std::size_t>(clustered_ ? block.kv_count : 1));
    plans_.resize(units_.size());
    for (std::size_t u = 0; u < units_.size(); ++u) {
      HeadCache& unit = units_[u];
      unit.cols = clustered_ ? block.head_dim : block.kv_cols();
      unit.first_col = static_cast<Index>(u) * unit.cols;
      unit.lists.resize(static_cast<std::size_t>(sizes.sequences * lists_));
      unit.beginning.resize(static_cast<std::size_t>(beginning_ > 0 ? sizes.sequences : 0));
    }
    if (block.taps > 1) queries_.setZero(sizes.sequences * history_, block.cols());
    if (block.induction) pending_.setZero(sizes.sequences * history_, block.kv_cols());
    if (clustered_) labels_.assign(static_cast<std::size_t>(sizes.sequences * history_) * units_.size(), -1);
    keys_.resize(0, block.kv_cols());
    values_.resize(0, block.kv_cols());
    for (AttentionPlan& plan : plans_) {
      plan.memory_tokens = c.memory;
      plan.combine = block.has_members() ? Combine::lse : Combine::single;
    }
    most_rows_ = capacity_ > 0
                     ? sizes.sequences * (lists_ * pages_for(capacity_) + pages_for(beginning_)) * HeadCache::page_rows
                     : std::numeric_limits<Index>::max();
    if (sizes.reserve > 0) reserve(c, block, sizes);
  }

  /// y (+)= the block's share of the output for the newest tokens, which enter the cache.
  void step(const LayerState<T>& layer, const HeadBlock& block, const CheckedInput<T>& in, const StepTokens& tokens,
            View<T> y, Context& context) {
    const Index n = tokens.count();
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    HeadsPass<T> pass(layer, block, in, context);
    const HeadsMatrices<T>& m = pass.matrices();
    pass.take_matrices(arena);
    pass.project();
    if (block.taps > 0) convolve_newest(layer, block, tokens, m.projected_q, m.normalised_q, arena);
    pass.normalise();
    if (clustered_) route(layer, block, pass, context);
    pass.rotate();
    for (Index i = 0; i < n; ++i) {
      remember(block, tokens, i, m, labels_now_.key_labels(), n);
      enter(block, tokens, i, m);
    }
    for (std::size_t u = 0; u < units_.size(); ++u) plan_step(block, tokens, u);
    const AttentionConfig config = pass.attention_config(false);
    const AttentionTerms<T> terms = step_terms(block, pass, arena);
    attention_forward(Plans(plans_), ConstView<T>(m.attended_q), view(std::as_const(keys_)),
                      view(std::as_const(values_)), m.out, config, context, terms);
    pass.output(y);
  }

  /// Enters the tokens of an empty sequence, by the matrices and labels of their forward pass.
  void fill(const HeadBlock& block, Index sequence, const HeadsTape<T>& tape, Index count) {
    const HeadsMatrices<T>& m = tape.matrices;
    for (Index i = 0; i < count; ++i) {
      const auto s = static_cast<std::int32_t>(sequence), place = static_cast<std::int32_t>(i);
      const StepTokens token{{&s, 1}, {&place, 1}};
      const auto from = [&](View<T> all) { return all.cols() > 0 ? all.rows(i, 1) : all; };
      HeadsMatrices<T> one;
      one.projected_q = from(m.projected_q);
      one.projected_v = from(m.projected_v);
      one.attended_k = from(m.attended_k);
      const std::span<const std::int32_t> labels = tape.plans.key_labels();
      remember(block, token, 0, one, labels.empty() ? labels : labels.subspan(static_cast<std::size_t>(i)), count);
      enter(block, token, 0, one);
    }
  }

  /// Takes the last token of a sequence of `length` back.
  void take_back(const HeadBlock& block, Index sequence, Index length) {
    const Index place = length - 1 - (block.induction ? 1 : 0);  // of the key that the token has brought
    if (block.count == 0 || place < 0) return;
    for (std::size_t u = 0; u < units_.size(); ++u) {
      CacheList& list = list_of(u, sequence, place);
      --list.end;
      if (place < globals_) --list.globals;
      if (place < beginning_) --units_[u].beginning[static_cast<std::size_t>(sequence)].end;
    }
  }

  void clear(Index sequence) {
    for (HeadCache& unit : units_) {
      for (CacheList& list : lists_of(unit, sequence)) unit.clear(list);
      if (beginning_ > 0) unit.clear(unit.beginning[static_cast<std::size_t>(sequence)]);
    }
  }

  /// Makes sequence `to` what `from` is.
  void copy(Index from, Index to) {
    clear(to);
    for (HeadCache& unit : units_) {
      const std::span<CacheList> sources = lists_of(unit, from), targets = lists_of(unit, to);
      for (std::size_t l = 0; l < sources.size(); ++l) copy_list(unit, sources[l], targets[l]);
      if (beginning_ > 0)
        copy_list(unit, unit.beginning[static_cast<std::size_t>(from)], unit.beginning[static_cast<std::size_t>(to)]);
    }
    for (RowMatrix<T>* rows : {&queries_, &pending_})
      if (rows->rows() > 0) rows->middleRows(to * history_, history_) = rows->middleRows(from * history_, history_);
    const auto per_sequence = static_cast<std::ptrdiff_t>(history_) * static_cast<std::ptrdiff_t>(units_.size());
    if (!labels_.empty())
      std::copy_n(labels_.begin() + from * per_sequence, per_sequence, labels_.begin() + to * per_sequence);
  }

  std::size_t bytes() const {
    const Index numbers = keys_.size() + values_.size() + queries_.size() + pending_.size();
    std::size_t sum = static_cast<std::size_t>(numbers) * sizeof(T) + labels_.capacity() * sizeof(std::int32_t);
    for (const HeadCache& unit : units_) sum += unit.bytes();
    for (const AttentionPlan& plan : plans_)
      sum += (plan.keys.capacity() + plan.key_positions.capacity()) * sizeof(std::int32_t);
    return sum;
  }

 private:
  std::span<CacheList> lists_of(HeadCache& unit, Index sequence) const {
    return std::span<CacheList>(unit.lists)
        .subspan(static_cast<std::size_t>(sequence * lists_), static_cast<std::size_t>(lists_));
  }

  std::int32_t& label_of(std::size_t unit, Index sequence, Index place) {
    return labels_[static_cast<std::size_t>(sequence * history_ + place % history_) * units_.size() + unit];
  }
  /// The list that the key of a place is in.
  CacheList& list_of(std::size_t unit, Index sequence, Index place) {
    const Index list = clustered_ ? label_of(unit, sequence, place) : 0;
    return lists_of(units_[unit], sequence)[static_cast<std::size_t>(list)];
  }

  // u = convolve(q) of the newest tokens, from the queries that are remembered.
  void convolve_newest(const LayerState<T>& layer, const HeadBlock& block, const StepTokens& tokens, View<T> q,
                       View<T> u, Arena& arena) {
    const T** const rows = arena.take<const T*>(block.taps);
    const Index d = block.head_dim;
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index place = tokens.places[static_cast<std::size_t>(i)];
      const Index sequence = tokens.sequences[static_cast<std::size_t>(i)];
      const Index reach = std::min(block.taps, place + 1);
      for (Index h = 0; h < block.count; ++h) {
        rows[0] = q.row(i) + h * d;
        for (Index t = 1; t < reach; ++t)
          rows[t] = view(queries_).row(sequence * history_ + (place - t) % history_) + h * d;
        convolve_row<T>(rows, reach, view(layer.parameters.taps).rows(block.taps_first + h * block.taps, block.taps),
                        u.row(i) + h * d);
      }
    }
  }

  // Labels of queries and keys, and of several probes the clusters of the queries.
  void route(const LayerState<T>& layer, const HeadBlock& block, HeadsPass<T>& pass, Context& context) {
    if (!block.has_members()) {
      pass.assign_labels(labels_now_);
      return;
    }
    labels_now_.members.resize(units_.size());
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const RouterRows<T> queries = router_queries(block, pass.matrices()), keys = router_keys(block, pass.matrices());
    const Index n = queries.all.rows();
    const View<T> scores = arena.matrix<T>(n, block.clusters), scratch = arena.matrix<T>(n, block.head_dim);
    const Index units = static_cast<Index>(units_.size());
    const auto query_labels = HeadsPlans::grow(labels_now_.query_labels, units * n);
    const auto own_labels = HeadsPlans::grow(labels_now_.own_key_labels, block.shared ? 0 : units * n);
    for (std::size_t u = 0; u < units_.size(); ++u) {
      const Index unit = static_cast<Index>(u);
      if (!block.shared) {
        layer.routers[u].scores(keys.of(unit, scratch, context), scores, context);
        best_columns<T>(scores, labels_of(own_labels, unit, n), context);
      }
      layer.routers[u].scores(queries.of(unit, scratch, context), scores, context);
      best_columns<T>(scores, labels_of(query_labels, unit, n), context);
      coterie::nearest_members(scores, {.probes = block.probes}, labels_now_.members[u], context);
    }
  }

  // Keeps what later tokens, or the taking back of this one, need of token i. labels: of `stride` rows for each unit.
  void remember(const HeadBlock& block, const StepTokens& tokens, Index i, const HeadsMatrices<T>& m,
                std::span<const std::int32_t> labels, Index stride) {
    const Index place = tokens.places[static_cast<std::size_t>(i)];
    const Index sequence = tokens.sequences[static_cast<std::size_t>(i)], at = sequence * history_ + place % history_;
    if (queries_.rows() > 0) std::copy_n(m.projected_q.row(i), block.cols(), view(queries_).row(at));
    if (pending_.rows() > 0) std::copy_n(m.attended_k.row(i), block.kv_cols(), view(pending_).row(at));
    if (clustered_)
      for (std::size_t u = 0; u < units_.size(); ++u)
        label_of(u, sequence, place) = labels[u * static_cast<std::size_t>(stride) + static_cast<std::size_t>(i)];
  }

  // The key that token i brings enters its lists: its own, or of induction heads that of the token before, with its value.
  void enter(const HeadBlock& block, const StepTokens& tokens, Index i, const HeadsMatrices<T>& m) {
    const Index sequence = tokens.sequences[static_cast<std::size_t>(i)];
    const Index place = tokens.places[static_cast<std::size_t>(i)] - (block.induction ? 1 : 0);
    if (place < 0) return;
    const T* const key =
        block.induction ? view(pending_).row(sequence * history_ + place % history_) : m.attended_k.row(i);
    for (std::size_t u = 0; u < units_.size(); ++u) {
      HeadCache& unit = units_[u];
      CacheList& list = list_of(u, sequence, place);
      if (place < globals_) ++list.globals;
      write(unit, unit.append(list, capacity_), key, m.projected_v.row(i), place);
      if (place < beginning_)
        write(unit, unit.append(unit.beginning[static_cast<std::size_t>(sequence)], 0), key, m.projected_v.row(i),
              place);
    }
  }

  void write(HeadCache& unit, Index row, const T* key, const T* value, Index place) {
    need_rows(unit.pages() * HeadCache::page_rows);
    std::copy_n(key + unit.first_col, unit.cols, view(keys_).row(row) + unit.first_col);
    std::copy_n(value + unit.first_col, unit.cols, view(values_).row(row) + unit.first_col);
    unit.places[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(place);
  }

  // At least so many rows, doubling as far as there can be more; the numbers stay.
  void need_rows(Index rows) {
    if (rows <= keys_.rows()) return;
    rows = std::max(rows, std::min({2 * keys_.rows(), keys_.rows() + (Index(1) << 20), most_rows_}));
    keys_.conservativeResize(rows, keys_.cols());
    values_.conservativeResize(rows, values_.cols());
    for (HeadCache& unit : units_) unit.places.resize(static_cast<std::size_t>(rows));
    for (AttentionPlan& plan : plans_) {
      plan.key_tokens = rows;
      if (positions_ != StepPositions::none)
        plan.key_positions.resize(static_cast<std::size_t>(rows + plan.memory_tokens));
    }
  }

  // Page by page: the same slots.
  void copy_list(HeadCache& unit, const CacheList& from, CacheList& to) {
    to.end = from.end;
    to.globals = from.globals;
    for (const std::int32_t page : from.pages) {
      to.pages.push_back(unit.take_page());
      need_rows(unit.pages() * HeadCache::page_rows);
      const Index source = page * HeadCache::page_rows, target = to.pages.back() * HeadCache::page_rows;
      for (Index i = 0; i < HeadCache::page_rows; ++i) {
        for (RowMatrix<T>* rows : {&keys_, &values_})
          std::copy_n(view(*rows).row(source + i) + unit.first_col, unit.cols,
                      view(*rows).row(target + i) + unit.first_col);
        unit.places[static_cast<std::size_t>(target + i)] = unit.places[static_cast<std::size_t>(source + i)];
      }
    }
  }

  // What token i of a step sees of a unit's keys.
  void plan_step(const HeadBlock& block, const StepTokens& tokens, std::size_t u) {
    HeadCache& unit = units_[u];
    AttentionPlan& plan = plans_[u];
    plan.tokens = tokens.count();
    StepPlan step(unit, plan, positions_);
    const Self self = block.self;
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index place = tokens.places[static_cast<std::size_t>(i)];
      const Index sequence = tokens.sequences[static_cast<std::size_t>(i)];
      const auto beginning_row = [&](Index ordinal) {
        return HeadCache::row(unit.beginning[static_cast<std::size_t>(sequence)], ordinal, 0);
      };
      if (place < beginning_) {
        const bool sees_self = self == Self::visible || (self == Self::only_if_alone && place == 0);
        step.add(place, true, 0, beginning_row, 0, place + (sees_self ? 1 : 0), beginning_row);
        step.end_row(place);
        continue;
      }
      // The query's clusters, each with the keys up to the query, itself included, and the first that its window reaches.
      const auto of_cluster = [&](Index cluster) { return seen_of(block, unit, u, sequence, place, cluster); };
      bool others = false;
      each_cluster(block, u, i, [&](Index cluster) {
        const Seen seen = of_cluster(cluster);
        others |= seen.up_to - (seen.has_self ? 1 : 0) > seen.begin;
      });
      bool first = true;
      each_cluster(block, u, i, [&](Index cluster) {
        Seen seen = of_cluster(cluster);
        if (seen.has_self && (self == Self::never || (self == Self::only_if_alone && others))) --seen.up_to;
        const CacheList& list = lists_of(unit, sequence)[static_cast<std::size_t>(cluster)];
        // Global tokens are no longer among the cluster's keys: they stand before all of them.
        const Index dropped = list.globals;
        const auto row_of = [&](Index ordinal) { return HeadCache::row(list, ordinal + dropped, capacity_); };
        step.add(place, first, globals_, beginning_row, std::max(seen.begin, dropped) - dropped,
                 std::max(seen.up_to, dropped) - dropped, row_of);
        first = false;
      });
      step.end_row(place);
    }
  }

  struct Seen {
    Index begin = 0, up_to = 0;  // ordinals of the cluster's keys
    bool has_self = false;       // the last one is the query's own
  };
  Seen seen_of(const HeadBlock& block, HeadCache& unit, std::size_t u, Index sequence, Index place, Index cluster) {
    Seen seen;
    seen.has_self = !clustered_ || label_of(u, sequence, place) == cluster;
    // The key of an induction head's query is not in yet, but counts in the window.
    seen.up_to =
        lists_of(unit, sequence)[static_cast<std::size_t>(cluster)].end + (block.induction && seen.has_self ? 1 : 0);
    seen.begin = window_ > 0 ? std::max<Index>(0, seen.up_to - window_) : 0;
    return seen;
  }

  // Calls f(cluster) for the clusters of row i, ascending.
  template <class F>
  void each_cluster(const HeadBlock& block, std::size_t u, Index i, const F& f) const {
    if (!clustered_) return f(0);
    if (!block.has_members())
      return f(
          labels_now_.query_labels[u * labels_now_.query_labels.size() / units_.size() + static_cast<std::size_t>(i)]);
    const ClusterMembers& members = labels_now_.members[u];
    for (Index cluster = 0; cluster < members.clusters; ++cluster) {
      const auto rows = members.of(cluster);
      if (std::binary_search(rows.begin(), rows.end(), static_cast<std::int32_t>(i))) f(cluster);
    }
  }

  // What attention adds: the terms of forward, but ALiBi's as a table of the keys at hand, for one of all distances grows.
  AttentionTerms<T> step_terms(const HeadBlock& block, HeadsPass<T>& pass, Arena& arena) const {
    if (positions_ != StepPositions::listed) return pass.attention_terms();
    AttentionTerms<T> terms = pass.memory_terms();
    std::size_t most = 1;
    for (const HeadCache& unit : units_) most = std::max(most, unit.distances.size());
    const View<T> table = arena.matrix<T>(block.count, static_cast<Index>(most));
    for (Index h = 0; h < block.count; ++h) {
      const HeadCache& unit = units_[units_.size() == 1 ? 0 : static_cast<std::size_t>(h / block.heads_per_kv())];
      const double slope = alibi_slope(h, block.count);
      for (std::size_t i = 0; i < unit.distances.size(); ++i)
        table(h, static_cast<Index>(i)) = alibi_bias_at<T>(slope, unit.distances[i]);
    }
    terms.bias = table;
    return terms;
  }

  // Memory for so many tokens of every sequence.
  void reserve(const RoutingAttentionConfig& c, const HeadBlock& block, const DecoderConfig& sizes) {
    const Index n = sizes.reserve, kept = capacity_ > 0 ? std::min(n, capacity_) : n;
    const Index list_pages = pages_for(kept);
    // Lists keep the pages of tokens that were taken back.
    const Index taken_back = lists_ * pages_for(std::min(n, sizes.max_rollback));
    const Index lists_pages = std::min(lists_ * list_pages, lists_ + pages_for(n) + taken_back);
    const Index beginning_pages = pages_for(std::min(n, beginning_));
    const Index all = sizes.sequences * (lists_pages + beginning_pages);
    const Index entries = sizes.sequences * block.probes;
    const Index seen = window_ > 0 ? std::max(std::min(n, window_), std::min(n, beginning_)) : n;
    const Index keys = entries * (c.memory + globals_ + 2 * key_block + seen);
    for (HeadCache& unit : units_) unit.reserve(list_pages, beginning_pages, all, keys);
    need_rows(all * HeadCache::page_rows);
    if (clustered_) {
      labels_now_.query_labels.reserve(units_.size() * static_cast<std::size_t>(sizes.sequences));
      labels_now_.own_key_labels.reserve(units_.size() * static_cast<std::size_t>(sizes.sequences));
    }
    labels_now_.members.resize(block.has_members() ? units_.size() : 0);
    for (ClusterMembers& members : labels_now_.members) {
      members.begin.reserve(static_cast<std::size_t>(block.clusters) + 1);
      members.rows.reserve(static_cast<std::size_t>(entries));
    }
    for (AttentionPlan& plan : plans_) {
      for (auto* v : {&plan.entries, &plan.row_entries, &plan.row_begin, &plan.query_positions, &plan.task_begin})
        v->reserve(static_cast<std::size_t>(entries + 1));
      plan.groups.reserve(static_cast<std::size_t>(entries));
      plan.visible.reserve(static_cast<std::size_t>(entries));
      plan.visible_too.reserve(static_cast<std::size_t>(entries));
      plan.parts.reserve(static_cast<std::size_t>(entries));
      plan.keys.reserve(static_cast<std::size_t>(keys));
    }
  }

  bool clustered_ = false;
  StepPositions positions_ = StepPositions::none;
  Index history_ = 0;                  // tokens of which labels, queries and pending keys are remembered
  Index beginning_ = 0, globals_ = 0;  // first tokens that are kept; those that all others see
  Index window_ = 0, capacity_ = 0;    // keys of a list that a query sees; that are kept; 0: all
  Index most_rows_ = 0;                // that lists can take
  Index lists_ = 1;                    // of a unit and sequence
  std::vector<HeadCache> units_;
  std::vector<AttentionPlan> plans_;  // of the current step, one per unit
  RowMatrix<T> keys_, values_;        // cache rows x key/value heads * d
  RowMatrix<T> queries_, pending_;    // sequences * history x c: projected; keys whose values are to come
  std::vector<std::int32_t> labels_;  // sequences * history x units: of the keys
  HeadsPlans labels_now_;             // labels and clusters of the current step
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
