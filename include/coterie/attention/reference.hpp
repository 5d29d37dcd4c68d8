// Attention by its definition, in plain loops over any scalar: the judge of every fast path, and the yardstick.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "coterie/attention/call.hpp"
#include "coterie/attention/config.hpp"

namespace coterie {
namespace detail {

/// The definition, one query row and head at a time, written for reading and not for speed.
///
/// In double it is the judge. In the scalar type of a fast path it is what a careful user would write: the yardstick of
/// that path's rounding.
template <class T>
class Reference {
 public:
  Reference(const char* function, const Plans& plans, Same<ConstView<T>> q, Same<ConstView<T>> k, Same<ConstView<T>> v,
            const AttentionConfig& config, const AttentionTerms<T>& terms)
      : call_(function, plans, q, k, v, config, terms) {}

  const AttentionCall<T>& call() const { return call_; }
  T scale(Index head) const { return static_cast<T>(call_.scale(head)); }

  /// One softmax of a query row: its keys, and the share of its result in the row's output.
  struct Softmax {
    std::vector<Index> keys;
    T share = 1;
  };

  /// The softmaxes of a row that see at least one key: one over all its entries, or for the mean one per entry.
  std::vector<Softmax> softmaxes(Index head, Index row) const {
    const AttentionPlan& p = call_.plan(head);
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
    for (Softmax& softmax : result) softmax.share = 1 / (static_cast<T>(result.size()) + call_.mean_epsilon());
    return result;
  }

  const T* query(Index head, Index row) const { return call_.q().row(row) + head * call_.d(); }

  /// Whether a pair has a distance: memory rows have no position.
  bool has_distance(Index key_row) const { return key_row < call_.key_tokens(); }

  /// A pair's key or value: the row's own plus the one for the pair's distance, if there is one.
  struct Row {
    const T* own;
    const T* relative;
    T operator[](Index l) const { return relative == nullptr ? own[l] : own[l] + relative[l]; }
  };
  Row key(Index head, Index query_row, Index key_row) const {
    return row(head, query_row, key_row, call_.k(), call_.terms().memory_keys, call_.terms().relative_keys, call_.d());
  }
  Row value(Index head, Index query_row, Index key_row) const {
    return row(head, query_row, key_row, call_.v(), call_.terms().memory_values, call_.terms().relative_values,
               call_.dv());
  }

  bool has_bias(Index key_row) const { return call_.bias_count() > 0 && has_distance(key_row); }
  /// A pair's element of the bias table, or of its gradient.
  template <class V>
  decltype(auto) bias_of(const V& table, Index head, Index query_row, Index key_row) const {
    return table(call_.bias_row(head),
                 call_.terms().bias.entry(call_.distance(head, query_row, key_row), call_.bias_count()));
  }

  /// A pair's row in a table of relative keys or values, or in its gradient, from the head's first column on.
  template <class V>
  auto relative_of(const V& rows, Index first, Index head, Index query_row, Index key_row, Index width) const {
    const DistanceTable<T> table(rows, first);
    return rows.row(table.entry(call_.distance(head, query_row, key_row), rows.rows())) +
           AttentionCall<T>::relative_column(rows, head, width);
  }

  /// q . k, before scale and bias.
  T dot(Index head, Index query_row, Index key_row) const {
    const T* const q_row = query(head, query_row);
    const Row k_row = key(head, query_row, key_row);
    T sum = 0;
    for (Index l = 0; l < call_.d(); ++l) sum += q_row[l] * k_row[l];
    return sum;
  }

  /// The derivative of a capped logit by scale q . k.
  T slope(Index head, Index query_row, Index key_row) const {
    const T cap = static_cast<T>(call_.config().soft_cap);
    if (cap == 0) return 1;
    const T y = std::tanh(scale(head) * dot(head, query_row, key_row) / cap);
    return 1 - y * y;
  }

  /// What becomes of a pair's probability: 0 where it is dropped.
  T kept(Index head, Index query_row, Index key_row) const {
    const AttentionConfig& config = call_.config();
    if (config.dropout == 0) return 1;
    const std::uint64_t call = dropout_call(config, head);
    const Index memory = key_row - call_.key_tokens();
    const std::uint32_t key_bits =
        memory < 0 ? row_bits(call, RowKind::key, key_row) : row_bits(call, RowKind::memory, memory);
    const std::uint32_t bits = pair_bits(row_bits(call, RowKind::query, query_row) ^ key_bits);
    return bits < dropout_bound(config) ? T(0) : static_cast<T>(1 / (1 - config.dropout));
  }

  /// Probabilities of the softmax's keys; returns its log-sum-exp.
  T probabilities(Index head, Index row, const Softmax& softmax, std::vector<T>& p) const {
    const T cap = static_cast<T>(call_.config().soft_cap);
    p.clear();
    T most = -std::numeric_limits<T>::infinity();
    for (const Index key_row : softmax.keys) {
      T logit = scale(head) * dot(head, row, key_row);
      if (cap != 0) logit = cap * std::tanh(logit / cap);
      if (has_bias(key_row)) logit += bias_of(call_.terms().bias.rows, head, row, key_row);
      p.push_back(logit);
      most = logit > most ? logit : most;
    }
    T sum = 0;
    for (T& x : p) {
      x = std::exp(x - most);
      sum += x;
    }
    for (T& x : p) x /= sum;
    return most + std::log(sum);
  }

 private:
  Row row(Index head, Index query_row, Index key_row, ConstView<T> rows, ConstView<T> memory,
          const DistanceTable<T>& relative, Index width) const {
    const Index own = call_.key_tokens(), column = call_.kv_head(head) * width;
    if (!has_distance(key_row)) return {memory.row(key_row - own) + column, nullptr};
    const T* const by_distance =
        given(relative.rows) ? relative_of(relative.rows, relative.first, head, query_row, key_row, width) : nullptr;
    return {rows.row(key_row) + column, by_distance};
  }

  AttentionCall<T> call_;
};

template <class T>
void reference_forward(const Plans& plans, ConstView<T> q, ConstView<T> k, ConstView<T> v, View<T> out, View<T> lse,
                       const AttentionConfig& config, const AttentionTerms<T>& terms) {
  const char* const function = "reference_forward";
  const Reference<T> reference(function, plans, q, k, v, config, terms);
  const Index dv = reference.call().dv(), heads = config.heads, tokens = plans[0].tokens;
  const bool wants_lse = lse.cols() > 0;
  reference.call().check_output(function, "out", out, tokens, heads * dv);
  if (wants_lse && plans[0].combine == Combine::mean)
    fail<ShapeError>(function, "lse", "an empty view for Combine::mean", "a matrix");
  if (wants_lse) reference.call().check_output(function, "lse", lse, tokens, heads);
  check_no_alias<T>(function, "lse", lse, "out", out);

  std::vector<T> p;
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < tokens; ++i) {
      for (Index l = 0; l < dv; ++l) out(i, h * dv + l) = 0;
      if (wants_lse) lse(i, h) = -std::numeric_limits<T>::infinity();
      for (const auto& softmax : reference.softmaxes(h, i)) {
        const T log_sum = reference.probabilities(h, i, softmax, p);
        if (wants_lse) lse(i, h) = log_sum;
        // out_i += share sum_j p_ij v_j
        for (std::size_t j = 0; j < p.size(); ++j) {
          const auto value = reference.value(h, i, softmax.keys[j]);
          const T used = softmax.share * p[j] * reference.kept(h, i, softmax.keys[j]);
          for (Index l = 0; l < dv; ++l) out(i, h * dv + l) += used * value[l];
        }
      }
    }
}

template <class T>
void reference_backward(const Plans& plans, ConstView<T> q, ConstView<T> k, ConstView<T> v, ConstView<T> d_out,
                        const AttentionGradients<T>& gradients, const AttentionConfig& config,
                        const AttentionTerms<T>& terms) {
  const char* const function = "reference_backward";
  const Reference<T> reference(function, plans, q, k, v, config, terms);
  check_gradients<T>(function, reference.call(), {}, d_out, gradients);
  const Index d = reference.call().d(), dv = reference.call().dv(), heads = config.heads;
  const Index tokens = plans[0].tokens, key_tokens = plans[0].key_tokens;
  const AttentionTermGradients<T>& d_terms = gradients.terms;
  const auto add_row = [](Index width, T factor, const T* x, T* to) {
    for (Index l = 0; l < width; ++l) to[l] += factor * x[l];
  };

  std::vector<T> p, dp;
  for (Index h = 0; h < heads; ++h) {
    const T scale = reference.scale(h);
    const Index kv_head = reference.call().kv_head(h);
    for (Index i = 0; i < tokens; ++i)
      for (const auto& softmax : reference.softmaxes(h, i)) {
        reference.probabilities(h, i, softmax, p);
        const T* const g = d_out.row(i) + h * dv;
        const T* const q_i = reference.query(h, i);
        dp.assign(p.size(), 0);
        T mean = 0;  // sum_j p_ij dp_ij
        for (std::size_t j = 0; j < p.size(); ++j) {
          const auto value = reference.value(h, i, softmax.keys[j]);
          for (Index l = 0; l < dv; ++l) dp[j] += softmax.share * g[l] * value[l];
          dp[j] *= reference.kept(h, i, softmax.keys[j]);
          mean += p[j] * dp[j];
        }
        for (std::size_t j = 0; j < p.size(); ++j) {
          const Index key_row = softmax.keys[j];
          const T d_logit = p[j] * (dp[j] - mean + (given(d_terms.d_lse) ? d_terms.d_lse(i, h) : T(0)));
          const T ds = d_logit * reference.slope(h, i, key_row);
          const T used = softmax.share * p[j] * reference.kept(h, i, key_row);
          const auto k_j = reference.key(h, i, key_row);
          for (Index l = 0; l < d; ++l) gradients.d_q(i, h * d + l) += scale * ds * k_j[l];
          const bool memory = key_row >= key_tokens;
          const View<T> d_keys = memory ? d_terms.d_memory_keys : gradients.d_k;
          const View<T> d_values = memory ? d_terms.d_memory_values : gradients.d_v;
          const Index row = memory ? key_row - key_tokens : key_row;
          if (given(d_keys)) add_row(d, scale * ds, q_i, d_keys.row(row) + kv_head * d);
          if (given(d_values)) add_row(dv, used, g, d_values.row(row) + kv_head * dv);
          if (!d_terms.d_scales.empty())
            d_terms.d_scales[static_cast<std::size_t>(h)] += static_cast<double>(ds * reference.dot(h, i, key_row));
          if (given(d_terms.d_bias) && reference.has_bias(key_row))
            reference.bias_of(d_terms.d_bias, h, i, key_row) += d_logit;
          const auto relative_row = [&](View<T> d_table, const DistanceTable<T>& table, Index width) {
            return reference.relative_of(d_table, table.first, h, i, key_row, width);
          };
          if (given(d_terms.d_relative_keys) && !memory)
            add_row(d, scale * ds, q_i, relative_row(d_terms.d_relative_keys, terms.relative_keys, d));
          if (given(d_terms.d_relative_values) && !memory)
            add_row(dv, used, g, relative_row(d_terms.d_relative_values, terms.relative_values, dv));
        }
      }
  }
}

}  // namespace detail

/// Attention along a plan by its definition: slow, plain, in double or in float.
///
/// Shapes: q tokens x heads*d, k key_tokens x kv_heads*d, v key_tokens x kv_heads*dv, out tokens x heads*dv; lse
///   tokens x heads, or empty when it is not wanted. Combine::mean has none.
/// Formula: out_i = sum_j p_ij v_j, p_i = softmax over visible j of (scale q_i.k_j + bias[i - j]), lse_i its
///   log-sum-exp. With a soft cap, cap tanh(scale q_i.k_j / cap) stands for scale q_i.k_j. Several entries: one softmax
///   over all (lse), or the mean over the entries that see a key (mean). k_j and v_j are sums with the rows of
///   relative_keys and relative_values for the distance of i and j. A row that sees no key: out 0, lse minus infinity.
/// Requires: what attention_forward requires (its errors).
/// Adds or overwrites: overwrites out and lse.
/// Allocates: lists of keys and probabilities of each row.
inline void reference_forward(const Plans& plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                              View<double> out, View<double> lse, const AttentionConfig& config,
                              const AttentionTerms<double>& terms = {}) {
  detail::reference_forward<double>(plans, q, k, v, out, lse, config, terms);
}
inline void reference_forward(const Plans& plans, ConstView<float> q, ConstView<float> k, ConstView<float> v,
                              View<float> out, View<float> lse, const AttentionConfig& config,
                              const AttentionTerms<float>& terms = {}) {
  detail::reference_forward<float>(plans, q, k, v, out, lse, config, terms);
}

/// Gradients of reference_forward, recomputing what they need.
///
/// Shapes: as in reference_forward; d_out as out, d_q, d_k, d_v as q, k, v. Gradients of terms may be left out.
/// Formula: with g = share d_out_i: dp_ij = g.v_j (0 where dropped), ds_ij = p_ij (dp_ij - sum_l p_il dp_il + d_lse_i);
///   d_v_j += p_ij g, d_q_i += scale ds_ij k_j, d_k_j += scale ds_ij q_i, d_scale += ds_ij q_i.k_j, d_bias += ds_ij;
///   a row of d_relative_keys and d_relative_values adds what d_k_j and d_v_j add, over the pairs of its distance.
/// Requires: what attention_backward requires of these arguments (its errors).
/// Adds or overwrites: adds.
/// Allocates: as reference_forward.
inline void reference_backward(const Plans& plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                               ConstView<double> d_out, View<double> d_q, View<double> d_k, View<double> d_v,
                               const AttentionConfig& config, const AttentionTerms<double>& terms = {},
                               const AttentionTermGradients<double>& gradients = {}) {
  detail::reference_backward<double>(plans, q, k, v, d_out, {d_q, d_k, d_v, gradients}, config, terms);
}
inline void reference_backward(const Plans& plans, ConstView<float> q, ConstView<float> k, ConstView<float> v,
                               ConstView<float> d_out, View<float> d_q, View<float> d_k, View<float> d_v,
                               const AttentionConfig& config, const AttentionTerms<float>& terms = {},
                               const AttentionTermGradients<float>& gradients = {}) {
  detail::reference_backward<float>(plans, q, k, v, d_out, {d_q, d_k, d_v, gradients}, config, terms);
}

}  // namespace coterie
