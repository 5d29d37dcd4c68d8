#pragma once

// The row invariant where a tile's path changes with its number of queries: a row has the same bits computed alone, in
// small groups, and in full tiles.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention/setup.hpp"
#include "catch.hpp"

namespace test {

/// Every number of `a` and `b` has the same bits; one NaN is as good as another, for which of two is kept is open.
template <class T>
bool same_bits_or_nan(const T* a, const T* b, Index count) {
  for (Index i = 0; i < count; ++i)
    if (std::memcmp(a + i, b + i, sizeof(T)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

/// Entries of one group, and the same entries in groups of `size` that all have its keys; only [first, last) of them.
inline AttentionPlan regrouped(const AttentionPlan& whole, Index size, Index first, Index last) {
  AttentionPlan plan;
  plan.tokens = whole.tokens;
  plan.key_tokens = whole.key_tokens;
  for (Index begin = first; begin < last; begin += size) {
    const Index end = std::min(begin + size, last);
    const auto entry_begin = static_cast<std::int32_t>(begin - first),
               entry_end = static_cast<std::int32_t>(end - first);
    const auto key_begin = static_cast<std::int32_t>(plan.keys.size());
    plan.keys.insert(plan.keys.end(), whole.keys.begin(), whole.keys.end());
    plan.groups.push_back({entry_begin, entry_end, key_begin, static_cast<std::int32_t>(plan.keys.size())});
  }
  plan.entries.assign(whole.entries.begin() + first, whole.entries.begin() + last);
  plan.visible.assign(whole.visible.begin() + first, whole.visible.begin() + last);
  if (!whole.visible_too.empty())
    plan.visible_too.assign(whole.visible_too.begin() + first, whole.visible_too.begin() + last);
  complete(plan);
  return plan;
}

/// What is drawn anew for every case of check_row_bits.
struct RowBitsCase {
  Index d, keys;
  int visibility;  // 0: everything, 1: causal, 2: some interval, 3: two of them
  bool bias, poison, gradients, relative, growing;
};

/// 70 queries, some of adjacent rows and some not, of which a few see nothing.
template <class T>
Inputs<T> row_bits_inputs(const RowBitsCase& c, Random& random) {
  constexpr Index queries = 70;
  Inputs<T> in;
  AttentionPlan& plan = in.plan;
  const auto ascending = [&random](Index count, Index consecutive) {
    std::vector<std::int32_t> rows;
    for (std::int32_t row = 0; Index(rows.size()) < count; ++row)
      if (Index(rows.size()) < consecutive || random.below(3) > 0) rows.push_back(row);
    return rows;
  };
  plan.entries = ascending(queries, 37);
  plan.keys = ascending(c.keys, c.keys / 2);
  plan.tokens = plan.entries.back() + 2;
  plan.key_tokens = plan.keys.back() + 3;
  plan.groups = {{0, static_cast<std::int32_t>(queries), 0, static_cast<std::int32_t>(c.keys)}};
  for (Index e = 0; e < queries; ++e) {
    Index bounds[4] = {0, c.keys, c.keys, c.keys};
    if (c.visibility == 1) bounds[1] = std::max<Index>(1, c.keys * e / queries);
    if (c.visibility >= 2) {
      for (Index& bound : bounds) bound = random.below(c.keys + 1);
      std::sort(bounds, bounds + 4);
    }
    if (random.below(12) == 0) bounds[1] = bounds[0];
    if (random.below(12) == 0) bounds[3] = bounds[2];
    plan.visible.push_back({static_cast<std::int32_t>(bounds[0]), static_cast<std::int32_t>(bounds[1])});
    if (c.visibility == 3)
      plan.visible_too.push_back({static_cast<std::int32_t>(bounds[2]), static_cast<std::int32_t>(bounds[3])});
  }
  complete(plan);
  const Index dv = c.d % 3 == 0 ? c.d + 5 : c.d;
  in.q = random.matrix<T>(plan.tokens, c.d) * T(3);
  in.k = random.matrix<T>(plan.key_tokens, c.d) * T(3);
  if (c.growing)  // so that logits of later blocks are far above earlier ones
    for (Index row = 0; row < plan.key_tokens; ++row) in.k.row(row) *= T(1) + T(row) / T(16);
  in.v = random.matrix<T>(plan.key_tokens, dv);
  in.bias = random.matrix<T>(c.bias ? 1 : 0, 9);
  in.bias_first = -4;
  in.relative_keys = random.matrix<T>(c.relative ? 25 : 0, c.d) * T(3);
  in.relative_values = random.matrix<T>(c.relative ? 25 : 0, dv);
  in.relative_first = -6;
  in.d_out = random.matrix<T>(plan.tokens, dv);
  in.d_lse = random.matrix<T>(plan.tokens, 1);
  if (c.poison) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    constexpr T bad[] = {infinity, -infinity, std::numeric_limits<T>::quiet_NaN()};
    for (int i = 0; i < 3; ++i) {
      const auto key = [&] { return plan.keys[static_cast<std::size_t>(random.below(c.keys))]; };
      in.k(key(), random.below(c.d)) = bad[i];
      in.v(key(), random.below(dv)) = bad[(i + 1) % 3];
    }
    in.q(plan.entries[static_cast<std::size_t>(random.below(queries))], random.below(c.d)) = bad[2];
    if (c.relative) {
      in.relative_keys(random.below(25), random.below(c.d)) = bad[0];
      in.relative_values(random.below(25), random.below(dv)) = bad[1];
      in.relative_values(random.below(25), random.below(dv)) = bad[2];
    }
  }
  return in;
}

/// `run(inputs, gradients)`: the Outputs of the kernels under test.
template <class T, class Run>
void check_row_bits(const Run& run, std::uint64_t seed) {
  Random random(seed);
  int turn = 0;
  for (Index d : {1, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128})
    for (Index keys :
         {Index(1), Index(2 + random.below(6)), Index(8 + random.below(8)), Index(16), Index(17 + random.below(46)),
          Index(63 + random.below(3)), Index(66 + random.below(63)), Index(129 + random.below(72))}) {
      const RowBitsCase c{d,
                          keys,
                          turn % 4,
                          random.below(2) == 0,
                          random.below(3) == 0,
                          d <= 24 || turn % 5 == 0,
                          random.below(3) == 0,
                          random.below(2) == 0};
      ++turn;
      Inputs<T> in = row_bits_inputs<T>(c, random);
      const AttentionPlan whole = in.plan;
      const auto queries = static_cast<Index>(whole.entries.size());
      const Outputs<T> expected = run(in, c.gradients);
      const auto check = [&](Index size, Index first, Index last) {
        in.plan = regrouped(whole, size, first, last);
        const Outputs<T> got = run(in, c.gradients);
        Index differing = 0;
        for (Index e = first; e < last; ++e) {
          const Index row = whole.entries[static_cast<std::size_t>(e)];
          bool same = same_bits_or_nan(got.out.row(row).data(), expected.out.row(row).data(), got.out.cols()) &&
                      same_bits_or_nan(&got.lse(row, 0), &expected.lse(row, 0), 1);
          if (c.gradients)
            same &= same_bits_or_nan(got.d_q.row(row).data(), expected.d_q.row(row).data(), got.d_q.cols());
          differing += !same;
        }
        INFO("d " << d << ", " << keys << " keys, visibility " << c.visibility << ", bias " << c.bias << ", relative "
                  << c.relative << ", NaN " << c.poison << ", groups of " << size << " in [" << first << ", " << last
                  << ")");
        CHECK(differing == 0);
      };
      const Index alone = random.below(queries);
      check(1, alone, alone + 1);
      check(1, 0, queries);
      for (const Index size : {2 + random.below(2), 4 + random.below(4), 8 + random.below(27)}) check(size, 0, queries);
    }
}

}  // namespace test
