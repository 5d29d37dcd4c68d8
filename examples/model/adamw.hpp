// AdamW, and the learning rate over the steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/core/matrix.hpp>
#include <numbers>
#include <string_view>
#include <utility>

namespace transformer {

using coterie::ConstView;
using coterie::Index;
using coterie::RowMatrix;
using coterie::View;

/// Warm-up, then a cosine from 1 to `floor`: the factor of the learning rate at `step`, `progress`: share of the
/// training that is done, 0 to 1.
inline double learning_rate_factor(Index step, Index warm_up, double progress, double floor) {
  const double rise = warm_up > 0 ? std::min(1.0, static_cast<double>(step + 1) / static_cast<double>(warm_up)) : 1.0;
  return rise * (floor + (1 - floor) * (1 + std::cos(std::numbers::pi * std::clamp(progress, 0.0, 1.0))) / 2);
}

struct AdamWConfig {
  double beta1 = 0.9, beta2 = 0.98, epsilon = 1e-8;
  double weight_decay = 0.01;  // of matrices; not of norms, biases and gains
  double largest_norm = 1;     // gradients are scaled down to this length, taken over all of them
};

/// AdamW (Loshchilov and Hutter, 2019) with clipping by the global norm.
template <class T>
class AdamW {
 public:
  explicit AdamW(const AdamWConfig& config = {}) : config_(config) {}

  /// One step; returns the length of the gradient before clipping.
  template <class M>
  double step(M& model, const typename M::Gradients& gradients, double learning_rate) {
    double squares = 0;
    Index count = 0;
    model.visit(gradients, [&](std::string_view, View<T> w, ConstView<T> g) {
      for (Index i = 0; i < w.rows(); ++i)
        for (Index j = 0; j < w.cols(); ++j) squares += static_cast<double>(g(i, j)) * static_cast<double>(g(i, j));
      count += w.rows() * w.cols();
    });
    if (first_.size() != count) {
      first_ = second_ = RowMatrix<T>::Zero(1, count);
      steps_ = 0;
    }
    ++steps_;
    const double length = std::sqrt(squares);
    const T clip = static_cast<T>(std::min(1.0, config_.largest_norm / (length + 1e-6)));
    const T beta1 = static_cast<T>(config_.beta1), beta2 = static_cast<T>(config_.beta2);
    const T rate = static_cast<T>(learning_rate / (1 - std::pow(config_.beta1, steps_)));
    const T correction = static_cast<T>(1 / std::sqrt(1 - std::pow(config_.beta2, steps_)));
    const T epsilon = static_cast<T>(config_.epsilon);

    Index at = 0;
    model.visit(gradients, [&](std::string_view name, View<T> w, ConstView<T> g) {
      const T keep = static_cast<T>(decays(name) ? 1 - learning_rate * config_.weight_decay : 1);
      for (Index i = 0; i < w.rows(); ++i)
        for (Index j = 0; j < w.cols(); ++j, ++at) {
          const T d = g(i, j) * clip;
          T &m = first_(0, at), &v = second_(0, at);
          m = beta1 * m + (1 - beta1) * d;
          v = beta2 * v + (1 - beta2) * d * d;
          w(i, j) = keep * w(i, j) - rate * m / (std::sqrt(v) * correction + epsilon);
        }
    });
    return length;
  }

  /// Means of the gradients and of their squares, 1 x parameters in the order of visit; empty before the first step.
  const RowMatrix<T>& first() const { return first_; }
  const RowMatrix<T>& second() const { return second_; }
  Index steps() const { return steps_; }
  /// Continues from what those three were.
  void restore(RowMatrix<T> first, RowMatrix<T> second, Index steps) {
    first_ = std::move(first);
    second_ = std::move(second);
    steps_ = steps;
  }

 private:
  static bool decays(std::string_view name) {
    for (const char* part : {"norm", "bias", "gain"})
      if (name.find(part) != std::string_view::npos) return false;
    return true;
  }

  AdamWConfig config_;
  RowMatrix<T> first_, second_;  // 1 x parameters, in the order of visit
  Index steps_ = 0;
};

}  // namespace transformer
