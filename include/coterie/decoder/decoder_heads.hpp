// One block of heads of a decoder: the steps of HeadsPass for the newest token of each sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "coterie/decoder/cache.hpp"
#include "coterie/decoder/step_plan.hpp"
#include "coterie/layer/heads_pass.hpp"
#include "coterie/plan/sinks_recent.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The newest tokens of some sequences.
struct StepTokens {
  std::span<const std::int32_t> sequences, positions;  ///< row by row; positions in the sequence
  Index count() const { return static_cast<Index>(positions.size()); }
  Index sequence(Index i) const { return sequences[static_cast<std::size_t>(i)]; }
  Index position(Index i) const { return positions[static_cast<std::size_t>(i)]; }
};

/// The caches of a block of heads, and its computation for the newest tokens.
///
/// Where step or make_room_to_copy throw, the sequences are as they were; where fill throws, the tokens entered so far
/// stay.
template <class T>
class DecoderHeads {
 public:
  /// Refers to the layer and its block.
  DecoderHeads(const LayerState<T>& layer, const HeadBlock& block, Index sequences, Index max_rollback)
      : layer_(&layer),
        block_(&block),
        max_rollback_(max_rollback),
        history_(max_rollback + (std::max<Index>)(block.taps, 2)) {
    const RoutingAttentionConfig& c = layer.config;
    const bool dense = block.kind == BlockKind::dense;
    globals_ = dense ? 0 : c.globals;
    beginning_ = dense ? 0 : (std::max)(c.globals, c.dense_up_to);
    window_ = dense ? 0 : block.window;
    positions_ = block.positions == PositionKind::alibi ? StepPositions::listed
                 : block.positions == PositionKind::none || block.positions == PositionKind::rotary
                     ? StepPositions::none
                     : StepPositions::absolute;
    const Index units = block.clustered() ? block.kv_count : 1;
    cache_ = HeadCache<T>({.sequences = sequences,
                           .units = units,
                           .unit_cols = block.kv_cols() / units,
                           .lists = block.clustered() ? block.clusters : 1,
                           .capacity = cache_capacity(window_, max_rollback),
                           .beginning = (std::max)(beginning_, block.sinks),
                           .globals = globals_,
                           .recent = recent_capacity(block.recent, max_rollback)});
    if (block.taps > 1) queries_.setZero(sequences * history_, block.cols());
    if (block.induction) pending_.setZero(sequences * history_, block.kv_cols());
    if (block.clustered()) labels_.assign(static_cast<std::size_t>(sequences * history_ * units), -1);
    plans_.resize(static_cast<std::size_t>(units));
    distances_.resize(static_cast<std::size_t>(units));
    for (AttentionPlan& plan : plans_) {
      plan.memory_tokens = c.memory;
      plan.combine = block.has_entries() ? Combine::lse : Combine::single;
    }
  }

  const HeadBlock& block() const { return *block_; }

  /// y (+)= the block's share of the output for the newest tokens, which enter the cache.
  void step(const CheckedInput<T>& in, const StepTokens& tokens, View<T> y, Context& context) {
    const Index n = tokens.count();
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    HeadsPass<T> pass(*layer_, *block_, in, context);
    const HeadsMatrices<T>& m = pass.matrices();
    pass.take_matrices(arena);
    pass.project();
    if (block_->taps > 0) convolve_newest(tokens, m.projected_q, m.normalised_q, arena);
    pass.normalise();
    if (block_->clustered()) pass.assign(labels_now_);
    pass.rotate();
    // A step that fails leaves remembered rows behind; the next token at that position overwrites them.
    for (Index i = 0; i < n; ++i) remember(tokens, i, m, labels_now_.key_labels(), n);
    for (Index i = 0; i < n; ++i) each_entry(tokens, i, [&](const CacheEntry& at) { cache_.make_room(at); });
    for (Index i = 0; i < n; ++i) enter(tokens, i, m);
    try {
      for (Index u = 0; u < units(); ++u) plan_step(tokens, u);
      const AttentionConfig config = pass.attention_config(false);
      const AttentionTerms<T> terms = step_terms(pass, arena);
      attention_forward(Plans(plans_), ConstView<T>(m.attended_q), cache_.keys(), cache_.values(), m.out, config,
                        context, terms);
      pass.output(y);
    } catch (...) {
      undo_step(tokens);
      throw;
    }
  }

  /// Undoes the last step, which was of these tokens.
  void undo_step(const StepTokens& tokens) noexcept {
    for (Index i = 0; i < tokens.count(); ++i)
      each_entry(tokens, i, [&](const CacheEntry& at) { cache_.undo_append(at); });
  }

  /// Enters the tokens of an empty sequence, by the matrices and labels of their forward pass.
  void fill(Index sequence, const HeadsTape<T>& tape, Index count) {
    const HeadsMatrices<T>& m = tape.matrices;
    for (Index i = 0; i < count; ++i) {
      const auto s = static_cast<std::int32_t>(sequence), position = static_cast<std::int32_t>(i);
      const StepTokens token{{&s, 1}, {&position, 1}};
      const auto from = [&](View<T> all) { return all.cols() > 0 ? all.rows(i, 1) : all; };
      HeadsMatrices<T> one;
      one.projected_q = from(m.projected_q);
      one.projected_v = from(m.projected_v);
      one.attended_k = from(m.attended_k);
      const std::span<const std::int32_t> labels = tape.plans.key_labels();
      remember(token, 0, one, labels.empty() ? labels : labels.subspan(static_cast<std::size_t>(i)), count);
      each_entry(token, 0, [&](const CacheEntry& at) { cache_.make_room(at); });
      enter(token, 0, one);
    }
  }

  /// Removes the last token of a sequence of `length`.
  void take_back(Index sequence, Index length) noexcept {
    const auto s = static_cast<std::int32_t>(sequence), position = static_cast<std::int32_t>(length - 1);
    each_entry({{&s, 1}, {&position, 1}}, 0, [&](const CacheEntry& at) { cache_.take_back(at); });
  }

  void clear(Index sequence) noexcept { cache_.clear(sequence); }

  /// Memory for copy(from, to).
  void make_room_to_copy(Index from, Index to) { cache_.make_room_to_copy(from, to); }

  /// Makes sequence `to` a copy of `from`.
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
    const Index sequences = cache_.shape().sequences, by_position = block_->has_sinks_recent() ? 1 : 0;
    const Index entries = sequences * (block_->probes + by_position);
    const Index memory = plans_.front().memory_tokens;
    const Index seen = window_ > 0 ? (std::max)((std::min)(tokens, window_), (std::min)(tokens, beginning_)) : tokens;
    const Index kept_rows = (std::min)(tokens, block_->sinks) + (std::min)(tokens, block_->recent);
    const Index keys = entries * (memory + globals_ + 2 * key_block + seen) + sequences * kept_rows;
    for (std::size_t u = 0; u < plans_.size(); ++u) {
      StepPlan::reserve(plans_[u], distances_[u], entries, keys);
      if (positions_ != StepPositions::none)
        plans_[u].key_positions.reserve(static_cast<std::size_t>(cache_.rows() + memory));
    }
    if (!block_->clustered()) return;
    for (auto* labels : {&labels_now_.query_labels, &labels_now_.own_key_labels})
      labels->reserve(plans_.size() * static_cast<std::size_t>(sequences));
    labels_now_.members.resize(block_->has_members() ? 2 * plans_.size() : 0);
    for (ClusterMembers& members : labels_now_.members) {
      members.begin.reserve(static_cast<std::size_t>(block_->clusters) + 1);
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
  void each_entry(const StepTokens& tokens, Index i, const F& f) {
    const Index sequence = tokens.sequence(i), position = tokens.position(i) - (block_->induction ? 1 : 0);
    for (Index u = 0; u < units() && position >= 0; ++u)
      f(CacheEntry{u, sequence, block_->clustered() ? label_of(u, sequence, position) : 0, position});
  }

  // u = convolve(q) of the newest tokens, from the queries that are remembered.
  void convolve_newest(const StepTokens& tokens, View<T> q, View<T> u, Arena& arena) {
    const HeadBlock& block = *block_;
    const T** const rows = arena.take<const T*>(block.taps);
    const Index d = block.head_dim;
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index position = tokens.position(i), sequence = tokens.sequence(i);
      const Index reach = (std::min)(block.taps, position + 1);
      for (Index h = 0; h < block.count; ++h) {
        rows[0] = q.row(i) + h * d;
        for (Index t = 1; t < reach; ++t)
          rows[t] = view(queries_).row(sequence * history_ + (position - t) % history_) + h * d;
        convolve_row<T>(rows, reach, view(layer_->parameters.taps).rows(block.taps_first + h * block.taps, block.taps),
                        u.row(i) + h * d);
      }
    }
  }

  // Keeps the rows of token i that later tokens, or its removal, need. labels: `stride` rows for each unit.
  void remember(const StepTokens& tokens, Index i, const HeadsMatrices<T>& m, std::span<const std::int32_t> labels,
                Index stride) {
    const Index sequence = tokens.sequence(i), position = tokens.position(i),
                at = sequence * history_ + position % history_;
    if (queries_.rows() > 0) std::copy_n(m.projected_q.row(i), block_->cols(), view(queries_).row(at));
    if (pending_.rows() > 0) std::copy_n(m.attended_k.row(i), block_->kv_cols(), view(pending_).row(at));
    for (Index u = 0; u < units() && block_->clustered(); ++u)
      label_of(u, sequence, position) = labels[static_cast<std::size_t>(u * stride + i)];
  }

  // The key that token i brings enters its lists, with the token's value.
  void enter(const StepTokens& tokens, Index i, const HeadsMatrices<T>& m) noexcept {
    each_entry(tokens, i, [&](const CacheEntry& at) {
      const T* const key =
          block_->induction ? view(pending_).row(at.sequence * history_ + at.position % history_) : m.attended_k.row(i);
      cache_.append(at, key, m.projected_v.row(i));
    });
  }

  // Plans which keys of a unit the tokens of a step see.
  void plan_step(const StepTokens& tokens, Index u) {
    const Self self = block_->self;
    StepPlan step(plans_[static_cast<std::size_t>(u)], distances_[static_cast<std::size_t>(u)], positions_,
                  tokens.count(), cache_.rows(), cache_.positions(u));
    for (Index i = 0; i < tokens.count(); ++i) {
      const Index position = tokens.position(i), sequence = tokens.sequence(i);
      const auto beginning_row = [&](Index ordinal) { return cache_.beginning_row(u, sequence, ordinal); };
      if (position < beginning_) {
        const bool sees_self = self == Self::visible || (self == Self::only_if_alone && position == 0);
        step.add(position, true, 0, beginning_row, 0, position + (sees_self ? 1 : 0), beginning_row);
        step.end_row(position);
        continue;
      }
      // The keys of a cluster from the first in the query's window up to the query itself.
      const auto of_cluster = [&](Index cluster) { return seen_of(u, sequence, position, cluster); };
      bool others = false;
      each_cluster(u, i, [&](Index cluster) {
        const Seen seen = of_cluster(cluster);
        others |= seen.up_to - (seen.has_self ? 1 : 0) > seen.begin;
      });
      if (block_->has_sinks_recent()) {
        plan_sinks_recent(step, u, i, tokens, others);
        continue;
      }
      bool first = true;
      each_cluster(u, i, [&](Index cluster) {
        Seen seen = of_cluster(cluster);
        if (seen.has_self && (self == Self::never || (self == Self::only_if_alone && others))) --seen.up_to;
        const CacheList& list = cache_.list(u, sequence, cluster);
        // Global tokens do not count among the keys of a cluster: they precede all of them.
        const Index dropped = list.globals;
        const auto row_of = [&](Index ordinal) { return cache_.row(list, ordinal + dropped); };
        step.add(position, first, globals_, beginning_row, (std::max)(seen.begin, dropped) - dropped,
                 (std::max)(seen.up_to, dropped) - dropped, row_of);
        first = false;
      });
      step.end_row(position);
    }
  }

  // Plans the keys that token i sees by position, then those of its clusters that are between them.
  void plan_sinks_recent(StepPlan& step, Index u, Index i, const StepTokens& tokens, bool others) {
    const Index position = tokens.position(i), sequence = tokens.sequence(i);
    const KeysByPosition by_position_keys =
        keys_by_position(block_->sinks, block_->recent, block_->self, others, position, position + 1);
    // Forward lists the keys of the sequence by position.
    step.add(
        position, true, by_position_keys.sinks, [&](Index at) { return cache_.beginning_row(u, sequence, at); },
        by_position_keys.begin - by_position_keys.sinks, by_position_keys.end - by_position_keys.sinks,
        [&](Index ordinal) { return cache_.recent_row(u, sequence, ordinal + by_position_keys.sinks); });
    const std::span<const std::int32_t> positions = cache_.positions(u);
    each_cluster(u, i, [&](Index cluster) {
      const CacheList& list = cache_.list(u, sequence, cluster);
      const auto row_of = [&](Index ordinal) { return cache_.row(list, ordinal); };
      const Seen seen = seen_of(u, sequence, position, cluster);
      // The first ordinal from `begin` on whose key is at `bound` or later. The own key of an induction head's query is
      // not in the list yet.
      const auto first_at = [&](Index begin, Index bound) {
        Index end = (std::min)(seen.up_to, list.end);
        while (begin < end) {
          const Index middle = begin + (end - begin) / 2;
          if (positions[static_cast<std::size_t>(row_of(middle))] < bound)
            begin = middle + 1;
          else
            end = middle;
        }
        return begin;
      };
      const Index begin = first_at(seen.begin, block_->sinks);
      step.add(position, false, 0, row_of, begin, first_at(begin, by_position_keys.until), row_of);
    });
    step.end_row(position);
  }

  // Keys that the list of recent ones keeps: rollback may remove the newest, and a step that fails displaces one more.
  // 0: no list.
  static Index recent_capacity(Index recent, Index rollback) {
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    return recent > 0 ? (std::min)((std::min)(recent, most) + (std::min)(rollback, most) + 1, most) : 0;
  }

  struct Seen {
    Index begin = 0, up_to = 0;  // ordinals of the cluster's keys
    bool has_self = false;       // the last one is the query's own
  };
  Seen seen_of(Index u, Index sequence, Index position, Index cluster) {
    Seen seen;
    seen.has_self = !block_->clustered() || label_of(u, sequence, position) == cluster;
    // The key of an induction head's query is not in the cache yet, but counts in the window.
    seen.up_to = cache_.list(u, sequence, cluster).end + (block_->induction && seen.has_self ? 1 : 0);
    seen.begin = window_ > 0 ? (std::max<Index>)(0, seen.up_to - window_) : 0;
    return seen;
  }

  // Calls f(cluster) for the clusters of row i, ascending.
  template <class F>
  void each_cluster(Index u, Index i, const F& f) const {
    if (!block_->clustered()) return f(0);
    const std::vector<std::int32_t>& labels = labels_now_.query_labels;
    if (!block_->has_members())
      return f(labels[static_cast<std::size_t>(u) * (labels.size() / plans_.size()) + static_cast<std::size_t>(i)]);
    const std::size_t lists = labels_now_.members.size() / plans_.size();  // per unit: of queries, then of keys
    const ClusterMembers& members = labels_now_.members[static_cast<std::size_t>(u) * lists];
    for (Index cluster = 0; cluster < members.clusters; ++cluster) {
      const auto rows = members.of(cluster);
      if (std::binary_search(rows.begin(), rows.end(), static_cast<std::int32_t>(i))) f(cluster);
    }
  }

  // Terms of attention: those of forward, but for ALiBi a table of the keys of this step, because a table of all
  // distances would grow with the position.
  AttentionTerms<T> step_terms(HeadsPass<T>& pass, Arena& arena) const {
    if (positions_ != StepPositions::listed) return pass.attention_terms();
    AttentionTerms<T> terms = pass.memory_terms();
    std::size_t most = 1;
    for (const std::vector<std::int32_t>& distances : distances_) most = (std::max)(most, distances.size());
    const View<T> table = arena.matrix<T>(block_->count, static_cast<Index>(most));
    for (Index h = 0; h < block_->count; ++h) {
      const auto& distances = distances_[units() == 1 ? 0 : static_cast<std::size_t>(h / block_->heads_per_kv())];
      const double slope = alibi_slope(h, block_->count);
      for (std::size_t i = 0; i < distances.size(); ++i)
        table(h, static_cast<Index>(i)) = alibi_bias_at<T>(slope, distances[i]);
    }
    terms.bias = table;
    return terms;
  }

  const LayerState<T>* layer_;
  const HeadBlock* block_;
  StepPositions positions_ = StepPositions::none;
  Index max_rollback_ = 0;
  Index history_ = 0;                                 // tokens whose labels, queries and pending keys are kept
  Index beginning_ = 0, globals_ = 0;                 // first tokens that are kept; first tokens that all others see
  Index window_ = 0;                                  // keys of a list that a query sees; 0: all
  HeadCache<T> cache_;                                // a unit for each plan
  std::vector<AttentionPlan> plans_;                  // of the current step
  std::vector<std::vector<std::int32_t>> distances_;  // per plan: see StepPositions::listed
  RowMatrix<T> queries_, pending_;    // sequences * history x columns: projected; keys whose values are to come
  std::vector<std::int32_t> labels_;  // sequences * history x units: of the keys
  HeadsPlans labels_now_;             // labels and clusters of the current step
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
