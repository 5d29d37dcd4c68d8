// Several routers updated together: all of them, or none.
#pragma once

#include <span>
#include <vector>

#include "coterie/router/kmeans.hpp"

namespace coterie::detail {

/// Updates router h by head h of the statistics, for every router.
///
/// Requires: statistics of the routers' clusters and dim, with as many heads (ShapeError); head by head what
/// OnlineKMeans::update requires (its errors). After any error, of a task or of memory as well, no router has moved.
/// Allocates: copies of the routers that have not been updated yet, and their k-means++; else nothing.
/// Threads and determinism: bit-identical to one update() after the other. Checks and first updates are tasks of
///   `tasks`, a Context or Serial. Later updates run in the calling thread, where they cannot fail: clusters x dim
///   numbers each.
template <class T, class Tasks>
void update_routers(std::span<OnlineKMeans<T>> routers, const RouterStatistics<T>& statistics, Tasks& tasks) {
  const auto heads = static_cast<Index>(routers.size());
  const auto router = [&](Index h) -> OnlineKMeans<T>& { return routers[static_cast<std::size_t>(h)]; };
  if (statistics.heads() != heads)
    fail<ShapeError>("OnlineKMeans::update", "statistics", join(heads, " heads"), statistics.heads());
  tasks.for_each(heads, [&](Index h, Index) { router(h).check_update(statistics, h); });
  std::vector<OnlineKMeans<T>> first;  // copies of the routers whose first update this is
  std::vector<Index> first_heads;
  for (Index h = 0; h < heads; ++h)
    if (router(h).updates() == 0) {
      first.push_back(router(h));
      first_heads.push_back(h);
    }
  tasks.for_each(static_cast<Index>(first.size()), [&](Index i, Index) {
    first[static_cast<std::size_t>(i)].update_checked(statistics, first_heads[static_cast<std::size_t>(i)]);
  });
  // From here on nothing allocates and nothing throws.
  std::size_t next = 0;
  for (Index h = 0; h < heads; ++h)
    if (router(h).updates() == 0)
      router(h).copy_state(first[next++]);
    else
      router(h).update_checked(statistics, h);
}

}  // namespace coterie::detail
