// Rotary positions: turns of column pairs of queries and keys, forward and backward.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/core/context.hpp"

namespace coterie {

/// Which columns of a head turn together, with h = d/2. Weights trained with one layout give the same logits with the
/// other once their columns are put in its order.
enum class RotaryLayout {
  halves,       ///< (j, j + h): GPT-NeoX, LLaMA
  interleaved,  ///< (2j, 2j + 1): RoFormer, GPT-J
};

/// Rotary positions of one head width: column pair j < h = d/2 turns by the angle position * base^(-j/h).
///
/// The dot product of a rotated query and a rotated key depends on their distance only. A last odd column stays.
/// Source: Su et al. 2021, section 3.2.
class Rotary {
 public:
  Rotary() = default;

  /// Requires: head_dim >= 0, a positive base and a layout that there is, otherwise ValueError.
  /// Allocates: tables of 128 * (d/2) doubles.
  explicit Rotary(Index head_dim, double base = 10000, RotaryLayout layout = RotaryLayout::halves)
      : half_(head_dim / 2), layout_(layout) {
    if (head_dim < 0) detail::fail<ValueError>("Rotary", "head_dim", "at least 0", head_dim);
    if (!(base > 0) || !std::isfinite(base)) detail::fail<ValueError>("Rotary", "base", "a positive number", base);
    if (layout != RotaryLayout::halves && layout != RotaryLayout::interleaved)
      detail::fail<ValueError>("Rotary", "layout", "halves or interleaved", static_cast<int>(layout));
    const auto half = static_cast<std::size_t>(half_);
    frequency_.resize(half);
    for (std::size_t j = 0; j < half; ++j)
      frequency_[j] = std::pow(base, -static_cast<double>(j) / static_cast<double>(half_));
    cos_.resize(block * half);
    sin_.resize(block * half);
    for (std::size_t b = 0; b < block; ++b)
      for (std::size_t j = 0; j < half; ++j) {
        cos_[b * half + j] = std::cos(static_cast<double>(b) * frequency_[j]);
        sin_[b * half + j] = std::sin(static_cast<double>(b) * frequency_[j]);
      }
  }

  /// d/2: how many angles a position has.
  Index half() const { return half_; }

  /// Turns every row of x by its position, in place.
  /// Shapes: x tokens x heads*d, positions tokens.
  /// Formula: (u, v) = (u cos a - v sin a, v cos a + u sin a), (u, v) the pair j of a head, a = position * base^(-j/h).
  /// Requires: shapes that fit, otherwise ShapeError.
  /// Overwrites x.
  /// Threads and determinism: a row's bits depend on that row and its position alone.
  /// Accuracy: cosines and sines come in double from those of two angles, within 2e-15 + 2e-16 * |angle| of the exact
  ///   ones of the frequency in double.
  template <class T>
  void forward(View<T> x, Index heads, std::span<const std::int32_t> positions, Context& context) const {
    rotate<T>("Rotary::forward", x, heads, positions, 1, context);
  }

  /// Turns every row of d_x back by its position, in place: the gradient of forward's output becomes that of its input.
  template <class T>
  void backward(View<T> d_x, Index heads, std::span<const std::int32_t> positions, Context& context) const {
    rotate<T>("Rotary::backward", d_x, heads, positions, -1, context);
  }

 private:
  static constexpr Index block = 64;

  // Cosine and sine of the current block of positions, and of the current position.
  struct Angles {
    double *block_cos, *block_sin, *cos, *sin;
    Index current = 1;  // not a multiple of the block: none yet
  };

  template <class T>
  void rotate(const char* function, View<T> x, Index heads, std::span<const std::int32_t> positions, double sign,
              Context& context) const {
    if (heads < 1 || x.cols() % heads != 0 || x.cols() / heads / 2 != half_)
      detail::fail<ShapeError>(function, "x", detail::join(heads, " heads of ", 2 * half_, " or one more columns"),
                               detail::join(x.cols(), " columns"));
    detail::check_shape<T>(function, "x", x, x.rows(), x.cols());
    if (static_cast<Index>(positions.size()) != x.rows())
      detail::fail<ShapeError>(function, "positions", detail::join(x.rows(), " values"), positions.size());
    context.for_chunks(x.rows(), block, [&](Index first, Index last, Index worker) {
      Arena& arena = context.workspace().worker(worker);
      Arena::Scope scope(arena);
      double* const scratch = arena.take<double>(4 * half_);
      Angles angles{scratch, scratch + half_, scratch + 2 * half_, scratch + 3 * half_};
      for (Index i = first; i < last; ++i)
        turn(x.row(i), x.cols() / heads, heads, positions[static_cast<std::size_t>(i)], sign, angles);
    });
  }

  template <class T>
  void turn(T* x, Index width, Index heads, Index position, double sign, Angles& a) const {
    const Index from = (position >= 0 ? position : position - (block - 1)) / block * block;  // rounded down
    if (a.current != from) {
      for (Index j = 0; j < half_; ++j) {
        const double angle = static_cast<double>(from) * frequency_[static_cast<std::size_t>(j)];
        a.block_cos[j] = std::cos(angle);
        a.block_sin[j] = std::sin(angle);
      }
      a.current = from;
    }
    // cos(a + b) = cos a cos b - sin a sin b, sin(a + b) = sin a cos b + cos a sin b
    const double* const fine_cos = cos_.data() + (position - from) * half_;
    const double* const fine_sin = sin_.data() + (position - from) * half_;
    for (Index j = 0; j < half_; ++j) {
      a.cos[j] = a.block_cos[j] * fine_cos[j] - a.block_sin[j] * fine_sin[j];
      a.sin[j] = sign * (a.block_sin[j] * fine_cos[j] + a.block_cos[j] * fine_sin[j]);
    }
    // Column of the pair's first, and how far the second is.
    const Index step = layout_ == RotaryLayout::halves ? 1 : 2, apart = layout_ == RotaryLayout::halves ? half_ : 1;
    for (Index h = 0; h < heads; ++h, x += width)
      for (Index j = 0; j < half_; ++j) {
        const T c = static_cast<T>(a.cos[j]), s = static_cast<T>(a.sin[j]), u = x[j * step], v = x[j * step + apart];
        x[j * step] = u * c - v * s;
        x[j * step + apart] = v * c + u * s;
      }
  }

  Index half_ = 0;
  RotaryLayout layout_ = RotaryLayout::halves;
  std::vector<double> frequency_;  // half: base^(-j/half)
  std::vector<double> cos_, sin_;  // block x half: of the positions in [0, block)
};

}  // namespace coterie
