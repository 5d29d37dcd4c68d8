// What a call runs on: threads, scratch memory, instruction set.
#pragma once

#include <algorithm>
#include <memory>

#include "coterie/core/executor.hpp"
#include "coterie/core/workspace.hpp"

namespace coterie {

/// The instruction set of the kernels. `automatic` takes the widest that the machine has; the others are for tests and
/// measurements, and a machine that lacks one throws ValueError where it is asked for.
enum class InstructionSet { automatic, baseline, avx2, avx512 };

/// Executor, workspace and instruction set of the calls of one thread.
///
///     Context context;                                            // serial, with a workspace of its own
///     ThreadPool pool(2);  Workspace workspace;
///     Context context{pool, workspace};                           // refers to both; they must outlive it
///
/// Threads and determinism: one Context per calling thread, for its workspace is written by every call. Results do not
/// depend on the number of workers, bit for bit; they do depend on the instruction set, within stated error.
class Context {
 public:
  Context() : own_(std::make_unique<Own>()) { bind(own_->serial, own_->workspace); }

  /// Serial, with a workspace of its own.
  explicit Context(InstructionSet instructions) : Context() { instructions_ = instructions; }

  template <Executor E>
  Context(E& executor, Workspace& workspace, InstructionSet instructions = InstructionSet::automatic)
      : instructions_(instructions) {
    bind(executor, workspace);
  }

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  Index workers() const { return workers_(executor_); }
  InstructionSet instructions() const { return instructions_; }
  Workspace& workspace() { return *workspace_; }

  /// Calls f(task, worker) for every task in [0, count); see Executor.
  template <class F>
  void for_each(Index count, F&& f) {
    if (count <= 0) return;
    workspace_->prepare(workers());
    TaskRef task(f);
    for_each_(executor_, count, task);
    workspace_->level();
  }

  /// Calls f(first, last, worker) for [0, count) cut at multiples of `size`, a task each: where it is cut does not depend
  /// on the workers.
  template <class F>
  void for_chunks(Index count, Index size, F&& f) {
    for_each((count + size - 1) / size,
             [&](Index task, Index worker) { f(task * size, (std::min)(count, (task + 1) * size), worker); });
  }

 private:
  struct Own {
    Serial serial;
    Workspace workspace;
  };

  template <class E>
  void bind(E& executor, Workspace& workspace) {
    executor_ = std::addressof(executor);
    workspace_ = &workspace;
    workers_ = [](void* e) { return static_cast<Index>(static_cast<E*>(e)->workers()); };
    for_each_ = [](void* e, Index count, TaskRef f) { static_cast<E*>(e)->for_each(count, f); };
  }

  std::unique_ptr<Own> own_;
  void* executor_ = nullptr;
  Workspace* workspace_ = nullptr;
  Index (*workers_)(void*) = nullptr;
  void (*for_each_)(void*, Index, TaskRef) = nullptr;
  InstructionSet instructions_ = InstructionSet::automatic;
};

}  // namespace coterie
