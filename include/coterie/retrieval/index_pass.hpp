// One pass of queries through an index: estimate parts, choose some, rank their keys, attend, add the tail.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/core/random.hpp"
#include "coterie/kernel/exponentials.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/plan/complete.hpp"
#include "coterie/retrieval/config.hpp"
#include "coterie/retrieval/index_scratch.hpp"
#include "coterie/retrieval/key_parts.hpp"
#include "coterie/retrieval/selection.hpp"

namespace coterie::detail {

/// Settings of a pass, resolved.
struct IndexPassSettings {
  double budget = 0, scale = 0;  // scale: never 0
  Index rank = 0, samples = 0;
  bool tail = false;
};

/// The keys of a pass: those that every query sees, and how many of them and of all keys each one sees.
struct VisibleKeys {
  Index sinks = 0;                             // rows [0, sinks)
  RowRange exact;                              // rows behind all parts
  Index key_rows = 0, queries = 0, first = 0;  // rows of the cache; queries of the call, and the pass's first one
  bool causal = false;

  /// Rows of the cache that query i of the pass may see.
  Index visible(Index i) const { return causal ? key_rows - queries + first + i + 1 : key_rows; }
  /// Rows of `exact` that it sees.
  Index seen_exact(Index i) const { return (std::max<Index>)(0, (std::min)(exact.end, visible(i)) - exact.begin); }
};

/// A pass of some queries of one key/value head. Rows of the pass: the `group` query heads that share a choice, query
/// by query.
///
/// Scores are to base 2. A query knows the score of every part's mean key, and chooses parts in that order until the
/// candidates reach their number. With ranking it sees the best candidates by int8 scores; the rest of the chosen parts
/// counts with these scores and the part's mean value.
///
/// All other parts count with size, mean key and mean value: the tail. What is seen is a plan, attended to as any plan,
/// and merged with the rest by its log-sum-exp.
template <class T>
class IndexPass {
 public:
  using Worker = typename IndexScratch<T>::Worker;

  /// Memory of a pass comes from the worker's arena; `scope` gives it back.
  IndexPass(const KeyParts<T>& parts, const VisibleKeys& keys, const IndexPassSettings& settings, Index group,
            Worker& worker)
      : parts_(parts),
        keys_(keys),
        settings_(settings),
        group_(group),
        worker_(worker),
        arena_(worker.context.workspace().shared()),
        scope_(arena_) {}

  /// Chooses for all queries, and writes the plan of what they see: rows of the plan are rows of the pass, or with
  /// `one_row` queries.
  /// Shapes: q queries x group*d, k all rows of the cache, d columns (read for samples alone).
  void choose(ConstView<T> q, ConstView<T> k, bool one_row = false) {
    estimate(q);
    begin_plan(one_row ? 1 : group_, q.rows());
    if (parts_.count() == 0) return;
    for (Index i = 0; i < q.rows(); ++i) {
      choose_parts(i);
      if (settings_.rank > 0) {
        score_candidates(i);
        keep_best(i);
      } else {
        remember_parts(i);
      }
      if (settings_.tail && !one_row)
        for (Index g = 0; g < group_; ++g) weigh(i * group_ + g, g, k);
    }
    if (settings_.rank == 0) add_parts();
  }

  /// out = attention along the plan and over the tail.
  /// Shapes: k and v all rows of the cache, d and dv columns; out queries x group*dv.
  void attend(ConstView<T> k, ConstView<T> v, View<T> out) {
    AttentionPlan& plan = worker_.plan;
    // Not complete(): its time for all key rows is more than a query of a long cache may cost.
    derive(plan, worker_.plan_scratch.numbers);
    const Index rows = rows_.rows(), dv = v.cols();
    const View<T> seen = arena_.template matrix<T>(rows, dv);
    attention_forward(plan, rows_, k, v, seen, worker_.tape, {.scale = settings_.scale}, worker_.context);
    View<T> tail;
    if (settings_.tail && parts_.count() > 0) {
      tail = arena_.template matrix<T>(rows, dv);
      // tail = weights mean values
      product<T>(scores_, parts_.values(), tail, worker_.context);
    }
    for (Index r = 0; r < rows; ++r) {
      T* const to = out.row(r / group_) + r % group_ * dv;
      if (!given(tail) || rest_[r] == 0) {
        std::copy_n(seen.row(r), dv, to);
        if (!finite_row(rows_.row(r), rows_.cols()) && keys_seen(r) == 0)
          std::fill_n(to, dv, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      const Shares s = shares(r);
      for (Index j = 0; j < dv; ++j) to[j] = (s.seen * seen(r, j) + s.rest * tail(r, j)) / s.total;
    }
  }

  /// Fills the report's rows of these queries, for the heads from `head` on. After attend().
  void report(Index head, KeyIndexReport& report) const {
    for (Index r = 0; r < rows_.rows(); ++r) {
      const Index i = r / group_, row = keys_.first + i, column = head + r % group_;
      report.keys_seen(row, column) = static_cast<double>(keys_seen(r));
      for (auto* m : {&report.ranked_mass, &report.estimated_mass, &report.sampled_mass, &report.sampled_error})
        (*m)(row, column) = 0;
      if (parts_.count() == 0 || !settings_.tail) continue;
      const Shares s = shares(r);
      const double unit = static_cast<double>(s.rest) / static_cast<double>(s.total);
      report.ranked_mass(row, column) = unit * static_cast<double>(rest_[r] - estimated_[r]);
      report.estimated_mass(row, column) = unit * static_cast<double>(estimated_[r]);
      if (settings_.samples == 0) continue;
      // The ratio changes the sum of all weights too.
      const double mass = report.estimated_mass(row, column), total = 1 + mass * (sampled_[r].mean - 1);
      report.sampled_mass(row, column) = mass * sampled_[r].mean / total;
      report.sampled_error(row, column) = mass * sampled_[r].error / (total * total);
    }
  }

 private:
  struct Shares {
    T seen, rest, total;
  };
  struct Ratio {
    double mean = 1, error = 0;  // error: standard error
  };

  Index keys_seen(Index r) const {
    const AttentionPlan& plan = worker_.plan;
    Index seen = 0;
    for (std::int32_t j = plan.row_begin[at(r)]; j < plan.row_begin[at(r) + 1]; ++j) {
      const Interval interval = plan.visible[at(plan.row_entries[at(j)])];
      seen += interval.end - interval.begin;
    }
    return seen;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
  static constexpr T nothing = -std::numeric_limits<T>::infinity();

  /// scores = q centroids^T, to base 2.
  void estimate(ConstView<T> q) {
    const Index d = q.cols() / group_, count = q.rows() * group_, depth = int8_words(d);
    const T factor = static_cast<T>(settings_.scale) * log2_e<T>;
    View<T> rows = arena_.template matrix<T>(count, d), scaled = arena_.template matrix<T>(count, d);
    for (Index r = 0; r < count; ++r) {
      std::copy_n(q.row(r / group_) + r % group_ * d, d, rows.row(r));
      for (Index e = 0; e < d; ++e) scaled(r, e) = factor * rows(r, e);
    }
    rows_ = rows;
    scaled_ = scaled;
    scores_ = arena_.template matrix<T>(count, parts_.count());
    if (parts_.count() > 0) product<T>(scaled_, parts_.centroids(), scores_, worker_.context);
    for (T** list : {&reference_, &estimated_, &rest_}) {
      *list = arena_.template take<T>(count);
      std::fill_n(*list, count, T(0));
    }
    sampled_ = arena_.template take<Ratio>(count);
    std::fill_n(sampled_, count, Ratio{});
    chosen_ = arena_.template take<std::int32_t>(parts_.count());
    order_ = arena_.template take<std::int32_t>(parts_.count());
    choice_ = arena_.template take<T>(parts_.count());
    candidate_begin_ = arena_.template take<Index>(parts_.count() + 1);
    if (settings_.rank > 0) {
      candidates_ = arena_.template matrix<T>(group_, parts_.keys() + int8_slack);
      combined_ = arena_.template take<T>(parts_.keys() + int8_slack);
      ordered_ = arena_.template take<Ordered<T>>(parts_.keys());
      kept_ = arena_.template take<Kept>(parts_.keys() + 1);
      bins_ = arena_.template take<std::int32_t>(selection_bins);
      int8_q_ = arena_.template take<T>(4 * depth * group_);
      std::fill_n(int8_q_, 4 * depth * group_, T(0));
      marks_ = arena_.template take<std::uint64_t>(keys_.exact.begin / 64 + 1);
    } else {
      pair_count_ = 0;
      pairs_ = arena_.template take<Pair>(q.rows() * parts_.count());
    }
  }

  /// The group of the keys that all queries see.
  void begin_plan(Index rows_per_query, Index queries) {
    AttentionPlan& plan = worker_.plan;
    rows_per_query_ = rows_per_query;
    plan.tokens = queries * rows_per_query;
    plan.key_tokens = keys_.key_rows;
    plan.memory_tokens = 0;
    plan.combine = Combine::lse;
    for (auto* list : {&plan.entries, &plan.keys, &plan.query_positions, &plan.key_positions}) list->clear();
    plan.groups.clear();
    plan.visible.clear();
    plan.visible_too.clear();
    const auto sinks = static_cast<std::int32_t>((std::min)(keys_.sinks, keys_.exact.begin));
    for (std::int32_t i = 0; i < sinks; ++i) plan.keys.push_back(i);
    plan.keys.insert(plan.keys.end(), parts_.loose().begin(), parts_.loose().end());
    always_ = static_cast<Index>(plan.keys.size());
    for (Index i = keys_.exact.begin; i < keys_.exact.end; ++i) plan.keys.push_back(static_cast<std::int32_t>(i));
    for (Index i = 0; i < queries; ++i)
      for (Index g = 0; g < rows_per_query; ++g) {
        plan.entries.push_back(static_cast<std::int32_t>(i * rows_per_query + g));
        plan.visible.push_back({0, static_cast<std::int32_t>(always_ + keys_.seen_exact(i))});
      }
    plan.groups.push_back(
        {0, static_cast<std::int32_t>(plan.entries.size()), 0, static_cast<std::int32_t>(plan.keys.size())});
  }

  /// Adds a group of the rows of some queries; its keys are those added to the plan since `keys_before`.
  template <class Queries>
  void add_group(const Queries& queries, std::size_t keys_before) {
    AttentionPlan& plan = worker_.plan;
    const auto entries_before = static_cast<std::int32_t>(plan.entries.size());
    for (const Index i : queries)
      for (Index g = 0; g < rows_per_query_; ++g)
        plan.entries.push_back(static_cast<std::int32_t>(i * rows_per_query_ + g));
    plan.groups.push_back({entries_before, static_cast<std::int32_t>(plan.entries.size()),
                           static_cast<std::int32_t>(keys_before), static_cast<std::int32_t>(plan.keys.size())});
    plan.visible.resize(plan.entries.size(), {0, static_cast<std::int32_t>(plan.keys.size() - keys_before)});
  }

  /// Chooses parts for a query, in the order of their scores.
  void choose_parts(Index i) {
    const Index visible = keys_.visible(i), seen = always_ + keys_.seen_exact(i), count = parts_.count();
    const double budget = settings_.budget, rank = static_cast<double>((std::max<Index>)(1, settings_.rank));
    const double most = (std::min)(static_cast<double>(visible),
                                   std::floor(budget <= 1 ? budget * static_cast<double>(visible) : budget));
    want_ = static_cast<Index>(most) - seen;
    chosen_count_ = candidate_count_ = 0;
    candidate_begin_[0] = 0;
    bool finite = false;
    for (Index g = 0; g < group_; ++g) finite = finite || finite_head(i, g);
    if (want_ <= 0 || !finite) return;  // NaN comes from the keys that are seen anyway, the tail, or attend()

    const T* choice = scores_.row(i);
    if (group_ > 1) choice = shared_choice(i);
    for (Index c = 0; c < count; ++c) order_[c] = static_cast<std::int32_t>(c);
    // A heap: few of the parts are taken from it. Lower parts win ties.
    const auto after = [choice](std::int32_t a, std::int32_t b) {
      return choice[a] < choice[b] || (choice[a] == choice[b] && a > b);
    };
    std::make_heap(order_, order_ + count, after);
    for (Index left = count; left > 0; --left) {
      const Index part = order_[0], size = parts_.size(part);
      const double with_half = static_cast<double>(seen + candidate_count_) + static_cast<double>(size) / 2;
      // With ranking the first part is looked into whatever its size: single keys are kept, not parts.
      if (with_half > rank * most && !(settings_.rank > 0 && chosen_count_ == 0)) break;
      std::pop_heap(order_, order_ + left, after);
      chosen_[chosen_count_++] = static_cast<std::int32_t>(part);
      candidate_count_ += size;
      candidate_begin_[chosen_count_] = candidate_count_;
    }
  }

  bool finite_head(Index i, Index g) const { return finite_row(rows_.row(i * group_ + g), rows_.cols()); }

  /// The sum over the finite heads of a group of their softmax over all parts.
  const T* shared_choice(Index i) {
    const Index count = parts_.count();
    Arena::Scope scope(arena_);
    T* const weights = arena_.template take<T>(count);
    std::fill_n(choice_, count, T(0));
    for (Index g = 0; g < group_; ++g) {
      if (!finite_head(i, g)) continue;
      std::copy_n(scores_.row(i * group_ + g), count, weights);
      const T sum = exponentials(weights, count, *std::max_element(weights, weights + count), nullptr);
      for (Index c = 0; c < count; ++c) choice_[c] += weights[c] / sum;
    }
    return choice_;
  }

  /// x = factor 2^(x - reference); returns the sum.
  T exponentials(T* x, Index count, T reference, const T* factor) const {
    T sum = 0;
    ExponentialsKernel<T>::on(worker_.context.instructions())({x, count, reference, factor, &sum});
    return sum;
  }

  /// candidates = q.k by the int8 copy, for every head of the group.
  void score_candidates(Index i) {
    const Index d = rows_.cols(), depth = int8_words(d);
    const auto kernel = Int8Kernel<T>::on(worker_.context.instructions());
    Index scaled_for = -1;
    for (Index p = 0; p < chosen_count_; ++p) {
      const Index part = chosen_[p];
      if (parts_.scale_of(part) != scaled_for) {
        scaled_for = parts_.scale_of(part);
        const T* const scale = parts_.scales(scaled_for);
        for (Index g = 0; g < group_; ++g)
          for (Index e = 0; e < d; ++e) int8_q_[4 * depth * g + e] = scaled_(i * group_ + g, e) * scale[e];
      }
      for (Index g = 0; g < group_; ++g)
        kernel({parts_.words(part), parts_.size(part), depth, int8_q_ + 4 * depth * g,
                candidates_.row(g) + candidate_begin_[p]});
    }
  }

  /// Adds the best candidates to the plan; their scores become minus infinity. Earlier candidates win ties.
  void keep_best(Index i) {
    if (chosen_count_ == 0) return;
    const T* by = candidates_.row(0);
    if (group_ > 1) by = combine_candidates(i);
    Ordered<T> threshold = (std::numeric_limits<Ordered<T>>::min)();
    if (want_ < candidate_count_) {
      for (Index j = 0; j < candidate_count_; ++j) ordered_[j] = ordered(by[j]);
      threshold = select_largest(ordered_, candidate_count_, want_, bins_);
    }
    // Without a branch, for nobody can predict which are kept.
    Index kept = 0;
    for (Index p = 0; p < chosen_count_; ++p) {
      const std::int32_t* const rows = parts_.rows(chosen_[p]).data();
      for (Index j = candidate_begin_[p]; j < candidate_begin_[p + 1]; ++j) {
        kept_[kept] = {static_cast<std::int32_t>(j), rows[j - candidate_begin_[p]]};
        kept += ordered(by[j]) >= threshold;
      }
    }
    if (kept > want_) {  // more than wanted equal the threshold: the last ones of these are too many
      Index ties = want_;
      for (Index k = 0; k < kept; ++k) ties -= ordered(by[kept_[k].candidate]) > threshold;
      Index left = 0;
      for (Index k = 0; k < kept; ++k)
        if (ordered(by[kept_[k].candidate]) > threshold || ties-- > 0) kept_[left++] = kept_[k];
      kept = left;
    }
    // Marks bring them into the order of rows, for the keys of a plan ascend.
    const Index words = keys_.exact.begin / 64 + 1;
    std::fill_n(marks_, words, std::uint64_t(0));
    for (Index k = 0; k < kept; ++k) {
      const auto row = static_cast<std::uint32_t>(kept_[k].row);
      marks_[row / 64] |= std::uint64_t(1) << (row % 64);
      for (Index g = 0; g < group_; ++g) candidates_(g, kept_[k].candidate) = nothing;
    }
    const std::size_t keys_before = worker_.plan.keys.size();
    for (Index w = 0; w < words; ++w)
      for (std::uint64_t bits = marks_[w]; bits != 0; bits &= bits - 1)
        worker_.plan.keys.push_back(static_cast<std::int32_t>(64 * w + std::countr_zero(bits)));
    add_group(std::span(&i, 1), keys_before);
  }

  /// The sum over the finite heads of a group of the shares that their candidates have of the estimates of all parts,
  /// or of the candidates' own sum where these estimates are nothing beside it.
  const T* combine_candidates(Index i) {
    Arena::Scope scope(arena_);
    T* const weights = arena_.template take<T>((std::max)(candidate_count_, parts_.count()));
    std::fill_n(combined_, candidate_count_, T(0));
    for (Index g = 0; g < group_; ++g) {
      if (!finite_head(i, g)) continue;
      const T reference = highest(i * group_ + g, g);
      std::copy_n(scores_.row(i * group_ + g), parts_.count(), weights);
      T all = exponentials(weights, parts_.count(), reference, parts_.sizes());
      std::copy_n(candidates_.row(g), candidate_count_, weights);
      const T sum = exponentials(weights, candidate_count_, reference, nullptr);
      if (all < T(1e-20)) all = sum;
      for (Index j = 0; j < candidate_count_; ++j) combined_[j] += weights[j] / all;
    }
    return combined_;
  }

  /// The largest score of a row: of parts, and of candidates that are not seen.
  T highest(Index r, Index g) const {
    T most = *std::max_element(scores_.row(r), scores_.row(r) + parts_.count());
    if (settings_.rank > 0 && candidate_count_ > 0)
      most = (std::max)(most, *std::max_element(candidates_.row(g), candidates_.row(g) + candidate_count_));
    return most;
  }

  /// Replaces the scores of a row by weights of mean values: of parts not chosen, size 2^score; of chosen ones, the sum
  /// of 2^score over the candidates that are not seen.
  void weigh(Index r, Index g, ConstView<T> k) {
    const T reference = highest(r, g);
    T* const weights = scores_.row(r);
    for (Index p = 0; p < chosen_count_; ++p) weights[chosen_[p]] = nothing;
    reference_[r] = reference;
    estimated_[r] = rest_[r] = exponentials(weights, parts_.count(), reference, parts_.sizes());
    if (settings_.samples > 0) sampled_[r] = sample(r, k);
    if (settings_.rank == 0) return;
    for (Index p = 0; p < chosen_count_; ++p) {
      const T sum = exponentials(candidates_.row(g) + candidate_begin_[p],
                                 candidate_begin_[p + 1] - candidate_begin_[p], reference, nullptr);
      weights[chosen_[p]] = sum;
      rest_[r] += sum;
    }
  }

  struct Pair {
    std::int32_t part, query;
  };
  struct Kept {
    std::int32_t candidate, row;
  };

  void remember_parts(Index i) {
    for (Index p = 0; p < chosen_count_; ++p) pairs_[pair_count_++] = {chosen_[p], static_cast<std::int32_t>(i)};
  }

  /// Adds a group for every part that is seen whole, with the queries that chose it.
  void add_parts() {
    Index* const begin = arena_.template take<Index>(parts_.count() + 1);
    Index* const list = arena_.template take<Index>((std::max<Index>)(1, pair_count_));
    std::fill_n(begin, parts_.count() + 1, Index(0));
    for (Index j = 0; j < pair_count_; ++j) ++begin[pairs_[j].part + 1];
    for (Index c = 0; c < parts_.count(); ++c) begin[c + 1] += begin[c];
    // Pairs come query by query, so that queries ascend in every group.
    for (Index j = 0; j < pair_count_; ++j) list[begin[pairs_[j].part]++] = pairs_[j].query;
    for (Index c = 0, first = 0; c < parts_.count(); first = begin[c++]) {
      if (begin[c] == first) continue;
      const std::size_t keys_before = worker_.plan.keys.size();
      worker_.plan.keys.insert(worker_.plan.keys.end(), parts_.rows(c).begin(), parts_.rows(c).end());
      add_group(std::span<const Index>(list + first, at(begin[c] - first)), keys_before);
    }
  }

  /// The sums of the weights of what is seen and of the rest, in the same unit.
  Shares shares(Index r) const {
    const T lse = worker_.tape.lse()(r, 0) * log2_e<T>, reference = reference_[r];
    const T most = (std::max)(lse, reference);
    Shares s{std::exp2(lse - most), std::exp2(reference - most), 0};
    s.total = s.seen + s.rest * rest_[r];
    return s;
  }

  /// Draws keys of parts that were not chosen, in proportion to their estimated weight. The mean ratio of their weight
  /// to the estimated one, times the estimated mass, is the mass without bias.
  Ratio sample(Index r, ConstView<T> k) const {
    // Random numbers follow from the query, so that a batch equals its rows one by one.
    std::uint64_t seed = 0;
    for (Index e = 0; e < rows_.cols(); ++e)
      seed = random_bits(seed, static_cast<std::uint64_t>(ordered(rows_(r, e))), static_cast<std::uint64_t>(e));
    const double all = static_cast<double>(estimated_[r]), n = static_cast<double>(settings_.samples);
    if (!(all > 0)) return {};
    const T* const weights = scores_.row(r);
    double below = 0, sum = 0, squares = 0;
    Index part = -1;  // the one that the target falls into: one sample for each of n equal pieces of the sum
    for (Index s = 0; s < settings_.samples; ++s) {
      const auto counter = static_cast<std::uint64_t>(s);
      const double target = (static_cast<double>(s) + random_uniform(seed, 0, counter)) / n * all;
      while (below <= target && part + 1 < parts_.count()) below += static_cast<double>(weights[++part]);
      if (part < 0 || weights[part] == 0) continue;
      const Index size = parts_.size(part), row = parts_.rows(part)[at(random_below(size, seed, 1, counter))];
      double score = -static_cast<double>(reference_[r]);
      for (Index e = 0; e < rows_.cols(); ++e)
        score += static_cast<double>(scaled_(r, e)) * static_cast<double>(k(row, e));
      const double ratio = std::exp2(score) * static_cast<double>(size) / static_cast<double>(weights[part]);
      sum += ratio;
      squares += ratio * ratio;
    }
    const double mean = sum / n, variance = (std::max)(0.0, squares / n - mean * mean);
    return {mean, std::sqrt(variance / (std::max)(1.0, n - 1))};
  }

  const KeyParts<T>& parts_;
  const VisibleKeys& keys_;
  const IndexPassSettings& settings_;
  const Index group_;
  Worker& worker_;
  Arena& arena_;
  Arena::Scope scope_;

  View<T> rows_, scaled_, scores_;                                   // queries; to base 2; of every part, then weights
  T *reference_ = nullptr, *estimated_ = nullptr, *rest_ = nullptr;  // per row: weights are 2^-reference times too
                                                                     // large; sums over parts not chosen; and all
  Index rows_per_query_ = 1, always_ = 0;
  Ratio* sampled_ = nullptr;
  // Of the query at hand.
  Index want_ = 0, chosen_count_ = 0, candidate_count_ = 0;
  std::int32_t *chosen_ = nullptr, *order_ = nullptr;
  T* choice_ = nullptr;
  Index* candidate_begin_ = nullptr;
  View<T> candidates_;
  T *combined_ = nullptr, *int8_q_ = nullptr;
  Ordered<T>* ordered_ = nullptr;
  Kept* kept_ = nullptr;
  std::int32_t* bins_ = nullptr;
  std::uint64_t* marks_ = nullptr;
  // Of all queries, where parts are seen whole.
  Pair* pairs_ = nullptr;
  Index pair_count_ = 0;
};

}  // namespace coterie::detail
