#pragma once

// A host whose jobs can be cancelled, as an executor: what library calls leave behind when one of their tasks throws.

#include <stdexcept>

#include "coterie/core/executor.hpp"

namespace test {

/// Runs tasks in the calling thread, and throws in place of task `left` from now on; -1: never.
struct Cancellable {
  long left = -1;

  coterie::Index workers() const { return 1; }
  template <class F>
  void for_each(coterie::Index count, F&& f) {
    for (coterie::Index i = 0; i < count; ++i) {
      if (left >= 0 && left-- == 0) throw std::runtime_error("cancelled");
      f(i, coterie::Index(0));
    }
  }
};

/// Runs attempt() with task 0, 1, 2, ... of the host cancelled, until it has no more; returns how many attempts had one
/// cancelled. prepare() runs before each attempt, check() after each one in which a task was cancelled.
template <class Prepare, class Attempt, class Check>
long cancel_each_task(Cancellable& host, Prepare&& prepare, Attempt&& attempt, Check&& check) {
  for (long n = 0;; ++n) {
    prepare();
    bool cancelled = false;
    host.left = n;
    try {
      attempt();
    } catch (const std::runtime_error&) {
      cancelled = true;
    }
    host.left = -1;
    if (!cancelled) return n;
    check();
  }
}

}  // namespace test
