#pragma once

// Plans as plain lists of who sees whom, and the same by brute force from the definition of a pattern.

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "catch.hpp"
#include "coterie/plan/builder.hpp"

namespace test {

using namespace coterie;

/// Per query row the key rows that it sees, in the order of the plan.
using Mask = std::vector<std::vector<Index>>;

/// Whether two plans are the same in every array.
inline bool same(const AttentionPlan& a, const AttentionPlan& b) {
  const auto same_list = [](const auto& x, const auto& y, auto&& equal) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), equal);
  };
  const auto same_interval = [](Interval x, Interval y) { return x.begin == y.begin && x.end == y.end; };
  const auto same_group = [](const AttentionPlan::Group& x, const AttentionPlan::Group& y) {
    return x.entry_begin == y.entry_begin && x.entry_end == y.entry_end && x.key_begin == y.key_begin &&
           x.key_end == y.key_end;
  };
  const auto same_part = [](const AttentionPlan::Part& x, const AttentionPlan::Part& y) {
    return x.group == y.group && x.entry_begin == y.entry_begin && x.entry_end == y.entry_end && x.alone == y.alone;
  };
  return a.tokens == b.tokens && a.key_tokens == b.key_tokens && a.memory_tokens == b.memory_tokens &&
         a.combine == b.combine && a.entries == b.entries && a.keys == b.keys &&
         same_list(a.groups, b.groups, same_group) && same_list(a.visible, b.visible, same_interval) &&
         same_list(a.visible_too, b.visible_too, same_interval) && a.query_positions == b.query_positions &&
         a.key_positions == b.key_positions && a.row_begin == b.row_begin && a.row_entries == b.row_entries &&
         same_list(a.parts, b.parts, same_part) && a.task_begin == b.task_begin;
}

inline Mask mask_of(const AttentionPlan& plan) {
  validate(plan);
  Mask mask(static_cast<std::size_t>(plan.tokens));
  for (const AttentionPlan::Group& group : plan.groups)
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
      auto& row = mask[static_cast<std::size_t>(plan.entries[e])];
      const auto see = [&](Interval interval) {
        for (std::int32_t rank = interval.begin; rank < interval.end; ++rank)
          row.push_back(plan.keys[static_cast<std::size_t>(group.key_begin + rank)]);
      };
      see(plan.visible[e]);
      if (!plan.visible_too.empty()) see(plan.visible_too[e]);
    }
  return mask;
}

/// What the builders' configs have in common.
struct Setting {
  Index tokens = 0, keys = 0;
  bool causal = false;
  std::optional<Alignment> alignment = {};
  Self self = Self::visible;
  std::vector<Index> offsets = {}, key_offsets = {};

  std::string text() const {
    std::string result = detail::join("tokens ", tokens, " keys ", keys, " causal ", causal, " alignment ",
                                      alignment ? static_cast<int>(*alignment) : -1, " self ", static_cast<int>(self));
    for (const Index offset : offsets) result += detail::join(" ", offset);
    for (const Index offset : key_offsets) result += detail::join(" :", offset);
    return result;
  }

  // The alignment that is in force.
  Alignment rule() const {
    if (alignment) return *alignment;
    return causal ? Alignment::bottom_right : Alignment::proportional;
  }

  // Whether the builders refuse it: no key is the query's own.
  bool refused() const {
    if (self == Self::visible || rule() != Alignment::proportional) return false;
    if (offsets.empty()) return tokens != keys;
    const auto& bounds = key_offsets.empty() ? offsets : key_offsets;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
      if (offsets[s + 1] - offsets[s] != bounds[s + 1] - bounds[s]) return true;
    return false;
  }
};

/// The mask by definition. choose(row, c, first, count): the positions that a query with aligned position c may see among
/// the keys [0, count) of its sequence, before the self rule; its keys begin at row `first`.
template <class Choose>
Mask expected_mask(const Setting& setting, Choose choose) {
  std::vector<Index> offsets = setting.offsets, key_offsets = setting.key_offsets;
  if (offsets.empty()) offsets = {0, setting.tokens};
  if (key_offsets.empty()) key_offsets = setting.offsets.empty() ? std::vector<Index>{0, setting.keys} : offsets;
  Mask mask(static_cast<std::size_t>(setting.tokens));
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const Index tokens = offsets[s + 1] - offsets[s], keys = key_offsets[s + 1] - key_offsets[s];
    for (Index i = 0; i < tokens; ++i) {
      Index c = i;
      if (setting.rule() == Alignment::bottom_right) c = i + keys - tokens;
      if (setting.rule() == Alignment::proportional) c = i * keys / tokens;
      std::vector<Index> seen = choose(offsets[s] + i, c, key_offsets[s], keys);
      const auto own = std::find(seen.begin(), seen.end(), c);
      if (own != seen.end() &&
          (setting.self == Self::never || (setting.self == Self::only_if_alone && seen.size() > 1)))
        seen.erase(own);
      for (Index& j : seen) j += key_offsets[s];
      mask[static_cast<std::size_t>(offsets[s] + i)] = seen;
    }
  }
  return mask;
}

/// The positions of `members` (ascending) that a clustered pattern shows to a query at c.
inline std::vector<Index> cut_window(const std::vector<Index>& members, Index c, Index window, bool causal) {
  std::vector<Index> before, seen;
  for (const Index j : members)
    if (j <= c) before.push_back(j);
  if (causal) {
    for (std::size_t rank = 0; rank < before.size(); ++rank)
      if (window == 0 || before.size() - rank <= static_cast<std::size_t>(window)) seen.push_back(before[rank]);
    return seen;
  }
  const Index r = static_cast<Index>(before.size());
  for (Index rank = 0; rank < static_cast<Index>(members.size()); ++rank)
    if (window == 0 || (rank >= r - (window + 1) / 2 && rank < r + window / 2))
      seen.push_back(members[static_cast<std::size_t>(rank)]);
  return seen;
}

/// Settings of every kind: causal or not, every self rule and alignment, equal and unequal lengths, ragged, empty.
inline std::vector<Setting> settings(const std::vector<Index>& lengths) {
  std::vector<Setting> result;
  for (const bool causal : {false, true})
    for (const Self self : {Self::visible, Self::only_if_alone, Self::never}) {
      for (const Index n : lengths) {
        result.push_back({n, n, causal, {}, self});
        if (n < 2) continue;
        for (const std::optional<Alignment> alignment :
             {std::optional<Alignment>(), std::optional(Alignment::bottom_right), std::optional(Alignment::top_left),
              std::optional(Alignment::proportional)}) {
          result.push_back({n, n + 3, causal, alignment, self});
          result.push_back({n, n / 2 + 1, causal, alignment, self});
        }
      }
      result.push_back({12, 12, causal, {}, self, {0, 0, 5, 6, 6, 12}});
      result.push_back({12, 12, causal, {}, self, {0, 0, 5, 6, 6, 12}, {0, 2, 5, 5, 6, 12}});
      result.push_back({12, 15, causal, Alignment::bottom_right, self, {0, 4, 5, 12}, {0, 6, 6, 15}});
      result.push_back({12, 9, causal, Alignment::top_left, self, {0, 4, 5, 12}, {0, 6, 6, 9}});
    }
  std::vector<Setting> accepted;
  for (const Setting& setting : result)
    if (!setting.refused()) accepted.push_back(setting);
  return accepted;
}

/// Distances by the plan's positions are those of aligned positions, for every visible pair.
inline void require_distances(const AttentionPlan& plan, const Setting& setting) {
  const Mask positions =
      expected_mask({setting.tokens, setting.keys, setting.causal, setting.alignment, Self::visible, setting.offsets,
                     setting.key_offsets},
                    [](Index, Index c, Index first, Index) { return std::vector<Index>{c - first}; });
  const Mask mask = mask_of(plan);
  std::vector<Index> key_offsets = setting.key_offsets.empty() ? setting.offsets : setting.key_offsets;
  for (std::size_t i = 0; i < mask.size(); ++i)
    for (const Index j : mask[i]) {
      Index first = 0;
      for (const Index offset : key_offsets) first = offset <= j ? offset : first;
      const Index from = plan.query_positions.empty() ? static_cast<Index>(i) : plan.query_positions[i];
      const Index to = plan.key_positions.empty() ? j : plan.key_positions[static_cast<std::size_t>(j)];
      REQUIRE(from - to == positions[i][0] - (j - first));
    }
}

/// The first rows of a causal plan are the plan of the first rows: same keys at the same ranks, same intervals.
inline void require_prefix(const AttentionPlan& shorter, const AttentionPlan& longer) {
  const auto rows_of = [](const AttentionPlan& plan) {
    std::vector<std::vector<Index>> rows(static_cast<std::size_t>(plan.tokens));
    for (const AttentionPlan::Group& group : plan.groups)
      for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
        auto& row = rows[static_cast<std::size_t>(plan.entries[e])];
        row = {plan.visible[e].begin, plan.visible[e].end};
        for (std::int32_t rank = 0; rank < plan.visible[e].end; ++rank)
          row.push_back(plan.keys[static_cast<std::size_t>(group.key_begin + rank)]);
      }
    return rows;
  };
  auto expected = rows_of(longer);
  expected.resize(static_cast<std::size_t>(shorter.tokens));
  REQUIRE(rows_of(shorter) == expected);
  REQUIRE(longer.visible_too.empty());
}

}  // namespace test
