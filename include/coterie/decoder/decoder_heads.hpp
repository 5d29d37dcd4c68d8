// One block of heads of a layer, one step of a decoder: what heads_forward does for the newest token of each sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "coterie/decoder/cache.hpp"
#include "coterie/decoder/step_plan.hpp"
#include "coterie/layer/heads.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The newest tokens of some sequences.
struct StepTokens {
  std::span<const std::int32_t> sequences, positions;  ///< row by row; positions in the sequence
  Index count() const { return static_cast<Index>(positions.size()); }
  Index sequence(Index i) const { return sequences[static_cast<std::size_t>(i)]; }
  Index position(Index i) const { return positions[static_cast<std::size_t>(i)]; }
};

/// The caches of a block of heads, and what it computes for the newest tokens.
///
/// Where step, fill or make_room_to_copy throw, the sequences are as they were, but for what fill has entered.
template <class T>
class DecoderHeads {
 public:
  DecoderHeads(const LayerState<T>& layer, const HeadBlock& block, Index sequences, Index max_rollback)
      : clustered_(block.routed && layer.config.routing != Routing::dense),
        members_(clustered_ && has_members(layer.config)),
        max_rollback_(max_rollback),
        history_(max_rollback + std::max<Index>(block.taps, 2)) {
    const RoutingAttentionConfig& c = layer.config;
    const bool dense = block.routed && !clustered_;
    self_ = block.routed ? *c.self : block.induction ? Self::never : Self::visible;
    globals_ = dense ? 0 : c.globals;
    beginning_ = dense ? 0 : std::max(c.globals, c.dense_up_to);
    window_ = dense ? 0 : block.routed ? c.window : c.local_window;
    clusters_ = clustered_ ? c.clusters : 1;
    probes_ = clustered_ ? c.probes : 1;
    positions_ = block.positions == PositionKind::alibi ? StepPositions::listed
                 : block.positions == PositionKind::none || block.positions == PositionKind::rotary
                     ? StepPositions::none
                     : StepPositions::absolute;
    const Index units = clustered_ ? block.kv_count : 1;
    cache_ = HeadCache<T>({.sequences = sequences,
                           .units = units,
                           .unit_cols = block.kv_cols() / units,
                           .lists = clusters_,
                           .capacity = cache_capacity(window_, max_rollback),
                           .beginning = beginning_,
                           .globals = globals_});
    if (block.taps > 1) queries_.setZero(sequences * history_, block.cols());
    if (block.induction) pending_.setZero(sequences * history_, block.kv_cols());
    if (clustered_) labels_.assign(static_cast<std::size_t>(sequences * history_ * units), -1);
    plans_.resize(static_cast<std::size_t>(units));
    distances_.resize(static_cast<std::size_t>(units));
    for (AttentionPlan& plan : plans_) {
      plan.memory_tokens = c.memory;
      plan.combine = members_ ? Combine::lse : Combine::single;
    }
  }

  /// y (+)= the block's share of the output for the newest tokens, which enter the cache.
  void step(const LayerState<T>& layer, const HeadBlock& block, const CheckedInput<T>& in, const StepTokens& tokens,
            View<T> y, bool add, Context& context) {
    const Index n = tokens.count();
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const auto take = [&](Buffer<T> HeadsTape<T>::*, Index rows, Index columns) {
      return arena.matrix<T>(rows, columns);
    };
    const auto convolved = [&](View<T> from, View<T> to) { convolve_newest(layer, block, tokens, from, to, arena); };
    HeadsMatrices<T> m = prepare_rows(layer, block, in, take, convolved, context);
    if (clustered_) route(layer, block, in, m, context);
    read_rows(layer, block, in, take, m, context);
    // What is remembered of a token that fails is overwritten when its position comes again.
    for (Index i = 0; i < n; ++i) remember(block, tokens, i, m, key_labels(labels_now_), n);
    for (Index i = 0; i < n; ++i) each_entry(block, tokens, i, [&](const CacheEntry& at) { cache_.make_room(at); });
    for (Index i = 0; i < n; ++i) enter(block, tokens, i, m);
    try {
      for (Index u = 0; u < units(); ++u) plan_step(block, tokens, u);
      const AttentionConfig config = attention_config(layer, block, in, false, arena);
      const AttentionTerms<T> terms = step_terms(layer, block, tokens, arena);
      attention_forward(Plans(plans_), ConstView<T>(m.read_q), cache_.keys(), cache_.values(), m.out, config, context,
                        terms);
      product<T>(m.out, view(layer.parameters.w_o).rows(block.first_col(), block.cols()), y, context, add);
    } catch (...) {
      undo_step(block, tokens);
      throw;
    }
  }

  /// Undoes the last step, which was of these tokens.
  void undo_step(const HeadBlock& block, const StepTokens& tokens) noexcept {
    for (Index i = 0; i < tokens.count(); ++i)
      each_entry(block, tokens, i, [&](const CacheEntry& at) { cache_.undo_append(at); });
  }

  /// Enters the tokens of an empty sequence, by the matrices and labels of their forward pass. Where it throws, those
  /// before stay.
  void fill(const HeadBlock& block, Index sequence, const HeadsTape<T>& tape, Index count) {
    const HeadsMatrices<T>& m = tape.matrices;
    for (Index i = 0; i < count; ++i) {
      const auto s = static_cast<std::int32_t>(sequence), position = static_cast<std::int32_t>(i);
      const StepTokens token{{&s, 1}, {&position, 1}};
      const auto from = [&](View<T> all) { return all.cols() > 0 ? all.rows(i, 1) : all; };
      HeadsMatrices<T> one;
      one.q = from(m.q);
      one.v = from(m.v);
      one.read_k = from(m.read_k);
      const std::span<const std::int32_t> labels = key_labels(tape.plans);
      remember(block, token, 0, one, labels.empty() ? labels : labels.subspan(static_cast<std::size_t>(i)), count);
      each_entry(block, token, 0, [&](const CacheEntry& at) { cache_.make_room(at); });
      enter(block, token, 0, one);
    }
  }

  /// Takes the last token of a sequence of `length` back.
  void take_back(const HeadBlock& block, Index sequence, Index length) noexcept {
    const auto s = static_cast<std::int32_t>(sequence), position = static_cast<std::int32_t>(length - 1);
    each_entry(block, {{&s, 1}, {&position, 1}}, 0, [&](const CacheEntry& at) { cache_.take_back(at); });
  }

  void clear(Index sequence) noexcept { cache_.clear(sequence); }

  /// Memory for copy(from, to).
  void make_room_to_copy(Index from, Index to) { cache_.make_room_to_copy(from, to); }

  /// Makes sequence `to` what `from` is.
  void copy(Index from, Index to) noexcept {
    cache_.copy(from, to);
    for (RowMatrix<T>* rows : {&queries_, &pending_})
      std::copy_n(rows->data() + from * history_ * rows->cols(), rows->rows() > 0 ? history_ * rows->cols() : 0,
                  rows->data() + to * history_ * rows->cols());
    const Index labels = labels_.empty() ? 0 : history_ * units();
    std::copy_n(labels_.begin() + from * labels, labels, labels_.begin() + to * labels);
  }

  /// Memory for so many tokens of every sequence.
  void reserve(Index tokens) {
    cache_.reserve(tokens, max_rollback_);
    const Index sequences = cache_.shape().sequences, entries = sequences * probes_;
    const Index memory = plans_.front().memory_tokens;
    const Index seen = window_ > 0 ? std::max(std::min(tokens, window_), std::min(tokens, beginning_)) : tokens;
    const Index keys = entries * (memory + globals_ + 2 * key_block + seen);
    for (std::size_t u = 0; u < plans_.size(); ++u) {
      StepPlan::reserve(plans_[u], distances_[u], entries, keys);
      if (positions_ != StepPositions::none)
        plans_[u].key_positions.reserve(static_cast<std::size_t>(cache_.rows() + memory));
    }
    if (!clustered_) return;
    for (auto* labels : {&labels_now_.query_labels, &labels_now_.key_labels})
      labels->reserve(plans_.size() * static_cast<std::size_t>(sequences));
    labels_now_.members.resize(members_ ? plans_.size() : 0);
    for (ClusterMembers& members : labels_now_.members) {
      members.begin.reserve(static_cast<std::size_t>(clusters_) + 1);
      members.rows.reserve(static_cast<std::size_t>(entries));
    }
  }

  std::size_t bytes() const {
    std::size_t sum = cache_.bytes() + static_cast<std::size_t>(queries_.size() + pending_.size()) * sizeof(T);
    sum += labels_.capacity() * sizeof(std::int32_t);
    for (const AttentionPlan& plan : plans_)
      sum += (plan.keys.capacity() + plan.key_positions.capacity()) * sizeof(std::int32_t);
    for (const std::vector<std::int32_t>& distances : distances_) sum += distances.capacity() * sizeof(std::int32_t);
    return sum;
  }

 private:
  Index units() const { return static_cast<Index>(plans_.size()); }

  std::int32_t& label_of(Index unit, Index sequence, Index position) {
    return labels_[static_cast<std::size_t>((sequence * history_ + position % history_) * units() + unit)];
  }

  /// Calls f(entry) for every unit, with the entry of the key that token i brings: its own, or of induction heads that
  /// of the token before; there may be none.
  template <class F>
  void each_entry(const HeadBlock& block, const StepTokens& tokens, Index i, const F& f) {
    const Index sequence = tokens.sequence(i), position = tokens.position(i) - (block.induction ? 1 : 0);
    for (Index u = 0; u < units() && position >= 0; ++u)
      f(CacheEntry{u, sequence, clustered_ ? label_of(u, sequence, position) : 0, position});
  }

  // u = convolve(q) of the newest tokens, from the queries that are remembered.
  void convolve_newest(const LayerState<T>& layer, const HeadBlock& block, const StepTokens& tokens, View<T> q,
                       View<T> u, Arena& arena) {
    const T** const rows = arena.take<const T*>(block.taps);
    const Index d = block.head_dim;
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index position = tokens.position(i), sequence = tokens.sequence(i);
      const Index reach = std::min(block.taps, position + 1);
      for (Index h = 0; h < block.count; ++h) {
        rows[0] = q.row(i) + h * d;
        for (Index t = 1; t < reach; ++t)
          rows[t] = view(queries_).row(sequence * history_ + (position - t) % history_) + h * d;
        convolve_row<T>(rows, reach, view(layer.parameters.taps).rows(block.taps_first + h * block.taps, block.taps),
                        u.row(i) + h * d);
      }
    }
  }

  // Labels of queries and keys, and of several probes the clusters of the queries.
  void route(const LayerState<T>& layer, const HeadBlock& block, const CheckedInput<T>& in, const HeadsMatrices<T>& m,
             Context& context) {
    if (!members_) {
      assign_labels(layer, block, in, m, labels_now_, context);
      return;
    }
    const RoutingAttentionConfig& c = layer.config;
    labels_now_.members.resize(plans_.size());
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const Index n = in.x.rows();
    const View<T> scores = arena.matrix<T>(n, clusters_), scratch = arena.matrix<T>(n, block.head_dim);
    const auto query_labels = HeadsPlans::grow(labels_now_.query_labels, units() * n);
    const auto own_labels = HeadsPlans::grow(labels_now_.key_labels, block.shared ? 0 : units() * n);
    for (Index u = 0; u < units(); ++u) {
      const OnlineKMeans<T>& router = layer.routers[static_cast<std::size_t>(u)];
      if (!block.shared) {
        router.scores(router_keys(block, m).of(u, scratch, c, context), scores, context);
        best_columns<T>(scores, labels_of(own_labels, u, n), context);
      }
      router.scores(router_queries(block, m).of(u, scratch, c, context), scores, context);
      best_columns<T>(scores, labels_of(query_labels, u, n), context);
      coterie::nearest_members(scores, {.probes = probes_}, labels_now_.members[static_cast<std::size_t>(u)], context);
    }
  }

  // Keeps what later tokens, or the taking back of this one, need of token i. labels: of `stride` rows for each unit.
  void remember(const HeadBlock& block, const StepTokens& tokens, Index i, const HeadsMatrices<T>& m,
                std::span<const std::int32_t> labels, Index stride) {
    const Index sequence = tokens.sequence(i), position = tokens.position(i),
                at = sequence * history_ + position % history_;
    if (queries_.rows() > 0) std::copy_n(m.q.row(i), block.cols(), view(queries_).row(at));
    if (pending_.rows() > 0) std::copy_n(m.read_k.row(i), block.kv_cols(), view(pending_).row(at));
    for (Index u = 0; u < units() && clustered_; ++u)
      label_of(u, sequence, position) = labels[static_cast<std::size_t>(u * stride + i)];
  }

  // The key that token i brings enters its lists, with the token's value.
  void enter(const HeadBlock& block, const StepTokens& tokens, Index i, const HeadsMatrices<T>& m) noexcept {
    each_entry(block, tokens, i, [&](const CacheEntry& at) {
      const T* const key =
          block.induction ? view(pending_).row(at.sequence * history_ + at.position % history_) : m.read_k.row(i);
      cache_.append(at, key, m.v.row(i));
    });
  }

  // What the tokens of a step see of a unit's keys.
  void plan_step(const HeadBlock& block, const StepTokens& tokens, Index u) {
    StepPlan step(plans_[static_cast<std::size_t>(u)], distances_[static_cast<std::size_t>(u)], positions_,
                  tokens.count(), cache_.rows(), cache_.positions(u));
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index position = tokens.position(i), sequence = tokens.sequence(i);
      const auto beginning_row = [&](Index ordinal) { return cache_.beginning_row(u, sequence, ordinal); };
      if (position < beginning_) {
        const bool sees_self = self_ == Self::visible || (self_ == Self::only_if_alone && position == 0);
        step.add(position, true, 0, beginning_row, 0, position + (sees_self ? 1 : 0), beginning_row);
        step.end_row(position);
        continue;
      }
      // The query's clusters, each with the keys up to the query, itself included, and the first that its window
      // reaches.
      const auto of_cluster = [&](Index cluster) { return seen_of(block, u, sequence, position, cluster); };
      bool others = false;
      each_cluster(u, i, [&](Index cluster) {
        const Seen seen = of_cluster(cluster);
        others |= seen.up_to - (seen.has_self ? 1 : 0) > seen.begin;
      });
      bool first = true;
      each_cluster(u, i, [&](Index cluster) {
        Seen seen = of_cluster(cluster);
        if (seen.has_self && (self_ == Self::never || (self_ == Self::only_if_alone && others))) --seen.up_to;
        const CacheList& list = cache_.list(u, sequence, cluster);
        // Global tokens are no longer among the cluster's keys: they stand before all of them.
        const Index dropped = list.globals;
        const auto row_of = [&](Index ordinal) { return cache_.row(list, ordinal + dropped); };
        step.add(position, first, globals_, beginning_row, std::max(seen.begin, dropped) - dropped,
                 std::max(seen.up_to, dropped) - dropped, row_of);
        first = false;
      });
      step.end_row(position);
    }
  }

  struct Seen {
    Index begin = 0, up_to = 0;  // ordinals of the cluster's keys
    bool has_self = false;       // the last one is the query's own
  };
  Seen seen_of(const HeadBlock& block, Index u, Index sequence, Index position, Index cluster) {
    Seen seen;
    seen.has_self = !clustered_ || label_of(u, sequence, position) == cluster;
    // The key of an induction head's query is not in yet, but counts in the window.
    seen.up_to = cache_.list(u, sequence, cluster).end + (block.induction && seen.has_self ? 1 : 0);
    seen.begin = window_ > 0 ? std::max<Index>(0, seen.up_to - window_) : 0;
    return seen;
  }

  // Calls f(cluster) for the clusters of row i, ascending.
  template <class F>
  void each_cluster(Index u, Index i, const F& f) const {
    if (!clustered_) return f(0);
    const std::vector<std::int32_t>& labels = labels_now_.query_labels;
    if (!members_)
      return f(labels[static_cast<std::size_t>(u) * (labels.size() / plans_.size()) + static_cast<std::size_t>(i)]);
    const ClusterMembers& members = labels_now_.members[static_cast<std::size_t>(u)];
    for (Index cluster = 0; cluster < members.clusters; ++cluster) {
      const auto rows = members.of(cluster);
      if (std::binary_search(rows.begin(), rows.end(), static_cast<std::int32_t>(i))) f(cluster);
    }
  }

  // What attention adds: the terms of forward, but ALiBi's as a table of the keys at hand, for one of all distances
  // grows.
  AttentionTerms<T> step_terms(const LayerState<T>& layer, const HeadBlock& block, const StepTokens& tokens,
                               Arena& arena) const {
    if (positions_ != StepPositions::listed) return attention_terms(layer, block, tokens.positions, arena);
    AttentionTerms<T> terms;
    add_memory_terms(layer, block, terms);
    std::size_t most = 1;
    for (const std::vector<std::int32_t>& distances : distances_) most = std::max(most, distances.size());
    const View<T> table = arena.matrix<T>(block.count, static_cast<Index>(most));
    for (Index h = 0; h < block.count; ++h) {
      const auto& distances = distances_[units() == 1 ? 0 : static_cast<std::size_t>(h / block.heads_per_kv())];
      const double slope = alibi_slope(h, block.count);
      for (std::size_t i = 0; i < distances.size(); ++i)
        table(h, static_cast<Index>(i)) = alibi_bias_at<T>(slope, distances[i]);
    }
    terms.bias = table;
    return terms;
  }

  bool clustered_ = false;  // every key/value head has clusters, and a plan of its own
  bool members_ = false;    // a query may be in several clusters
  Self self_ = Self::visible;
  StepPositions positions_ = StepPositions::none;
  Index max_rollback_ = 0;
  Index history_ = 0;                  // tokens of which labels, queries and pending keys are remembered
  Index beginning_ = 0, globals_ = 0;  // first tokens that are kept; those that all others see
  Index window_ = 0;                   // keys of a list that a query sees; 0: all
  Index clusters_ = 1, probes_ = 1;
  HeadCache<T> cache_;                                // a unit for each plan
  std::vector<AttentionPlan> plans_;                  // of the current step
  std::vector<std::vector<std::int32_t>> distances_;  // per plan: see StepPositions::listed
  RowMatrix<T> queries_, pending_;    // sequences * history x columns: projected; keys whose values are to come
  std::vector<std::int32_t> labels_;  // sequences * history x units: of the keys
  HeadsPlans labels_now_;             // labels and clusters of the current step
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
