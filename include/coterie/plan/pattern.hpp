// What a pattern is made of, for all builders: alignment, self rule, ragged sequences, ranks that a query sees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/core/offsets.hpp"

namespace coterie {

/// Whether a query sees the key at its own (aligned) position. A key that is left out still counts in the window.
enum class Self {
  visible,        ///< like any other key
  only_if_alone,  ///< left out, unless nothing else is visible
  never,          ///< left out
};

/// The position c(i) of query i among the keys of its sequence, where their numbers differ; c(i) = i where they do not.
enum class Alignment {
  bottom_right,  ///< i + keys - tokens: the last query meets the last key (caches, chunks); default of causal patterns
  top_left,      ///< i: the first query meets the first key
  proportional,  ///< i*keys/tokens, rounded down; default of two-sided patterns
};

namespace detail {

/// One sequence of a ragged batch: its first rows and their numbers.
struct Sequence {
  Index query_begin = 0, tokens = 0, key_begin = 0, keys = 0;
  Alignment alignment = Alignment::bottom_right;

  /// c(i) for the query row `row`.
  Index position(Index row) const {
    const Index i = row - query_begin;
    switch (alignment) {
      case Alignment::bottom_right:
        return i + keys - tokens;
      case Alignment::top_left:
        return i;
      case Alignment::proportional:
        break;
    }
    return i * keys / tokens;
  }
  bool has_equal_lengths() const { return tokens == keys; }
};

/// A pattern in terms that serve every builder: a query that has r of its group's keys up to its position sees the
/// ranks [r - before, r + after).
struct Pattern {
  Index tokens = 0, keys = 0, clusters = 1;
  Index before = 0, after = 0;
  Alignment alignment = Alignment::bottom_right;
  Self self = Self::visible;
  std::span<const Index> offsets, key_offsets;  // empty: one sequence

  Index sequences() const { return sequence_count(offsets); }

  Sequence sequence(Index s) const {
    const RowRange query_rows = sequence_rows(offsets, tokens, s), key_rows = sequence_rows(key_offsets, keys, s);
    Sequence result{query_rows.begin, query_rows.count(), key_rows.begin, key_rows.count()};
    result.alignment =
        result.has_equal_lengths() ? Alignment::top_left : alignment;  // the same positions, without division
    return result;
  }

  /// Sees `window` ranks up to the query's position (0: all) and `ahead` after it.
  void see(Index window, Index ahead) {
    const Index all = tokens + keys + 1;  // more than any rank or position is away from any other
    before = window == 0 ? all : (std::min)(window, all);
    after = (std::min)(ahead, all);
  }
};

/// Collects the fault of a value that is no rule.
inline void check_self(Faults& faults, Self self) {
  faults.expect(self == Self::visible || self == Self::only_if_alone || self == Self::never, "self",
                "visible, only_if_alone or never", static_cast<int>(self));
}

/// Checks the fields that all configs share. Keys without offsets of their own take those of the tokens.
inline void check_pattern(Faults& faults, Pattern& pattern) {
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  const Index tokens = pattern.tokens, keys = pattern.keys;
  const std::span<const Index> offsets = pattern.offsets, key_offsets = pattern.key_offsets;
  const int alignment = static_cast<int>(pattern.alignment);
  faults.expect(alignment >= 0 && alignment <= 2, "alignment", "bottom_right, top_left or proportional", alignment);
  check_self(faults, pattern.self);
  bool good = tokens >= 0 && tokens <= most && keys >= 0 && keys <= most;
  faults.expect(tokens >= 0 && tokens <= most, "tokens", "0 to 2147483647", tokens);
  faults.expect(keys == tokens || (keys >= 0 && keys <= most), "keys", "0 to 2147483647", keys);
  if (good && !offsets.empty()) {
    good = check_offsets(faults, "offsets", offsets, tokens);
    if (key_offsets.empty()) {
      faults.expect(tokens == keys, "key_offsets", "offsets of the keys, for they are not as many as the tokens",
                    "none");
      good = good && tokens == keys;
      pattern.key_offsets = offsets;
    }
  }
  if (good && !key_offsets.empty()) {
    const std::size_t bounds = offsets.empty() ? 2 : offsets.size();
    good = key_offsets.size() == bounds;
    if (!good) faults.expect(false, "key_offsets", join(bounds, " values, as offsets"), key_offsets.size());
    good = good && check_offsets(faults, "key_offsets", key_offsets, keys);
  }
  if (good && pattern.self != Self::visible && pattern.alignment == Alignment::proportional)
    for (Index s = 0; s < pattern.sequences(); ++s)
      if (!pattern.sequence(s).has_equal_lengths()) {
        faults.expect(false, "self", "Self::visible, for proportional alignment of unequal lengths has no self",
                      join("another rule in sequence ", s));
        break;
      }
}

/// Reads and checks the fields that all configs share.
template <class Config>
Pattern read_pattern(Faults& faults, const Config& config, Index tokens, Index keys) {
  Pattern pattern;
  pattern.tokens = tokens;
  pattern.keys = keys;
  pattern.alignment = config.alignment.value_or(config.causal ? Alignment::bottom_right : Alignment::proportional);
  pattern.self = config.self;
  pattern.offsets = config.offsets;
  pattern.key_offsets = config.key_offsets;
  check_pattern(faults, pattern);
  return pattern;
}

}  // namespace detail
}  // namespace coterie
