// Recall: how much of the attention along a wider plan a narrower one keeps, in mass and in outputs. For
// choosing clusters and windows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "coterie/attention/call.hpp"
#include "coterie/attention/config.hpp"
#include "coterie/core/context.hpp"
#include "coterie/core/random.hpp"

namespace coterie {

/// Settings of attention_recall.
struct RecallConfig {
  Index queries = 256;     ///< query rows that are measured, drawn without repetition; all where there are no more
  std::uint64_t seed = 0;  ///< of the draw
};

/// Shares of the wider plan's probability mass on keys that the plan shows too; with values, also what is lost of the
/// outputs.
struct AttentionRecall {
  std::vector<Index> queries;  ///< the rows measured, ascending, without those that see nothing in a head's wider plan
  double mean = 0;             ///< over those rows and all heads
  std::vector<double> heads;   ///< mean of each head
  std::vector<double> rows;    ///< of queries[i] and head h at i * heads + h

  double error = 0;                 ///< of the outputs: mean over heads; without values 0, and the lists are empty
  double worst_error = 0;           ///< that of the head with the largest one
  std::vector<double> head_errors;  ///< of each head: root of the mean square over the rows
  std::vector<double> row_errors;   ///< in the order of rows
};

namespace detail {

/// Sets `sees[key]` to `value` for the keys that a row sees.
inline void mark_keys(const AttentionPlan& plan, Index row, char value, std::vector<char>& sees) {
  for (std::int32_t j = plan.row_begin[std::size_t(row)]; j < plan.row_begin[std::size_t(row) + 1]; ++j) {
    const std::int32_t entry = plan.row_entries[std::size_t(j)];
    const std::int32_t* const keys = plan.keys.data() + group_of(plan, entry).key_begin;
    const auto mark = [&](Interval seen) {
      for (std::int32_t rank = seen.begin; rank < seen.end; ++rank) sees[std::size_t(keys[rank])] = value;
    };
    mark(plan.visible[std::size_t(entry)]);
    mark(second_interval(plan, std::size_t(entry)));
  }
}

/// Adds a pair's value, the one for its distance included, times `factor` to `sum`.
template <class T>
void add_value(const AttentionCall<T>& call, Index head, Index row, Index key_row, double factor,
               std::vector<double>& sum) {
  const Index dv = call.dv(), column = call.kv_head(head) * dv;
  const bool memory = key_row >= call.key_tokens();
  const ConstView<T> table = call.terms().relative_values.rows;
  const T* const own =
      (memory ? call.terms().memory_values.row(key_row - call.key_tokens()) : call.v().row(key_row)) + column;
  const T* const relative =
      !given(table) || memory
          ? nullptr
          : table.row(call.terms().relative_values.entry(call.distance(head, row, key_row), table.rows())) +
                AttentionCall<T>::relative_column(table, head, dv);
  for (Index c = 0; c < dv; ++c) {
    const double value = static_cast<double>(own[c]) + (relative ? static_cast<double>(relative[c]) : 0);
    sum[std::size_t(c)] += factor * value;
  }
}

/// |some - all| / |all|; 0 where both are zero.
inline double relative_error(const std::vector<double>& some, const std::vector<double>& all) {
  double difference = 0, square = 0;
  for (std::size_t c = 0; c < all.size(); ++c) {
    difference += (some[c] - all[c]) * (some[c] - all[c]);
    square += all[c] * all[c];
  }
  return difference == 0 ? 0 : std::sqrt(difference / square);
}

/// v: null where outputs are not asked for.
template <class T>
AttentionRecall attention_recall(const Plans& plans, const Plans& full, ConstView<T> q, ConstView<T> k,
                                 const ConstView<T>* v, const AttentionConfig& config, const RecallConfig& recall,
                                 Context& context, const AttentionTerms<T>& terms) {
  const char* const function = "attention_recall";
  AttentionTerms<T> checked = terms;
  if (v == nullptr) {  // keys stand in for values
    checked.memory_values = terms.memory_keys;
    checked.relative_values = {};
  }
  const AttentionCall<T> call(function, plans, q, k, v ? *v : k, config, checked);
  const AttentionCall<T> wider(function, full, q, k, v ? *v : k, config, checked);
  if (recall.queries < 1) fail<ValueError>(function, "queries", "at least 1", recall.queries);

  const std::vector<Index> rows = draw_rows(call.tokens(), recall.queries, recall.seed);
  const Index heads = call.heads(), count = static_cast<Index>(rows.size()), key_rows = call.key_rows();
  AttentionRecall result;
  result.rows.assign(static_cast<std::size_t>(count * heads), -1.0);
  if (v) result.row_errors.assign(result.rows.size(), 0.0);
  struct Scratch {
    std::vector<char> sees, kept;
    std::vector<double> logits, some, all;  // logits; outputs
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(context.workers()));
  context.for_each(count, [&](Index i, Index worker) {
    Scratch& s = scratch[static_cast<std::size_t>(worker)];
    s.sees.resize(static_cast<std::size_t>(key_rows), 0);
    s.kept.resize(static_cast<std::size_t>(key_rows), 0);
    s.logits.resize(static_cast<std::size_t>(key_rows));
    const Index row = rows[static_cast<std::size_t>(i)];
    for (Index h = 0; h < heads; ++h) {
      const AttentionPlan &plan = call.plan(h), &all = wider.plan(h);
      mark_keys(all, row, 1, s.sees);
      mark_keys(plan, row, 1, s.kept);
      double most = -std::numeric_limits<double>::infinity();
      for (Index key = 0; key < key_rows; ++key)
        if (s.sees[std::size_t(key)]) {
          s.logits[std::size_t(key)] = wider.logit(h, row, key);
          most = (std::max)(most, s.logits[std::size_t(key)]);
        }
      double sum = 0, kept = 0;
      if (v) {
        s.some.assign(static_cast<std::size_t>(wider.dv()), 0.0);
        s.all = s.some;
      }
      bool sees_any = false;
      for (Index key = 0; key < key_rows; ++key)
        if (s.sees[std::size_t(key)]) {
          const double p = std::exp(s.logits[std::size_t(key)] - most);
          sum += p;
          sees_any = true;
          if (s.kept[std::size_t(key)]) kept += p;
          if (!v) continue;
          add_value(wider, h, row, key, p, s.all);
          if (s.kept[std::size_t(key)]) add_value(wider, h, row, key, p, s.some);
        }
      const auto at = static_cast<std::size_t>(i * heads + h);
      if (sees_any) result.rows[at] = kept / sum;
      if (v && sees_any) {
        for (double& x : s.all) x /= sum;
        if (kept != 0)
          for (double& x : s.some) x /= kept;
        result.row_errors[at] = relative_error(s.some, s.all);
      }
      mark_keys(all, row, 0, s.sees);
      mark_keys(plan, row, 0, s.kept);
    }
  });
  // Rows that see nothing in the wider plan have no share.
  result.heads.assign(static_cast<std::size_t>(heads), 0.0);
  if (v) result.head_errors = result.heads;
  Index kept = 0;
  for (Index i = 0; i < count; ++i) {
    const double* const from = result.rows.data() + i * heads;
    if (std::any_of(from, from + heads, [](double share) { return share < 0; })) continue;
    for (Index h = 0; h < heads; ++h) {
      result.heads[static_cast<std::size_t>(h)] += from[h];
      result.rows[static_cast<std::size_t>(kept * heads + h)] = from[h];
      if (!v) continue;
      const double error = result.row_errors[static_cast<std::size_t>(i * heads + h)];
      result.row_errors[static_cast<std::size_t>(kept * heads + h)] = error;
      result.head_errors[static_cast<std::size_t>(h)] += error * error;
    }
    result.queries.push_back(rows[static_cast<std::size_t>(i)]);
    ++kept;
  }
  result.rows.resize(static_cast<std::size_t>(kept * heads));
  for (double& share : result.heads) {
    if (kept > 0) share /= static_cast<double>(kept);
    result.mean += share / static_cast<double>(heads);
  }
  if (v) result.row_errors.resize(result.rows.size());
  for (double& error : result.head_errors) {
    if (kept > 0) error = std::sqrt(error / static_cast<double>(kept));
    result.error += error / static_cast<double>(heads);
    if (std::isnan(error) || error > result.worst_error) result.worst_error = error;  // NaN stays
  }
  return result;
}

}  // namespace detail

/// The share of the probability mass of attention along `full` (mostly a dense plan) on keys that `plan` shows too, for
/// sampled queries: 1 where nothing is lost.
///
/// Shapes: as in attention_forward; both plans of the same tokens and keys. How a plan combines several entries does
///   not matter: the keys of all of them count, once.
/// Formula: recall_i = sum of p_ij over j that plan shows, p_i the softmax over the keys of full, at full's positions;
///   without dropout. NaN where a logit is NaN.
/// Requires: as attention_forward, and at least one query (ShapeError, ValueError).
/// Allocates: its result and marks, key rows for each worker. Not for inner loops.
/// Threads and determinism: the same numbers for any number of workers.
/// Cost: 2 d operations per sampled query, head and key, in double and plain loops.
/// Source: ours.
inline AttentionRecall attention_recall(const Plans& plan, const Plans& full, ConstView<float> q, ConstView<float> k,
                                        const AttentionConfig& config, const RecallConfig& recall, Context& context,
                                        const AttentionTerms<float>& terms = {}) {
  return detail::attention_recall<float>(plan, full, q, k, nullptr, config, recall, context, terms);
}
inline AttentionRecall attention_recall(const Plans& plan, const Plans& full, ConstView<double> q, ConstView<double> k,
                                        const AttentionConfig& config, const RecallConfig& recall, Context& context,
                                        const AttentionTerms<double>& terms = {}) {
  return detail::attention_recall<double>(plan, full, q, k, nullptr, config, recall, context, terms);
}

/// The same, and how far the outputs are from those of `full`, if only the keys that `plan` shows are attended to.
///
/// Shapes: v key tokens x kv_heads*dv.
/// Formula: error_i = |out'_i - out_i| / |out_i|, out_i = sum of p_ij v_j over the keys of full, out'_i the same sum
///   over those of them that plan shows, divided by recall_i; zero where there are none.
/// Requires: as attention_forward (ShapeError, ValueError).
/// Cost: 2 (d + dv) operations per sampled query, head and key.
inline AttentionRecall attention_recall(const Plans& plan, const Plans& full, ConstView<float> q, ConstView<float> k,
                                        ConstView<float> v, const AttentionConfig& config, const RecallConfig& recall,
                                        Context& context, const AttentionTerms<float>& terms = {}) {
  return detail::attention_recall<float>(plan, full, q, k, &v, config, recall, context, terms);
}
inline AttentionRecall attention_recall(const Plans& plan, const Plans& full, ConstView<double> q, ConstView<double> k,
                                        ConstView<double> v, const AttentionConfig& config, const RecallConfig& recall,
                                        Context& context, const AttentionTerms<double>& terms = {}) {
  return detail::attention_recall<double>(plan, full, q, k, &v, config, recall, context, terms);
}

}  // namespace coterie
