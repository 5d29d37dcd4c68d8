// Rows with no or several entries: what becomes of them, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "coterie/attention/call.hpp"
#include "coterie/core/context.hpp"
#include "coterie/kernel/arguments.hpp"

namespace coterie::detail {

/// Rows of a task that walks all rows of a call.
inline constexpr Index row_chunk = 1024;

/// Writes the rows of a head that no single entry has written: those without an entry, and those with several to combine.
///
/// A row that sees no key gets the empty state: output 0, log-sum-exp minus infinity. It is the identity element of
/// attention_merge, and of combining entries, where those that see no key are left out.
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
          most = (std::max)(most, entry_states.reference[entries[e]]);
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

}  // namespace coterie::detail
