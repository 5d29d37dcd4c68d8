// Labels, members and plans of a block of heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/kernel/normalise.hpp"
#include "coterie/layer/layer_state.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/dense_up_to.hpp"
#include "coterie/plan/globals.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/members.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/plan/sinks_recent.hpp"
#include "coterie/router/commitment.hpp"
#include "coterie/router/kmeans.hpp"
#include "coterie/router/members.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Rows of queries or of keys as routers see them, all routed key/value heads side by side.
template <class T>
struct RouterRows {
  const HeadBlock& block;
  ConstView<T> all;         ///< rows x key/value heads * d
  bool normalised = false;  ///< whether these rows are normalised already

  /// The normalised rows of a head. Where they are not normalised yet, they are written to `scratch`, rows x d.
  ConstView<T> of(Index head, View<T> scratch, Context& context) const {
    if (normalised) return columns(head);
    const View<T> to = scratch.rows(0, all.rows());
    normalise_rows<T>(columns(head), to, View<T>(), block.head_dim, context, block.normalisation);
    return to;
  }
  /// The same in the calling thread, for use inside a task.
  ConstView<T> of(Index head, View<T> scratch) const {
    const ConstView<T> rows = columns(head);
    if (normalised) return rows;
    const View<T> to = scratch.rows(0, rows.rows());
    for (Index i = 0; i < rows.rows(); ++i) normalise_row(rows.row(i), to.row(i), block.head_dim, block.normalisation);
    return to;
  }
  /// The rows of a head as they are.
  ConstView<T> columns(Index head) const { return all.columns(head * block.head_dim, block.head_dim); }
};

template <class T>
RouterRows<T> router_queries(const HeadBlock& block, const HeadsMatrices<T>& m) {
  return {block, m.routed_q, block.normalises_queries() && block.heads_per_kv() == 1};
}
template <class T>
RouterRows<T> router_keys(const HeadBlock& block, const HeadsMatrices<T>& m) {
  return {block, block.shared ? m.normalised_q : m.projected_k, block.shared || block.normalises_keys()};
}

/// routed_q = sum over the query heads of a key/value head of their normalised rows.
template <class T>
void sum_queries(const HeadBlock& block, ConstView<T> q, View<T> routed_q, Context& context) {
  const Index d = block.head_dim, each = block.heads_per_kv();
  context.for_chunks(q.rows(), normalise_task_rows, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    T* const row = arena.take<T>(d);
    for (Index i = first; i < last; ++i)
      for (Index h = 0; h < block.count; ++h) {
        const T* from = q.row(i) + h * d;
        if (!block.normalises_queries()) normalise_row(from, row, d, block.normalisation), from = row;
        T* const to = routed_q.row(i) + h / each * d;
        if (h % each == 0)
          std::copy(from, from + d, to);
        else
          for (Index j = 0; j < d; ++j) to[j] += from[j];
      }
  });
}

/// Undoes sum_queries: adds into d_q, the gradient of q, which is normalised or not as q is.
template <class T>
void sum_queries_backward(const HeadBlock& block, ConstView<T> q, ConstView<T> d_routed_q, View<T> d_q,
                          Context& context) {
  const Index d = block.head_dim, each = block.heads_per_kv();
  context.for_chunks(q.rows(), normalise_task_rows, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    T* const row = arena.take<T>(d);
    for (Index i = first; i < last; ++i)
      for (Index h = 0; h < block.count; ++h) {
        const T* const from = d_routed_q.row(i) + h / each * d;
        T* const to = d_q.row(i) + h * d;
        if (block.normalises_queries()) {
          for (Index j = 0; j < d; ++j) to[j] += from[j];
        } else {
          const T inverse = normalise_row(q.row(i) + h * d, row, d, block.normalisation);
          normalise_row_backward(row, inverse, from, to, d, block.normalisation);
        }
      }
  });
}

/// The sum over routers of the commitment loss of their rows. Adds the gradient of rows.all into d_rows, unless that
/// has no columns.
template <class T>
double rows_commitment(std::span<const OnlineKMeans<T>> routers, const RouterRows<T>& rows,
                       std::span<const std::int32_t> labels, View<T> d_rows, Context& context) {
  const HeadBlock& block = rows.block;
  const Index d = block.head_dim, n = rows.all.rows();
  const bool differentiate = d_rows.cols() > 0;
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const bool through = !rows.normalised && differentiate;
  const View<T> scratch = rows.normalised ? View<T>() : arena.matrix<T>(n, d);
  const View<T> inverse = through ? arena.matrix<T>(n, 1) : View<T>();
  const View<T> d_normalised = through ? arena.matrix<T>(n, d) : View<T>();
  double loss = 0;
  for (std::size_t h = 0; h < routers.size(); ++h) {
    const Index head = static_cast<Index>(h);
    const auto label = labels_of(labels, head, n);
    const ConstView<T> centroids = routers[h].centroids();
    if (!through) {
      const ConstView<T> x = rows.of(head, scratch, context);
      loss += differentiate ? coterie::commitment_loss(x, label, centroids, block.commitment,
                                                       d_rows.columns(head * d, d), context)
                            : coterie::commitment_loss(x, label, centroids, block.commitment, context);
      continue;
    }
    normalise_rows<T>(rows.columns(head), scratch, inverse, d, context, block.normalisation);
    d_normalised.fill(0);
    loss += coterie::commitment_loss(ConstView<T>(scratch), label, centroids, block.commitment, d_normalised, context);
    normalise_rows_backward<T>(scratch, inverse, d_normalised, d_rows.columns(head * d, d), d, context,
                               block.normalisation);
  }
  return loss;
}

/// Fills the labels and plans of a block of heads from the rows that its routers see.
template <class T>
class HeadsRouting {
 public:
  HeadsRouting(const LayerState<T>& layer, const HeadBlock& block, const CheckedInput<T>& in, const HeadsMatrices<T>& m,
               Context& context)
      : layer_(layer),
        block_(block),
        in_(in),
        queries_{router_queries(block, m)},
        keys_{router_keys(block, m)},
        context_(context) {}

  /// Sets the labels of queries and keys of routed heads: given, drawn, or assigned by their routers. Where a token can
  /// be in several clusters, sets the members of the clusters as well.
  void assign(HeadsPlans& plans) const { block_.has_members() ? score_members(plans) : assign_labels(plans); }

  /// Builds the plans, with a dense beginning, global tokens and memory on top.
  void build_plans(HeadsPlans& plans) const;

 private:
  void build_token_plans(HeadsPlans& plans) const;
  void assign_labels(HeadsPlans& plans) const;
  void build_clustered_plans(HeadsPlans& plans) const;
  void score_members(HeadsPlans& plans) const;
  void build_member_plans(HeadsPlans& plans) const;
  void add_to_plans(HeadsPlans& plans) const;

  Index tokens() const { return in_.x.rows(); }
  Index key_rows() const { return in_.source.rows(); }
  // Lists of members of a head: one of queries, and one of keys where it differs.
  std::size_t sides() const { return block_.balanced && block_.shared ? 1 : 2; }
  ClusterMembers& members_of(HeadsPlans& plans, Index head, std::size_t side) const {
    return plans.members[static_cast<std::size_t>(head) * sides() + side];
  }

  const LayerState<T>& layer_;
  const HeadBlock& block_;
  const CheckedInput<T>& in_;
  RouterRows<T> queries_, keys_;
  Context& context_;
};

template <class T>
void HeadsRouting<T>::assign_labels(HeadsPlans& plans) const {
  const Index n = tokens(), heads = block_.kv_count;
  const bool given = !in_.input.routes.empty(), drawn = !given && block_.routing == Routing::random;
  const bool own_keys = in_.crosses() || (!given && !drawn && !block_.shared);
  const auto query_labels = HeadsPlans::grow(plans.query_labels, heads * n);
  const auto key_labels = HeadsPlans::grow(plans.own_key_labels, own_keys ? heads * key_rows() : 0);
  if (given) {
    std::copy(in_.input.routes.begin(), in_.input.routes.end(), query_labels.begin());
    return;
  }
  Arena& arena = context_.workspace().shared();
  Arena::Scope scope(arena);
  const View<T> scratch = drawn ? View<T>() : arena.matrix<T>((std::max)(n, key_rows()), block_.head_dim);
  const auto stream = static_cast<std::uint64_t>(LayerStream::routes);
  const std::uint64_t step = random_bits(layer_.config.seed, stream, in_.input.step);
  for (Index h = 0; h < heads; ++h) {
    const auto assign = [&](const RouterRows<T>& rows, std::span<const std::int32_t> positions,
                            std::span<std::int32_t> labels) {
      if (drawn) {
        const std::uint64_t seed = random_bits(step, stream, static_cast<std::uint64_t>(h));
        for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = random_label(seed, positions[i], block_.clusters);
        return;
      }
      layer_.routers[static_cast<std::size_t>(h)].assign(rows.of(h, scratch, context_), labels, context_);
    };
    assign(queries_, in_.positions, labels_of(query_labels, h, n));
    if (own_keys) assign(keys_, in_.key_positions, labels_of(key_labels, h, key_rows()));
  }
}

template <class T>
void HeadsRouting<T>::build_plans(HeadsPlans& plans) const {
  build_token_plans(plans);
  add_to_plans(plans);
}

// Builds the plans without sinks, recent keys, a dense beginning, global tokens and memory.
template <class T>
void HeadsRouting<T>::build_token_plans(HeadsPlans& plans) const {
  if (block_.has_members()) return build_member_plans(plans);
  if (block_.clustered()) return build_clustered_plans(plans);
  AttentionPlan& plan = plans.use(1)[0];
  if (block_.kind == BlockKind::local)
    plan_local({.tokens = tokens(),
                .keys = key_rows(),
                .window = block_.window,
                .lookahead = block_.lookahead,
                .causal = layer_.config.causal,
                .self = block_.self,
                .offsets = in_.offsets,
                .key_offsets = in_.key_offsets},
               plan, &plans.scratch[0]);
  else
    plan_dense({.tokens = tokens(),
                .keys = key_rows(),
                .causal = layer_.config.causal,
                .self = block_.self,
                .offsets = in_.offsets,
                .key_offsets = in_.key_offsets},
               plan, &plans.scratch[0]);
}

// Builds plans from one label per token.
template <class T>
void HeadsRouting<T>::build_clustered_plans(HeadsPlans& plans) const {
  assign_labels(plans);
  const std::span<AttentionPlan> built = plans.use(static_cast<std::size_t>(block_.kv_count));
  context_.for_each(block_.kv_count, [&](Index h, Index) {
    plan_clustered(labels_of(std::span<const std::int32_t>(plans.query_labels), h, tokens()),
                   labels_of(plans.key_labels(), h, key_rows()),
                   {.clusters = block_.clusters,
                    .window = block_.window,
                    .causal = layer_.config.causal,
                    .self = block_.self,
                    .offsets = in_.offsets,
                    .key_offsets = in_.key_offsets},
                   built[static_cast<std::size_t>(h)], &plans.scratch[static_cast<std::size_t>(h)]);
  });
}

// Makes labels and lists of members from the scores of the routers.
template <class T>
void HeadsRouting<T>::score_members(HeadsPlans& plans) const {
  const Index heads = block_.kv_count;
  if (plans.members.size() < sides() * layer_.routers.size()) plans.members.resize(sides() * layer_.routers.size());
  HeadsPlans::grow(plans.query_labels, heads * tokens());
  HeadsPlans::grow(plans.own_key_labels, block_.shared ? 0 : heads * key_rows());
  Arena& arena = context_.workspace().shared();
  Arena::Scope scope(arena);
  const Index most = (std::max)(tokens(), key_rows());
  const View<T> scratch = arena.matrix<T>(most, block_.head_dim), all_scores = arena.matrix<T>(most, block_.clusters);
  for (Index h = 0; h < heads; ++h)
    for (std::size_t side = 0; side < sides(); ++side) {
      const bool of_queries = side == 0;
      const Index n = of_queries ? tokens() : key_rows();
      const std::span<const Index> offsets = of_queries ? in_.offsets : in_.key_offsets;
      const View<T> scores = all_scores.rows(0, n);
      if (of_queries || !block_.shared) {  // shared keys have the queries' scores
        const RouterRows<T>& rows = of_queries ? queries_ : keys_;
        layer_.routers[static_cast<std::size_t>(h)].scores(rows.of(h, scratch, context_), scores, context_);
        const std::span<std::int32_t> labels = of_queries ? plans.query_labels : plans.own_key_labels;
        best_columns<T>(scores, labels_of(labels, h, n), context_);
      }
      const double share = of_queries ? block_.query_share : 0;
      ClusterMembers& members = members_of(plans, h, side);
      if (block_.balanced)
        coterie::balanced_members(scores,
                                  {.members = share > 0 ? 0 : block_.window,
                                   .share = share,
                                   .unassigned = block_.unassigned,
                                   .offsets = offsets},
                                  members, context_);
      else
        coterie::nearest_members(scores, {.probes = of_queries ? block_.probes : 1, .offsets = offsets}, members,
                                 context_);
    }
}

// Builds plans of tokens that are in several clusters or in none: balanced membership, several probes.
template <class T>
void HeadsRouting<T>::build_member_plans(HeadsPlans& plans) const {
  score_members(plans);
  const std::span<AttentionPlan> built = plans.use(layer_.routers.size());
  context_.for_each(block_.kv_count, [&](Index h, Index) {
    plan_members(members_of(plans, h, 0), members_of(plans, h, sides() - 1),
                 {.window = block_.balanced ? 0 : block_.window,
                  .causal = layer_.config.causal,
                  .self = block_.self,
                  .combine = block_.balanced ? block_.combine : Combine::lse,
                  .offsets = in_.offsets,
                  .key_offsets = in_.key_offsets},
                 built[static_cast<std::size_t>(h)], &plans.scratch[static_cast<std::size_t>(h)]);
  });
}

// Adds sinks and recent keys, a dense beginning, global tokens and memory. Dense heads see all tokens anyway and get
// memory alone.
template <class T>
void HeadsRouting<T>::add_to_plans(HeadsPlans& plans) const {
  const RoutingAttentionConfig& c = layer_.config;
  const bool dense = block_.kind == BlockKind::dense;
  const Index dense_up_to = dense ? 0 : c.dense_up_to, globals = dense ? 0 : c.globals;
  if (dense_up_to + globals + c.memory == 0 && !block_.has_sinks_recent()) return;
  context_.for_each(static_cast<Index>(plans.count), [&](Index i, Index) {
    const auto number = static_cast<std::size_t>(i);
    AttentionPlan& plan = plans.plans[number];
    PlanScratch* const scratch = &plans.scratch[number];
    if (block_.has_sinks_recent())
      plan_add_sinks_recent({.sinks = block_.sinks,
                             .recent = block_.recent,
                             .self = block_.self,
                             .offsets = in_.offsets,
                             .key_offsets = in_.key_offsets},
                            plan, scratch);
    if (dense_up_to > 0)
      plan_dense_up_to({.length = dense_up_to,
                        .causal = c.causal,
                        .self = block_.self,
                        .offsets = in_.offsets,
                        .key_offsets = in_.key_offsets},
                       plan, scratch);
    if (globals > 0)
      plan_add_globals({.globals = globals, .causal = c.causal, .self = block_.self, .offsets = in_.offsets}, plan,
                       scratch);
    if (c.memory > 0) plan_add_memory(c.memory, plan, scratch);
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
