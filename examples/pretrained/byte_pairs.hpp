// The merging of byte pairs: a word's bytes become tokens, the pair of the lowest rank first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace pretrained {

/// Pairs of tokens that are merged, by rank.
class BytePairs {
 public:
  /// Adds the pair of the next rank. False, and nothing added, if the pair is known.
  bool add(std::int32_t left, std::int32_t right, std::int32_t merged) {
    return merges_.try_emplace(key(left, right), Merge{static_cast<std::int32_t>(merges_.size()), merged}).second;
  }

  /// Memory of merge(), to be used again.
  struct Scratch {
    struct Symbol {
      std::int32_t token, previous, next;
    };
    /// rank, position, left and right token: the lowest first.
    using Candidate = std::tuple<std::int32_t, std::int32_t, std::int32_t, std::int32_t>;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  /// Merges neighbours until no pair is known: always the pair of the lowest rank, of equal ones the leftmost. Adds the
  /// tokens that remain to `out`.
  /// Requires: fewer than 2^31 tokens.
  /// Cost: n log n.
  void merge(std::span<const std::int32_t> tokens, Scratch& scratch, std::vector<std::int32_t>& out) const {
    auto& [symbols, heap] = scratch;
    symbols.clear();
    heap.clear();
    const auto n = static_cast<std::int32_t>(tokens.size());
    for (std::int32_t i = 0; i < n; ++i)
      symbols.push_back({tokens[static_cast<std::size_t>(i)], i - 1, i + 1 < n ? i + 1 : none});
    for (std::int32_t i = 0; i + 1 < n; ++i) push(scratch, i);

    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      const auto [rank, position, left, right] = heap.back();
      heap.pop_back();
      Scratch::Symbol& symbol = symbols[static_cast<std::size_t>(position)];
      if (symbol.token != left || symbol.next == none) continue;  // merged meanwhile
      Scratch::Symbol& gone = symbols[static_cast<std::size_t>(symbol.next)];
      if (gone.token != right) continue;
      symbol.token = merges_.at(key(left, right)).merged;
      gone.token = none;
      symbol.next = gone.next;
      if (symbol.next != none) {
        symbols[static_cast<std::size_t>(symbol.next)].previous = position;
        push(scratch, position);
      }
      if (symbol.previous != none) push(scratch, symbol.previous);
    }
    for (std::int32_t i = n > 0 ? 0 : none; i != none; i = symbols[static_cast<std::size_t>(i)].next)
      out.push_back(symbols[static_cast<std::size_t>(i)].token);
  }

 private:
  struct Merge {
    std::int32_t rank, merged;
  };
  static constexpr std::int32_t none = -1;

  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  /// Adds the pair of a symbol and the next one to the heap, if it is known.
  void push(Scratch& scratch, std::int32_t position) const {
    const Scratch::Symbol& symbol = scratch.symbols[static_cast<std::size_t>(position)];
    const std::int32_t right = scratch.symbols[static_cast<std::size_t>(symbol.next)].token;
    const auto at = merges_.find(key(symbol.token, right));
    if (at == merges_.end()) return;
    scratch.heap.emplace_back(at->second.rank, position, symbol.token, right);
    std::push_heap(scratch.heap.begin(), scratch.heap.end(), std::greater<>());
  }

  std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace pretrained
