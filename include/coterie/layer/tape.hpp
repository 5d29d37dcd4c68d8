// What a forward pass of a layer leaves behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/core/cluster_members.hpp"
#include "coterie/core/workspace.hpp"
#include "coterie/layer/initialise.hpp"
#include "coterie/plan/complete.hpp"

namespace coterie {

namespace detail {

/// Numbers that outlive a call: grows, never shrinks, keeps nothing when it grows.
template <class T>
class Buffer {
 public:
  /// A rows x cols matrix, uninitialised.
  View<T> matrix(Index rows, Index cols) {
    if (!data_ || rows * cols > capacity_) {
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<T*>(::operator new[](static_cast<std::size_t>(rows * cols) * sizeof(T), alignment)));
      capacity_ = rows * cols;
    }
    return {data_.get(), rows, cols};
  }

 private:
  static constexpr std::align_val_t alignment{Arena::alignment};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, alignment); }
  };
  std::unique_ptr<T, Free> data_;
  Index capacity_ = 0;
};

/// Place of every row in its sequence, queries' places counted among their keys.
struct Places {
  std::vector<std::int32_t> queries, keys;  ///< keys empty: as queries
};

/// Labels and plans of a group of heads; vectors keep their memory from call to call.
struct HeadsPlans {
  std::vector<std::int32_t> query_labels, key_labels;  ///< heads x rows; key_labels empty: as query_labels
  std::vector<ClusterMembers> members;  ///< per head lists of the queries, and of the keys; empty where labels do
  std::vector<AttentionPlan> plans;
  std::vector<PlanScratch> scratch;  ///< per plan, for builders run side by side
  std::size_t count = 0;             ///< plans in use: 1 for all heads, or one per key/value head

  std::span<const AttentionPlan> used() const { return {plans.data(), count}; }
  /// The first `number` plans, to be built.
  std::span<AttentionPlan> use(std::size_t number) {
    if (scratch.size() < number) scratch.resize(number);
    if (plans.size() < number) plans.resize(number);
    count = number;
    return {plans.data(), number};
  }
  static std::span<std::int32_t> grow(std::vector<std::int32_t>& v, Index size) {
    v.resize(static_cast<std::size_t>(size));
    return v;
  }
};

/// The piece of labels, heads x rows, that belongs to a head.
template <class L>
std::span<L> labels_of(std::span<L> all, Index head, Index rows) {
  return all.subspan(static_cast<std::size_t>(head * rows), static_cast<std::size_t>(rows));
}

/// The matrices of a group of heads in a forward pass; d head width, c = heads * d, e = key/value heads * d.
template <class T>
struct HeadsMatrices {
  View<T> q;        ///< tokens x c: projected queries; normalised where nobody needs them otherwise
  View<T> u;        ///< tokens x c: normalised queries, where kept; else, and where normalised in place, q itself
  View<T> k;        ///< key rows x e: keys, if not shared; normalised where attention reads them so
  View<T> v;        ///< key rows x e: values; one row of zeros more for induction
  View<T> route;    ///< tokens x e: what routers see of queries: u, or sums over the query heads of a key/value head
  View<T> read_q;   ///< tokens x c: queries as attention reads them: u or q, or rotated
  View<T> read_k;   ///< key rows x e: keys likewise: k, u or q
  View<T> out;      ///< tokens x c: what attention gave
  View<T> inverse;  ///< tokens x heads: what normalise_rows says of u, where kept
  View<T> key_inverse;  ///< key rows x key/value heads: the same of k
};

/// A group of heads on a tape.
template <class T>
struct HeadsTape {
  HeadsMatrices<T> matrices;
  HeadsPlans plans;
  AttentionTape<T> attention;
  Buffer<T> q, u, k, v, route, read_q, read_k, out, inverse, key_inverse;
};

}  // namespace detail

template <class T>
class RoutingAttention;
template <class T>
class Decoder;

/// What backward and update_router need of a forward pass, and diagnostics: labels, plans, cluster sizes.
/// Make it once and use it for every step; its memory grows to the largest step and stays.
template <class T>
class RoutingAttentionTape {
 public:
  RoutingAttentionTape() = default;
  RoutingAttentionTape(RoutingAttentionTape&& other) noexcept { *this = std::move(other); }
  RoutingAttentionTape& operator=(RoutingAttentionTape&& other) noexcept {
    if (this == &other) return *this;
    places_ = std::move(other.places_);
    local_ = std::move(other.local_);
    routed_ = std::move(other.routed_);
    config_ = other.config_;
    crosses_ = other.crosses_;
    key_tokens_ = other.key_tokens_;
    tokens_ = std::exchange(other.tokens_, Index(-1));  // what was moved from is empty again
    return *this;
  }

  /// Tokens of the forward pass; -1 before the first.
  Index tokens() const { return tokens_; }

  /// Clusters of the queries of a routed head, one per token (-1: none); empty for dense routing. Heads are counted
  /// among the routed ones, here and below; query heads that share a key/value head count as one.
  std::span<const std::int32_t> labels(Index routed_head) const {
    return slice("Tape::labels", routed_.plans.query_labels, routed_head, tokens_);
  }
  /// Clusters of the keys of a routed head; those of the queries where they are shared.
  std::span<const std::int32_t> key_labels(Index routed_head) const {
    const auto& keys = routed_.plans.key_labels;
    return slice("Tape::key_labels", keys.empty() ? routed_.plans.query_labels : keys, routed_head, key_tokens_);
  }
  /// How many queries each cluster of a routed head has; allocates.
  std::vector<double> cluster_sizes(Index routed_head) const {
    std::vector<double> sizes(static_cast<std::size_t>(config_.clusters), 0.0);
    for (const std::int32_t label : labels(routed_head))
      if (label >= 0) sizes[static_cast<std::size_t>(label)] += 1;
    return sizes;
  }

  /// The plans of the routed heads: one each, or one for all where routing is dense.
  std::span<const AttentionPlan> plans() const { return routed_.plans.used(); }
  /// The plan of all local heads, in a span of one; empty when there are none.
  std::span<const AttentionPlan> local_plans() const { return local_.plans.used(); }

 private:
  friend class RoutingAttention<T>;

  std::span<const std::int32_t> slice(const char* function, std::span<const std::int32_t> all, Index head,
                                      Index rows) const {
    const Index heads = tokens_ < 0 ? 0 : detail::routed_kv_heads(config_);
    if (head < 0 || head >= heads)
      detail::fail<ValueError>(function, "routed_head", detail::join("0 to ", heads, " - 1"), head);
    if (all.empty()) return {};
    return detail::labels_of(all, head, rows);
  }

  Index tokens_ = -1, key_tokens_ = -1;
  bool crosses_ = false;           // keys and values came from a source
  RoutingAttentionConfig config_;  // of the layer that wrote it
  detail::Places places_;
  detail::HeadsTape<T> local_, routed_;
};

}  // namespace coterie
