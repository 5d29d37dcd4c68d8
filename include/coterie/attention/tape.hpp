// What attention's backward pass needs from its forward pass.
#pragma once

#include <vector>

#include "coterie/core/matrix.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {

/// Made once and reused: forward overwrites it, backward reads it. Holds log-sum-exps, nothing quadratic.
template <class T>
class AttentionTape {
 public:
  /// tokens x heads: log-sum-exp of each row's visible logits, base e; empty for Combine::mean, which has none.
  ConstView<T> lse() const { return {lse_.data(), combine_ == Combine::mean ? 0 : tokens_, heads_}; }

  Index tokens() const { return tokens_; }
  Index heads() const { return heads_; }
  Combine combine() const { return combine_; }

  // For the library: sizes the tape and hands out its storage.
  View<T> prepare(Index tokens, Index heads, Combine combine) {
    tokens_ = tokens;
    heads_ = heads;
    combine_ = combine;
    entries_.resize(combine == Combine::mean ? static_cast<std::size_t>(heads) : 0);
    if (combine == Combine::mean) return {};
    lse_.resize(static_cast<std::size_t>(tokens * heads));
    return {lse_.data(), tokens, heads};
  }
  View<T> entry_out(Index head, Index entries, Index dv) {
    Entries& e = entries_[static_cast<std::size_t>(head)];
    e.out.resize(static_cast<std::size_t>(entries * dv));
    e.lse.resize(static_cast<std::size_t>(entries));
    e.dv = dv;
    return {e.out.data(), entries, dv};
  }
  View<T> entry_lse(Index head, Index entries) {
    return {entries_[static_cast<std::size_t>(head)].lse.data(), entries, 1};
  }
  ConstView<T> entry_out(Index head) const {
    const Entries& e = entries_[static_cast<std::size_t>(head)];
    return {e.out.data(), static_cast<Index>(e.lse.size()), e.dv};
  }
  ConstView<T> entry_lse(Index head) const {
    const Entries& e = entries_[static_cast<std::size_t>(head)];
    return {e.lse.data(), static_cast<Index>(e.lse.size()), 1};
  }

 private:
  // Combine::mean keeps every entry's own softmax.
  struct Entries {
    std::vector<T> out, lse;
    Index dv = 0;
  };

  std::vector<T> lse_;
  std::vector<Entries> entries_;
  Index tokens_ = 0, heads_ = 0;
  Combine combine_ = Combine::single;
};

}  // namespace coterie
