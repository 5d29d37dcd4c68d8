#include "coterie/plan/members.hpp"

#include "coterie/plan/clustered.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

/// Lists drawn at random: every row of a sequence is in a cluster with the given probability.
ClusterMembers random_members(Random& random, Index tokens, Index clusters, std::vector<Index> offsets, double share) {
  if (offsets.empty()) offsets = {0, tokens};
  ClusterMembers members;
  members.tokens = tokens;
  members.clusters = clusters;
  members.sequences = static_cast<Index>(offsets.size()) - 1;
  members.begin = {0};
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index c = 0; c < clusters; ++c) {
      for (Index i = offsets[s]; i < offsets[s + 1]; ++i)
        if (random.uniform(0, 1) < share) members.rows.push_back(static_cast<std::int32_t>(i));
      members.begin.push_back(static_cast<std::int32_t>(members.rows.size()));
    }
  return members;
}

/// What every entry of a row sees, cluster by cluster.
Mask expected_members(const Setting& s, Index window, const ClusterMembers& queries, const ClusterMembers& keys,
                      bool one_softmax) {
  Setting visible = s;
  visible.self = Self::visible;
  const std::vector<Index> offsets = s.offsets.empty() ? std::vector<Index>{0, s.tokens} : s.offsets;
  Mask mask(static_cast<std::size_t>(s.tokens));
  for (Index c = 0; c < queries.clusters; ++c) {
    std::vector<bool> is_in(static_cast<std::size_t>(s.tokens), false);
    for (Index q = 0; q < queries.sequences; ++q)
      for (const std::int32_t row : queries.of(c, q)) is_in[static_cast<std::size_t>(row)] = true;
    const auto members = [&](Index row, Index first) {
      const auto sequence = std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin() - 1;
      std::vector<Index> positions;
      for (const std::int32_t key : keys.of(c, static_cast<Index>(sequence))) positions.push_back(key - first);
      return positions;
    };
    const auto choose = [&](Index row, Index position, Index first, Index) {
      return is_in[static_cast<std::size_t>(row)] ? cut_window(members(row, first), position, window, s.causal)
                                                  : std::vector<Index>{};
    };
    // For one softmax over all entries the self rule looks at the whole row.
    const Mask added = expected_mask(one_softmax && s.self == Self::only_if_alone ? visible : s, choose);
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i].insert(mask[i].end(), added[i].begin(), added[i].end());
  }
  if (one_softmax && s.self == Self::only_if_alone) {
    const Mask self = expected_mask(visible, [](Index, Index c, Index, Index) { return std::vector<Index>{c}; });
    for (std::size_t i = 0; i < mask.size(); ++i) {
      const Index own = self[i][0];
      const auto others = std::count_if(mask[i].begin(), mask[i].end(), [&](Index j) { return j != own; });
      if (others > 0) std::erase(mask[i], own);
    }
  }
  return mask;
}

}  // namespace

TEST_CASE("members equal their definition, for every combine") {
  AttentionPlan plan;
  Random random(6);
  for (const Setting& s : settings({0, 1, 9}))
    for (const Combine combine : {Combine::mean, Combine::lse})
      for (const Index window : {0, 3})
        for (const bool shared : {false, true}) {
          if (shared && s.tokens != s.keys) continue;
          if (shared && !s.key_offsets.empty()) continue;
          INFO(s.text() << " window " << window << " combine " << static_cast<int>(combine));
          const auto queries = random_members(random, s.tokens, 4, s.offsets, 0.4);
          const auto keys =
              shared ? queries
                     : random_members(random, s.keys, 4, s.key_offsets.empty() ? s.offsets : s.key_offsets, 0.4);
          plan_members(queries, keys,
                       {.window = window,
                        .causal = s.causal,
                        .alignment = s.alignment,
                        .self = s.self,
                        .combine = combine,
                        .offsets = s.offsets,
                        .key_offsets = s.key_offsets},
                       plan);
          REQUIRE(plan.combine == combine);
          Mask got = mask_of(plan), expected = expected_members(s, window, queries, keys, combine == Combine::lse);
          REQUIRE(got == expected);
          require_distances(plan, s);
        }
}

TEST_CASE("members of one cluster each are labels") {
  AttentionPlan by_members, by_labels;
  Random random(2);
  const std::vector<Index> offsets = {0, 4, 4, 20};
  const auto labels = random.labels(20, 5, -1);
  ClusterMembers members{.tokens = 20, .clusters = 5, .sequences = 3, .begin = {0}};
  for (std::size_t s = 0; s < 3; ++s)
    for (std::int32_t c = 0; c < 5; ++c) {
      for (Index i = offsets[s]; i < offsets[s + 1]; ++i)
        if (labels[static_cast<std::size_t>(i)] == c) members.rows.push_back(static_cast<std::int32_t>(i));
      members.begin.push_back(static_cast<std::int32_t>(members.rows.size()));
    }
  plan_members(members, members, {.window = 3, .causal = true, .combine = Combine::single, .offsets = offsets},
               by_members);
  plan_clustered(labels, labels, {.clusters = 5, .window = 3, .causal = true, .offsets = offsets}, by_labels);
  REQUIRE(by_members.entries == by_labels.entries);
  REQUIRE(by_members.keys == by_labels.keys);
  REQUIRE(mask_of(by_members) == mask_of(by_labels));
  REQUIRE(by_members.groups.size() == by_labels.groups.size());
}

TEST_CASE("members: errors leave the plan as it was") {
  AttentionPlan plan;
  const std::vector<std::int32_t> labels = {0, 0, 0};
  plan_clustered(labels, labels, {.clusters = 1}, plan);
  const auto refused = [&](const ClusterMembers& queries, const ClusterMembers& keys, const MembersConfig& config) {
    const AttentionPlan before = plan;
    const std::string text = message_of<ValueError>([&] { plan_members(queries, keys, config, plan); });
    REQUIRE(plan.combine == before.combine);
    REQUIRE(plan.entries == before.entries);
    REQUIRE(plan.keys == before.keys);
    REQUIRE(mask_of(plan) == mask_of(before));
    return text;
  };
  const ClusterMembers good{.tokens = 4, .clusters = 2, .sequences = 1, .begin = {0, 2, 4}, .rows = {0, 1, 1, 3}};
  const auto with = [&](auto&& change) {
    ClusterMembers changed = good;
    change(changed);
    return changed;
  };
  REQUIRE(contains(refused(good, good, {.combine = Combine::single}), "combine"));
  REQUIRE(contains(refused(good, good, {.window = -1}), "window"));
  REQUIRE(contains(refused(with([](auto& m) { m.begin.pop_back(); }), good, {}), "queries.begin"));
  REQUIRE(contains(refused(good, with([](auto& m) { m.begin[1] = 5; }), {}), "keys.begin"));
  REQUIRE(contains(refused(good, with([](auto& m) { m.rows[1] = 4; }), {}), "keys.rows[1]"));
  REQUIRE(contains(refused(with([](auto& m) { m.rows[1] = 0; }), good, {}), "queries.rows[1]"));
  REQUIRE(contains(refused(good, with([](auto& m) {
                             m.clusters = 1, m.begin = {0, 4}, m.rows = {0, 1, 2, 3};
                           }),
                           {}),
                   "keys.clusters"));
  const std::vector<Index> none = {0}, offsets = {0, 2, 4};
  const ClusterMembers stray{.tokens = 0, .clusters = 2, .sequences = 0, .begin = {0}, .rows = {5}};
  REQUIRE(contains(refused(stray, stray, {.offsets = none}), "queries.begin[0]"));
  REQUIRE(contains(refused(good, good, {.offsets = offsets}), "sequences"));
  plan_members(good, good, {.causal = true}, plan);
  REQUIRE(mask_of(plan) == Mask{{0}, {0, 1, 1}, {}, {1, 3}});
}
