// Order in which a thread works through the tasks of a call.
#pragma once

#include <algorithm>
#include <utility>

#include "coterie/attention/config.hpp"
#include "coterie/core/workspace.hpp"
#include "coterie/kernel/arguments.hpp"

namespace coterie::detail {

/// Calls f(i, arguments) for every part i in [0, count) of a task, at least one, with the arguments that make(i) gives;
/// each call knows the next one's, whose first rows the kernel prefetches. If there is `more`, make(count) is what this
/// thread will probably compute next.
template <class T, class Make, class F>
void each_part_in_turn(Index count, bool more, Make&& make, F&& f) {
  AttentionArguments<T> arguments, next = make(Index(0));
  for (Index i = 0; i < count; ++i) {
    arguments = next;
    if (i + 1 < count || more) {
      next = make(i + 1);
      arguments.next = &next;
    }
    f(i, arguments);
  }
}

/// The tasks of heads [head_begin, head_end), head by head.
class HeadTasks {
 public:
  HeadTasks(const Plans& plans, Index heads, Index head_begin, Index head_end, Arena& arena)
      : head_begin_(head_begin), heads_(head_end - head_begin), ends_(arena.take<Index>(heads_)) {
    Index end = 0;
    for (Index i = 0; i < heads_; ++i) ends_[i] = end += plans.of(head_begin + i, heads).tasks();
  }

  Index count() const { return heads_ == 0 ? 0 : ends_[heads_ - 1]; }

  /// (head, task of its plan)
  std::pair<Index, Index> operator[](Index i) const {
    const Index head = std::upper_bound(ends_, ends_ + heads_, i) - ends_;
    return {head_begin_ + head, head == 0 ? i : i - ends_[head - 1]};
  }

 private:
  Index head_begin_, heads_;
  Index* ends_;
};

}  // namespace coterie::detail
