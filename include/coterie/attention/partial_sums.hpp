// Gradients of keys and values, summed part by part in a fixed order.
//
// Several parts may see the same key. Each adds its gradients into rows of its own, and those rows are added to d_k and
// d_v part after part, ranges of key rows side by side: no atomics, and the same bits for any number of workers. A part
// whose keys no other part sees adds its rows itself, while they are in its cache.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/attention/call.hpp"
#include "coterie/attention/tasks.hpp"
#include "coterie/kernel/dispatch.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Partial sums of the gradient of a distance table: `count` rows of `columns` numbers. Without columns: not wanted.
template <class T>
struct TableSums {
  T* rows = nullptr;
  Index count = 0, columns = 0;

  bool wanted() const { return count > 0 && columns > 0; }
  T* pointer() const { return wanted() ? rows : nullptr; }
  void take(Arena& arena) { rows = arena.take<T>(count * columns); }
  void clear() const { std::fill_n(rows, count * columns, T(0)); }

  /// Rows [begin, end) of a head's `width` columns of the table += those of the sums.
  void add_to(View<T> table, Index head, Index width, Index begin, Index end) const {
    if (!wanted()) return;
    const Index column = AttentionCall<T>::relative_column(table, head, width);
    for (Index r = begin; r < end; ++r)
      for (Index c = 0; c < width; ++c) table(r, column + c) += rows[r * columns + c];
  }
};

/// The partial sums of one part.
template <class T>
struct PartialSums {
  Index head = 0;
  const AttentionPlan::Part* part = nullptr;
  const std::int32_t* keys = nullptr;  // key row of each rank of the group
  std::span<PartialRange> ranges;      // ranks that the part sees
  Index rows = 0, d = 0, dv = 0;
  bool alone = false;  // adds its rows itself
  T *d_k = nullptr, *d_v = nullptr, *d_scale = nullptr;
  TableSums<T> d_bias;                              // one row
  TableSums<T> d_relative_keys, d_relative_values;  // the task's, for a table is large

  void take_rows(Arena& arena) {
    d_k = arena.take<T>(rows * padded(d));
    d_v = arena.take<T>(rows * padded(dv));
  }

  void clear() const {
    std::fill_n(d_k, rows * padded(d), T(0));
    std::fill_n(d_v, rows * padded(dv), T(0));
    d_bias.clear();
    *d_scale = 0;
  }

  AttentionGradientArguments<T> kernel_arguments() const {
    AttentionGradientArguments<T> g;
    g.ranges = ranges.data();
    g.range_count = Index(ranges.size());
    g.d_k = d_k;
    g.d_v = d_v;
    g.d_bias = d_bias.pointer();
    g.d_scale = d_scale;
    g.d_relative_keys = d_relative_keys.pointer();
    g.d_relative_values = d_relative_values.pointer();
    return g;
  }

  /// Rows of `to` += the sums in `from` (d_k or d_v) for the keys in [begin, end) that the part sees: all tokens, or all
  /// memory, which comes from key `tokens` on.
  void add_keys(const KernelTable<T>& kernel, const T* from, Index begin, Index end, Index tokens, View<T> to) const {
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

/// Tasks whose partial sums are in memory together: a few consecutive ones. How tasks are cut into waves changes no bit.
template <class T>
class Wave {
 public:
  /// Takes tasks from `begin` on until memory for their sums reaches a limit; at least one for every worker. Refers to the
  /// call, the gradients and the kernel.
  Wave(const AttentionCall<T>& call, const AttentionGradients<T>& gradients, const KernelTable<T>& kernel,
       const HeadTasks& tasks, Index begin, Index workers, Arena& arena)
      : call_(call), gradients_(gradients), kernel_(kernel) {
    constexpr Index limit = Index(4) << 20;  // numbers
    const Index most = (std::min)(tasks.count() - begin, 8 * workers);
    task_begin_ = arena.take<Index>(most + 1);
    tables_ = arena.take<Tables>(most);
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
      Tables& tables = *new (tables_ + tasks_) Tables;
      take_tables(tables, arena);
      numbers += tables.keys.count * tables.keys.columns + tables.values.count * tables.values.columns;
      for (Index p = 0; p < parts_of(plan, task); ++p) {
        PartialSums<T>& sums = *new (parts_ + parts++) PartialSums<T>;
        sums.head = head;
        sums.part = &plan.parts[std::size_t(plan.task_begin[std::size_t(task)] + p)];
        const AttentionPlan::Group& group = plan.groups[std::size_t(sums.part->group)];
        sums.keys = plan.keys.data() + group.key_begin;
        find_ranges(plan, sums, arena);
        sums.d = call.d();
        sums.dv = call.dv();
        sums.alone = sums.part->alone && call.heads() == call.kv_heads();
        if (!sums.alone) {
          sums.take_rows(arena);
          numbers += sums.rows * (padded(sums.d) + padded(sums.dv));
        }
        sums.d_bias.count = 1;
        sums.d_bias.columns = given(gradients.terms.d_bias) ? call.bias_count() : 0;
        sums.d_bias.take(arena);
        sums.d_scale = arena.take<T>(1);
        sums.d_relative_keys = tables.keys;
        sums.d_relative_values = tables.values;
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
    tables_[task].keys.clear();
    tables_[task].values.clear();
  }

  /// d_k, d_v and the terms' gradients += the wave's partial sums, part after part.
  void add(Context& context) const {
    const std::span<const PartialSums<T>> parts(parts_, std::size_t(task_begin_[tasks_]));
    const AttentionTermGradients<T>& d_terms = gradients_.terms;
    bool shared = false;
    for (const PartialSums<T>& sums : parts) shared |= !sums.alone;
    // A task adds all parts to its own rows: ranges of a size that depends on the problem alone.
    const Index tokens = call_.key_tokens(), range = (std::max)(Index(256), (tokens + 63) / 64);
    const Index ranges = (tokens + range - 1) / range;
    if (shared)
      context.for_each(ranges + 1, [&](Index i, Index) {
        const Index begin = (std::min)(i * range, tokens);
        const Index end = i < ranges ? (std::min)(begin + range, tokens) : call_.key_rows();
        for (const PartialSums<T>& sums : parts)
          if (!sums.alone) add_rows(sums, begin, end);
      });
    for (const PartialSums<T>& sums : parts) {
      for (Index c = 0; c < sums.d_bias.columns; ++c)
        d_terms.d_bias(call_.bias_row(sums.head), c) += sums.d_bias.rows[c];
      if (!d_terms.d_scales.empty()) d_terms.d_scales[std::size_t(sums.head)] += double(*sums.d_scale);
    }
    if (!given(d_terms.d_relative_keys) && !given(d_terms.d_relative_values)) return;
    // A piece of the tables' rows adds all tasks.
    context.for_chunks(call_.relative_count(), 16, [&](Index begin, Index end, Index) {
      for (Index task = 0; task < tasks_; ++task) {
        const Index head = parts_[task_begin_[task]].head;
        tables_[task].keys.add_to(d_terms.d_relative_keys, head, call_.d(), begin, end);
        tables_[task].values.add_to(d_terms.d_relative_values, head, call_.dv(), begin, end);
      }
    });
  }

  /// Adds the sums of a part that is alone to all of its keys.
  void add_rows(const PartialSums<T>& sums) const {
    add_rows(sums, 0, call_.key_tokens());
    add_rows(sums, call_.key_tokens(), call_.key_rows());
  }

 private:
  /// A task's sums of the tables of relative keys and values.
  struct Tables {
    TableSums<T> keys, values;
  };

  void take_tables(Tables& tables, Arena& arena) const {
    const AttentionTermGradients<T>& d_terms = gradients_.terms;
    tables.keys.count = tables.values.count = call_.relative_count();
    tables.keys.columns = given(d_terms.d_relative_keys) ? padded(call_.d()) : 0;
    tables.values.columns = given(d_terms.d_relative_values) ? padded(call_.dv()) : 0;
    tables.keys.take(arena);
    tables.values.take(arena);
  }

  /// Adds a part's sums to keys [begin, end), which are all tokens or all memory.
  void add_rows(const PartialSums<T>& sums, Index begin, Index end) const {
    if (begin == end) return;
    const Index tokens = call_.key_tokens(), head = call_.kv_head(sums.head), d = call_.d(), dv = call_.dv();
    const bool memory = begin >= tokens;
    const View<T> keys = memory ? gradients_.terms.d_memory_keys : gradients_.d_k;
    const View<T> values = memory ? gradients_.terms.d_memory_values : gradients_.d_v;
    if (given(keys)) sums.add_keys(kernel_, sums.d_k, begin, end, tokens, keys.columns(head * d, d));
    if (given(values)) sums.add_keys(kernel_, sums.d_v, begin, end, tokens, values.columns(head * dv, dv));
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
          ranges[count - 1].end = (std::max)(ranges[count - 1].end, range.end);
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
          ranges[merged].end = (std::max)(ranges[merged].end, ranges[i].end);
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

  const AttentionCall<T>& call_;
  const AttentionGradients<T>& gradients_;
  const KernelTable<T>& kernel_;
  Index tasks_ = 0;
  Tables* tables_ = nullptr;  // per task
  Index* task_begin_ = nullptr;
  PartialSums<T>* parts_ = nullptr;
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
