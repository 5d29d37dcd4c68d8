#include "coterie/plan/strided.hpp"

#include "errors.hpp"
#include "plan/masks.hpp"

using namespace test;

TEST_CASE("strided equals its definition") {
  AttentionPlan plan;
  for (const Setting& s : settings({0, 1, 3, 14}))
    for (const Index stride : {1, 3, 50})
      for (const Index window : {0, 1, 2}) {
        INFO(s.text() << " stride " << stride << " window " << window);
        plan_strided({.tokens = s.tokens,
                      .keys = s.keys,
                      .stride = stride,
                      .window = window,
                      .causal = s.causal,
                      .alignment = s.alignment,
                      .self = s.self,
                      .offsets = s.offsets,
                      .key_offsets = s.key_offsets},
                     plan);
        const Mask expected = expected_mask(s, [&](Index, Index c, Index, Index keys) {
          std::vector<Index> members;
          for (Index j = 0; j < keys; ++j)
            if ((c - j) % stride == 0) members.push_back(j);
          return cut_window(members, c, window, s.causal);
        });
        REQUIRE(mask_of(plan) == expected);
        require_distances(plan, s);
      }
}

TEST_CASE("strided: the plan of a prefix is a prefix of the plan") {
  AttentionPlan shorter, longer;
  plan_strided({.tokens = 20, .stride = 3, .window = 2, .causal = true}, longer);
  for (Index n = 0; n <= 20; ++n) {
    plan_strided({.tokens = n, .stride = 3, .window = 2, .causal = true}, shorter);
    require_prefix(shorter, longer);
  }
}

TEST_CASE("strided: a stride beyond all positions costs nothing, and leaves every query its own key") {
  AttentionPlan plan;
  PlanScratch scratch;
  plan_strided({.tokens = 6, .stride = 2147483647, .alignment = Alignment::top_left}, plan, &scratch);
  REQUIRE(statistics(plan).visible_pairs == 6);
  REQUIRE(scratch.numbers.size() < 1000);
}

TEST_CASE("strided names all faults") {
  AttentionPlan plan;
  REQUIRE(message_of<ValueError>([&] { plan_strided({.tokens = 4, .window = -1}, plan); }) ==
          "plan_strided: stride: expected 1 to 2147483647, got 0; window: expected at least 0, got -1");
}
