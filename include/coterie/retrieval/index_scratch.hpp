// Scratch memory of an index's passes.
#pragma once

#include <algorithm>
#include <bit>
#include <deque>

#include "coterie/attention/tape.hpp"
#include "coterie/core/context.hpp"
#include "coterie/plan/complete.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie::detail {

/// Scratch of the passes of KeyIndex: one for each worker, kept from call to call.
template <class T>
struct IndexScratch {
  struct Worker {
    explicit Worker(InstructionSet instructions) : context(instructions) {}
    Context context;  // serial, with a workspace of its own: heads run side by side
    AttentionPlan plan;
    AttentionTape<T> tape;
    PlanScratch plan_scratch;
  };
  std::deque<Worker> workers;

  /// Makes scratch for the workers of a context.
  void prepare(const Context& context) {
    if (!workers.empty() && workers.front().context.instructions() != context.instructions()) workers.clear();
    while (static_cast<Index>(workers.size()) < context.workers()) workers.emplace_back(context.instructions());
  }

  /// Reserves memory for the largest task in every worker, because any of them can get it.
  void reserve(Index rows, Index groups, Index entries, Index keys) {
    const auto at = [](Index i) { return static_cast<std::size_t>(i); };
    for (Worker& w : workers) {
      w.tape.prepare(rows, 1, Combine::lse);
      for (auto* list : {&w.plan.entries, &w.plan.row_entries, &w.plan_scratch.numbers}) list->reserve(at(entries));
      w.plan.row_begin.reserve(at(rows) + 1);
      w.plan.visible.reserve(at(entries));
      w.plan.keys.reserve(std::bit_ceil(at(keys)));  // it grows with every key
      w.plan.groups.reserve(at(groups));
      w.plan.parts.reserve(at(groups + entries / AttentionPlan::part_entries));
      w.plan.task_begin.reserve(at(groups + entries / AttentionPlan::part_entries + 1));
    }
  }

  /// Makes the arenas of all workers as large as the largest.
  void level() {
    std::size_t shared = 0, own = 0;
    for (Worker& w : workers) {
      w.context.workspace().prepare(1);
      shared = (std::max)(shared, w.context.workspace().shared().bytes());
      own = (std::max)(own, w.context.workspace().worker(0).bytes());
    }
    for (Worker& w : workers) {
      w.context.workspace().shared().reserve(shared);
      w.context.workspace().worker(0).reserve(own);
    }
  }
};

}  // namespace coterie::detail
