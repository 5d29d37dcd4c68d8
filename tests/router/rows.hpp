// Rows for the router's tests: normalised, random or in blobs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace router_test {

using coterie::Index;
using coterie::RowMatrix;

struct Generator {
  explicit Generator(std::uint64_t seed) : engine(seed) {}
  double uniform() { return (static_cast<double>(engine() >> 11) + 0.5) * 0x1p-53; }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }
  std::mt19937_64 engine;
};

// Zero mean, norm sqrt(d), by formulas of its own.
template <class T>
void normalise(RowMatrix<T>& rows) {
  for (Index i = 0; i < rows.rows(); ++i) {
    double mean = 0, square = 0;
    for (Index j = 0; j < rows.cols(); ++j) mean += static_cast<double>(rows(i, j)) / static_cast<double>(rows.cols());
    for (Index j = 0; j < rows.cols(); ++j) square += std::pow(static_cast<double>(rows(i, j)) - mean, 2);
    const double scale = std::sqrt(static_cast<double>(rows.cols()) / square);
    for (Index j = 0; j < rows.cols(); ++j)
      rows(i, j) = static_cast<T>((static_cast<double>(rows(i, j)) - mean) * scale);
  }
}

template <class T>
RowMatrix<T> random_rows(Index n, Index d, std::uint64_t seed) {
  Generator generator(seed);
  RowMatrix<T> rows(n, d);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < d; ++j) rows(i, j) = static_cast<T>(generator.normal());
  normalise(rows);
  return rows;
}

// Row i lies near the direction `blobs[i % blobs.size()]`, each number off by `spread` times a normal.
template <class T>
RowMatrix<T> blob_rows(Index n, const RowMatrix<T>& directions, const std::vector<Index>& blobs, double spread,
                       std::uint64_t seed) {
  Generator generator(seed);
  RowMatrix<T> rows(n, directions.cols());
  for (Index i = 0; i < n; ++i) {
    const Index blob = blobs[static_cast<std::size_t>(i) % blobs.size()];
    for (Index j = 0; j < rows.cols(); ++j)
      rows(i, j) = static_cast<T>(static_cast<double>(directions(blob, j)) + spread * generator.normal());
  }
  normalise(rows);
  return rows;
}

template <class T>
bool same_bits(coterie::ConstView<T> a, coterie::ConstView<T> b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i)
    if (std::memcmp(a.row(i), b.row(i), static_cast<std::size_t>(a.cols()) * sizeof(T)) != 0) return false;
  return true;
}

inline bool same_bits(std::span<const double> a, std::span<const double> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace router_test
