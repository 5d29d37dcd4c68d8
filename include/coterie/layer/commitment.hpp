// The commitment loss of a layer: routed rows are drawn to the centroids that they are nearest to.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/core/normalise.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/router/commitment.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The sum over routed heads of commitment_loss of their queries, and of their keys where they have some of their own.
/// Adds its gradients: shared heads, into d_q that of the normalised rows u; others, into d_q and d_k those of q and k. Views
/// without columns: the loss alone.
template <class T>
double layer_commitment(const RoutingAttentionConfig& c, std::span<const OnlineKMeans<T>> routers,
                        const HeadsMatrices<T>& m, const HeadsPlans& plans, bool shared, View<T> d_q, View<T> d_k,
                        Context& context) {
  const Index d = c.head_dim;
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  double loss = 0;
  // Queries or keys: rows of all heads, their labels, and where gradients go.
  const auto add = [&](View<T> all, std::span<const std::int32_t> labels, View<T> d_all) {
    const Index n = all.rows();
    const bool differentiate = d_all.cols() > 0;
    Arena::Scope side(arena);
    const View<T> rows = shared ? View<T>() : arena.matrix<T>(n, d), inverse = arena.matrix<T>(n, 1);
    const View<T> d_rows = shared || !differentiate ? View<T>() : arena.matrix<T>(n, d);
    for (std::size_t h = 0; h < routers.size(); ++h) {
      const Index first = static_cast<Index>(h) * d;
      const auto label = labels_of(labels, static_cast<Index>(h), n);
      const ConstView<T> centroids = routers[h].centroids();
      if (!shared) normalise_rows<T>(all.columns(first, d), rows, inverse, d, context);
      const ConstView<T> x = shared ? all.columns(first, d) : rows;
      if (!differentiate) {
        loss += coterie::commitment_loss(x, label, centroids, c.commitment, context);
        continue;
      }
      const View<T> d_x = shared ? d_all.columns(first, d) : d_rows;
      if (!shared) d_x.fill(0);
      loss += coterie::commitment_loss(x, label, centroids, c.commitment, d_x, context);
      if (!shared) normalise_rows_backward<T>(rows, inverse, d_x, d_all.columns(first, d), d, context);
    }
  };
  add(shared ? m.u : m.q, plans.query_labels, d_q);
  if (!shared) add(m.k, plans.key_labels.empty() ? plans.query_labels : plans.key_labels, d_k);
  return loss;
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
