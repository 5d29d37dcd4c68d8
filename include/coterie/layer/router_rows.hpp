// What routers see of queries and keys: normalised rows, one per token and routed key/value head.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/kernel/normalise.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/router/commitment.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Rows of all routed key/value heads side by side, of queries or of keys.
template <class T>
struct RouterRows {
  ConstView<T> all;         ///< rows x key/value heads * d
  bool normalised = false;  ///< they are already

  /// The normalised rows of a head; where they are not yet, written to `scratch`, rows x d.
  ConstView<T> of(Index head, View<T> scratch, const RoutingAttentionConfig& c, Context& context) const {
    const ConstView<T> rows = all.columns(head * c.head_dim, c.head_dim);
    if (normalised) return rows;
    const View<T> to = scratch.rows(0, rows.rows());
    normalise_rows<T>(rows, to, View<T>(), c.head_dim, context, c.normalisation);
    return to;
  }
  /// The same in the calling thread, for use inside a task.
  ConstView<T> of(Index head, View<T> scratch, const RoutingAttentionConfig& c) const {
    const ConstView<T> rows = all.columns(head * c.head_dim, c.head_dim);
    if (normalised) return rows;
    const View<T> to = scratch.rows(0, rows.rows());
    for (Index i = 0; i < rows.rows(); ++i) normalise_row(rows.row(i), to.row(i), c.head_dim, c.normalisation);
    return to;
  }
};

/// What routers see of the queries of a group of heads.
template <class T>
RouterRows<T> router_queries(const HeadBlock& group, const HeadsMatrices<T>& m) {
  return {m.route, group.normalises_queries() && group.heads_per_kv() == 1};
}
/// What they see of the keys.
template <class T>
RouterRows<T> router_keys(const HeadBlock& group, const HeadsMatrices<T>& m) {
  return {group.shared ? m.u : m.k, group.shared || group.normalises_keys()};
}

/// route = sum over the query heads of a key/value head of their normalised rows.
template <class T>
void sum_queries(const RoutingAttentionConfig& c, const HeadBlock& group, ConstView<T> u, View<T> route,
                 Context& context) {
  const Index d = c.head_dim, each = group.heads_per_kv();
  context.for_chunks(u.rows(), normalise_task_rows, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    T* const row = arena.take<T>(d);
    for (Index i = first; i < last; ++i)
      for (Index h = 0; h < group.count; ++h) {
        const T* from = u.row(i) + h * d;
        if (!group.normalises_queries()) normalise_row(from, row, d, c.normalisation), from = row;
        T* const to = route.row(i) + h / each * d;
        if (h % each == 0)
          std::copy(from, from + d, to);
        else
          for (Index j = 0; j < d; ++j) to[j] += from[j];
      }
  });
}

/// Undoes sum_queries: adds into d_u, the gradient of u, which is normalised or not as u is.
template <class T>
void sum_queries_backward(const RoutingAttentionConfig& c, const HeadBlock& group, ConstView<T> u, ConstView<T> d_route,
                          View<T> d_u, Context& context) {
  const Index d = c.head_dim, each = group.heads_per_kv();
  context.for_chunks(u.rows(), normalise_task_rows, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    T* const row = arena.take<T>(d);
    for (Index i = first; i < last; ++i)
      for (Index h = 0; h < group.count; ++h) {
        const T* const from = d_route.row(i) + h / each * d;
        T* const to = d_u.row(i) + h * d;
        if (group.normalises_queries()) {
          for (Index j = 0; j < d; ++j) to[j] += from[j];
        } else {
          const T inverse = normalise_row(u.row(i) + h * d, row, d, c.normalisation);
          normalise_row_backward(row, inverse, from, to, d, c.normalisation);
        }
      }
  });
}

/// The sum over routers of the commitment loss of their rows. Adds into d_rows the gradient of rows.all; a view without
/// columns: the loss alone.
template <class T>
double rows_commitment(const RoutingAttentionConfig& c, std::span<const OnlineKMeans<T>> routers,
                       const RouterRows<T>& rows, std::span<const std::int32_t> labels, View<T> d_rows,
                       Context& context) {
  const Index d = c.head_dim, n = rows.all.rows();
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
      const ConstView<T> x = rows.of(head, scratch, c, context);
      loss += differentiate
                  ? coterie::commitment_loss(x, label, centroids, c.commitment, d_rows.columns(head * d, d), context)
                  : coterie::commitment_loss(x, label, centroids, c.commitment, context);
      continue;
    }
    normalise_rows<T>(rows.all.columns(head * d, d), scratch, inverse, d, context, c.normalisation);
    d_normalised.fill(0);
    loss += coterie::commitment_loss(ConstView<T>(scratch), label, centroids, c.commitment, d_normalised, context);
    normalise_rows_backward<T>(scratch, inverse, d_normalised, d_rows.columns(head * d, d), d, context,
                               c.normalisation);
  }
  return loss;
}

/// Labels of the keys, those of the queries where they are shared.
inline std::span<const std::int32_t> key_labels(const HeadsPlans& plans) {
  return plans.key_labels.empty() ? plans.query_labels : plans.key_labels;
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
