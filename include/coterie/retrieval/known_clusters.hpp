// Checks of clusters that are known, such as those of a file.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "coterie/core/check.hpp"
#include "coterie/core/finite.hpp"
#include "coterie/core/offsets.hpp"
#include "coterie/retrieval/config.hpp"

namespace coterie::detail {

/// The clusters of keys that were clustered together.
struct KnownRun {
  std::span<const std::int32_t> sizes, rows;
};

/// Appends the clusters of each range of rows to `known`.
///
/// Requires: clusters that hold every finite key of each range once, range by range (ValueError, which names
///   "clusters.<head>.sizes" or "clusters.<head>.rows").
template <class T>
void add_known_runs(const char* function, const KeyClusters& clusters, Index head, std::span<const RowRange> ranges,
                    ConstView<T> k, ConstView<T> v, std::vector<KnownRun>& known) {
  const auto& [sizes, rows] = clusters;
  const auto fault = [&](const char* list, const std::string& expected, const auto& got) {
    fail<ValueError>(function, join("clusters.", head, ".", list).c_str(), expected, got);
  };
  std::size_t sum = 0;
  for (const std::int32_t size : sizes) {
    if (size < 1) fault("sizes", "at least 1", size);
    sum += static_cast<std::size_t>(size);
  }
  if (sum != rows.size()) fault("sizes", join("a sum of ", rows.size(), ", the number of rows"), sum);
  std::size_t part = 0, key = 0;
  std::vector<char> missing;
  for (const RowRange range : ranges) {
    missing.assign(static_cast<std::size_t>(range.count()), 0);
    Index left = 0;
    for (Index row = range.begin; row < range.end; ++row)
      if (finite_row(k.row(row), k.cols()) && finite_row(v.row(row), v.cols())) {
        missing[static_cast<std::size_t>(row - range.begin)] = 1;
        ++left;
      }
    const std::size_t first_part = part, first_key = key;
    for (; left > 0; ++part) {
      const std::string expected =
          join("every finite key of rows ", range.begin, " to ", range.end - 1, " once, ascending inside a cluster");
      if (part == sizes.size()) fault("rows", expected, join(left, " too few"));
      for (std::int32_t i = 0; i < sizes[part]; ++i, ++key, --left) {
        const std::int32_t row = rows[key];
        if (row < range.begin || row >= range.end || (i > 0 && row <= rows[key - 1]) ||
            missing[static_cast<std::size_t>(row - range.begin)] == 0)
          fault("rows", expected, join(row, " at ", key));
        missing[static_cast<std::size_t>(row - range.begin)] = 0;
      }
    }
    known.push_back(
        {std::span(sizes).subspan(first_part, part - first_part), std::span(rows).subspan(first_key, key - first_key)});
  }
  if (part != sizes.size())
    fault("sizes", join(part, " clusters, those of whole segments"), join(sizes.size(), " clusters"));
}

}  // namespace coterie::detail
