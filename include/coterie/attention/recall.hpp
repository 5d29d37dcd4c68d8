// Recall: the share of the attention along a wider plan that a narrower one keeps. For choosing clusters and windows.
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

/// Shares of the wider plan's probability mass on keys that the plan shows too.
struct AttentionRecall {
  std::vector<Index> queries;  ///< the rows measured, ascending, without those that see nothing in a head's wider plan
  double mean = 0;             ///< over those rows and all heads
  std::vector<double> heads;   ///< mean of each head
  std::vector<double> rows;    ///< of queries[i] and head h at i * heads + h
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

template <class T>
AttentionRecall attention_recall(const Plans& plans, const Plans& full, ConstView<T> q, ConstView<T> k,
                                 const AttentionConfig& config, const RecallConfig& recall, Context& context,
                                 const AttentionTerms<T>& terms) {
  const char* const function = "attention_recall";
  // Values do not matter: keys stand in for them.
  const ConstView<T> memory = terms.memory_keys;
  AttentionTerms<T> checked = terms;
  checked.memory_values = memory;
  checked.relative_values = {};
  const AttentionCall<T> call(function, plans, q, k, k, config, checked);
  const AttentionCall<T> wider(function, full, q, k, k, config, checked);
  if (recall.queries < 1) fail<ValueError>(function, "queries", "at least 1", recall.queries);

  const std::vector<Index> rows = draw_rows(call.tokens(), recall.queries, recall.seed);
  const Index heads = call.heads(), count = static_cast<Index>(rows.size()), key_rows = call.key_rows();
  AttentionRecall result;
  result.rows.assign(static_cast<std::size_t>(count * heads), -1.0);
  struct Scratch {
    std::vector<char> sees, kept;
    std::vector<double> logits;
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
      bool sees_any = false;
      for (Index key = 0; key < key_rows; ++key)
        if (s.sees[std::size_t(key)]) {
          const double p = std::exp(s.logits[std::size_t(key)] - most);
          sum += p;
          sees_any = true;
          if (s.kept[std::size_t(key)]) kept += p;
        }
      if (sees_any) result.rows[static_cast<std::size_t>(i * heads + h)] = kept / sum;
      mark_keys(all, row, 0, s.sees);
      mark_keys(plan, row, 0, s.kept);
    }
  });
  // Rows that see nothing in the wider plan have no share.
  result.heads.assign(static_cast<std::size_t>(heads), 0.0);
  Index kept = 0;
  for (Index i = 0; i < count; ++i) {
    const double* const from = result.rows.data() + i * heads;
    if (std::any_of(from, from + heads, [](double share) { return share < 0; })) continue;
    for (Index h = 0; h < heads; ++h) {
      result.heads[static_cast<std::size_t>(h)] += from[h];
      result.rows[static_cast<std::size_t>(kept * heads + h)] = from[h];
    }
    result.queries.push_back(rows[static_cast<std::size_t>(i)]);
    ++kept;
  }
  result.rows.resize(static_cast<std::size_t>(kept * heads));
  for (double& share : result.heads) {
    if (kept > 0) share /= static_cast<double>(kept);
    result.mean += share / static_cast<double>(heads);
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
  return detail::attention_recall<float>(plan, full, q, k, config, recall, context, terms);
}
inline AttentionRecall attention_recall(const Plans& plan, const Plans& full, ConstView<double> q, ConstView<double> k,
                                        const AttentionConfig& config, const RecallConfig& recall, Context& context,
                                        const AttentionTerms<double>& terms = {}) {
  return detail::attention_recall<double>(plan, full, q, k, config, recall, context, terms);
}

}  // namespace coterie
