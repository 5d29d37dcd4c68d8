#include "coterie/plan/local.hpp"

#include "coterie/plan/dense.hpp"
#include "plan/masks.hpp"

using namespace test;

TEST_CASE("local equals its definition") {
  AttentionPlan plan;
  for (const Setting& s : settings({0, 1, 3, 10})) {
    for (const Index window : {1, 2, 3, 7, 11, 1000})
      for (const Index lookahead : {0, 1, 4, 1000}) {
        if (s.causal && lookahead > 0) continue;
        INFO(s.text() << " window " << window << " lookahead " << lookahead);
        plan_local({.tokens = s.tokens,
                    .keys = s.keys,
                    .window = window,
                    .lookahead = lookahead,
                    .causal = s.causal,
                    .alignment = s.alignment,
                    .self = s.self,
                    .offsets = s.offsets,
                    .key_offsets = s.key_offsets},
                   plan);
        const Mask expected = expected_mask(s, [&](Index, Index c, Index, Index keys) {
          std::vector<Index> seen;
          for (Index j = 0; j < keys; ++j)
            if (j > c - window && j <= c + lookahead) seen.push_back(j);
          return seen;
        });
        REQUIRE(mask_of(plan) == expected);
        require_distances(plan, s);
      }
  }
}

TEST_CASE("local, every length and window: dense with the same mask") {
  AttentionPlan local, dense;
  for (Index window = 1; window <= 8; ++window)
    for (Index n = 1; n <= 3 * window + 1; ++n) {
      plan_local({.tokens = n, .window = window, .causal = true}, local);
      plan_dense({.tokens = n, .causal = true}, dense);
      Mask expected = mask_of(dense);
      for (auto& row : expected)
        if (static_cast<Index>(row.size()) > window)
          row.erase(row.begin(), row.begin() + (static_cast<Index>(row.size()) - window));
      REQUIRE(mask_of(local) == expected);
    }
}

TEST_CASE("local: the plan of a prefix is a prefix of the plan") {
  AttentionPlan shorter, longer;
  for (const Self self : {Self::visible, Self::only_if_alone, Self::never}) {
    plan_local({.tokens = 20, .window = 4, .causal = true, .self = self}, longer);
    for (Index n = 0; n <= 20; ++n) {
      plan_local({.tokens = n, .window = 4, .causal = true, .self = self}, shorter);
      require_prefix(shorter, longer);
    }
  }
}

TEST_CASE("local names all faults and leaves the plan as it was") {
  AttentionPlan plan;
  plan_local({.tokens = 4, .window = 2}, plan);
  const auto keys = plan.keys;
  REQUIRE_THROWS_AS(plan_local({.tokens = 4}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_local({.tokens = 4, .window = -1}, plan), ValueError);
  REQUIRE_THROWS_AS(plan_local({.tokens = 4, .window = 1, .lookahead = -1}, plan), ValueError);
  REQUIRE_THROWS_WITH(plan_local({.tokens = 4, .window = 0, .lookahead = 1, .causal = true}, plan),
                      "plan_local: window: expected at least 1, got 0; lookahead: expected 0 where causal, got 1");
  REQUIRE(plan.keys == keys);
  validate(plan);
}
