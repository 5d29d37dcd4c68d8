// Scratch memory that grows once and is reused: nothing allocates after warm-up.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace coterie {

/// A growing stack of 64-byte aligned scratch memory.
///
/// take() hands out uninitialised numbers; a Scope gives back everything that was taken after it. When the stack is
/// empty again it merges its blocks into one, so that the same sequence of calls allocates nothing the second time.
class Arena {
 public:
  static constexpr std::size_t alignment = 64;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  /// What was taken moves with its arena and stays where it is in memory; the other arena is empty afterwards.
  Arena(Arena&& other) noexcept { *this = std::move(other); }
  Arena& operator=(Arena&& other) noexcept {
    if (this == &other) return *this;
    blocks_ = std::move(other.blocks_);
    other.blocks_.clear();
    block_ = std::exchange(other.block_, std::size_t(0));
    used_ = std::exchange(other.used_, std::size_t(0));
    return *this;
  }

  /// Room for `count` values, uninitialised, aligned to 64 bytes. Allocates only when the arena has to grow.
  template <class T>
  T* take(Index count) {
    static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= alignment);
    COTERIE_ASSERT(count >= 0);
    return static_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T)));
  }

  /// A `rows` x `cols` matrix, uninitialised.
  template <class T>
  View<T> matrix(Index rows, Index cols) {
    return {take<T>(rows * cols), rows, cols};
  }

  /// Bytes held.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Block& block : blocks_) sum += block.size;
    return sum;
  }

  /// Gives back all that was taken.
  void clear() { rewind(0, 0); }

  /// Bytes that `count` values take.
  template <class T>
  static constexpr std::size_t bytes_for(Index count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
  }

  /// Makes an arena of which nothing is taken hold at least `size` bytes.
  void reserve(std::size_t size) {
    if (block_ == 0 && used_ == 0 && bytes() < size) hold(size);
  }

  /// Gives back, at its end, what was taken from the arena since its start.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ~Scope() { arena_.rewind(block_, used_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    std::size_t block_, used_;
  };

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(alignment)); }
  };
  struct Block {
    std::unique_ptr<std::byte[], Free> data;
    std::size_t size = 0;
  };

  static Block make_block(std::size_t size) {
    return {std::unique_ptr<std::byte[], Free>(
                static_cast<std::byte*>(::operator new[](size, std::align_val_t(alignment)))),
            size};
  }

  void* take_bytes(std::size_t size) {
    size = (size + alignment - 1) / alignment * alignment;
    while (block_ < blocks_.size() && used_ + size > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const std::size_t last = blocks_.empty() ? std::size_t(4096) : blocks_.back().size;
      blocks_.push_back(make_block(size > 2 * last ? size : 2 * last));
    }
    std::byte* p = blocks_[block_].data.get() + used_;
    used_ += size;
    return p;
  }

  void rewind(std::size_t block, std::size_t used) {
    block_ = block;
    used_ = used;
    if (block == 0 && used == 0 && blocks_.size() > 1) hold(bytes());
  }

  // Replaces all blocks by one. Called by destructors: without memory the arena is left empty.
  void hold(std::size_t size) noexcept {
    blocks_.clear();
    try {
      blocks_.push_back(make_block(size));
    } catch (const std::bad_alloc&) {
    }
  }

  std::vector<Block> blocks_;
  std::size_t block_ = 0, used_ = 0;
};

/// The scratch memory of one Context: a shared arena for the calling thread, and one arena per worker.
class Workspace {
 public:
  /// What a whole call shares: partial results, projected inputs.
  Arena& shared() { return shared_; }

  /// The arena of one worker, to be used inside tasks.
  Arena& worker(Index worker) { return workers_[static_cast<std::size_t>(worker)]; }

  /// Makes arenas for `workers` workers; keeps those that exist.
  void prepare(Index workers) {
    while (workers_.size() < static_cast<std::size_t>(workers)) workers_.emplace_back();
  }

  /// Makes all workers' arenas as large as the largest; call it when nothing is taken. Which worker gets which task is
  /// chance, and the next call must not have to grow an arena that has had small tasks so far.
  void level() {
    std::size_t most = 0;
    for (const Arena& arena : workers_) most = arena.bytes() > most ? arena.bytes() : most;
    for (Arena& arena : workers_) arena.reserve(most);
  }

  /// The object of type S that lives here, made at its first use: scratch memory that an arena cannot hold, such as
  /// plans. A caller finds it as the last one left it.
  template <class S>
  S& object() {
    for (const Object& object : objects_)
      if (object.tag == &tag<S>) return *static_cast<S*>(object.data.get());
    objects_.push_back({&tag<S>, std::make_shared<S>()});
    return *static_cast<S*>(objects_.back().data.get());
  }

  /// Bytes held by all arenas together.
  std::size_t bytes() const {
    std::size_t sum = shared_.bytes();
    for (const Arena& arena : workers_) sum += arena.bytes();
    return sum;
  }

 private:
  struct Object {
    const void* tag;
    std::shared_ptr<void> data;
  };
  template <class S>
  static inline char tag = 0;

  Arena shared_;
  std::deque<Arena> workers_;
  std::vector<Object> objects_;
};

}  // namespace coterie
