// Errors of attention outputs, head by head.
#pragma once

#include <algorithm>
#include <cmath>

#include "llama.hpp"

namespace pretrained {

/// Root mean square over queries of |out - dense| / |dense|, by layer and head.
class HeadErrors {
 public:
  HeadErrors(Index layers, Index heads)
      : squares_(RowMatrix<double>::Zero(layers, heads)), queries_(static_cast<std::size_t>(layers), 0.0) {}

  /// Adds the queries of a layer; those whose dense output is zero do not count.
  /// Shapes: out, dense queries x heads*d.
  void add(Index layer, ConstView<float> out, ConstView<float> dense) {
    const Index heads = squares_.cols(), d = dense.cols() / heads;
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < dense.rows(); ++i) {
        double difference = 0, size = 0;
        for (Index c = h * d; c < (h + 1) * d; ++c) {
          const double exact = double(dense(i, c)), error = double(out(i, c)) - exact;
          difference += error * error;
          size += exact * exact;
        }
        if (size > 0) squares_(layer, h) += difference / size;
      }
    queries_[static_cast<std::size_t>(layer)] += static_cast<double>(dense.rows());
  }

  double head(Index layer, Index head) const {
    const double queries = queries_[static_cast<std::size_t>(layer)];
    return queries > 0 ? std::sqrt(squares_(layer, head) / queries) : 0;
  }
  /// Mean over the heads of a layer.
  double layer(Index layer) const {
    double sum = 0;
    for (Index h = 0; h < squares_.cols(); ++h) sum += head(layer, h);
    return sum / static_cast<double>(squares_.cols());
  }
  /// Mean over all heads.
  double mean() const {
    double sum = 0;
    for (Index l = 0; l < squares_.rows(); ++l) sum += layer(l);
    return sum / static_cast<double>(squares_.rows());
  }

  /// The head, or the layer, with the largest error.
  struct Worst {
    Index layer = 0, head = 0;
    double error = -1;
  };
  Worst worst_head() const {
    Worst worst;
    for (Index l = 0; l < squares_.rows(); ++l)
      for (Index h = 0; h < squares_.cols(); ++h)
        if (head(l, h) > worst.error) worst = {l, h, head(l, h)};
    return worst;
  }
  Worst worst_layer() const {
    Worst worst;
    for (Index l = 0; l < squares_.rows(); ++l)
      if (layer(l) > worst.error) worst = {l, 0, layer(l)};
    return worst;
  }

 private:
  RowMatrix<double> squares_;  // sum over queries of the square of the relative error
  std::vector<double> queries_;
};

}  // namespace pretrained
