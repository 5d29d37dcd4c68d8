#include "coterie/router/members.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "allocation.hpp"
#include "catch.hpp"
#include "coterie/router/kmeans.hpp"
#include "errors.hpp"
#include "rows.hpp"

using namespace coterie;
using namespace router_test;

namespace {

using Lists = std::vector<std::vector<std::int32_t>>;

Lists lists_of(const ClusterMembers& members) {
  Lists lists;
  for (Index s = 0; s < members.sequences; ++s)
    for (Index c = 0; c < members.clusters; ++c) {
      const auto list = members.of(c, s);
      lists.emplace_back(list.begin(), list.end());
    }
  REQUIRE(static_cast<std::size_t>(members.begin.back()) == members.rows.size());
  return lists;
}

// Scores with many ties.
template <class T>
RowMatrix<T> tied_scores(Index n, Index k, std::uint64_t seed) {
  Generator generator(seed);
  RowMatrix<T> scores(n, k);
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < k; ++c) scores(i, c) = static_cast<T>(static_cast<int>(9 * generator.uniform()) - 4);
  return scores;
}

// By the definition: a stable sort of every column.
template <class T>
Lists expected_balanced(const RowMatrix<T>& scores, Index members, bool joins, std::vector<Index> offsets) {
  if (offsets.empty()) offsets = {0, scores.rows()};
  Lists lists;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::size_t first = lists.size();
    for (Index c = 0; c < scores.cols(); ++c) {
      std::vector<std::int32_t> rows(static_cast<std::size_t>(offsets[s + 1] - offsets[s]));
      std::iota(rows.begin(), rows.end(), static_cast<std::int32_t>(offsets[s]));
      std::stable_sort(rows.begin(), rows.end(),
                       [&](std::int32_t a, std::int32_t b) { return scores(a, c) > scores(b, c); });
      rows.resize(std::min(rows.size(), static_cast<std::size_t>(members)));
      lists.push_back(rows);
    }
    for (Index i = offsets[s]; joins && i < offsets[s + 1]; ++i) {
      bool taken = false;
      for (std::size_t l = first; l < lists.size(); ++l)
        for (const std::int32_t row : lists[l])
          taken |= row == i && l < first + static_cast<std::size_t>(scores.cols());
      if (taken) continue;
      Index best = 0;
      for (Index c = 1; c < scores.cols(); ++c)
        if (scores(i, c) > scores(i, best)) best = c;
      lists[first + static_cast<std::size_t>(best)].push_back(static_cast<std::int32_t>(i));
    }
    for (std::size_t l = first; l < lists.size(); ++l) std::sort(lists[l].begin(), lists[l].end());
  }
  return lists;
}

const std::vector<std::vector<Index>> batches = {{}, {0, 0, 7, 7, 20, 23}};

}  // namespace

TEMPLATE_TEST_CASE("every cluster takes its best rows, the lower of equals, in order", "", float, double) {
  Context context;
  ClusterMembers members;
  for (const Index k : {1, 3, 8})
    for (const Index w : {1, 4, 22, 23, 50})  // T16, T17: also longer than every sequence, and w k unlike n
      for (const auto& offsets : batches)
        for (const bool joins : {false, true}) {
          const RowMatrix<TestType> scores = tied_scores<TestType>(23, k, static_cast<std::uint64_t>(k + w));
          balanced_members(
              scores,
              {.members = w, .unassigned = joins ? Unassigned::nearest : Unassigned::left_out, .offsets = offsets},
              members, context);
          CAPTURE(k, w, offsets.size(), joins);
          REQUIRE(lists_of(members) == expected_balanced<TestType>(scores, w, joins, offsets));
          const MembershipCoverage covered = coverage(members);
          REQUIRE(covered.in_none + covered.in_one + covered.in_several == 23);
          if (joins || w >= 23) REQUIRE(covered.in_none == 0);
          if (k > 1 && w >= 23) REQUIRE(covered.in_several == 23);
        }
}

TEST_CASE("T15: tokens that no cluster takes are counted, and join their best cluster where asked to") {
  RowMatrix<float> scores(4, 2);
  scores << 5, 4, 4, 5, 1, 2, 0, -1;
  Context context;
  ClusterMembers members;
  balanced_members(scores, {.members = 1}, members, context);
  REQUIRE(lists_of(members) == Lists{{0}, {1}});
  MembershipCoverage covered = coverage(members);
  REQUIRE(covered.in_none == 2);
  REQUIRE(covered.in_one == 2);
  REQUIRE(covered.in_several == 0);
  balanced_members(scores, {.members = 1, .unassigned = Unassigned::nearest}, members, context);
  REQUIRE(lists_of(members) == Lists{{0, 3}, {1, 2}});
  balanced_members(scores, {.members = 2}, members, context);
  covered = coverage(members);
  REQUIRE(covered.in_none == 2);
  REQUIRE(covered.in_several == 2);
}

TEST_CASE("coverage refuses rows that are no tokens") {
  ClusterMembers members{.tokens = 3, .clusters = 1, .begin = {0, 1}, .rows = {2}};
  REQUIRE(coverage(members).in_one == 1);
  for (const std::int32_t row : {-1, 3}) {
    members.rows = {row};
    REQUIRE(test::contains(test::message_of<ValueError>([&] { coverage(members); }), "coverage: members.rows"));
  }
  members = {.tokens = -1, .clusters = 1, .begin = {0, 0}};
  REQUIRE(test::contains(test::message_of<ValueError>([&] { coverage(members); }), "coverage: members.tokens"));
}

TEST_CASE("rows go to their best clusters; one probe is the router's label") {
  const Index n = 500, k = 12, d = 16;
  const OnlineKMeans<float> kmeans({.clusters = k, .dim = d, .seed = 3});
  const RowMatrix<float> rows = random_rows<float>(n, d, 5);
  Context context;
  RowMatrix<float> scores(n, k);
  RowMatrix<float> centroids(d, k);
  for (Index c = 0; c < k; ++c)
    for (Index j = 0; j < d; ++j) centroids(j, c) = kmeans.centroids()(c, j);
  product<float>(rows, centroids, view(scores), context);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
  kmeans.assign(rows, labels, context);
  ClusterMembers members;
  const std::vector<Index> offsets = {0, 100, 100, 500};
  for (const Index probes : {Index(1), Index(3), k}) {
    nearest_members(scores, {.probes = probes, .offsets = offsets}, members, context);
    const Lists lists = lists_of(members);
    std::vector<Index> found(static_cast<std::size_t>(n), 0);
    for (std::size_t l = 0; l < lists.size(); ++l) {
      REQUIRE(std::is_sorted(lists[l].begin(), lists[l].end()));
      const Index s = static_cast<Index>(l) / k, c = static_cast<Index>(l) % k;
      for (const std::int32_t row : lists[l]) {
        REQUIRE(row >= offsets[static_cast<std::size_t>(s)]);
        REQUIRE(row < offsets[static_cast<std::size_t>(s) + 1]);
        Index better = 0;
        for (Index other = 0; other < k; ++other) better += scores(row, other) > scores(row, c);
        REQUIRE(better < probes);
        if (probes == 1) REQUIRE(labels[static_cast<std::size_t>(row)] == c);
        ++found[static_cast<std::size_t>(row)];
      }
    }
    for (const Index count : found) REQUIRE(count == probes);
  }
}

TEST_CASE("scores that are no numbers come last, zeros of both signs are equal") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  RowMatrix<float> scores(5, 1);
  scores << nan, -infinity, 0.0f, -0.0f, -nan;
  Context context;
  ClusterMembers members;
  balanced_members(scores, {.members = 1}, members, context);
  REQUIRE(lists_of(members) == Lists{{2}});
  balanced_members(scores, {.members = 3}, members, context);
  REQUIRE(lists_of(members) == Lists{{1, 2, 3}});
  balanced_members(scores, {.members = 4}, members, context);
  REQUIRE(lists_of(members) == Lists{{0, 1, 2, 3}});
  RowMatrix<float> negative_first(2, 1);
  negative_first << -0.0f, 0.0f;
  balanced_members(negative_first, {.members = 1}, members, context);
  REQUIRE(lists_of(members) == Lists{{0}});
  RowMatrix<float> row(1, 4);
  row << nan, 1, infinity, 1;
  nearest_members(row, {.probes = 2}, members, context);
  REQUIRE(lists_of(members) == Lists{{}, {0}, {0}, {}});
}

TEST_CASE("memberships are the same for any number of workers, and a second call allocates nothing") {
  const RowMatrix<float> scores = tied_scores<float>(700, 9, 2);
  ThreadPool pool(3);
  Workspace workspace;
  Context one, three(pool, workspace);
  ClusterMembers a, b;
  const BalancedConfig balanced{.members = 40, .unassigned = Unassigned::nearest};
  const NearestConfig nearest{.probes = 2};
  for (int round = 0; round < 2; ++round) {
    balanced_members(scores, balanced, a, one);
    balanced_members(scores, balanced, b, three);
    REQUIRE(a.begin == b.begin);
    REQUIRE(a.rows == b.rows);
    nearest_members(scores, nearest, a, one);
    nearest_members(scores, nearest, b, three);
    REQUIRE(a.begin == b.begin);
    REQUIRE(a.rows == b.rows);
  }
  const long before = test::allocations();
  balanced_members(scores, balanced, a, one);
  nearest_members(scores, nearest, a, one);
  REQUIRE(test::allocations() == before);
}

TEST_CASE("memberships name all faults of their arguments, and write nothing") {
  const RowMatrix<float> scores = tied_scores<float>(10, 3, 1);
  Context context;
  ClusterMembers members;
  const std::vector<Index> bad = {0, 4, 9};
  try {
    balanced_members(scores, {.members = 0, .unassigned = static_cast<Unassigned>(7), .offsets = bad}, members,
                     context);
    FAIL("no error");
  } catch (const ValueError& error) {
    const std::string text = error.what();
    for (const char* part : {"balanced_members", "members: expected at least 1, got 0", "unassigned", "offsets"})
      REQUIRE(text.find(part) != std::string::npos);
  }
  REQUIRE_THROWS_AS(nearest_members(scores, {.probes = 0}, members, context), ValueError);
  REQUIRE_THROWS_AS(nearest_members(scores, {.probes = 4}, members, context), ValueError);
  REQUIRE_THROWS_AS(nearest_members(RowMatrix<float>(3, 0), {}, members, context), ValueError);
  REQUIRE(members.begin.empty());
  balanced_members(RowMatrix<float>(0, 2), {.members = 3}, members, context);
  REQUIRE(lists_of(members) == Lists{{}, {}});
}
