// What a forward pass of a layer leaves behind.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/core/cluster_members.hpp"
#include "coterie/core/workspace.hpp"
#include "coterie/layer/head_block.hpp"
#include "coterie/layer/input.hpp"
#include "coterie/plan/complete.hpp"

namespace coterie {

namespace detail {

/// The labels of one head among those of all, heads x rows.
template <class L>
std::span<L> labels_of(std::span<L> all, Index head, Index rows) {
  return all.subspan(static_cast<std::size_t>(head * rows), static_cast<std::size_t>(rows));
}

/// Labels and plans of a block of heads; vectors keep their memory from call to call.
class HeadsPlans {
 public:
  std::vector<std::int32_t> query_labels;    ///< key/value heads x query rows
  std::vector<std::int32_t> own_key_labels;  ///< key/value heads x key rows; empty where keys have those of the queries
  std::vector<ClusterMembers> members;       ///< per head lists of the queries, and of the keys; empty where labels do
  std::vector<AttentionPlan> plans;
  std::vector<PlanScratch> scratch;  ///< per plan, for builders run side by side
  std::size_t count = 0;             ///< plans in use: 1 for all heads, or one per key/value head

  /// Labels of the keys: their own, or those of the queries.
  std::span<const std::int32_t> key_labels() const { return own_key_labels.empty() ? query_labels : own_key_labels; }

  std::span<const AttentionPlan> used() const { return {plans.data(), count}; }
  /// The first `number` plans, to be built. Allocates: where there are fewer. After an error none are in use.
  std::span<AttentionPlan> use(std::size_t number) {
    count = 0;
    if (plans.size() < number) plans.resize(number);
    if (scratch.size() < number) scratch.resize(number);
    count = number;
    return {plans.data(), number};
  }
  static std::span<std::int32_t> grow(std::vector<std::int32_t>& labels, Index size) {
    labels.resize(static_cast<std::size_t>(size));
    return labels;
  }
};

/// The matrices of a block of heads in a forward pass. Several of them can be views of the same rows.
/// Shapes: d = head width, c = heads * d, e = key/value heads * d.
template <class T>
struct HeadsMatrices {
  View<T> projected_q;          ///< tokens x c; normalised in place where nobody needs the projected ones afterwards
  View<T> normalised_q;         ///< tokens x c: normalised, after the convolution if any; else projected_q
  View<T> routed_q;             ///< tokens x e: rows for the routers: normalised_q, or its sums per key/value head
  View<T> attended_q;           ///< tokens x c: what attention reads: one of the first two, or rotated
  View<T> projected_k;          ///< source rows x e, unless shared; normalised in place where attention reads them so
  View<T> attended_k;           ///< source rows x e: projected_k, or where shared one of the first two; or rotated
  View<T> projected_v;          ///< source rows x e; one row of zeros more for induction
  View<T> out;                  ///< tokens x c: the output of attention
  View<T> q_inverse_deviation;  ///< tokens x heads: inverse deviations of normalise_rows for normalised_q, where kept
  View<T> k_inverse_deviation;  ///< source rows x key/value heads: the same of projected_k

  HeadsMatrices() = default;

  /// Takes all matrices from an arena.
  HeadsMatrices(const HeadBlock& block, Index tokens, Index source_rows, Arena& arena) {
    lay_out(block, tokens, source_rows, [&](Index rows, Index cols) { return arena.matrix<T>(rows, cols); });
  }

  /// Bytes of all matrices.
  static std::size_t bytes(const HeadBlock& block, Index tokens, Index source_rows) {
    std::size_t sum = 0;
    HeadsMatrices().lay_out(block, tokens, source_rows, [&](Index rows, Index cols) {
      sum += Arena::bytes_for<T>(rows * cols);
      return View<T>();
    });
    return sum;
  }

 private:
  template <class Take>
  void lay_out(const HeadBlock& block, Index n, Index source_rows, const Take& take) {
    const Index cols = block.cols(), kv_cols = block.kv_cols();
    projected_q = take(n, cols);
    // The convolution's gradient, and attention that reads projected queries, need them beside the normalised ones.
    const bool both = block.taps > 0 || (block.shared && block.logits != Logits::normalised);
    normalised_q = both ? take(n, cols) : projected_q;
    routed_q = block.sums_queries() ? take(n, kv_cols) : normalised_q;
    if (!block.shared) projected_k = take(source_rows, kv_cols);
    projected_v = take(source_rows + (block.induction ? 1 : 0), kv_cols);
    out = take(n, cols);
    if (block.normalises_queries()) q_inverse_deviation = take(n, block.count);
    if (block.normalises_keys()) k_inverse_deviation = take(source_rows, block.kv_count);

    attended_q = block.logits == Logits::normalised ? normalised_q : projected_q;
    attended_k = !block.shared ? projected_k : block.logits == Logits::raw ? projected_q : normalised_q;
    if (!rotates_copies(block)) return;
    attended_q = take(n, cols);
    attended_k = block.attends_same_rows() ? attended_q : take(source_rows, kv_cols);
  }

  // Rows are rotated in place unless routers or normalise_rows_backward read them as they were.
  static bool rotates_copies(const HeadBlock& block) {
    return block.positions == PositionKind::rotary &&
           (block.clustered() || block.shared || block.logits != Logits::raw);
  }
};

/// A block of heads on a tape.
template <class T>
struct HeadsTape {
  Arena arena;  ///< of the matrices
  HeadsMatrices<T> matrices;
  HeadsPlans plans;
  AttentionTape<T> attention;
};

}  // namespace detail

template <class T>
class RoutingAttention;
namespace detail {
template <class T>
class LayerChecks;
}

/// What backward and update_router need of a forward pass, and diagnostics: labels, plans, cluster sizes.
///
/// Make it once and use it for every step. Its memory grows to the largest step and stays.
template <class T>
class RoutingAttentionTape {
 public:
  RoutingAttentionTape() = default;
  RoutingAttentionTape(RoutingAttentionTape&& other) noexcept { *this = std::move(other); }
  RoutingAttentionTape& operator=(RoutingAttentionTape&& other) noexcept {
    if (this == &other) return *this;
    positions_ = std::move(other.positions_);
    blocks_ = std::move(other.blocks_);
    config_ = other.config_;
    crosses_ = other.crosses_;
    key_tokens_ = other.key_tokens_;
    tokens_ = std::exchange(other.tokens_, Index(-1));  // what was moved from is empty again
    return *this;
  }

  /// Tokens of the forward pass; -1 before the first.
  Index tokens() const { return tokens_; }

  /// Clusters of the queries of a routed head, one per token (-1: none).
  ///
  /// Here and below, heads are numbered within the routed block. Query heads that share a key/value head count as one.
  /// Requires: a routed head (ValueError).
  std::span<const std::int32_t> labels(Index routed_head) const {
    return slice("Tape::labels", routed().plans.query_labels, routed_head, tokens_);
  }
  /// Clusters of the keys of a routed head; those of the queries where they are shared.
  /// Requires: a routed head (ValueError).
  std::span<const std::int32_t> key_labels(Index routed_head) const {
    return slice("Tape::key_labels", routed().plans.key_labels(), routed_head, key_tokens_);
  }
  /// Numbers of queries in each cluster of a routed head.
  /// Requires: a routed head (ValueError). Allocates: the result.
  std::vector<double> cluster_sizes(Index routed_head) const {
    std::vector<double> sizes(static_cast<std::size_t>(config_.routed.clusters), 0.0);
    for (const std::int32_t label : labels(routed_head))
      if (label >= 0) sizes[static_cast<std::size_t>(label)] += 1;
    return sizes;
  }

  /// The plans of the routed heads, one each; empty where there are none.
  std::span<const AttentionPlan> plans() const { return plans_of(detail::BlockKind::routed, config_.routed.heads); }
  /// The plan of all local heads, in a span of one; empty where there are none.
  std::span<const AttentionPlan> local_plans() const { return plans_of(detail::BlockKind::local, config_.local.heads); }
  /// The plan of all dense heads, in a span of one; empty where there are none.
  std::span<const AttentionPlan> dense_plans() const { return plans_of(detail::BlockKind::dense, config_.dense.heads); }

 private:
  friend class RoutingAttention<T>;
  friend class detail::LayerChecks<T>;

  const detail::HeadsTape<T>& block(detail::BlockKind kind) const { return blocks_[detail::Heads::index(kind)]; }
  const detail::HeadsTape<T>& routed() const { return block(detail::BlockKind::routed); }

  // By the config: a block without heads can still hold the plans of another layer that used this tape before.
  std::span<const AttentionPlan> plans_of(detail::BlockKind kind, Index heads) const {
    if (tokens_ < 0 || heads == 0) return {};
    return block(kind).plans.used();
  }

  std::span<const std::int32_t> slice(const char* function, std::span<const std::int32_t> all, Index head,
                                      Index rows) const {
    const Index heads = tokens_ < 0 || config_.routed.heads == 0 ? 0 : detail::routed_kv_heads(config_);
    if (head < 0 || head >= heads)
      detail::fail<ValueError>(function, "routed_head",
                               heads > 0 ? detail::join("0 to ", heads - 1) : "a layer with routed heads", head);
    return detail::labels_of(all, head, rows);
  }

  Index tokens_ = -1, key_tokens_ = -1;
  bool crosses_ = false;           // keys and values came from a source
  RoutingAttentionConfig config_;  // of the layer that wrote it
  detail::RowPositions positions_;
  std::array<detail::HeadsTape<T>, 3> blocks_;  // local, routed, dense
};

}  // namespace coterie
