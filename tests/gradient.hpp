#pragma once

// One gradient check for everything that can be differentiated.

#include <algorithm>
#include <cmath>
#include <limits>

#include "catch.hpp"
#include "coterie/core/matrix.hpp"

namespace test {

/// How far `gradient` is from the derivative of loss() by every element of `x`: the largest difference from the central
/// differences in double, relative to the largest element of the gradient, or to 1 where that is smaller. NaN counts as
/// infinitely far. loss() reads `x`; the steps are undone.
template <class Loss>
double gradient_error(coterie::View<double> x, coterie::ConstView<double> gradient, Loss&& loss) {
  REQUIRE(gradient.rows() == x.rows());
  REQUIRE(gradient.cols() == x.cols());
  const double step = 1e-5;
  double largest = 1, error = 0;
  for (coterie::Index i = 0; i < x.rows(); ++i)
    for (coterie::Index j = 0; j < x.cols(); ++j) {
      const double kept = x(i, j);
      x(i, j) = kept + step;
      const double above = loss();
      x(i, j) = kept - step;
      const double below = loss();
      x(i, j) = kept;
      const double difference = std::abs(gradient(i, j) - (above - below) / (2 * step));
      if (!(difference <= error)) error = std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference;
      largest = std::max(largest, std::abs(gradient(i, j)));
    }
  return error / largest;
}

template <class Loss>
void require_gradient(coterie::View<double> x, coterie::ConstView<double> gradient, Loss&& loss,
                      double tolerance = 1e-7) {
  REQUIRE(gradient_error(x, gradient, loss) <= tolerance);
}

}  // namespace test
