#include "coterie/plan/dense_up_to.hpp"

#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/globals.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/members.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/plan/strided.hpp"
#include "errors.hpp"
#include "plan/masks.hpp"
#include "random.hpp"

using namespace test;

namespace {

// By the definition, in sequences of queries and keys that lie end to end.
Mask expected_dense(const Mask& before, const Setting& s, Index length) {
  Mask mask = before;
  const std::vector<Index> offsets = s.offsets.empty() ? std::vector<Index>{0, s.tokens} : s.offsets;
  const std::vector<Index> key_offsets = !s.key_offsets.empty() ? s.key_offsets
                                         : s.offsets.empty()    ? std::vector<Index>{0, s.keys}
                                                                : s.offsets;
  for (std::size_t q = 0; q + 1 < offsets.size(); ++q) {
    const Index tokens = offsets[q + 1] - offsets[q], keys = key_offsets[q + 1] - key_offsets[q];
    for (Index i = 0; i < tokens; ++i) {
      const Index position = s.rule() == Alignment::bottom_right ? i + keys - tokens
                             : s.rule() == Alignment::top_left   ? i
                                                                 : i * keys / tokens;
      if (s.causal ? position >= length : keys > length) continue;
      auto& row = mask[static_cast<std::size_t>(offsets[q] + i)];
      row.clear();
      const Index until = s.causal ? std::min(position + 1, keys) : keys;
      for (Index j = 0; j < until; ++j)
        if (j != position || s.self == Self::visible || (s.self == Self::only_if_alone && until == 1))
          row.push_back(key_offsets[q] + j);
    }
  }
  return mask;
}

Mask sorted(Mask mask) {
  for (auto& row : mask) std::sort(row.begin(), row.end());
  return mask;
}

}  // namespace

TEST_CASE("short sequences are dense, long causal ones up to a position") {
  AttentionPlan plan;
  Random random(4);
  const std::vector<Index> ragged = {0, 0, 5, 6, 6, 13};
  for (const bool causal : {false, true})
    for (const Self self : {Self::visible, Self::only_if_alone, Self::never})
      for (const Index length : {0, 1, 5, 6, 20})
        for (const std::vector<Index>& offsets : {std::vector<Index>{}, ragged}) {
          const Setting s{13, 13, causal, {}, self, offsets};
          INFO(s.text() << " length " << length);
          const auto check = [&] {
            const Mask before = mask_of(plan);
            plan_dense_up_to({length, causal, {}, self, offsets}, plan);
            REQUIRE(mask_of(plan) == expected_dense(before, s, length));
          };
          plan_local({13, 0, 3, causal ? 0 : 1, causal, {}, self, offsets}, plan);
          check();
          const auto labels = random.labels(13, 3, -1);  // some in no cluster, which see all the same where it is dense
          plan_clustered(labels, labels, {3, 4, causal, {}, self, offsets}, plan);
          check();
          plan_strided({13, 0, 3, 2, causal, {}, self, offsets}, plan);
          check();
        }
}

TEST_CASE("dense up to a length, of keys from elsewhere") {
  AttentionPlan plan;
  const std::vector<Index> offsets = {0, 3, 8, 8, 13}, key_offsets = {0, 7, 9, 12, 17};
  for (const bool causal : {false, true})
    for (const Index length : {1, 2, 5, 20}) {
      const Setting s{13, 17, causal, {}, Self::visible, offsets, key_offsets};
      INFO(s.text() << " length " << length);
      plan_local({13, 17, 2, causal ? 0 : 1, causal, {}, Self::visible, offsets, key_offsets}, plan);
      const Mask before = mask_of(plan);
      plan_dense_up_to({length, causal, {}, Self::visible, offsets, key_offsets}, plan);
      REQUIRE(mask_of(plan) == expected_dense(before, s, length));
    }
}

TEST_CASE("dense up to a length, of queries beyond the last key") {
  AttentionPlan plan;
  plan_dense({.tokens = 3, .keys = 2, .causal = true, .alignment = Alignment::top_left}, plan);
  plan_dense_up_to({.length = 3, .causal = true, .alignment = Alignment::top_left}, plan);
  REQUIRE(mask_of(plan) == Mask{{0}, {0, 1}, {0, 1}});
  const std::vector<Index> offsets = {0, 4, 4, 9}, key_offsets = {0, 0, 3, 5};  // of sequence 0 no keys
  for (const Alignment alignment : {Alignment::top_left, Alignment::bottom_right, Alignment::proportional})
    for (const Self self : {Self::visible, Self::only_if_alone, Self::never})
      for (const Index length : {1, 2, 3, 20}) {
        if (alignment == Alignment::proportional && self != Self::visible) continue;
        const Setting s{9, 5, true, alignment, self, offsets, key_offsets};
        INFO(s.text() << " length " << length);
        plan_local({9, 5, 1, 0, true, alignment, self, offsets, key_offsets}, plan);
        const Mask before = mask_of(plan);
        plan_dense_up_to({length, true, alignment, self, offsets, key_offsets}, plan);
        REQUIRE(mask_of(plan) == expected_dense(before, s, length));
      }
}

TEST_CASE("rows of several entries have one where they are dense; globals and memory come on top") {
  AttentionPlan plan;
  const std::vector<std::int32_t> rows = {0, 1, 2, 3, 4, 5, 1, 3, 5};
  ClusterMembers members;
  members.tokens = 6;
  members.clusters = 2;
  members.sequences = 1;
  members.begin = {0, 6, 9};
  members.rows = rows;
  plan_members(members, members, {.causal = true}, plan);
  plan_dense_up_to({.length = 4, .causal = true}, plan);
  for (std::size_t i = 0; i < 6; ++i)
    REQUIRE(plan.row_begin[i + 1] - plan.row_begin[i] == (i < 4 ? 1 : i == 5 ? 2 : 1));
  const std::vector<Index> offsets = {0, 4, 4, 7, 12};
  const auto labels = Random(2).labels(12, 3, -1);
  plan_clustered(labels, labels, {3, 2, true, {}, Self::visible, offsets}, plan);
  plan_dense_up_to({.length = 2, .causal = true, .offsets = offsets}, plan);
  plan_add_globals({.globals = 1, .causal = true, .offsets = offsets}, plan);
  REQUIRE(sorted(mask_of(plan))[5] == std::vector<Index>{4, 5});
  plan_local({.tokens = 12, .window = 2, .causal = true}, plan);
  plan_dense_up_to({.length = 5, .causal = true}, plan);
  plan_add_globals({.globals = 2, .causal = true}, plan);
  plan_add_memory(1, plan);
  const Mask mask = sorted(mask_of(plan));
  REQUIRE(mask[1] == std::vector<Index>{0, 1, 12});
  REQUIRE(mask[4] == std::vector<Index>{0, 1, 2, 3, 4, 12});
  REQUIRE(mask[5] == std::vector<Index>{0, 1, 4, 5, 12});
  REQUIRE(mask[11] == std::vector<Index>{0, 1, 10, 11, 12});
}

TEST_CASE("dense up to a length: what makes no sense is refused, and the plan stays") {
  AttentionPlan plan;
  REQUIRE(contains(message_of<ValueError>([&] { plan_dense_up_to({.length = 1}, plan); }), "plan"));
  plan_local({.tokens = 6, .window = 2, .causal = true}, plan);
  const Mask before = mask_of(plan);
  REQUIRE(contains(message_of<ValueError>([&] { plan_dense_up_to({.length = -1}, plan); }), "length"));
  const std::vector<Index> bad = {0, 7};
  REQUIRE(
      contains(message_of<ValueError>([&] { plan_dense_up_to({.length = 1, .causal = true, .offsets = bad}, plan); }),
               "offsets"));
  REQUIRE(mask_of(plan) == before);
  plan_add_memory(1, plan);
  REQUIRE(contains(message_of<ValueError>([&] { plan_dense_up_to({.length = 1}, plan); }), "memory"));
}
