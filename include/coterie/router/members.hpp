// Memberships beyond the nearest cluster: from scores of rows for centroids to lists of members.
//
//     router.scores(rows, scores, context);                        // tokens x clusters, OnlineKMeans
//     balanced_members(scores, {.members = w}, members, context);  // every cluster takes its w best rows
//     nearest_members(scores, {.probes = 2}, members, context);    // every row goes to its two best clusters
//
// plan_members() makes a plan of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "coterie/core/cluster_members.hpp"
#include "coterie/core/context.hpp"
#include "coterie/core/offsets.hpp"

namespace coterie {

/// What becomes of a row that no cluster takes.
enum class Unassigned {
  left_out,  ///< it is in no cluster: its output is zero (the paper's code)
  nearest,   ///< it joins its best cluster, which then has more members
};

/// Settings of balanced_members.
struct BalancedConfig {
  Index members = 0;  ///< rows that a cluster takes in each sequence, as far as there are so many; at least 1
  double share = 0;  ///< above 0, instead of members: share * rows of the sequence / clusters, rounded down, at least 1
  Unassigned unassigned = Unassigned::left_out;
  std::span<const Index> offsets = {};  ///< sequences + 1 ascending row numbers; empty: one sequence
};

/// Settings of nearest_members.
struct NearestConfig {
  Index probes = 1;                     ///< clusters of a row, 1 to clusters
  std::span<const Index> offsets = {};  ///< sequences + 1 ascending row numbers; empty: one sequence
};

namespace detail {

/// A score as an integer that compares alike: NaN lowest, both zeros alike, whatever -ffast-math makes of comparisons.
template <class T>
auto order_key(T score) {
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  constexpr Integer infinity = std::bit_cast<Integer>(std::numeric_limits<T>::infinity());
  const Integer bits = std::bit_cast<Integer>(score), size = bits & std::numeric_limits<Integer>::max();
  if (size > infinity) return std::numeric_limits<Integer>::min();
  return bits >= 0 ? size : -size;
}

/// A row or a cluster and its score. The better comes first; of equals the lower number.
template <class T>
struct Candidate {
  decltype(order_key(T())) key;
  std::int32_t number;
  friend bool operator<(const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key > b.key : a.number < b.number;
  }
};

/// The best `count` candidates come first, in any order.
template <class T>
void partition_best(Candidate<T>* candidates, Index all, Index count) {
  if (count < all) std::nth_element(candidates, candidates + count, candidates + all);
}

/// Checks what both memberships take.
template <class T>
void check_scores(const char* function, Faults& faults, ConstView<T> scores, std::span<const Index> offsets) {
  check_shape<T>(function, "scores", scores, scores.rows(), scores.cols());
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  faults.expect(scores.cols() >= 1, "scores", "at least one column, one for each cluster", scores.cols());
  faults.expect(scores.rows() <= most, "scores", "at most 2147483647 rows", scores.rows());
  if (!offsets.empty()) check_offsets(faults, "offsets", offsets, scores.rows());
}

inline void check_memberships(const char* function, Index sequences, Index clusters, Index memberships) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  if (memberships > most || sequences * clusters >= most)
    fail<ValueError>(function, "scores", join("at most ", most, " clusters and memberships of all sequences together"),
                     std::max(memberships, sequences * clusters));
}

/// The best column of a row, the lowest of equals: of scores, the label that OnlineKMeans::assign() gives.
template <class T>
Index best_column(const T* scores, Index columns) {
  Index best = 0;
  for (Index c = 1; c < columns; ++c)
    if (order_key(scores[c]) > order_key(scores[best])) best = c;
  return best;
}

/// labels[i] = best_column of row i.
template <class T>
void best_columns(ConstView<T> scores, std::span<std::int32_t> labels, Context& context) {
  context.for_chunks(scores.rows(), 512, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i)
      labels[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(best_column(scores.row(i), scores.cols()));
  });
}

template <class T>
void balanced_members(ConstView<T> scores, const BalancedConfig& config, ClusterMembers& members, Context& context) {
  const char* const function = "balanced_members";
  Faults faults(function);
  check_scores<T>(function, faults, scores, config.offsets);
  faults.expect(config.share >= 0 && std::isfinite(config.share), "share", "0, or a positive number", config.share);
  faults.expect(config.share > 0 ? config.members == 0 : config.members >= 1, "members",
                config.share > 0 ? "0 with a share" : "at least 1", config.members);
  faults.expect(config.unassigned == Unassigned::left_out || config.unassigned == Unassigned::nearest, "unassigned",
                "left_out or nearest", static_cast<int>(config.unassigned));
  faults.raise();
  const Index k = scores.cols(), n = scores.rows(), sequences = sequence_count(config.offsets), lists = sequences * k;
  const auto rows_of = [&](Index s) { return sequence_rows(config.offsets, n, s); };
  const auto taken = [&](Index s) {
    const Index all = rows_of(s).count();
    if (config.share == 0) return std::min(config.members, all);
    const double rows = config.share * static_cast<double>(all) / static_cast<double>(k);
    return std::min(all, rows < static_cast<double>(all) ? std::max<Index>(1, static_cast<Index>(rows)) : all);
  };
  Index memberships = config.unassigned == Unassigned::nearest ? n : 0;
  for (Index s = 0; s < sequences; ++s) memberships += k * taken(s);
  check_memberships(function, sequences, k, memberships);

  members.tokens = n;
  members.clusters = k;
  members.sequences = sequences;
  members.begin.assign(static_cast<std::size_t>(lists) + 1, 0);
  members.rows.resize(static_cast<std::size_t>(memberships));
  for (Index s = 0, i = 0; s < sequences; ++s)
    for (Index c = 0; c < k; ++c, ++i)
      members.begin[static_cast<std::size_t>(i) + 1] =
          static_cast<std::int32_t>(members.begin[static_cast<std::size_t>(i)] + taken(s));
  std::int32_t* const rows = members.rows.data();
  context.for_each(lists, [&](Index list, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    const Index s = list / k, c = list % k, first = rows_of(s).begin, all = rows_of(s).count();
    Candidate<T>* const candidates = arena.template take<Candidate<T>>(all);
    for (Index i = 0; i < all; ++i)
      candidates[i] = {order_key(scores(first + i, c)), static_cast<std::int32_t>(first + i)};
    const Index count = taken(s);
    partition_best(candidates, all, count);
    std::int32_t* const to = rows + members.begin[static_cast<std::size_t>(list)];
    for (Index i = 0; i < count; ++i) to[i] = candidates[i].number;
    std::sort(to, to + count);
  });
  if (config.unassigned == Unassigned::left_out) return;

  // Rows that nobody took join their best cluster: count them, move the lists apart from the back, add, sort.
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  std::int32_t* const joins = arena.take<std::int32_t>(n);       // per row its cluster's list, -1: it is in one
  std::int32_t* const joined = arena.take<std::int32_t>(lists);  // per list a count
  std::fill_n(joins, n, 0);
  std::fill_n(joined, lists, 0);
  const auto selected = static_cast<std::size_t>(members.begin.back());
  for (std::size_t i = 0; i < selected; ++i) joins[rows[i]] = -1;
  for (Index s = 0; s < sequences; ++s)
    for (Index i = rows_of(s).begin; i < rows_of(s).end; ++i) {
      std::int32_t& list = joins[i];
      if (list < 0) continue;
      list = static_cast<std::int32_t>(s * k + best_column(scores.row(i), k));
      ++joined[list];
    }
  std::int32_t added = 0;
  for (Index list = 0; list < lists; ++list) added += joined[list];
  members.rows.resize(selected + static_cast<std::size_t>(added));
  for (Index list = lists - 1; list >= 0; --list) {
    std::int32_t& begin = members.begin[static_cast<std::size_t>(list)];
    std::int32_t& end = members.begin[static_cast<std::size_t>(list) + 1];
    const std::int32_t before = added - joined[list];  // rows that join earlier lists
    std::copy_backward(rows + begin, rows + end, rows + end + before);
    joined[list] = end + before;  // where the list's next new row goes
    end += added;
    added = before;
  }
  for (Index i = 0; i < n; ++i) {
    const std::int32_t list = joins[i];
    if (list >= 0) rows[joined[list]++] = static_cast<std::int32_t>(i);
  }
  for (Index list = 0; list < lists; ++list)
    std::sort(rows + members.begin[static_cast<std::size_t>(list)],
              rows + members.begin[static_cast<std::size_t>(list) + 1]);
}

template <class T>
void nearest_members(ConstView<T> scores, const NearestConfig& config, ClusterMembers& members, Context& context) {
  const char* const function = "nearest_members";
  Faults faults(function);
  check_scores<T>(function, faults, scores, config.offsets);
  const Index k = scores.cols(), n = scores.rows(), probes = config.probes;
  if (probes < 1 || probes > k) faults.expect(false, "probes", join("1 to clusters = ", k), probes);
  faults.raise();
  const Index sequences = sequence_count(config.offsets), lists = sequences * k;
  check_memberships(function, sequences, k, n * probes);

  Arena& shared = context.workspace().shared();
  Arena::Scope shared_scope(shared);
  std::int32_t* const probed = shared.take<std::int32_t>(n * probes);  // tokens x probes
  context.for_chunks(n, 256, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    Candidate<T>* const candidates = arena.template take<Candidate<T>>(k);
    for (Index i = first; i < last; ++i) {
      for (Index c = 0; c < k; ++c) candidates[c] = {order_key(scores(i, c)), static_cast<std::int32_t>(c)};
      partition_best(candidates, k, probes);
      for (Index p = 0; p < probes; ++p) probed[i * probes + p] = candidates[p].number;
    }
  });
  members.tokens = n;
  members.clusters = k;
  members.sequences = sequences;
  members.begin.assign(static_cast<std::size_t>(lists) + 1, 0);
  members.rows.resize(static_cast<std::size_t>(n * probes));
  // A counting sort: counts, starts, then each list's start moves to its end.
  const auto each = [&](auto&& f) {
    for (Index s = 0; s < sequences; ++s) {
      const RowRange range = sequence_rows(config.offsets, n, s);
      for (Index i = range.begin; i < range.end; ++i)
        for (Index p = 0; p < probes; ++p) f(i, s * k + probed[i * probes + p]);
    }
  };
  each([&](Index, Index list) { ++members.begin[static_cast<std::size_t>(list) + 1]; });
  for (std::size_t i = 1; i < members.begin.size(); ++i) members.begin[i] += members.begin[i - 1];
  each([&](Index i, Index list) {
    members.rows[static_cast<std::size_t>(members.begin[static_cast<std::size_t>(list)]++)] =
        static_cast<std::int32_t>(i);
  });
  std::copy_backward(members.begin.begin(), members.begin.end() - 1, members.begin.end());
  members.begin.front() = 0;
}

}  // namespace detail

/// The paper's membership: in every sequence each cluster takes the `members` rows that score highest for its centroid.
///
/// A row may be in several clusters or in none; members times clusters need not be the number of tokens. Rows are ascending,
/// equal scores go to the lower row, NaN scores lowest.
/// NOT STRICTLY CAUSAL: whether a row is taken depends on the scores of all rows of its sequence, later ones too, so in a
/// causal model what earlier rows see changes with later tokens; likelihoods leak and decoding cannot repeat training.
/// nearest_members() and OnlineKMeans::assign() have no such leak. How much: see the tests of plan_members.
/// Shapes: scores tokens x clusters.
/// Requires: what BalancedConfig says; offsets ascending from 0 to tokens (ValueError, one for all faults).
/// Overwrites members. Allocates: only where members and workspace have to grow.
/// Threads and determinism: the same lists for any number of workers.
/// Cost: tokens * clusters. Source: Roy et al. 2021, section 4.1 (top-k per centroid).
inline void balanced_members(ConstView<float> scores, const BalancedConfig& config, ClusterMembers& members,
                             Context& context) {
  detail::balanced_members<float>(scores, config, members, context);
}
inline void balanced_members(ConstView<double> scores, const BalancedConfig& config, ClusterMembers& members,
                             Context& context) {
  detail::balanced_members<double>(scores, config, members, context);
}

/// Every row goes to the `probes` clusters that it scores highest for: with one probe the labels of OnlineKMeans::assign(),
/// with more the query side of a multi-probe search, whose keys are in one cluster each.
///
/// A row's clusters depend on that row alone, so nothing leaks from later tokens. Equal scores go to the lower cluster.
/// Shapes: scores tokens x clusters.
/// Requires: 1 to clusters probes; offsets ascending from 0 to tokens (ValueError, one for all faults).
/// Overwrites members. Allocates: only where members and workspace have to grow.
/// Threads and determinism: the same lists for any number of workers.
/// Cost: tokens * clusters. Source: ours.
inline void nearest_members(ConstView<float> scores, const NearestConfig& config, ClusterMembers& members,
                            Context& context) {
  detail::nearest_members<float>(scores, config, members, context);
}
inline void nearest_members(ConstView<double> scores, const NearestConfig& config, ClusterMembers& members,
                            Context& context) {
  detail::nearest_members<double>(scores, config, members, context);
}

}  // namespace coterie
