// Gradients of keys and values, summed part by part in a fixed order.
//
// Several parts may see the same key. Each adds its gradients into rows of its own, and those rows are added to d_k and
// d_v part after part, ranges of key rows side by side: no atomics, and the same bits for any number of workers. A part
// whose keys no other part sees adds its rows itself, while they are in its cache.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/attention/call.hpp"
#include "coterie/kernel/backward.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The partial sums of one part.
template <class T>
struct PartialSums {
  Index head = 0;
  const AttentionPlan::Part* part = nullptr;
  const std::int32_t* keys = nullptr;  // key row of each rank of the group
  std::span<PartialRange> ranges;      // ranks that the part sees
  Index rows = 0, d = 0, dv = 0, bias_count = 0;
  bool alone = false;  // adds its rows itself
  T *d_k = nullptr, *d_v = nullptr, *d_bias = nullptr, *d_scale = nullptr;
  T *d_relative_keys = nullptr, *d_relative_values = nullptr;  // the task's, for a table is large; or null

  void take_rows(Arena& arena) {
    d_k = arena.take<T>(rows * padded(d));
    d_v = arena.take<T>(rows * padded(dv));
  }

  void clear() const {
    std::fill_n(d_k, rows * padded(d), T(0));
    std::fill_n(d_v, rows * padded(dv), T(0));
    std::fill_n(d_bias, bias_count, T(0));
    *d_scale = 0;
  }

  AttentionGradientArguments<T> kernel_arguments() const {
    AttentionGradientArguments<T> g;
    g.ranges = ranges.data();
    g.range_count = Index(ranges.size());
    g.d_k = d_k;
    g.d_v = d_v;
    g.d_bias = bias_count > 0 ? d_bias : nullptr;
    g.d_scale = d_scale;
    g.d_relative_keys = d_relative_keys;
    g.d_relative_values = d_relative_values;
    return g;
  }

  /// Rows of `to` += the sums in `from` (d_k or d_v) for the keys in [begin, end) that the part sees: all tokens, or all
  /// memory, which comes from key `tokens` on.
  void add_keys(const BackwardFunctions<T>& kernel, const T* from, Index begin, Index end, Index tokens,
                View<T> to) const {
    const Index columns = to.cols();
    const bool memory = begin >= tokens;
    for (const PartialRange& range : ranges) {
      const std::int32_t *low = keys + range.begin, *last = keys + range.end;
      if (*low >= tokens) {  // memory comes before tokens
        const std::int32_t* const middle =
            std::partition_point(low, last, [tokens](std::int32_t key) { return key >= tokens; });
        (memory ? last : low) = middle;
      }
      low = std::lower_bound(low, last, begin);
      const std::int32_t* const high = std::lower_bound(low, last, end);
      if (low == high) continue;
      const T* const row = from + (range.row + (low - keys) - range.begin) * padded(columns);
      kernel.add_rows({row, padded(columns), to.data(), to.stride(), low, memory ? tokens : 0, high - low, columns});
    }
  }
};

/// A few consecutive tasks with their partial sums. How tasks are cut into waves changes no bit.
template <class T>
class Wave {
 public:
  /// Takes tasks from `begin` on until memory for their sums reaches a limit; at least one for every worker.
  Wave(const AttentionCall<T>& call, const HeadTasks& tasks, Index begin, const AttentionTermGradients<T>& gradients,
       Index workers, Arena& arena)
      : relative_count_(call.relative_count()),
        key_columns_(given(gradients.d_relative_keys) ? padded(call.d()) : 0),
        value_columns_(given(gradients.d_relative_values) ? padded(call.dv()) : 0) {
    constexpr Index limit = Index(4) << 20;  // numbers
    const Index most = std::min(tasks.count() - begin, 8 * workers);
    task_begin_ = arena.take<Index>(most + 1);
    tables_ = arena.take<T*>(most);
    const Index table_size = relative_count_ * (key_columns_ + value_columns_);
    Index part_count = 0;
    for (Index i = 0; i < most; ++i) {
      const auto [head, task] = tasks[begin + i];
      part_count += parts_of(call.plan(head), task);
    }
    parts_ = arena.take<PartialSums<T>>(part_count);
    Index parts = 0, numbers = 0;
    for (; tasks_ < most && (tasks_ < workers || numbers < limit); ++tasks_) {
      task_begin_[tasks_] = parts;
      const auto [head, task] = tasks[begin + tasks_];
      const AttentionPlan& plan = call.plan(head);
      T* const tables = tables_[tasks_] = arena.take<T>(table_size);
      numbers += table_size;
      for (Index p = 0; p < parts_of(plan, task); ++p) {
        PartialSums<T>& sums = *new (parts_ + parts++) PartialSums<T>;
        sums.head = head;
        sums.part = &plan.parts[std::size_t(plan.task_begin[std::size_t(task)] + p)];
        const AttentionPlan::Group& group = plan.groups[std::size_t(sums.part->group)];
        sums.keys = plan.keys.data() + group.key_begin;
        find_ranges(plan, sums, arena);
        sums.d = call.d();
        sums.dv = call.dv();
        sums.bias_count = given(gradients.d_bias) ? call.bias_count() : 0;
        sums.alone = sums.part->alone && call.heads() == call.kv_heads();
        if (!sums.alone) {
          sums.take_rows(arena);
          numbers += sums.rows * (padded(sums.d) + padded(sums.dv));
        }
        sums.d_bias = arena.take<T>(sums.bias_count);
        sums.d_scale = arena.take<T>(1);
        if (key_columns_ > 0) sums.d_relative_keys = tables;
        if (value_columns_ > 0) sums.d_relative_values = tables + relative_count_ * key_columns_;
      }
    }
    task_begin_[tasks_] = parts;
  }

  Index tasks() const { return tasks_; }

  std::span<const PartialSums<T>> task(Index i) const {
    return {parts_ + task_begin_[i], std::size_t(task_begin_[i + 1] - task_begin_[i])};
  }

  /// Before a task's first part.
  void clear_tables(Index task) const {
    std::fill_n(tables_[task], relative_count_ * (key_columns_ + value_columns_), T(0));
  }

  /// d_k, d_v and the terms' gradients += the wave's partial sums, part after part.
  void add(const AttentionCall<T>& call, View<T> d_k, View<T> d_v, const AttentionTermGradients<T>& gradients,
           const BackwardFunctions<T>& kernel, Context& context) const {
    bool shared = false;
    for (const PartialSums<T>* sums = parts_; sums != parts_ + task_begin_[tasks_]; ++sums) shared |= !sums->alone;
    // A task adds all parts to its own rows: ranges of a size that depends on the problem alone.
    const Index tokens = call.key_tokens(), range = std::max<Index>(256, (tokens + 63) / 64);
    const Index ranges = (tokens + range - 1) / range;
    if (shared)
      context.for_each(ranges + 1, [&](Index i, Index) {
        const Index begin = std::min(i * range, tokens);
        const Index end = i < ranges ? std::min(begin + range, tokens) : tokens + call.memory_tokens();
        for (const PartialSums<T>* sums = parts_; sums != parts_ + task_begin_[tasks_]; ++sums)
          if (!sums->alone) add_rows(call, *sums, begin, end, d_k, d_v, gradients, kernel);
      });
    for (const PartialSums<T>* sums = parts_; sums != parts_ + task_begin_[tasks_]; ++sums) {
      for (Index c = 0; c < sums->bias_count; ++c) gradients.d_bias(call.bias_row(sums->head), c) += sums->d_bias[c];
      if (!gradients.d_scales.empty()) gradients.d_scales[std::size_t(sums->head)] += double(*sums->d_scale);
    }
    if (key_columns_ + value_columns_ == 0) return;
    // A piece of the tables' rows adds all tasks.
    context.for_chunks(relative_count_, 16, [&](Index begin, Index end, Index) {
      for (Index task = 0; task < tasks_; ++task) {
        const Index head = parts_[task_begin_[task]].head;
        const T* const values = tables_[task] + relative_count_ * key_columns_;
        add_table(tables_[task], key_columns_, begin, end, head, call.d(), gradients.d_relative_keys);
        add_table(values, value_columns_, begin, end, head, call.dv(), gradients.d_relative_values);
      }
    });
  }

  /// Adds a part's sums to keys [begin, end), which are all tokens or all memory.
  static void add_rows(const AttentionCall<T>& call, const PartialSums<T>& sums, Index begin, Index end, View<T> d_k,
                       View<T> d_v, const AttentionTermGradients<T>& gradients, const BackwardFunctions<T>& kernel) {
    const bool memory = begin >= call.key_tokens();
    const Index head = call.kv_head(sums.head), d = call.d(), dv = call.dv();
    const View<T> keys = memory ? gradients.d_memory_keys : d_k, values = memory ? gradients.d_memory_values : d_v;
    if (begin == end) return;
    const Index tokens = call.key_tokens();
    if (given(keys)) sums.add_keys(kernel, sums.d_k, begin, end, tokens, keys.columns(head * d, d));
    if (given(values)) sums.add_keys(kernel, sums.d_v, begin, end, tokens, values.columns(head * dv, dv));
  }

 private:
  /// Rows [begin, end) of a head's table += those of `from`, of `columns` numbers; 0 columns: not wanted.
  static void add_table(const T* from, Index columns, Index begin, Index end, Index head, Index width, View<T> table) {
    if (columns == 0) return;
    const Index column = AttentionCall<T>::relative_column(table, head, width);
    for (Index r = begin; r < end; ++r)
      for (Index c = 0; c < width; ++c) table(r, column + c) += from[r * columns + c];
  }

  static Index parts_of(const AttentionPlan& plan, Index task) {
    return plan.task_begin[std::size_t(task) + 1] - plan.task_begin[std::size_t(task)];
  }

  /// The ranks that a part's entries see, as ascending ranges without overlap. Ranges that meet in a block of keys become
  /// one, so that a kernel finds the rows of any segment side by side.
  static void find_ranges(const AttentionPlan& plan, PartialSums<T>& sums, Arena& arena) {
    const Index entries = sums.part->entry_end - sums.part->entry_begin;
    PartialRange* ranges = arena.take<PartialRange>(2 * entries);
    Index count = 0;
    bool ascending = true;
    const auto meets = [](const PartialRange& before, const PartialRange& range) {
      return range.begin <= before.end || range.begin / key_block == (before.end - 1) / key_block;
    };
    for (const std::vector<Interval>* visible : {&plan.visible, &plan.visible_too}) {
      if (visible->empty()) continue;
      for (Index e = sums.part->entry_begin; e < sums.part->entry_end; ++e) {
        const Interval seen = (*visible)[std::size_t(e)];
        if (seen.begin == seen.end) continue;
        const PartialRange range{seen.begin, seen.end, 0};
        // Mostly the entry sees what its neighbour sees, and a little more.
        if (count > 0 && range.begin >= ranges[count - 1].begin && meets(ranges[count - 1], range)) {
          ranges[count - 1].end = std::max(ranges[count - 1].end, range.end);
        } else {
          ascending = ascending && (count == 0 || range.begin > ranges[count - 1].end);
          ranges[count++] = range;
        }
      }
    }
    if (!ascending) {
      std::sort(ranges, ranges + count, [](const PartialRange& a, const PartialRange& b) { return a.begin < b.begin; });
      Index merged = 0;
      for (Index i = 1; i < count; ++i) {
        if (meets(ranges[merged], ranges[i]))
          ranges[merged].end = std::max(ranges[merged].end, ranges[i].end);
        else
          ranges[++merged] = ranges[i];
      }
      count = merged + 1;
    }
    for (Index i = 0; i < count; ++i) {
      ranges[i].row = sums.rows;
      sums.rows += ranges[i].end - ranges[i].begin;
    }
    sums.ranges = {ranges, std::size_t(count)};
  }

  Index tasks_ = 0;
  Index relative_count_, key_columns_, value_columns_;  // of the tables' sums; no columns: not wanted
  T** tables_ = nullptr;                                // per task
  Index* task_begin_ = nullptr;
  PartialSums<T>* parts_ = nullptr;
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
