// Random numbers for weights and batches, the same with every standard library.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/core/matrix.hpp>
#include <cstdint>
#include <locale>
#include <numbers>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace transformer {

using coterie::Index;
using coterie::RowMatrix;

/// A stream of random numbers, whose state can be saved.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  /// Uniform in {0, ..., count - 1}.
  Index below(Index count) { return std::min(static_cast<Index>(uniform() * static_cast<double>(count)), count - 1); }
  /// Puts elements into a random order.
  template <class Element>
  void shuffle(std::vector<Element>& elements) {
    for (std::size_t i = elements.size(); i > 1; --i)
      std::swap(elements[i - 1], elements[static_cast<std::size_t>(below(static_cast<Index>(i)))]);
  }
  /// Standard normal, by Box and Muller.
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

  /// The position in the stream, as text.
  std::string state() const {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << engine_;
    return text.str();
  }
  /// Continues from a state; returns whether the text was one, and changes nothing if not.
  bool restore(const std::string& state) {
    std::istringstream text(state);
    text.imbue(std::locale::classic());
    std::mt19937_64 engine;
    if (!(text >> engine) || !(text >> std::ws).eof()) return false;
    engine_ = engine;
    return true;
  }

 private:
  std::mt19937_64 engine_;
};

/// Uniform in [0, 1), as a function of three numbers (splitmix64, three rounds).
inline double uniform_at(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  std::uint64_t bits = 0;
  for (const std::uint64_t word : {seed, stream, counter}) {
    bits += word + 0x9e3779b97f4a7c15ULL;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
    bits ^= bits >> 31;
  }
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

/// A matrix of the given size with every element drawn from `draw`.
template <class T, class Draw>
RowMatrix<T> random_matrix(Index rows, Index cols, Draw&& draw) {
  RowMatrix<T> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(draw());
  return m;
}

/// Weights x in -> out, uniform in +-1/sqrt(in).
template <class T>
RowMatrix<T> linear_weights(Index in, Index out, Random& random) {
  return random_matrix<T>(in, out, [&] { return (2 * random.uniform() - 1) / std::sqrt(static_cast<double>(in)); });
}

}  // namespace transformer
