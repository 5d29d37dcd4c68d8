// The builder that makes the plan of a pattern: groups of equal labels, and an interval for each query.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "coterie/core/cluster_members.hpp"
#include "coterie/plan/complete.hpp"
#include "coterie/plan/pattern.hpp"

namespace coterie::detail {

/// Sorts rows stably by bucket_of(row) in [0, buckets), by counting; rows in bucket -1 are left out. The rows are those
/// of `rows`, or 0 to count - 1 where it is null. `ends` has room for buckets + 1 numbers, and gets the end of each
/// bucket in `sorted`.
template <class BucketOf>
void counting_sort(const std::int32_t* rows, Index count, Index buckets, BucketOf bucket_of, std::int32_t* ends,
                   std::vector<std::int32_t>& sorted) {
  std::fill(ends, ends + buckets + 1, 0);
  const auto row_at = [rows](Index i) { return rows == nullptr ? static_cast<std::int32_t>(i) : rows[i]; };
  for (Index i = 0; i < count; ++i) {
    const std::int32_t bucket = bucket_of(row_at(i));
    if (bucket >= 0) ++ends[bucket + 1];
  }
  for (Index bucket = 0; bucket < buckets; ++bucket) ends[bucket + 1] += ends[bucket];
  sorted.resize(static_cast<std::size_t>(ends[buckets]));
  for (Index i = 0; i < count; ++i) {
    const std::int32_t row = row_at(i);
    const std::int32_t bucket = bucket_of(row);
    if (bucket >= 0) sorted[static_cast<std::size_t>(ends[bucket]++)] = row;
  }
}

/// Makes the plan of a pattern. Labels: one per row, in [-1, clusters); both empty: all rows are in cluster 0.
///
/// Groups are the (sequence, cluster) that have a query or a key, sequence by sequence. `scratch`: kept by the caller,
/// or null: the builder's own. After std::bad_alloc the plan is left without derived arrays.
class PlanBuilder {
 public:
  PlanBuilder(const Pattern& pattern, AttentionPlan& plan, PlanScratch* scratch)
      : pattern_(pattern), plan_(plan), scratch_(scratch != nullptr ? *scratch : own_) {}
  PlanBuilder(const PlanBuilder&) = delete;
  PlanBuilder& operator=(const PlanBuilder&) = delete;

  /// Builds with labels label_of(position): the aligned position of a query, the position of a key.
  template <class LabelOf>
  void build_by_position(LabelOf label_of) {
    divide_scratch(pattern_.tokens + pattern_.keys);
    std::int32_t* const query_labels = scratch_.numbers.data();
    std::int32_t* const key_labels = query_labels + pattern_.tokens;
    for (Index s = 0; s < pattern_.sequences(); ++s) {
      const Sequence sequence = pattern_.sequence(s);
      for (Index i = 0; i < sequence.tokens; ++i)
        query_labels[sequence.query_begin + i] = label_of(sequence.position(sequence.query_begin + i));
      for (Index j = 0; j < sequence.keys; ++j) key_labels[sequence.key_begin + j] = label_of(j);
    }
    build_divided({query_labels, static_cast<std::size_t>(pattern_.tokens)},
                  {key_labels, static_cast<std::size_t>(pattern_.keys)});
  }

  void build(std::span<const std::int32_t> query_labels, std::span<const std::int32_t> key_labels) {
    divide_scratch(0);
    build_divided(query_labels, key_labels);
  }

  /// Builds with lists of the rows of every (sequence, cluster) instead of labels; a row may be in several.
  void build(const ClusterMembers& queries, const ClusterMembers& keys, Combine combine) {
    lists_ = true;
    begin_plan(combine);
    one_list_ = note_sequences() && &queries == &keys;
    entry_ends_ = queries.begin.data() + 1;
    key_ends_ = keys.begin.data() + 1;
    plan_.entries.assign(queries.rows.begin(), queries.rows.end());
    plan_.keys.assign(keys.rows.begin(), keys.rows.end());
    make_groups();
    complete(plan_, &scratch_);
    if (combine == Combine::lse && pattern_.self == Self::only_if_alone) leave_self_out();
  }

  /// Scratch memory, free until build().
  std::vector<std::int32_t>& numbers() { return scratch_.numbers; }

 private:
  void begin_plan(Combine combine) {
    clear_derived(plan_);  // so that an unfinished plan is refused
    plan_.tokens = pattern_.tokens;
    plan_.key_tokens = pattern_.keys;
    plan_.memory_tokens = 0;
    plan_.combine = combine;
  }

  // Divides scratch memory into `labels` labels, the sequence of every row where there are several, and the ends of the
  // buckets of sorted queries and keys.
  void divide_scratch(Index labels) {
    const Index rows = pattern_.sequences() > 1 ? pattern_.tokens + pattern_.keys : 0;
    const Index ends = (std::max)(pattern_.clusters, pattern_.sequences()) + 1;
    const auto size = static_cast<std::size_t>(labels + rows + 2 * ends);
    std::vector<std::int32_t>& numbers = scratch_.numbers;
    if (numbers.size() < size) numbers.resize(size);
    if (rows > 0) {
      query_sequences_ = numbers.data() + labels;
      key_sequences_ = query_sequences_ + pattern_.tokens;
    }
    ends_ = numbers.data() + labels + rows;
    more_ends_ = ends_ + ends;
  }

  void build_divided(std::span<const std::int32_t> query_labels, std::span<const std::int32_t> key_labels) {
    query_labels_ = query_labels;
    key_labels_ = key_labels;
    begin_plan(Combine::single);
    const bool same_labels = std::equal(query_labels.begin(), query_labels.end(), key_labels.begin(), key_labels.end());
    one_list_ = note_sequences() && same_labels;  // self-attention
    sort(query_labels_, pattern_.tokens, query_sequences_, ends_, plan_.entries);
    entry_ends_ = key_ends_ = ends_;
    if (one_list_) {
      plan_.keys = plan_.entries;
    } else {
      key_ends_ = more_ends_;
      sort(key_labels_, pattern_.keys, key_sequences_, more_ends_, plan_.keys);
    }
    make_groups();
    complete(plan_, &scratch_);
  }

  // Writes the sequence of every row, and positions where row numbers do not give the distances. True where they do:
  // queries and keys have the same rows in every sequence.
  bool note_sequences() {
    bool by_rows = true;
    for (Index s = 0; s < pattern_.sequences(); ++s) {
      const Sequence sequence = pattern_.sequence(s);
      by_rows = by_rows && sequence.has_equal_lengths() && sequence.query_begin == sequence.key_begin;
      if (query_sequences_ == nullptr) continue;
      std::fill_n(query_sequences_ + sequence.query_begin, sequence.tokens, static_cast<std::int32_t>(s));
      std::fill_n(key_sequences_ + sequence.key_begin, sequence.keys, static_cast<std::int32_t>(s));
    }
    plan_.query_positions.resize(static_cast<std::size_t>(by_rows ? 0 : pattern_.tokens));
    plan_.key_positions.resize(static_cast<std::size_t>(by_rows ? 0 : pattern_.keys));
    if (by_rows) return true;
    for (Index s = 0; s < pattern_.sequences(); ++s) {
      const Sequence sequence = pattern_.sequence(s);
      for (Index i = sequence.query_begin; i < sequence.query_begin + sequence.tokens; ++i)
        plan_.query_positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(sequence.position(i));
      for (Index j = 0; j < sequence.keys; ++j)
        plan_.key_positions[static_cast<std::size_t>(sequence.key_begin + j)] = static_cast<std::int32_t>(j);
    }
    return false;
  }

  // Sorts by cluster, then stably by sequence: linear also for many clusters and many short sequences. Buckets are the
  // sequences where there are several, otherwise the clusters.
  void sort(std::span<const std::int32_t> labels, Index count, const std::int32_t* sequences, std::int32_t* ends,
            std::vector<std::int32_t>& sorted) {
    const auto cluster_of = [labels](std::int32_t row) {
      return labels.empty() ? 0 : labels[static_cast<std::size_t>(row)];
    };
    const auto sequence_of = [=](std::int32_t row) { return cluster_of(row) < 0 ? -1 : sequences[row]; };
    if (pattern_.sequences() <= 1) {
      counting_sort(nullptr, count, pattern_.clusters, cluster_of, ends, sorted);
      return;
    }
    const std::int32_t* rows = nullptr;
    if (pattern_.clusters > 1) {
      counting_sort(nullptr, count, pattern_.clusters, cluster_of, ends, scratch_.sorted);
      rows = scratch_.sorted.data();
      count = static_cast<Index>(scratch_.sorted.size());
    }
    counting_sort(rows, count, pattern_.sequences(), sequence_of, ends, sorted);
  }

  // A bucket is a list, a cluster or, where there are several sequences, a sequence. It is a group, except that a
  // sequence of several clusters is cut where the label changes.
  void make_groups() {
    constexpr std::int32_t none = (std::numeric_limits<std::int32_t>::max)();
    plan_.groups.clear();
    plan_.visible.resize(plan_.entries.size());
    const bool two = pattern_.after > 0 && pattern_.self != Self::visible;
    plan_.visible_too.resize(two ? plan_.entries.size() : 0);
    const bool several = pattern_.sequences() > 1;
    const Index buckets = lists_    ? pattern_.sequences() * pattern_.clusters
                          : several ? pattern_.sequences()
                                    : pattern_.clusters;
    const Index per_sequence = lists_ ? pattern_.clusters : several ? 1 : buckets;
    AttentionPlan::Group group;
    for (Index bucket = 0; bucket < buckets; ++bucket) {
      const std::int32_t entry_end = entry_ends_[bucket], key_end = key_ends_[bucket];
      const auto of_entry = [&](std::int32_t e) {
        return e < entry_end ? query_labels_[static_cast<std::size_t>(plan_.entries[static_cast<std::size_t>(e)])]
                             : none;
      };
      const auto of_key = [&](std::int32_t j) {
        return j < key_end ? key_labels_[static_cast<std::size_t>(plan_.keys[static_cast<std::size_t>(j)])] : none;
      };
      while (group.entry_end < entry_end || group.key_end < key_end) {
        group = {group.entry_end, entry_end, group.key_end, key_end};
        if (!lists_ && several && pattern_.clusters > 1) {
          const std::int32_t label = (std::min)(of_entry(group.entry_begin), of_key(group.key_begin));
          for (group.entry_end = group.entry_begin; of_entry(group.entry_end) == label;) ++group.entry_end;
          for (group.key_end = group.key_begin; of_key(group.key_end) == label;) ++group.key_end;
        }
        plan_.groups.push_back(group);
        make_intervals(group, pattern_.sequence(bucket / per_sequence));
      }
    }
  }

  void make_intervals(const AttentionPlan::Group& group, const Sequence& sequence) {
    const std::int32_t* const keys = plan_.keys.data() + group.key_begin;
    const Index count = group.key_end - group.key_begin;
    Interval* const visible = plan_.visible.data();
    Interval* const visible_too = plan_.visible_too.empty() ? nullptr : plan_.visible_too.data();
    const auto see = [=, before = pattern_.before, after = pattern_.after, self = pattern_.self](
                         std::int32_t e, Index rank, Index up_to, bool has_self) {
      const auto begin = static_cast<std::int32_t>(std::clamp<Index>(rank - before, 0, count));
      const auto end = static_cast<std::int32_t>(std::clamp<Index>(rank + after, 0, count));
      const bool leaves_out = self != Self::visible && has_self && (self == Self::never || end - begin > 1);
      const auto after_self = static_cast<std::int32_t>(up_to);
      visible[e] = {begin, leaves_out ? after_self - 1 : end};
      if (visible_too != nullptr) visible_too[e] = {leaves_out ? after_self : end, end};
    };
    Index up_to = 0;  // keys at positions up to the query's; it only grows, for both lists ascend
    if (one_list_) {
      // It grows by one key, the query's own.
      for (std::int32_t e = group.entry_begin; e < group.entry_end; ++e) {
        ++up_to;
        see(e, up_to, up_to, true);
      }
      return;
    }
    for (std::int32_t e = group.entry_begin; e < group.entry_end; ++e) {
      const Index position = sequence.position(plan_.entries[static_cast<std::size_t>(e)]);
      while (up_to < count && keys[up_to] - sequence.key_begin <= position) ++up_to;
      // Without labels ranks are positions, and windows are cut by distance also for queries beyond the keys' ends.
      const Index rank = query_labels_.empty() && !lists_ ? position + 1 : up_to;
      see(e, rank, up_to, up_to > 0 && keys[up_to - 1] - sequence.key_begin == position);
    }
  }

  // Self::only_if_alone for one softmax over several entries: an entry that shows nothing but the query's own key shows
  // it only where no other entry of the row shows a key.
  void leave_self_out() {
    for (Index s = 0; s < pattern_.sequences(); ++s) {
      const Sequence sequence = pattern_.sequence(s);
      for (Index row = sequence.query_begin; row < sequence.query_begin + sequence.tokens; ++row) {
        const std::span<const std::int32_t> entries =
            std::span(plan_.row_entries)
                .subspan(static_cast<std::size_t>(plan_.row_begin[static_cast<std::size_t>(row)]),
                         static_cast<std::size_t>(plan_.row_begin[static_cast<std::size_t>(row) + 1] -
                                                  plan_.row_begin[static_cast<std::size_t>(row)]));
        if (entries.size() < 2) continue;
        const Index own = sequence.key_begin + sequence.position(row);
        const auto shows = [&](std::int32_t entry) {  // 0 nothing, 1 the own key alone, 2 others
          const auto e = static_cast<std::size_t>(entry);
          const Interval first = plan_.visible[e];
          if (second_interval(plan_, e).size() > 0) return 2;
          if (first.size() != 1) return first.size() == 0 ? 0 : 2;
          return plan_.keys[static_cast<std::size_t>(group_of(plan_, entry).key_begin + first.begin)] == own ? 1 : 2;
        };
        const auto count = [&](int what) {
          return std::count_if(entries.begin(), entries.end(), [&](std::int32_t e) { return shows(e) == what; });
        };
        if (count(1) == 0 || count(2) == 0) continue;
        for (const std::int32_t e : entries)
          if (shows(e) == 1) plan_.visible[static_cast<std::size_t>(e)].end -= 1;
      }
    }
  }

  const Pattern& pattern_;
  AttentionPlan& plan_;
  PlanScratch own_, &scratch_;
  std::span<const std::int32_t> query_labels_, key_labels_;
  std::int32_t* query_sequences_ = nullptr;
  std::int32_t* key_sequences_ = nullptr;
  std::int32_t *ends_ = nullptr, *more_ends_ = nullptr;  // in scratch memory
  const std::int32_t* entry_ends_ = nullptr;             // of the buckets
  const std::int32_t* key_ends_ = nullptr;
  bool one_list_ = false;  // queries and keys are the same rows, in the same buckets
  bool lists_ = false;     // buckets are lists of members, not labels
};

}  // namespace coterie::detail
