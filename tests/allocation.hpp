#pragma once

#include <exception>

namespace test {

/// How often this process has asked for memory so far, in all threads: by malloc and its kin, so also Eigen, with glibc and
/// under sanitizers; elsewhere by operator new alone.
long allocations();

/// While it lives, allocation `n` of this process (the next one is 0) fails, and no other: operator new throws
/// std::bad_alloc, malloc returns null. Under sanitizers, and where the C library is not glibc, by operator new alone.
/// One at a time.
class FailAllocation {
 public:
  explicit FailAllocation(long n);
  FailAllocation(const FailAllocation&) = delete;
  FailAllocation& operator=(const FailAllocation&) = delete;
  ~FailAllocation();

  /// Whether allocation n has been asked for, and has failed.
  bool failed() const;
};

/// Runs attempt() with allocation 0, 1, 2, ... failing, until it asks for no more; returns how many attempts had one fail.
/// prepare() runs before each attempt; check(threw) after each one in which an allocation failed: `threw` says whether the
/// attempt ended in an exception (std::bad_alloc, or what was made of it). Inside prepare and check no allocation fails.
/// Call it for at least one failure: a loop that never fails tests nothing.
template <class Prepare, class Attempt, class Check>
long fail_each_allocation(Prepare&& prepare, Attempt&& attempt, Check&& check) {
  for (long n = 0;; ++n) {
    prepare();
    bool threw = false, failed = false;
    {
      const FailAllocation fail(n);
      try {
        attempt();
      } catch (const std::exception&) {
        threw = true;
      }
      failed = fail.failed();
    }
    if (!failed) return n;
    check(threw);
  }
}

}  // namespace test
