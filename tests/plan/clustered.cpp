#include "coterie/plan/clustered.hpp"

#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

// Positions of the keys of a sequence whose label is `label`.
std::vector<Index> members_of(const std::vector<std::int32_t>& key_labels, std::int32_t label, Index first,
                              Index keys) {
  std::vector<Index> members;
  for (Index j = 0; label >= 0 && j < keys; ++j)
    if (key_labels[static_cast<std::size_t>(first + j)] == label) members.push_back(j);
  return members;
}

Mask expected_clusters(const Setting& s, Index window, const std::vector<std::int32_t>& query_labels,
                       const std::vector<std::int32_t>& key_labels) {
  return expected_mask(s, [&](Index row, Index c, Index first, Index keys) {
    return cut_window(members_of(key_labels, query_labels[static_cast<std::size_t>(row)], first, keys), c, window,
                      s.causal);
  });
}

ClusteredConfig config_of(const Setting& s, Index clusters, Index window) {
  return {.clusters = clusters,
          .window = window,
          .causal = s.causal,
          .alignment = s.alignment,
          .self = s.self,
          .offsets = s.offsets,
          .key_offsets = s.key_offsets};
}

}  // namespace

TEST_CASE("clustered equals its definition") {
  AttentionPlan plan;
  Random random(1);
  for (const Setting& s : settings({0, 1, 3, 14}))
    for (const Index clusters : {1, 3, 40})
      for (const Index window : {0, 1, 2, 3, 1000})
        for (const std::int32_t lowest : {0, -1}) {
          INFO(s.text() << " clusters " << clusters << " window " << window);
          const auto query_labels = random.labels(s.tokens, clusters, lowest);
          const auto key_labels = s.tokens == s.keys && clusters == 3 ? query_labels  // shared queries and keys
                                                                      : random.labels(s.keys, clusters, lowest);
          plan_clustered(query_labels, key_labels, config_of(s, clusters, window), plan);
          REQUIRE(mask_of(plan) == expected_clusters(s, window, query_labels, key_labels));
          require_distances(plan, s);
        }
}

TEST_CASE("clustered: nobody is where its label is -1") {
  AttentionPlan plan;
  const std::vector<std::int32_t> query_labels = {0, -1, 0, 1}, key_labels = {0, 0, -1, 0};
  plan_clustered(query_labels, key_labels, {.clusters = 2}, plan);
  REQUIRE(plan.entries == std::vector<std::int32_t>{0, 2, 3});
  REQUIRE(plan.keys == std::vector<std::int32_t>{0, 1, 3});
  REQUIRE(mask_of(plan) == Mask{{0, 1, 3}, {}, {0, 1, 3}, {}});
}

TEST_CASE("clustered: groups are sequence by sequence, cluster by cluster, without the empty ones") {
  AttentionPlan plan;
  const std::vector<std::int32_t> labels = {5, 2, 5, 2, 2, 0};
  const std::vector<Index> offsets = {0, 3, 3, 6};
  plan_clustered(labels, labels, {.clusters = 6, .offsets = offsets}, plan);
  REQUIRE(plan.entries == std::vector<std::int32_t>{1, 0, 2, 5, 3, 4});
  REQUIRE(plan.groups.size() == 4);
}

TEST_CASE("clustered: one cluster and a window of n is dense") {
  AttentionPlan plan;
  const std::vector<std::int32_t> labels(9, 0);
  plan_clustered(labels, labels, {.clusters = 1, .window = 9, .causal = true}, plan);
  for (std::size_t i = 0; i < 9; ++i) REQUIRE(mask_of(plan)[i].size() == i + 1);
  plan_clustered(labels, labels, {.clusters = 1, .window = 18}, plan);
  for (std::size_t i = 0; i < 9; ++i) REQUIRE(mask_of(plan)[i].size() == 9);
}

TEST_CASE("clustered: the plan of a prefix is a prefix of the plan") {
  const auto labels = Random(3).labels(40, 4, -1);
  const auto key_labels = Random(4).labels(40, 4, -1);
  AttentionPlan shorter, longer;
  for (const Self self : {Self::visible, Self::only_if_alone, Self::never}) {
    const ClusteredConfig config = {.clusters = 4, .window = 3, .causal = true, .self = self};
    plan_clustered(labels, key_labels, config, longer);
    for (std::size_t n = 0; n <= 40; ++n) {
      plan_clustered(std::span(labels).first(n), std::span(key_labels).first(n), config, shorter);
      require_prefix(shorter, longer);
    }
  }
}

TEST_CASE("clustered names the label that is wrong, and leaves the plan as it was") {
  AttentionPlan plan;
  std::vector<std::int32_t> labels = {0, 1, 1, 0};
  const std::vector<std::int32_t> good = labels;
  plan_clustered(labels, labels, {.clusters = 2}, plan);
  const auto entries = plan.entries;
  const auto message = [&](std::size_t at, std::int32_t value, bool in_keys) {
    labels = good;
    labels[at] = value;
    return message_of<ValueError>(
        [&] { plan_clustered(in_keys ? good : labels, in_keys ? labels : good, {.clusters = 2}, plan); });
  };
  REQUIRE(message(2, 2, false) == "plan_clustered: query_labels[2]: expected -1 to 1, got 2");
  REQUIRE(message(3, -2, true) == "plan_clustered: key_labels[3]: expected -1 to 1, got -2");
  REQUIRE_THROWS_AS(plan_clustered(good, good, {}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_clustered(good, good, {.clusters = 2, .window = -1}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_clustered(good, good, {.clusters = Index(1) << 31}, plan), ValueError);
  REQUIRE(plan.entries == entries);
  validate(plan);
}

TEST_CASE("random: a clustered plan of labels by (seed, position)") {
  AttentionPlan plan;
  for (const Setting& s : settings({0, 1, 3, 14}))
    for (const Index window : {0, 2}) {
      INFO(s.text() << " window " << window);
      plan_random({.tokens = s.tokens,
                   .keys = s.keys,
                   .clusters = 3,
                   .window = window,
                   .causal = s.causal,
                   .alignment = s.alignment,
                   .self = s.self,
                   .offsets = s.offsets,
                   .key_offsets = s.key_offsets,
                   .seed = 7},
                  plan);
      const auto label = [](Index position) { return detail::random_label(7, position, 3); };
      const Mask expected = expected_mask(s, [&](Index, Index c, Index, Index keys) {
        std::vector<Index> members;
        for (Index j = 0; j < keys; ++j)
          if (label(j) == label(c)) members.push_back(j);
        return cut_window(members, c, window, s.causal);
      });
      REQUIRE(mask_of(plan) == expected);
    }
}

TEST_CASE("random: seeds differ, clusters fill evenly, prefixes agree") {
  AttentionPlan plan, again, other, shorter;
  const Index n = 16000, clusters = 16;
  plan_random({.tokens = n, .clusters = clusters, .causal = true, .seed = 1}, plan);
  plan_random({.tokens = n, .clusters = clusters, .causal = true, .seed = 1}, again);
  plan_random({.tokens = n, .clusters = clusters, .causal = true, .seed = 2}, other);
  REQUIRE(plan.entries == again.entries);
  REQUIRE(plan.entries != other.entries);
  const PlanStatistics sizes = statistics(plan);
  REQUIRE(sizes.groups == clusters);
  REQUIRE(sizes.keys_per_group.min > 850);  // 1000 +- 31
  REQUIRE(sizes.keys_per_group.max < 1150);
  // Neighbours are together no more often than chance has it: 1000 +- 31 of them.
  Index together = 0;
  for (Index i = 1; i < n; ++i)
    together += detail::random_label(1, i, clusters) == detail::random_label(1, i - 1, clusters);
  REQUIRE(together > 850);
  REQUIRE(together < 1150);
  plan_random({.tokens = 30, .clusters = 4, .causal = true}, plan);
  plan_random({.tokens = 20, .clusters = 4, .causal = true}, shorter);
  require_prefix(shorter, plan);
  REQUIRE_THROWS_AS(plan_random({.tokens = 20}, plan), ValueError);
}

TEST_CASE("clustered: clusters that no label names cost nothing") {
  const std::vector<std::int32_t> labels = {0, 3, 0, 3, 3};
  AttentionPlan plan, few;
  PlanScratch scratch;
  plan_clustered(labels, labels, {.clusters = 2147483647, .causal = true}, plan, &scratch);
  plan_clustered(labels, labels, {.clusters = 4, .causal = true}, few);
  REQUIRE(plan.entries == few.entries);
  REQUIRE(scratch.numbers.size() < 1000);
}

TEST_CASE("clustered: values that no enumerator has are refused") {
  const std::vector<std::int32_t> labels = {0, 0};
  AttentionPlan plan;
  const auto refuse = [&](const ClusteredConfig& config) {
    return message_of<ValueError>([&] { plan_clustered(labels, labels, config, plan); });
  };
  REQUIRE(contains(refuse({.clusters = 1, .self = static_cast<Self>(9)}), "self: expected visible"));
  REQUIRE(
      contains(refuse({.clusters = 1, .alignment = static_cast<Alignment>(-1)}), "alignment: expected bottom_right"));
}
