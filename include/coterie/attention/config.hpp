// What attention is asked to do: heads, scale, plans, and the terms added to the plain formula.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"
#include "coterie/core/random.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {

/// Heads and logit scale of a call. q has heads*d columns, head h in columns [h*d, (h+1)*d); k and v have kv_heads of them.
struct AttentionConfig {
  Index heads = 1;     ///< query heads
  Index kv_heads = 0;  ///< key/value heads; 0: as heads. Divides heads; head h reads kv head h / (heads/kv_heads)
  double scale = 0;    ///< factor of q.k; 0: 1/sqrt(d)
  std::span<const double> scales = {};  ///< one factor per head, instead of `scale`
  /// Bound of scale q.k, relative key included, before a bias is added: cap tanh(scale q.k / cap); 0: none.
  double soft_cap = 0;
  double dropout = 0;  ///< share of the probabilities that become 0, the others growing by 1 / (1 - dropout)
  std::uint64_t dropout_seed = 0;  ///< which ones: a function of seed, step, head, query row and key row alone
  std::uint64_t dropout_step = 0;  ///< to differ from call to call; backward takes forward's
  /// Combine::mean: added to the number of entries that the sum of their outputs is divided by.
  double mean_epsilon = 0;
};

/// One plan for all heads, or one for every key/value head, or one for every head. Refers to the plans, does not own them.
class Plans {
 public:
  Plans(const AttentionPlan& plan) : plans_(&plan, 1) {}             // NOLINT: converts on purpose
  Plans(std::span<const AttentionPlan> plans) : plans_(plans) {}     // NOLINT
  Plans(const std::vector<AttentionPlan>& plans) : plans_(plans) {}  // NOLINT
  Index size() const { return static_cast<Index>(plans_.size()); }
  const AttentionPlan& operator[](Index i) const { return plans_[static_cast<std::size_t>(i)]; }
  /// The plan of query head `head` of `heads`.
  const AttentionPlan& of(Index head, Index heads) const { return (*this)[head * size() / heads]; }

 private:
  std::span<const AttentionPlan> plans_;
};

namespace detail {

/// What decides about dropped pairs of a head: see row_bits and pair_bits.
inline std::uint64_t dropout_call(const AttentionConfig& config, Index head) {
  return random_bits(config.dropout_seed, config.dropout_step, static_cast<std::uint64_t>(head));
}
/// Pairs whose bits are below it are dropped.
inline std::uint32_t dropout_bound(const AttentionConfig& config) {
  return static_cast<std::uint32_t>(config.dropout * 0x1p32);
}

}  // namespace detail

/// A table with an entry for each distance (query position - key position): a column of a bias, a row of relative keys or
/// values. Distances outside the table take the nearest entry. Converts from a matrix; refers to it, does not own it.
///
///     terms.bias = {matrix, -4};  // the first entry is for distance -4
template <class T>
struct DistanceTable {
  ConstView<T> rows = {};  ///< the table; empty: none
  Index first = 0;         ///< the distance of the first entry

  constexpr DistanceTable() = default;
  template <class M>
  requires std::convertible_to<M&&, ConstView<T>>
  constexpr DistanceTable(M&& table, Index first_distance = 0)  // NOLINT: converts on purpose
      : rows(std::forward<M>(table)), first(first_distance) {}

  /// The entry for a distance in a table of `count` entries.
  constexpr Index entry(Index distance, Index count) const { return std::clamp<Index>(distance - first, 0, count - 1); }
};

/// What is added to the plain formula; every member may be left out.
template <class T>
struct AttentionTerms {
  /// (heads or 1) x distances: added to the logit of a pair by its distance; none to memory's.
  DistanceTable<T> bias = {};
  ConstView<T> memory_keys = {};    ///< memory_tokens x kv_heads*d
  ConstView<T> memory_values = {};  ///< memory_tokens x kv_heads*dv
  /// distances x (d or heads*d): added to the key of a pair by its distance; none to memory's. d columns are for all heads.
  DistanceTable<T> relative_keys = {};
  /// distances x (dv or heads*dv): added to the value. Either may be given alone; both have the same distances.
  DistanceTable<T> relative_values = {};
};

/// Gradients of AttentionTerms and of the scales, added to; and the gradient that comes in through lse.
template <class T>
struct AttentionTermGradients {
  View<T> d_bias = {};              ///< as bias
  View<T> d_memory_keys = {};       ///< as memory_keys
  View<T> d_memory_values = {};     ///< as memory_values
  std::span<double> d_scales = {};  ///< one per head: gradient of the logit scale
  ConstView<T> d_lse = {};          ///< tokens x heads: gradient of tape.lse(), read
  View<T> d_relative_keys = {};     ///< as relative_keys
  View<T> d_relative_values = {};   ///< as relative_values
};

}  // namespace coterie
