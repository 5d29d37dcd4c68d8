// Plans of routed heads whose tokens are in several clusters or in none: balanced membership, several probes.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/layer/router_rows.hpp"
#include "coterie/plan/members.hpp"
#include "coterie/router/kmeans.hpp"
#include "coterie/router/members.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The rows of queries or keys of a sequence batch, to be scored.
template <class T>
struct ScoredRows {
  RouterRows<T> rows;
  std::span<const Index> offsets;  ///< of the sequences
};

/// Labels and plans of the routed heads, both from the scores of their routers. `shared`: keys are the queries.
template <class T>
void build_member_plans(const RoutingAttentionConfig& c, std::span<const OnlineKMeans<T>> routers,
                        const ScoredRows<T>& queries, const ScoredRows<T>& keys, bool shared, HeadsPlans& plans,
                        Context& context) {
  const Index d = c.head_dim, heads = static_cast<Index>(routers.size());
  const bool balanced = c.membership == Membership::balanced;
  const std::size_t sides = balanced && shared ? 1 : 2;  // lists of queries, and of keys where they are others
  if (plans.members.size() < sides * routers.size()) plans.members.resize(sides * routers.size());
  const auto members_of = [&](Index head, std::size_t side) -> ClusterMembers& {
    return plans.members[static_cast<std::size_t>(head) * sides + side];
  };
  HeadsPlans::grow(plans.query_labels, heads * queries.rows.all.rows());
  HeadsPlans::grow(plans.key_labels, shared ? 0 : heads * keys.rows.all.rows());

  {
    Arena& arena = context.workspace().shared();
    Arena::Scope scope(arena);
    const Index most = std::max(queries.rows.all.rows(), keys.rows.all.rows());
    const View<T> normalised = arena.matrix<T>(most, d), all_scores = arena.matrix<T>(most, c.clusters);
    for (Index h = 0; h < heads; ++h)
      for (std::size_t side = 0; side < sides; ++side) {
        const ScoredRows<T>& from = side == 0 ? queries : keys;
        const Index n = from.rows.all.rows();
        const View<T> scores = all_scores.rows(0, n);
        if (side == 0 || !shared) {  // shared keys have the queries' scores
          routers[static_cast<std::size_t>(h)].scores(from.rows.of(h, normalised, c, context), scores, context);
          const std::span<std::int32_t> labels = side == 0 ? plans.query_labels : plans.key_labels;
          best_columns<T>(scores, labels_of(labels, h, n), context);
        }
        const double share = side == 0 ? c.query_share : 0;
        if (balanced)
          coterie::balanced_members(scores,
                                    {.members = share > 0 ? 0 : c.window,
                                     .share = share,
                                     .unassigned = c.unassigned,
                                     .offsets = from.offsets},
                                    members_of(h, side), context);
        else
          coterie::nearest_members(scores, {.probes = side == 0 ? c.probes : 1, .offsets = from.offsets},
                                   members_of(h, side), context);
      }
  }
  const std::span<AttentionPlan> built = plans.use(routers.size());
  context.for_each(heads, [&](Index h, Index) {
    plan_members(members_of(h, 0), members_of(h, sides - 1),
                 {.window = balanced ? 0 : c.window,
                  .causal = c.causal,
                  .self = *c.self,
                  .combine = balanced ? c.combine : Combine::lse,
                  .offsets = queries.offsets,
                  .key_offsets = keys.offsets},
                 built[static_cast<std::size_t>(h)], &plans.scratch[static_cast<std::size_t>(h)]);
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
