// The checked arguments of a call of attention, forward and backward.
#pragma once

#include <cmath>
#include <functional>
#include <span>

#include "coterie/attention/config.hpp"
#include "coterie/attention/tape.hpp"
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
  /// Throws ValueError or ShapeError, which names `function` and the argument at fault.
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
      const ConstView<T> bias = terms.bias.rows;
      if (bias.rows() != 1 && bias.rows() != heads_)
        fail<ShapeError>(function, "bias", join("1 row, or one for each of ", heads_, " heads"), bias.rows());
      check_shape<T>(function, "bias", bias, bias.rows(), bias.cols());
    }
    const DistanceTable<T>&keys = terms.relative_keys, &values = terms.relative_values;
    check_relative(function, "relative_keys", keys.rows, d_);
    check_relative(function, "relative_values", values.rows, dv_);
    if (given(keys.rows) && given(values.rows)) {
      if (keys.rows.rows() != values.rows.rows())
        fail<ShapeError>(function, "relative_values", join(keys.rows.rows(), " rows, as relative_keys"),
                         values.rows.rows());
      if (keys.first != values.first)
        fail<ValueError>(function, "relative_values", join("distances from ", keys.first, " on, as relative_keys"),
                         values.first);
    }
  }

  void check_output(const char* function, const char* name, View<T> out, Index rows, Index cols) const {
    check_shape<T>(function, name, out, rows, cols);
    check_no_alias<T>(function, name, out, "q", q_);
    check_no_alias<T>(function, name, out, "k", k_);
    check_no_alias<T>(function, name, out, "v", v_);
    check_no_alias<T>(function, name, out, "bias", terms_.bias.rows);
    check_no_alias<T>(function, name, out, "memory_keys", terms_.memory_keys);
    check_no_alias<T>(function, name, out, "memory_values", terms_.memory_values);
    check_no_alias<T>(function, name, out, "relative_keys", terms_.relative_keys.rows);
    check_no_alias<T>(function, name, out, "relative_values", terms_.relative_values.rows);
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
  Index bias_count() const { return given(terms_.bias.rows) ? terms_.bias.rows.cols() : 0; }
  Index bias_row(Index head) const { return terms_.bias.rows.rows() == 1 ? 0 : head; }
  /// Rows of the tables of relative keys and values, and the distance of the first.
  Index relative_count() const { return given(relative().rows) ? relative().rows.rows() : 0; }
  Index relative_first() const { return relative().first; }
  /// A head's first column in a table of relative keys or values, of `width` columns a head.
  static Index relative_column(ConstView<T> table, Index head, Index width) {
    return table.cols() == width ? 0 : head * width;
  }
  PartSizes sizes() const { return {d_, dv_, bias_count(), relative_count(), key_rows()}; }
  ConstView<T> q() const { return q_; }
  ConstView<T> k() const { return k_; }
  ConstView<T> v() const { return v_; }
  const AttentionConfig& config() const { return config_; }
  const AttentionTerms<T>& terms() const { return terms_; }
  std::span<const double> scales() const { return config_.scales; }
  T mean_epsilon() const { return static_cast<T>(config_.mean_epsilon); }

  double scale(Index head) const {
    return !config_.scales.empty() ? config_.scales[std::size_t(head)]
           : config_.scale != 0    ? config_.scale
                                   : 1 / std::sqrt(double(d_));
  }

  /// Query position - key position.
  Index distance(Index head, Index row, Index key_row) const {
    const AttentionPlan& p = plan(head);
    const Index from = p.query_positions.empty() ? row : p.query_positions[std::size_t(row)];
    const Index to = p.key_positions.empty() ? key_row : p.key_positions[std::size_t(key_row)];
    return from - to;
  }

  /// One logit in double, for diagnostics.
  double logit(Index head, Index row, Index key_row) const {
    const Index kv = kv_head(head);
    const bool memory = key_row >= key_tokens();
    const T* const query = q_.row(row) + head * d_;
    const T* const key = (memory ? terms_.memory_keys.row(key_row - key_tokens()) : k_.row(key_row)) + kv * d_;
    double sum = 0;
    for (Index c = 0; c < d_; ++c) sum += static_cast<double>(query[c]) * static_cast<double>(key[c]);
    if (given(terms_.relative_keys.rows) && !memory) {
      const ConstView<T> table = terms_.relative_keys.rows;
      const Index at = terms_.relative_keys.entry(distance(head, row, key_row), table.rows());
      const T* const relative = table.row(at) + relative_column(table, head, d_);
      for (Index c = 0; c < d_; ++c) sum += static_cast<double>(query[c]) * static_cast<double>(relative[c]);
    }
    sum *= scale(head);
    if (config_.soft_cap != 0) sum = config_.soft_cap * std::tanh(sum / config_.soft_cap);
    if (bias_count() == 0 || memory) return sum;
    const Index at = terms_.bias.entry(distance(head, row, key_row), bias_count());
    return sum + static_cast<double>(terms_.bias.rows(bias_row(head), at));
  }

  /// What the kernel reads for a part; outputs are left to the caller.
  AttentionArguments<T> arguments(Index head, const AttentionPlan::Part& part) const {
    const AttentionPlan& p = plan(head);
    const Index kv = kv_head(head);
    AttentionArguments<T> arguments;
    arguments.entries = part.entry_end - part.entry_begin;
    arguments.rows = p.entries.data() + part.entry_begin;
    arguments.visible = p.visible.data() + part.entry_begin;
    arguments.visible_too = p.visible_too.empty() ? nullptr : p.visible_too.data() + part.entry_begin;
    arguments.keys = p.keys.data() + p.groups[std::size_t(part.group)].key_begin;
    arguments.q = {q_.data() + head * d_, q_.stride(), q_.rows(), nullptr, 0};
    arguments.k = source(k_, terms_.memory_keys, kv * d_);
    arguments.v = source(v_, terms_.memory_values, kv * dv_);
    arguments.d = d_;
    arguments.dv = dv_;
    arguments.scale = static_cast<T>(scale(head));
    arguments.dropout_bound = dropout_bound(config_);
    if (arguments.dropout_bound != 0) {
      arguments.dropout_call = dropout_call(config_, head);
      arguments.dropout_scale = static_cast<T>(1 / (1 - config_.dropout));
    }
    arguments.soft_cap = static_cast<T>(config_.soft_cap) * log2_e<T>;
    if (bias_count() > 0) {
      arguments.bias = terms_.bias.rows.row(bias_row(head));
      arguments.bias_first = terms_.bias.first;
      arguments.bias_count = bias_count();
    }
    arguments.relative_count = relative_count();
    arguments.relative_first = relative_first();
    const auto use_table = [head](ConstView<T> table, Index width, const T*& rows, Index& stride) {
      if (!given(table)) return;
      rows = table.data() + relative_column(table, head, width);
      stride = table.stride();
    };
    use_table(terms_.relative_keys.rows, d_, arguments.relative_keys, arguments.relative_keys_stride);
    use_table(terms_.relative_values.rows, dv_, arguments.relative_values, arguments.relative_values_stride);
    arguments.query_positions = p.query_positions.empty() ? nullptr : p.query_positions.data();
    arguments.key_positions = p.key_positions.empty() ? nullptr : p.key_positions.data();
    return arguments;
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

  /// Either table: where both are given, their distances are the same.
  const DistanceTable<T>& relative() const {
    return given(terms_.relative_keys.rows) ? terms_.relative_keys : terms_.relative_values;
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

/// What attention_backward adds into.
template <class T>
struct AttentionGradients {
  View<T> d_q, d_k, d_v;
  AttentionTermGradients<T> terms;
};

/// The arguments of attention_backward beyond those of the forward call: the gradient that it starts from, and what it adds
/// into. `out` is forward's, or empty where it is not read.
template <class T>
void check_gradients(const char* function, const AttentionCall<T>& call, Same<ConstView<T>> out,
                     Same<ConstView<T>> d_out, const AttentionGradients<T>& gradients) {
  const Index tokens = call.tokens(), keys = call.key_tokens(), memory = call.memory_tokens(), heads = call.heads();
  const Index kv_heads = call.kv_heads();
  const AttentionTerms<T>& terms = call.terms();
  const AttentionTermGradients<T>& d_terms = gradients.terms;
  check_shape<T>(function, "d_out", d_out, tokens, heads * call.dv());

  struct Output {
    const char* name;
    View<T> view;
    Index rows, cols;
    bool wanted;
  };
  const auto optional = [](const char* name, View<T> view, Index rows, Index cols) {
    return Output{name, view, rows, cols, given(view)};
  };
  const auto as = [&](const char* name, View<T> view, ConstView<T> table) {
    return optional(name, view, table.rows(), table.cols());
  };
  const Output outputs[] = {
      {"d_q", gradients.d_q, tokens, heads * call.d(), true},
      {"d_k", gradients.d_k, keys, kv_heads * call.d(), true},
      {"d_v", gradients.d_v, keys, kv_heads * call.dv(), true},
      optional("d_bias", d_terms.d_bias, terms.bias.rows.rows(), call.bias_count()),
      optional("d_memory_keys", d_terms.d_memory_keys, memory, kv_heads * call.d()),
      optional("d_memory_values", d_terms.d_memory_values, memory, kv_heads * call.dv()),
      as("d_relative_keys", d_terms.d_relative_keys, terms.relative_keys.rows),
      as("d_relative_values", d_terms.d_relative_values, terms.relative_values.rows),
  };
  for (const Output& output : outputs) {
    if (!output.wanted) continue;
    call.check_output(function, output.name, output.view, output.rows, output.cols);
    check_no_alias<T>(function, output.name, output.view, "out", out);
    check_no_alias<T>(function, output.name, output.view, "d_out", d_out);
    check_no_alias<T>(function, output.name, output.view, "d_lse", d_terms.d_lse);
    for (const Output* other = outputs; other != &output; ++other)
      if (other->wanted) check_no_alias<T>(function, output.name, output.view, other->name, other->view);
  }
  const std::less<const double*> before;
  const std::span<const double> scales = call.scales(), d_scales = d_terms.d_scales;
  if (!d_scales.empty() && !scales.empty() && before(d_scales.data(), scales.data() + scales.size()) &&
      before(scales.data(), d_scales.data() + d_scales.size()))
    fail<ShapeError>(function, "d_scales", "storage of its own", "an overlap with scales");
  if (!d_scales.empty() && Index(d_scales.size()) != heads)
    fail<ShapeError>(function, "d_scales", join("none, or one for each of ", heads, " heads"), d_scales.size());
  if (given(d_terms.d_lse)) {
    if (call.combine() == Combine::mean)
      fail<ValueError>(function, "d_lse", "none for Combine::mean, which has no lse", "a matrix");
    check_shape<T>(function, "d_lse", d_terms.d_lse, tokens, heads);
  }
}

/// Whether out and tape may be those of a forward call with the same arguments.
template <class T>
void check_tape(const char* function, const AttentionCall<T>& call, ConstView<T> out, const AttentionTape<T>& tape) {
  const Index tokens = call.tokens(), heads = call.heads();
  check_shape<T>(function, "out", out, tokens, heads * call.dv());
  if (tape.tokens() != tokens || tape.heads() != heads || tape.combine() != call.combine())
    fail<ShapeError>(function, "tape",
                     join("the tape of a forward call with ", tokens, " tokens and ", heads, " heads"),
                     join("one of ", tape.tokens(), " and ", tape.heads()));
  if (call.combine() == Combine::mean)
    for (Index h = 0; h < heads; ++h)
      if (tape.entry_out(h).rows() != Index(call.plan(h).entries.size()) || tape.entry_out(h).cols() != call.dv())
        fail<ShapeError>(function, "tape", "the tape of a forward call with the same plans", "another one");
}

}  // namespace coterie::detail
