// Executors run tasks on threads: the concept, and the two executors that come with the library.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace coterie {

/// A reference to a callable `void(Index task, Index worker)`; does not own it and does not allocate.
class TaskRef {
 public:
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, TaskRef>) TaskRef(F& f)  // NOLINT: converts on purpose
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Index task, Index worker) { (*static_cast<F*>(object))(task, worker); }) {}

  void operator()(Index task, Index worker) const { call_(object_, task, worker); }

 private:
  void* object_;
  void (*call_)(void*, Index, Index);
};

/// What the library requires of an executor, so that a host program can use its own threads.
///
/// `workers()` gives the number of workers, and `for_each(count, f)` calls f(task, worker) once for every task in
/// [0, count), worker in [0, workers()), no two calls with the same worker at the same time, and returns when all are
/// done. Tasks may run in any order: results do not depend on it. An exception of a task is rethrown to the caller.
template <class E>
concept Executor = requires(E& executor, TaskRef f) {
  { executor.workers() } -> std::convertible_to<Index>;
  executor.for_each(Index(0), f);
};

/// Runs every task in the calling thread, in order.
struct Serial {
  Index workers() const { return 1; }
  template <class F>
  void for_each(Index count, F&& f) {
    for (Index task = 0; task < count; ++task) f(task, Index(0));
  }
};

/// A fixed team of threads; the calling thread works as worker 0.
///
/// Threads and determinism: for_each may be called by several threads, their calls run one after the other. A task must
/// not call for_each of its own pool. The first exception is rethrown to the caller once all workers have stopped;
/// tasks not yet begun are then left out.
class ThreadPool {
 public:
  /// Requires `workers` >= 1, otherwise ValueError.
  explicit ThreadPool(Index workers) : workers_(workers) {
    if (workers < 1) detail::fail<ValueError>("ThreadPool", "workers", "at least 1", workers);
    try {
      for (Index worker = 1; worker < workers; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Index workers() const { return workers_; }

  template <class F>
  void for_each(Index count, F&& f) {
    TaskRef task(f);
    run(count, task);
  }

 private:
  void run(Index count, TaskRef task) {
    if (count <= 0) return;
    std::lock_guard<std::mutex> one_caller(caller_);
    if (count == 1 || workers_ == 1) {
      for (Index i = 0; i < count; ++i) task(i, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      running_ = workers_ - 1;
      error_ = nullptr;
      ++generation_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return running_ == 0; });
    task_ = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void work(Index worker) {
    for (;;) {
      const Index i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      try {
        (*task_)(i, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_, std::memory_order_relaxed);
      }
    }
  }

  void serve(Index worker) {
    std::uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
      }
      work(worker);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) idle_.notify_one();
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Index workers_;
  std::vector<std::thread> threads_;
  std::mutex caller_, mutex_;
  std::condition_variable wake_, idle_;
  TaskRef* task_ = nullptr;
  Index count_ = 0, running_ = 0;
  std::atomic<Index> next_{0};
  std::uint64_t generation_ = 0;
  bool stopping_ = false;
  std::exception_ptr error_;
};

}  // namespace coterie
