#pragma once

// Random numbers of the tests: the same everywhere, for the standard's distributions differ between libraries.

#include <cstdint>
#include <random>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace test {

using coterie::Index;
using coterie::RowMatrix;

class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}

  /// Uniform in [low, high).
  double uniform(double low = -1, double high = 1) {
    return low + (high - low) * (static_cast<double>(bits_() >> 11) * 0x1p-53);
  }

  /// Uniform in [0, count).
  Index below(Index count) { return static_cast<Index>(bits_() % static_cast<std::uint64_t>(count)); }

  template <class T>
  RowMatrix<T> matrix(Index rows, Index cols) {
    RowMatrix<T> result(rows, cols);
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) result(i, j) = static_cast<T>(uniform());
    return result;
  }

  /// Labels in [lowest, clusters).
  std::vector<std::int32_t> labels(Index count, Index clusters, std::int32_t lowest = 0) {
    std::vector<std::int32_t> result(static_cast<std::size_t>(count));
    for (std::int32_t& label : result) label = static_cast<std::int32_t>(lowest + below(clusters - lowest));
    return result;
  }

 private:
  std::mt19937_64 bits_;
};

}  // namespace test
