// Ragged batches: sequences lie end to end in one matrix, offsets[s] to offsets[s + 1]; empty ones are legal.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie::detail {

/// Consecutive rows, [begin, end).
struct RowRange {
  Index begin = 0, end = 0;
  Index count() const { return end - begin; }
};

/// The sequences of checked offsets; none given: one.
inline Index sequence_count(std::span<const Index> offsets) {
  return offsets.empty() ? 1 : static_cast<Index>(offsets.size()) - 1;
}
/// The rows of sequence s among `rows`.
inline RowRange sequence_rows(std::span<const Index> offsets, Index rows, Index s) {
  if (offsets.empty()) return {0, rows};
  const auto i = static_cast<std::size_t>(s);
  return {offsets[i], offsets[i + 1]};
}

/// Collects the faults of one offsets argument; true if it can be used.
inline bool check_offsets(Faults& faults, const char* argument, std::span<const Index> offsets, Index rows) {
  std::string got;
  if (offsets.size() > static_cast<std::size_t>((std::numeric_limits<std::int32_t>::max)())) got = "too many";
  for (std::size_t i = 0; i < offsets.size() && got.empty(); ++i)
    if (i == 0 ? offsets[0] != 0 : offsets[i] < offsets[i - 1]) got = join(offsets[i], " at ", i);
  if (got.empty() && offsets.back() != rows) got = join(offsets.back(), " at the end");
  if (got.empty()) return true;
  faults.expect(false, argument, join("ascending values from 0 to ", rows), got);
  return false;
}

}  // namespace coterie::detail
