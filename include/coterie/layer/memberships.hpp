// Plans of routed heads whose tokens are in several clusters or in none: balanced membership, several probes.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/core/normalise.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/plan/members.hpp"
#include "coterie/router/kmeans.hpp"
#include "coterie/router/members.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// What a routed head's router scores: the rows of queries or keys of a sequence batch.
template <class T>
struct RoutedRows {
  ConstView<T> rows;               ///< of all heads, side by side
  std::span<const Index> offsets;  ///< of the sequences
};

/// Plans of the routed heads, from the scores of their routers. `shared`: keys are the queries, normalised already.
template <class T>
void build_member_plans(const RoutingAttentionConfig& c, std::span<const OnlineKMeans<T>> routers,
                        const RoutedRows<T>& queries, const RoutedRows<T>& keys, bool shared, HeadsPlans& plans,
                        Context& context) {
  const Index d = c.head_dim, heads = static_cast<Index>(routers.size());
  const bool balanced = c.membership == Membership::balanced, one_list = balanced && shared;
  const auto lists = static_cast<std::size_t>(heads * (one_list ? 1 : 2));
  if (plans.members.size() < lists) plans.members.resize(lists);
  {
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const Index most = std::max(queries.rows.rows(), keys.rows.rows());
    const View<T> normalised = arena.matrix<T>(shared ? 0 : most, d), scores = arena.matrix<T>(most, c.clusters);
    for (Index h = 0; h < heads; ++h)
      for (std::size_t side = 0; side < (one_list ? 1 : 2); ++side) {
        const RoutedRows<T>& from = side == 0 ? queries : keys;
        const Index n = from.rows.rows();
        ConstView<T> rows = from.rows.columns(h * d, d);
        if (!shared) {
          normalise_rows<T>(rows, normalised.rows(0, n), View<T>(), d, context);
          rows = normalised.rows(0, n);
        }
        const View<T> scored = scores.rows(0, n);
        if (side == 0 || !shared) routers[static_cast<std::size_t>(h)].scores(rows, scored, context);
        ClusterMembers& members = plans.members[static_cast<std::size_t>(h) * (one_list ? 1 : 2) + side];
        if (balanced)
          coterie::balanced_members(scored, {.members = c.window, .unassigned = c.unassigned, .offsets = from.offsets},
                                    members, context);
        else
          coterie::nearest_members(scored, {.probes = side == 0 ? c.probes : 1, .offsets = from.offsets}, members,
                                   context);
      }
  }
  const std::span<AttentionPlan> built = plans.use(static_cast<std::size_t>(heads));
  context.for_each(heads, [&](Index h, Index) {
    const std::size_t at = static_cast<std::size_t>(h) * (one_list ? 1 : 2);
    plan_members(plans.members[at], plans.members[one_list ? at : at + 1],
                 {.window = balanced ? 0 : c.window,
                  .causal = c.causal,
                  .self = *c.self,
                  .combine = balanced ? c.combine : Combine::lse,
                  .offsets = queries.offsets,
                  .key_offsets = keys.offsets},
                 built[static_cast<std::size_t>(h)]);
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
