// Attention by its definition: plain loops in double, the judge of every fast path.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "coterie/attention/config.hpp"

namespace coterie {
namespace detail {

/// The definition, one query row and head at a time, written for reading and not for speed.
class Reference {
 public:
  Reference(const char* function, Plans plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
            const AttentionConfig& config, const AttentionTerms<double>& terms)
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
    faults.expect(kv_heads_ >= 1 && (heads_ < 1 || heads_ % kv_heads_ == 0), "kv_heads", "a divisor of heads",
                  kv_heads_);
    faults.expect(config.scales.empty() || Index(config.scales.size()) == heads_, "scales", "none or one per head",
                  config.scales.size());
    faults.expect(config.soft_cap >= 0, "soft_cap", "0, or a positive number", config.soft_cap);
    faults.expect(config.dropout >= 0 && config.dropout < 1, "dropout", "at least 0 and below 1", config.dropout);
    faults.raise();
    faults.expect(plans.size() == 1 || plans.size() == kv_heads_ || plans.size() == heads_, "plans",
                  "1, kv_heads or heads of them", plans.size());
    faults.raise();
    for (Index p = 0; p < plans.size(); ++p)
      if (static_cast<Index>(plans[p].row_begin.size()) != plans[p].tokens + 1)
        fail<ValueError>(function, "plans", "completed plans", join("one without row_begin at ", p));
    d_ = q.cols() / heads_;
    dv_ = v.cols() / kv_heads_;
    const AttentionPlan& plan = plans[0];
    for (Index p = 1; p < plans.size(); ++p)
      if (plans[p].tokens != plan.tokens || plans[p].key_tokens != plan.key_tokens ||
          plans[p].memory_tokens != plan.memory_tokens || plans[p].combine != plan.combine)
        fail<ValueError>(function, "plans", "plans of equal sizes and combine", join("another at ", p));
    check_shape(function, "q", q, plan.tokens, heads_ * d_);
    check_shape(function, "k", k, plan.key_tokens, kv_heads_ * d_);
    check_shape(function, "v", v, plan.key_tokens, kv_heads_ * dv_);
    if (plan.memory_tokens > 0) {
      check_shape(function, "memory_keys", terms.memory_keys, plan.memory_tokens, kv_heads_ * d_);
      check_shape(function, "memory_values", terms.memory_values, plan.memory_tokens, kv_heads_ * dv_);
    }
    if (terms.bias.cols() > 0 && terms.bias.rows() != 1 && terms.bias.rows() != heads_)
      fail<ShapeError>(function, "bias", "1 row, or one per head", terms.bias.rows());
    const auto fits = [&](ConstView<double> table, Index width) {
      return table.rows() == 0 || table.cols() == width || table.cols() == heads_ * width;
    };
    if (!fits(terms.relative_keys, d_))
      fail<ShapeError>(function, "relative_keys", "d or heads*d columns", terms.relative_keys.cols());
    if (!fits(terms.relative_values, dv_))
      fail<ShapeError>(function, "relative_values", "dv or heads*dv columns", terms.relative_values.cols());
  }

  Index d() const { return d_; }
  Index dv() const { return dv_; }
  Index heads() const { return heads_; }
  Index kv_heads() const { return kv_heads_; }
  const AttentionPlan& plan(Index head) const { return plans_.of(head, heads_); }
  Index kv_head(Index head) const { return head / (heads_ / kv_heads_); }

  double scale(Index head) const {
    if (!config_.scales.empty()) return config_.scales[static_cast<std::size_t>(head)];
    return config_.scale != 0 ? config_.scale : 1 / std::sqrt(static_cast<double>(d_));
  }

  /// One softmax of a query row: its keys, and the share of its result in the row's output.
  struct Softmax {
    std::vector<Index> keys;
    double share = 1;
  };

  /// The softmaxes of a row that see at least one key: one over all its entries, or for the mean one per entry.
  std::vector<Softmax> softmaxes(Index head, Index row) const {
    const AttentionPlan& p = plan(head);
    std::vector<Softmax> result;
    const auto i = static_cast<std::size_t>(row);
    for (std::int32_t j = p.row_begin[i]; j < p.row_begin[i + 1]; ++j) {
      const auto entry = static_cast<std::size_t>(p.row_entries[static_cast<std::size_t>(j)]);
      std::vector<Index> keys;
      const auto see = [&](const AttentionPlan::Group& group, Interval interval) {
        for (std::int32_t rank = interval.begin; rank < interval.end; ++rank)
          keys.push_back(p.keys[static_cast<std::size_t>(group.key_begin + rank)]);
      };
      for (const AttentionPlan::Group& group : p.groups)
        if (group.entry_begin <= Index(entry) && Index(entry) < group.entry_end) {
          see(group, p.visible[entry]);
          if (!p.visible_too.empty()) see(group, p.visible_too[entry]);
        }
      if (keys.empty()) continue;
      if (p.combine == Combine::mean || result.empty())
        result.push_back({keys, 1});
      else
        result[0].keys.insert(result[0].keys.end(), keys.begin(), keys.end());
    }
    for (Softmax& softmax : result)
      softmax.share =
          1 / (static_cast<double>(result.size()) + (p.combine == Combine::mean ? config_.mean_epsilon : 0));
    return result;
  }

  const double* query(Index head, Index row) const { return q_.row(row) + head * d_; }

  /// A pair's key or value: the row's own plus the one for the pair's distance, if there is one.
  struct Row {
    const double* own;
    const double* relative;
    double operator[](Index l) const { return relative == nullptr ? own[l] : own[l] + relative[l]; }
  };
  Row key(Index head, Index query_row, Index key_row) const {
    const Index own = plan(head).key_tokens;
    return {(key_row < own ? k_.row(key_row) : terms_.memory_keys.row(key_row - own)) + kv_head(head) * d_,
            relative(head, query_row, key_row, terms_.relative_keys, d_)};
  }
  Row value(Index head, Index query_row, Index key_row) const {
    const Index own = plan(head).key_tokens;
    return {(key_row < own ? v_.row(key_row) : terms_.memory_values.row(key_row - own)) + kv_head(head) * dv_,
            relative(head, query_row, key_row, terms_.relative_values, dv_)};
  }

  /// Memory rows have no position.
  bool has_bias(Index head, Index key_row) const { return terms_.bias.cols() > 0 && key_row < plan(head).key_tokens; }
  /// Row and column of a pair's element in the bias table.
  Index bias_row(Index head) const { return terms_.bias.rows() == 1 ? 0 : head; }
  Index bias_column(Index head, Index query_row, Index key_row) const {
    return at_distance(head, query_row, key_row, terms_.bias_first, terms_.bias.cols());
  }

  bool has_relative(Index head, ConstView<double> table, Index key_row) const {
    return table.rows() > 0 && key_row < plan(head).key_tokens;
  }
  /// Row of a pair in the relative tables, and the head's first column in one of them.
  Index relative_row(Index head, Index query_row, Index key_row, ConstView<double> table) const {
    return at_distance(head, query_row, key_row, terms_.relative_first, table.rows());
  }
  Index relative_column(Index head, ConstView<double> table, Index width) const {
    return table.cols() == width ? 0 : head * width;
  }

  /// q . k, before scale and bias.
  double dot(Index head, Index query_row, Index key_row) const {
    const double* const q_row = query(head, query_row);
    const Row k_row = key(head, query_row, key_row);
    double sum = 0;
    for (Index l = 0; l < d_; ++l) sum += q_row[l] * k_row[l];
    return sum;
  }

  /// The derivative of a capped logit by scale q . k.
  double slope(Index head, Index query_row, Index key_row) const {
    if (config_.soft_cap == 0) return 1;
    const double y = std::tanh(scale(head) * dot(head, query_row, key_row) / config_.soft_cap);
    return 1 - y * y;
  }

  /// What becomes of a pair's probability: 0 where it is dropped.
  double kept(Index head, Index query_row, Index key_row) const {
    if (config_.dropout == 0) return 1;
    const std::uint64_t call = dropout_call(config_, head);
    const Index memory = key_row - plan(head).key_tokens;
    const std::uint32_t key_bits =
        memory < 0 ? row_bits(call, RowKind::key, key_row) : row_bits(call, RowKind::memory, memory);
    const std::uint32_t bits = pair_bits(row_bits(call, RowKind::query, query_row) ^ key_bits);
    return bits < dropout_bound(config_) ? 0 : 1 / (1 - config_.dropout);
  }

  /// Probabilities of the softmax's keys; returns its log-sum-exp.
  double probabilities(Index head, Index row, const Softmax& softmax, std::vector<double>& p) const {
    p.clear();
    double most = -std::numeric_limits<double>::infinity();
    for (const Index key_row : softmax.keys) {
      double logit = scale(head) * dot(head, row, key_row);
      if (config_.soft_cap != 0) logit = config_.soft_cap * std::tanh(logit / config_.soft_cap);
      if (has_bias(head, key_row)) logit += terms_.bias(bias_row(head), bias_column(head, row, key_row));
      p.push_back(logit);
      most = logit > most ? logit : most;
    }
    double sum = 0;
    for (double& x : p) {
      x = std::exp(x - most);
      sum += x;
    }
    for (double& x : p) x /= sum;
    return most + std::log(sum);
  }

 private:
  Index at_distance(Index head, Index query_row, Index key_row, Index first, Index count) const {
    const AttentionPlan& p = plan(head);
    const Index from = p.query_positions.empty() ? query_row : p.query_positions[static_cast<std::size_t>(query_row)];
    const Index to = p.key_positions.empty() ? key_row : p.key_positions[static_cast<std::size_t>(key_row)];
    const Index at = from - to - first;
    if (at < 0) return 0;
    return at < count ? at : count - 1;
  }

  const double* relative(Index head, Index query_row, Index key_row, ConstView<double> table, Index width) const {
    if (!has_relative(head, table, key_row)) return nullptr;
    return table.row(relative_row(head, query_row, key_row, table)) + relative_column(head, table, width);
  }

  Plans plans_;
  ConstView<double> q_, k_, v_;
  const AttentionConfig& config_;
  const AttentionTerms<double>& terms_;
  Index heads_, kv_heads_, d_ = 0, dv_ = 0;
};

}  // namespace detail

/// Attention along a plan by its definition: slow, plain, in double.
/// Shapes: q tokens x heads*d, k key_tokens x kv_heads*d, v key_tokens x kv_heads*dv, out tokens x heads*dv; lse
///   tokens x heads, or empty when it is not wanted; for Combine::mean there is none.
/// Formula: out_i = sum_j p_ij v_j, p_i = softmax over visible j of (scale q_i.k_j + bias[i - j]), lse_i its
///   log-sum-exp; with a soft cap, cap tanh(scale q_i.k_j / cap) for scale q_i.k_j; several entries: one softmax over all (lse), or the mean over the entries that see a key (mean).
///   k_j and v_j are sums with the rows of relative_keys and relative_values for the distance of i and j.
///   A row that sees nothing: out 0, lse -inf.
/// Requires: complete() has been called on the plans; shapes that fit, otherwise ShapeError or ValueError.
/// Adds or overwrites: overwrites out and lse.
inline void reference_forward(Plans plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                              View<double> out, View<double> lse, const AttentionConfig& config,
                              const AttentionTerms<double>& terms = {}) {
  const char* const function = "reference_forward";
  const detail::Reference reference(function, plans, q, k, v, config, terms);
  const Index dv = reference.dv(), heads = reference.heads(), tokens = plans[0].tokens;
  const bool wants_lse = lse.cols() > 0;
  detail::check_shape<double>(function, "out", out, tokens, heads * dv);
  if (wants_lse && plans[0].combine == Combine::mean)
    detail::fail<ShapeError>(function, "lse", "an empty view for Combine::mean", "a matrix");
  if (wants_lse) detail::check_shape<double>(function, "lse", lse, tokens, heads);

  std::vector<double> p;
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < tokens; ++i) {
      for (Index l = 0; l < dv; ++l) out(i, h * dv + l) = 0;
      if (wants_lse) lse(i, h) = -std::numeric_limits<double>::infinity();
      for (const auto& softmax : reference.softmaxes(h, i)) {
        const double log_sum = reference.probabilities(h, i, softmax, p);
        if (wants_lse) lse(i, h) = log_sum;
        // out_i += share sum_j p_ij v_j
        for (std::size_t j = 0; j < p.size(); ++j) {
          const auto value = reference.value(h, i, softmax.keys[j]);
          const double used = softmax.share * p[j] * reference.kept(h, i, softmax.keys[j]);
          for (Index l = 0; l < dv; ++l) out(i, h * dv + l) += used * value[l];
        }
      }
    }
}

/// Gradients of reference_forward, recomputing what they need.
/// Shapes: as in reference_forward; d_out as out, d_q, d_k, d_v as q, k, v. Gradients of terms may be left out.
/// Formula: with g = share d_out_i: dp_ij = g.v_j (0 where dropped), ds_ij = p_ij (dp_ij - sum_l p_il dp_il + d_lse_i);
///   d_v_j += p_ij g, d_q_i += scale ds_ij k_j, d_k_j += scale ds_ij q_i, d_scale += ds_ij q_i.k_j, d_bias += ds_ij;
///   a row of d_relative_keys and d_relative_values adds what d_k_j and d_v_j add, over the pairs of its distance.
/// Requires: as reference_forward.
/// Adds or overwrites: adds.
inline void reference_backward(Plans plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                               ConstView<double> d_out, View<double> d_q, View<double> d_k, View<double> d_v,
                               const AttentionConfig& config, const AttentionTerms<double>& terms = {},
                               const AttentionTermGradients<double>& gradients = {}) {
  const char* const function = "reference_backward";
  const detail::Reference reference(function, plans, q, k, v, config, terms);
  const Index d = reference.d(), dv = reference.dv(), heads = reference.heads();
  const Index tokens = plans[0].tokens, key_tokens = plans[0].key_tokens;
  const bool has_d_lse = gradients.d_lse.cols() > 0;
  detail::check_shape<double>(function, "d_out", d_out, tokens, heads * dv);
  detail::check_shape<double>(function, "d_q", d_q, tokens, q.cols());
  detail::check_shape<double>(function, "d_k", d_k, key_tokens, k.cols());
  detail::check_shape<double>(function, "d_v", d_v, key_tokens, v.cols());
  if (has_d_lse) {
    detail::check_shape<double>(function, "d_lse", gradients.d_lse, tokens, heads);
    if (plans[0].combine == Combine::mean)
      detail::fail<ShapeError>(function, "d_lse", "an empty view for Combine::mean", "a matrix");
  }
  if (gradients.d_bias.cols() > 0)
    detail::check_shape<double>(function, "d_bias", gradients.d_bias, terms.bias.rows(), terms.bias.cols());
  if (gradients.d_memory_keys.cols() > 0)
    detail::check_shape<double>(function, "d_memory_keys", gradients.d_memory_keys, plans[0].memory_tokens, k.cols());
  if (gradients.d_memory_values.cols() > 0)
    detail::check_shape<double>(function, "d_memory_values", gradients.d_memory_values, plans[0].memory_tokens,
                                v.cols());
  if (gradients.d_relative_keys.rows() > 0)
    detail::check_shape<double>(function, "d_relative_keys", gradients.d_relative_keys, terms.relative_keys.rows(),
                                terms.relative_keys.cols());
  if (gradients.d_relative_values.rows() > 0)
    detail::check_shape<double>(function, "d_relative_values", gradients.d_relative_values,
                                terms.relative_values.rows(), terms.relative_values.cols());
  if (!gradients.d_scales.empty() && static_cast<Index>(gradients.d_scales.size()) != heads)
    detail::fail<ShapeError>(function, "d_scales", "one per head", gradients.d_scales.size());

  std::vector<double> p, dp;
  for (Index h = 0; h < heads; ++h) {
    const double scale = reference.scale(h);
    const Index kv_head = reference.kv_head(h);
    for (Index i = 0; i < tokens; ++i)
      for (const auto& softmax : reference.softmaxes(h, i)) {
        reference.probabilities(h, i, softmax, p);
        const double* const g = d_out.row(i) + h * dv;
        dp.assign(p.size(), 0);
        double mean = 0;  // sum_j p_ij dp_ij
        for (std::size_t j = 0; j < p.size(); ++j) {
          const auto value = reference.value(h, i, softmax.keys[j]);
          for (Index l = 0; l < dv; ++l) dp[j] += softmax.share * g[l] * value[l];
          dp[j] *= reference.kept(h, i, softmax.keys[j]);
          mean += p[j] * dp[j];
        }
        for (std::size_t j = 0; j < p.size(); ++j) {
          const Index key_row = softmax.keys[j];
          const double d_logit = p[j] * (dp[j] - mean + (has_d_lse ? gradients.d_lse(i, h) : 0));
          const double ds = d_logit * reference.slope(h, i, key_row);
          const double used = softmax.share * p[j] * reference.kept(h, i, key_row);
          const double* const q_i = reference.query(h, i);
          const auto k_j = reference.key(h, i, key_row);
          for (Index l = 0; l < d; ++l) d_q(i, h * d + l) += scale * ds * k_j[l];
          if (key_row < key_tokens) {
            for (Index l = 0; l < d; ++l) d_k(key_row, kv_head * d + l) += scale * ds * q_i[l];
            for (Index l = 0; l < dv; ++l) d_v(key_row, kv_head * dv + l) += used * g[l];
          } else {
            const Index row = key_row - key_tokens;
            if (gradients.d_memory_keys.cols() > 0)
              for (Index l = 0; l < d; ++l) gradients.d_memory_keys(row, kv_head * d + l) += scale * ds * q_i[l];
            if (gradients.d_memory_values.cols() > 0)
              for (Index l = 0; l < dv; ++l) gradients.d_memory_values(row, kv_head * dv + l) += used * g[l];
          }
          if (!gradients.d_scales.empty())
            gradients.d_scales[static_cast<std::size_t>(h)] += ds * reference.dot(h, i, key_row);
          if (gradients.d_bias.cols() > 0 && reference.has_bias(h, key_row))
            gradients.d_bias(reference.bias_row(h), reference.bias_column(h, i, key_row)) += d_logit;
          const auto add = [&](View<double> to, ConstView<double> table, Index width, double factor, const double* x) {
            if (to.rows() == 0 || !reference.has_relative(h, table, key_row)) return;
            const Index row = reference.relative_row(h, i, key_row, table);
            const Index column = reference.relative_column(h, table, width);
            for (Index l = 0; l < width; ++l) to(row, column + l) += factor * x[l];
          };
          add(gradients.d_relative_keys, terms.relative_keys, d, scale * ds, q_i);
          add(gradients.d_relative_values, terms.relative_values, dv, used, g);
        }
      }
  }
}

}  // namespace coterie
