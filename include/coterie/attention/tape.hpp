// What attention's backward pass needs from its forward pass.
#pragma once

#include <vector>

#include "coterie/core/matrix.hpp"
#include "coterie/kernel/arguments.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {

/// Made once and reused: forward overwrites it, backward reads it. Holds a few numbers per row and head, nothing
/// quadratic.
template <class T>
class AttentionTape {
 public:
  /// tokens x heads: log-sum-exp of each row's visible logits, base e; empty for Combine::mean, which has none.
  ConstView<T> lse() const { return {lse_.data(), combine_ == Combine::mean ? 0 : tokens_, heads_}; }

  Index tokens() const { return tokens_; }
  Index heads() const { return heads_; }
  Combine combine() const { return combine_; }

  // For the library: sizes the tape and hands out its storage.
  detail::SoftmaxStates<T> prepare(Index tokens, Index heads, Combine combine) {
    tokens_ = tokens;
    heads_ = heads;
    combine_ = combine;
    entries_.resize(combine == Combine::mean ? static_cast<std::size_t>(heads) : 0);
    if (combine == Combine::mean) return {};
    for (std::vector<T>* v : {&reference_, &inverse_, &lse_}) v->resize(static_cast<std::size_t>(tokens * heads));
    return {reference_.data(), inverse_.data(), lse_.data(), heads};
  }
  detail::SoftmaxStates<T> states() const {
    return {const_cast<T*>(reference_.data()), const_cast<T*>(inverse_.data()), nullptr, heads_};
  }

  // Combine::mean: every entry has a softmax and an output of its own.
  void prepare_entries(Index head, Index entries, Index dv) {
    Entries& e = entries_[static_cast<std::size_t>(head)];
    e.out.resize(static_cast<std::size_t>(entries * dv));
    for (std::vector<T>* v : {&e.reference, &e.inverse}) v->resize(static_cast<std::size_t>(entries));
    e.dv = dv;
  }
  View<T> entry_out(Index head) const {
    const Entries& e = entries_[static_cast<std::size_t>(head)];
    return {const_cast<T*>(e.out.data()), static_cast<Index>(e.reference.size()), e.dv};
  }
  detail::SoftmaxStates<T> entry_states(Index head) const {
    const Entries& e = entries_[static_cast<std::size_t>(head)];
    return {const_cast<T*>(e.reference.data()), const_cast<T*>(e.inverse.data()), nullptr, 1};
  }

 private:
  struct Entries {
    std::vector<T> out, reference, inverse;
    Index dv = 0;
  };

  std::vector<T> reference_, inverse_, lse_;
  std::vector<Entries> entries_;
  Index tokens_ = 0, heads_ = 0;
  Combine combine_ = Combine::single;
};

}  // namespace coterie
