// One checked call of attention: its arguments, its tasks, and what becomes of rows with no or several entries.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <utility>

#include "coterie/attention/config.hpp"
#include "coterie/attention/tape.hpp"
#include "coterie/core/context.hpp"
#include "coterie/kernel/arguments.hpp"

namespace coterie::detail {

/// Whether a soft cap is 0, or a positive number that is one to base 2 in the scalar type as well.
template <class T>
bool is_soft_cap(double soft_cap) {
  const T cap = static_cast<T>(soft_cap) * log2_e<T>;
  return soft_cap == 0 || (cap > 0 && std::isfinite(cap) && std::isfinite(1 / cap));
}

/// Whether an optional matrix was given.
template <class V>
bool given(const V& m) {
  return m.rows() > 0 && m.cols() > 0;
}

/// The arguments of attention_forward and attention_backward, checked.
template <class T>
class AttentionCall {
 public:
  AttentionCall(const char* function, const Plans& plans, ConstView<T> q, ConstView<T> k, ConstView<T> v,
                const AttentionConfig& config, const AttentionTerms<T>& terms)
      : plans_(plans),
        q_(q),
        k_(k),
        v_(v),
        config_(config),
        terms_(terms),
        heads_(config.heads),
        kv_heads_(config.kv_heads == 0 ? config.heads : config.kv_heads) {
    Faults faults(function);
    faults.expect(heads_ >= 1, "heads", "at least 1", heads_);
    faults.expect(heads_ < 1 || (kv_heads_ >= 1 && heads_ % kv_heads_ == 0), "kv_heads", "a divisor of heads",
                  kv_heads_);
    faults.expect(std::isfinite(static_cast<T>(config.scale)), "scale", "a finite number", config.scale);
    faults.expect(config.scales.empty() || Index(config.scales.size()) == heads_, "scales",
                  "none, or one for each head", config.scales.size());
    for (const double scale : config.scales)
      if (!std::isfinite(static_cast<T>(scale))) {
        faults.expect(false, "scales", "finite numbers", scale);
        break;
      }
    faults.expect(is_soft_cap<T>(config.soft_cap), "soft_cap", "0, or a positive number", config.soft_cap);
    faults.expect(config.dropout >= 0 && config.dropout < 1, "dropout", "at least 0 and below 1", config.dropout);
    faults.expect(config.mean_epsilon >= 0 && std::isfinite(config.mean_epsilon), "mean_epsilon",
                  "0, or a positive number", config.mean_epsilon);
    faults.raise();
    if (plans.size() != 1 && plans.size() != kv_heads_ && plans.size() != heads_)
      fail<ShapeError>(
          function, "plans",
          kv_heads_ == heads_ ? join("1 or ", heads_, " plans") : join("1, ", kv_heads_, " or ", heads_, " plans"),
          plans.size());
    const AttentionPlan& plan = plans[0];
    if (config.mean_epsilon != 0 && plan.combine != Combine::mean)
      fail<ValueError>(function, "mean_epsilon", "0 for plans that do not combine by mean", config.mean_epsilon);
    for (Index p = 0; p < plans.size(); ++p) {
      if (Index(plans[p].row_begin.size()) != plans[p].tokens + 1 ||
          plans[p].row_entries.size() != plans[p].entries.size())
        fail<ValueError>(function, "plan", "a plan that a builder or complete() has completed", "an incomplete one");
      if (plans[p].tokens != plan.tokens || plans[p].key_tokens != plan.key_tokens ||
          plans[p].memory_tokens != plan.memory_tokens || plans[p].combine != plan.combine)
        fail<ShapeError>(function, "plans", "plans of the same sizes and combine", join("other ones at ", p));
    }
    d_ = columns_per_head(function, "q", q, heads_);
    dv_ = columns_per_head(function, "v", v, kv_heads_);
    check_shape<T>(function, "q", q, plan.tokens, heads_ * d_);
    check_shape<T>(function, "k", k, plan.key_tokens, kv_heads_ * d_);
    check_shape<T>(function, "v", v, plan.key_tokens, kv_heads_ * dv_);
    check_shape<T>(function, "memory_keys", terms.memory_keys, plan.memory_tokens,
                   plan.memory_tokens ? kv_heads_ * d_ : terms.memory_keys.cols());
    check_shape<T>(function, "memory_values", terms.memory_values, plan.memory_tokens,
                   plan.memory_tokens ? kv_heads_ * dv_ : terms.memory_values.cols());
    if (bias_count() > 0) {
      if (terms.bias.rows() != 1 && terms.bias.rows() != heads_)
        fail<ShapeError>(function, "bias", join("1 row, or one for each of ", heads_, " heads"), terms.bias.rows());
      check_shape<T>(function, "bias", terms.bias, terms.bias.rows(), terms.bias.cols());
    }
    check_relative(function, "relative_keys", terms.relative_keys, d_);
    check_relative(function, "relative_values", terms.relative_values, dv_);
    if (given(terms.relative_keys) && given(terms.relative_values) &&
        terms.relative_keys.rows() != terms.relative_values.rows())
      fail<ShapeError>(function, "relative_values", join(terms.relative_keys.rows(), " rows, as relative_keys"),
                       terms.relative_values.rows());
  }

  void check_output(const char* function, const char* name, View<T> out, Index rows, Index cols) const {
    check_shape<T>(function, name, out, rows, cols);
    check_no_alias<T>(function, name, out, "q", q_);
    check_no_alias<T>(function, name, out, "k", k_);
    check_no_alias<T>(function, name, out, "v", v_);
    check_no_alias<T>(function, name, out, "bias", terms_.bias);
    check_no_alias<T>(function, name, out, "memory_keys", terms_.memory_keys);
    check_no_alias<T>(function, name, out, "memory_values", terms_.memory_values);
    check_no_alias<T>(function, name, out, "relative_keys", terms_.relative_keys);
    check_no_alias<T>(function, name, out, "relative_values", terms_.relative_values);
  }

  const Plans& plans() const { return plans_; }
  const AttentionPlan& plan(Index head) const { return plans_.of(head, heads_); }
  Combine combine() const { return plans_[0].combine; }
  Index tokens() const { return plans_[0].tokens; }
  Index key_tokens() const { return plans_[0].key_tokens; }
  Index memory_tokens() const { return plans_[0].memory_tokens; }
  Index key_rows() const { return key_tokens() + memory_tokens(); }
  Index heads() const { return heads_; }
  Index kv_heads() const { return kv_heads_; }
  Index kv_head(Index head) const { return head / (heads_ / kv_heads_); }
  Index d() const { return d_; }
  Index dv() const { return dv_; }
  Index bias_count() const { return given(terms_.bias) ? terms_.bias.cols() : 0; }
  Index bias_row(Index head) const { return terms_.bias.rows() == 1 ? 0 : head; }
  /// Rows of the tables of relative keys and values.
  Index relative_count() const {
    return given(terms_.relative_keys)     ? terms_.relative_keys.rows()
           : given(terms_.relative_values) ? terms_.relative_values.rows()
                                           : 0;
  }
  /// A head's first column in a table of relative keys or values, of `width` columns a head.
  static Index relative_column(ConstView<T> table, Index head, Index width) {
    return table.cols() == width ? 0 : head * width;
  }
  PartSizes sizes() const { return {d_, dv_, bias_count(), relative_count(), key_rows()}; }
  const AttentionTerms<T>& terms() const { return terms_; }
  std::span<const double> scales() const { return config_.scales; }
  T mean_epsilon() const { return static_cast<T>(config_.mean_epsilon); }

  double scale(Index head) const {
    return !config_.scales.empty() ? config_.scales[std::size_t(head)]
           : config_.scale != 0    ? config_.scale
                                   : 1 / std::sqrt(double(d_));
  }

  /// One logit in double, for diagnostics.
  double logit(Index head, Index row, Index key_row) const {
    const Index kv = kv_head(head);
    const bool memory = key_row >= key_tokens();
    const T* const query = q_.row(row) + head * d_;
    const T* const key = (memory ? terms_.memory_keys.row(key_row - key_tokens()) : k_.row(key_row)) + kv * d_;
    const AttentionPlan& p = plan(head);
    const auto distance = [&] {
      const Index from = p.query_positions.empty() ? row : p.query_positions[std::size_t(row)];
      const Index to = p.key_positions.empty() ? key_row : p.key_positions[std::size_t(key_row)];
      return from - to;
    };
    double sum = 0;
    for (Index c = 0; c < d_; ++c) sum += static_cast<double>(query[c]) * static_cast<double>(key[c]);
    if (given(terms_.relative_keys) && !memory) {
      const Index at = std::clamp<Index>(distance() - terms_.relative_first, 0, relative_count() - 1);
      const T* const relative = terms_.relative_keys.row(at) + relative_column(terms_.relative_keys, head, d_);
      for (Index c = 0; c < d_; ++c) sum += static_cast<double>(query[c]) * static_cast<double>(relative[c]);
    }
    sum *= scale(head);
    if (config_.soft_cap != 0) sum = config_.soft_cap * std::tanh(sum / config_.soft_cap);
    if (bias_count() == 0 || memory) return sum;
    const Index at = std::clamp<Index>(distance() - terms_.bias_first, 0, bias_count() - 1);
    return sum + static_cast<double>(terms_.bias(bias_row(head), at));
  }

  /// What the kernel reads for a part; outputs are left to the caller.
  AttentionArguments<T> part(Index head, const AttentionPlan::Part& piece) const {
    const AttentionPlan& p = plan(head);
    const Index kv = kv_head(head);
    AttentionArguments<T> part;
    part.entries = piece.entry_end - piece.entry_begin;
    part.rows = p.entries.data() + piece.entry_begin;
    part.visible = p.visible.data() + piece.entry_begin;
    part.visible_too = p.visible_too.empty() ? nullptr : p.visible_too.data() + piece.entry_begin;
    part.keys = p.keys.data() + p.groups[std::size_t(piece.group)].key_begin;
    part.q = {q_.data() + head * d_, q_.stride(), q_.rows(), nullptr, 0};
    part.k = source(k_, terms_.memory_keys, kv * d_);
    part.v = source(v_, terms_.memory_values, kv * dv_);
    part.d = d_;
    part.dv = dv_;
    part.scale = static_cast<T>(scale(head));
    part.dropout_bound = dropout_bound(config_);
    if (part.dropout_bound != 0) {
      part.dropout_call = dropout_call(config_, head);
      part.dropout_scale = static_cast<T>(1 / (1 - config_.dropout));
    }
    part.soft_cap = static_cast<T>(config_.soft_cap) * log2_e<T>;
    if (bias_count() > 0) {
      part.bias = terms_.bias.row(bias_row(head));
      part.bias_first = terms_.bias_first;
      part.bias_count = terms_.bias.cols();
    }
    part.relative_count = relative_count();
    part.relative_first = terms_.relative_first;
    const auto table = [head](ConstView<T> given_table, Index width, const T*& rows, Index& stride) {
      if (!given(given_table)) return;
      rows = given_table.data() + relative_column(given_table, head, width);
      stride = given_table.stride();
    };
    table(terms_.relative_keys, d_, part.relative_keys, part.relative_keys_stride);
    table(terms_.relative_values, dv_, part.relative_values, part.relative_values_stride);
    part.query_positions = p.query_positions.empty() ? nullptr : p.query_positions.data();
    part.key_positions = p.key_positions.empty() ? nullptr : p.key_positions.data();
    return part;
  }

 private:
  static Index columns_per_head(const char* function, const char* argument, ConstView<T> m, Index heads) {
    if (m.cols() < heads || m.cols() % heads != 0)
      fail<ShapeError>(function, argument, join("a positive multiple of ", heads, " columns, one block for each head"),
                       join(m.cols(), " columns"));
    return m.cols() / heads;
  }

  void check_relative(const char* function, const char* argument, ConstView<T> table, Index width) const {
    if (table.rows() == 0) return;
    if (table.cols() != width && table.cols() != heads_ * width)
      fail<ShapeError>(function, argument, join(width, " columns, or ", heads_ * width, " for ", heads_, " heads"),
                       table.cols());
    check_shape<T>(function, argument, table, table.rows(), table.cols());
  }

  static RowSource<T> source(ConstView<T> rows, ConstView<T> memory, Index column) {
    const auto from_column = [column](ConstView<T> m) { return m.data() ? m.data() + column : nullptr; };
    return {from_column(rows), rows.stride(), rows.rows(), from_column(memory), memory.stride()};
  }

  Plans plans_;
  ConstView<T> q_, k_, v_;
  AttentionConfig config_;
  AttentionTerms<T> terms_;
  Index heads_, kv_heads_, d_ = 0, dv_ = 0;
};

/// Calls f(i, part) for i in [0, count), at least one, with the parts that make(i) gives; each knows the next one. If there is
/// `more`, make(count) is what this thread will probably turn to afterwards.
template <class T, class Make, class F>
void each_part_in_turn(Index count, bool more, Make&& make, F&& f) {
  AttentionArguments<T> part, next = make(Index(0));
  for (Index i = 0; i < count; ++i) {
    part = next;
    if (i + 1 < count || more) {
      next = make(i + 1);
      part.next = &next;
    }
    f(i, part);
  }
}

/// The tasks of heads [head_begin, head_end), head by head.
class HeadTasks {
 public:
  HeadTasks(const Plans& plans, Index heads, Index head_begin, Index head_end, Arena& arena)
      : head_begin_(head_begin), heads_(head_end - head_begin), ends_(arena.take<Index>(heads_)) {
    Index end = 0;
    for (Index i = 0; i < heads_; ++i) ends_[i] = end += plans.of(head_begin + i, heads).tasks();
  }

  Index count() const { return heads_ == 0 ? 0 : ends_[heads_ - 1]; }

  /// (head, task of its plan)
  std::pair<Index, Index> operator[](Index i) const {
    const Index head = std::upper_bound(ends_, ends_ + heads_, i) - ends_;
    return {head_begin_ + head, head == 0 ? i : i - ends_[head - 1]};
  }

 private:
  Index head_begin_, heads_;
  Index* ends_;
};

/// Rows of a task that walks all rows of a call.
inline constexpr Index row_chunk = 1024;

/// Writes the rows of a head that no single entry has written: those without an entry, and those with several to combine.
template <class T>
void combine_rows(const AttentionCall<T>& call, Index head, View<T> out, const SoftmaxStates<T>& states,
                  View<T> entry_out, const SoftmaxStates<T>& entry_states, Context& context) {
  const AttentionPlan& plan = call.plan(head);
  const bool single = plan.combine == Combine::single, mean = plan.combine == Combine::mean;
  if (single && Index(plan.entries.size()) == plan.tokens) return;
  const Index dv = call.dv();
  context.for_chunks(plan.tokens, row_chunk, [&](Index begin, Index end, Index) {
    for (Index i = begin; i < end; ++i) {
      const std::int32_t* entries = plan.row_entries.data() + plan.row_begin[std::size_t(i)];
      const Index count = plan.row_begin[std::size_t(i) + 1] - plan.row_begin[std::size_t(i)];
      if (single && count == 1) continue;
      T* to = out.row(i) + head * dv;
      std::fill_n(to, dv, T(0));
      T most = std::numeric_limits<T>::lowest(), sum = 0;
      bool sees = false;
      for (Index e = 0; e < count; ++e)
        if (sees_key(plan, entries[e])) {
          sees = true;
          most = std::max(most, entry_states.reference[entries[e]]);
        }
      for (Index e = 0; e < count; ++e) {
        const std::int32_t entry = entries[e];
        if (!sees_key(plan, entry)) continue;
        // mean: out = sum_e out_e / m; lse: out = sum_e weight_e out_e / sum, weight_e = sum_j 2^(logit_ej - most)
        const T weight = mean ? T(1) : std::exp2(entry_states.reference[entry] - most) / entry_states.inverse[entry];
        if (weight == 0) continue;  // an output of no weight may be no number
        sum += weight;
        const T* from = entry_out.row(entry);
        for (Index c = 0; c < dv; ++c) to[c] += weight * from[c];
      }
      if (mean) sum += call.mean_epsilon();
      if (sees)
        for (Index c = 0; c < dv; ++c) to[c] /= sum;
      const Index at = i * states.stride;
      if (states.reference) states.reference[at] = most;
      if (states.inverse) states.inverse[at] = sees ? T(1) / sum : T(0);
      if (states.lse) states.lse[at] = sees ? most * ln_2<T> + std::log(sum) : -std::numeric_limits<T>::infinity();
    }
  });
}

/// Per entry of a Combine::mean plan: 1 / (entries of its row that see a key + epsilon).
template <class T>
T* entry_weights(const AttentionPlan& plan, T epsilon, T* weights) {
  for (Index i = 0; i < plan.tokens; ++i) {
    Index seeing = 0;
    const Index begin = plan.row_begin[std::size_t(i)], end = plan.row_begin[std::size_t(i) + 1];
    for (Index j = begin; j < end; ++j) seeing += sees_key(plan, plan.row_entries[std::size_t(j)]);
    for (Index j = begin; j < end; ++j)
      weights[plan.row_entries[std::size_t(j)]] = seeing > 0 ? T(1) / (static_cast<T>(seeing) + epsilon) : T(0);
  }
  return weights;
}

/// d_q of a row += the gradients of its entries, in order.
template <class T>
void add_entry_rows(const AttentionPlan& plan, View<T> entry_d_q, View<T> d_q, Context& context) {
  context.for_chunks(plan.tokens, row_chunk, [&](Index begin, Index end, Index) {
    for (Index i = begin; i < end; ++i)
      for (Index j = plan.row_begin[std::size_t(i)]; j < plan.row_begin[std::size_t(i) + 1]; ++j) {
        const T* from = entry_d_q.row(plan.row_entries[std::size_t(j)]);
        for (Index c = 0; c < d_q.cols(); ++c) d_q(i, c) += from[c];
      }
  });
}

/// The arguments of attention_backward beyond those of the forward call.
template <class T>
void check_backward(const char* function, const AttentionCall<T>& call, ConstView<T> out, const AttentionTape<T>& tape,
                    ConstView<T> d_out, View<T> d_q, View<T> d_k, View<T> d_v,
                    const AttentionTermGradients<T>& gradients) {
  const Index tokens = call.tokens(), keys = call.key_tokens(), memory = call.memory_tokens(), heads = call.heads();
  check_shape<T>(function, "out", out, tokens, heads * call.dv());
  check_shape<T>(function, "d_out", d_out, tokens, heads * call.dv());
  if (tape.tokens() != tokens || tape.heads() != heads || tape.combine() != call.combine())
    fail<ShapeError>(function, "tape",
                     join("the tape of a forward call with ", tokens, " tokens and ", heads, " heads"),
                     join("one of ", tape.tokens(), " and ", tape.heads()));
  if (call.combine() == Combine::mean)
    for (Index h = 0; h < heads; ++h)
      if (tape.entry_out(h).rows() != Index(call.plan(h).entries.size()) || tape.entry_out(h).cols() != call.dv())
        fail<ShapeError>(function, "tape", "the tape of a forward call with the same plans", "another one");

  struct Output {
    const char* name;
    View<T> view;
    Index rows, cols;
    bool wanted;
  };
  const Output outputs[] = {
      {"d_q", d_q, tokens, heads * call.d(), true},
      {"d_k", d_k, keys, call.kv_heads() * call.d(), true},
      {"d_v", d_v, keys, call.kv_heads() * call.dv(), true},
      {"d_bias", gradients.d_bias, call.terms().bias.rows(), call.bias_count(), given(gradients.d_bias)},
      {"d_memory_keys", gradients.d_memory_keys, memory, call.kv_heads() * call.d(), given(gradients.d_memory_keys)},
      {"d_memory_values", gradients.d_memory_values, memory, call.kv_heads() * call.dv(),
       given(gradients.d_memory_values)},
      {"d_relative_keys", gradients.d_relative_keys, call.terms().relative_keys.rows(),
       call.terms().relative_keys.cols(), given(gradients.d_relative_keys)},
      {"d_relative_values", gradients.d_relative_values, call.terms().relative_values.rows(),
       call.terms().relative_values.cols(), given(gradients.d_relative_values)},
  };
  for (const Output& output : outputs) {
    if (!output.wanted) continue;
    call.check_output(function, output.name, output.view, output.rows, output.cols);
    check_no_alias<T>(function, output.name, output.view, "out", out);
    check_no_alias<T>(function, output.name, output.view, "d_out", d_out);
    check_no_alias<T>(function, output.name, output.view, "d_lse", gradients.d_lse);
    for (const Output* other = outputs; other != &output; ++other)
      if (other->wanted) check_no_alias<T>(function, output.name, output.view, other->name, other->view);
  }
  const std::less<const double*> before;
  const std::span<const double> scales = call.scales(), d_scales = gradients.d_scales;
  if (!d_scales.empty() && !scales.empty() && before(d_scales.data(), scales.data() + scales.size()) &&
      before(scales.data(), d_scales.data() + d_scales.size()))
    fail<ShapeError>(function, "d_scales", "storage of its own", "an overlap with scales");
  if (!gradients.d_scales.empty() && Index(gradients.d_scales.size()) != heads)
    fail<ShapeError>(function, "d_scales", join("none, or one for each of ", heads, " heads"),
                     gradients.d_scales.size());
  if (given(gradients.d_lse)) {
    if (call.combine() == Combine::mean)
      fail<ValueError>(function, "d_lse", "none for Combine::mean, which has no lse", "a matrix");
    check_shape<T>(function, "d_lse", gradients.d_lse, tokens, heads);
  }
}

}  // namespace coterie::detail
