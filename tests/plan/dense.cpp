#include "coterie/plan/dense.hpp"

#include "errors.hpp"
#include "plan/masks.hpp"

using namespace test;

namespace {

DenseConfig config_of(const Setting& s) {
  return {.tokens = s.tokens,
          .keys = s.keys,
          .causal = s.causal,
          .alignment = s.alignment,
          .self = s.self,
          .offsets = s.offsets,
          .key_offsets = s.key_offsets};
}

}  // namespace

TEST_CASE("dense equals its definition") {
  AttentionPlan plan;
  for (const Setting& setting : settings({0, 1, 2, 7, 20})) {
    INFO(setting.text());
    plan_dense(config_of(setting), plan);
    const Mask expected = expected_mask(setting, [&](Index, Index c, Index, Index keys) {
      std::vector<Index> seen;
      for (Index j = 0; j < keys; ++j)
        if (!setting.causal || j <= c) seen.push_back(j);
      return seen;
    });
    REQUIRE(mask_of(plan) == expected);
    require_distances(plan, setting);
  }
}

TEST_CASE("dense: keys default to tokens, positions are row numbers where they can be") {
  AttentionPlan plan;
  plan_dense({.tokens = 4, .causal = true}, plan);
  REQUIRE(plan.key_tokens == 4);
  REQUIRE(plan.query_positions.empty());
  REQUIRE(plan.key_positions.empty());
  REQUIRE(plan.visible_too.empty());
  REQUIRE(plan.groups.size() == 1);
  plan_dense({.tokens = 4, .keys = 6, .causal = true}, plan);
  REQUIRE(plan.query_positions == std::vector<std::int32_t>{2, 3, 4, 5});
  REQUIRE(mask_of(plan)[0] == std::vector<Index>{0, 1, 2});
  plan_dense({.tokens = 4}, plan);
  REQUIRE(plan.query_positions.empty());
}

TEST_CASE("dense: the plan of a prefix is a prefix of the plan") {
  AttentionPlan shorter, longer;
  plan_dense({.tokens = 20, .causal = true}, longer);
  for (Index n = 0; n <= 20; ++n) {
    plan_dense({.tokens = n, .causal = true}, shorter);
    require_prefix(shorter, longer);
  }
}

TEST_CASE("dense names all faults and leaves the plan as it was") {
  AttentionPlan plan;
  plan_dense({.tokens = 4}, plan);
  const auto entries = plan.entries;
  const std::vector<Index> descending = {0, 3, 2, 5}, short_end = {0, 2, 4}, late = {1, 5}, good = {0, 2, 5};
  REQUIRE_THROWS_AS(plan_dense({.tokens = -1}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = Index(1) << 31}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .keys = -2}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .offsets = descending}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .offsets = short_end}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .offsets = late}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .keys = 6, .offsets = good}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .offsets = good, .key_offsets = late}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .keys = 5, .key_offsets = good}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_dense({.tokens = 5, .keys = 6, .self = Self::never}, plan), ValueError);
  const std::string message = message_of<ValueError>([&] { plan_dense({.tokens = -1, .keys = -2}, plan); });
  REQUIRE(contains(message, "plan_dense: tokens: expected 0 to "));
  REQUIRE(contains(message, "; keys: expected 0 to "));
  REQUIRE(plan.entries == entries);
  validate(plan);
}
