// The weights of a routing attention layer by name, and gradients of the same shapes.
#pragma once

#include <array>
#include <string_view>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie {

/// Weights or gradients of one layer; a tensor that the layer does not have is empty and not visited.
///
/// Shapes, in the order of visit(), with D = model_dim, H = heads of all blocks, V = kv_heads, d = head_dim, K
/// key/value heads that have keys of their own (not matching.shared_qk), G heads of the blocks with
/// matching.learned_gain, I heads of those with matching.induction; B heads of one block, whose name is a prefix:
/// local, routed, dense. A product is y = x w, head h owns the columns [h*d, (h+1)*d), and lists of heads keep the
/// order local, routed, dense:
///
///     w_q     D x H*d      queries
///     w_k     D x K*d      keys of the heads that have their own
///     w_v     D x V*d      values
///     w_o     H*d x D      output
///     b_q     1 x H*d      with config.bias
///     b_k     1 x K*d      with config.bias
///     b_v     1 x V*d      with config.bias
///     b_o     1 x D        with config.bias
///     gain    1 x G        logits are gain/sqrt(d) * q.k
///     taps    rows x d     per induction head key_taps of its block: factors of the query t positions back
///     local_distance_bias    B x (window + lookahead)   column c: distance c - lookahead; PositionKind::bias
///     local_bucket_bias      B x buckets   PositionKind::t5_buckets
///     routed_distance_bias   B x distances   column c: distance c; two-sided B x (2 * distances - 1), distance
///                            c + 1 - distances; PositionKind::bias
///     routed_bucket_bias     B x buckets   PositionKind::t5_buckets
///     dense_distance_bias, dense_bucket_bias   as the routed ones
///     local_relative_keys, local_relative_values     distances x d   rows as columns of local_distance_bias;
///                                                    PositionKind::shaw
///     routed_relative_keys, routed_relative_values   distances x d   rows as columns of routed_distance_bias
///     dense_relative_keys, dense_relative_values     distances x d   rows as columns of dense_distance_bias
///     memory_keys    memory x V*d   keys as attention reads them: beside normalised ones where those are normalised
///     memory_values  memory x V*d
template <class T>
struct Parameters {
  RowMatrix<T> w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, gain, taps;
  RowMatrix<T> local_distance_bias, local_bucket_bias, routed_distance_bias, routed_bucket_bias, dense_distance_bias,
      dense_bucket_bias;
  RowMatrix<T> local_relative_keys, local_relative_values, routed_relative_keys, routed_relative_values,
      dense_relative_keys, dense_relative_values;
  RowMatrix<T> memory_keys, memory_values;

  /// Name and member of a tensor.
  struct Tensor {
    std::string_view name;
    RowMatrix<T> Parameters::*member;
  };
  /// All tensors that a layer can have, in the order above.
  static constexpr std::array<Tensor, 24> tensors() {
    return {{{"w_q", &Parameters::w_q},
             {"w_k", &Parameters::w_k},
             {"w_v", &Parameters::w_v},
             {"w_o", &Parameters::w_o},
             {"b_q", &Parameters::b_q},
             {"b_k", &Parameters::b_k},
             {"b_v", &Parameters::b_v},
             {"b_o", &Parameters::b_o},
             {"gain", &Parameters::gain},
             {"taps", &Parameters::taps},
             {"local_distance_bias", &Parameters::local_distance_bias},
             {"local_bucket_bias", &Parameters::local_bucket_bias},
             {"routed_distance_bias", &Parameters::routed_distance_bias},
             {"routed_bucket_bias", &Parameters::routed_bucket_bias},
             {"dense_distance_bias", &Parameters::dense_distance_bias},
             {"dense_bucket_bias", &Parameters::dense_bucket_bias},
             {"local_relative_keys", &Parameters::local_relative_keys},
             {"local_relative_values", &Parameters::local_relative_values},
             {"routed_relative_keys", &Parameters::routed_relative_keys},
             {"routed_relative_values", &Parameters::routed_relative_values},
             {"dense_relative_keys", &Parameters::dense_relative_keys},
             {"dense_relative_values", &Parameters::dense_relative_values},
             {"memory_keys", &Parameters::memory_keys},
             {"memory_values", &Parameters::memory_values}}};
  }

  /// Calls f(name, View<T>) for every tensor that the layer has, in the order above.
  template <class F>
  void visit(F&& f) {
    for (const Tensor& tensor : tensors())
      if (RowMatrix<T>& m = this->*tensor.member; m.size() > 0) f(tensor.name, View<T>(m));
  }
  /// Calls f(name, ConstView<T>) for every tensor that the layer has, in the order above.
  template <class F>
  void visit(F&& f) const {
    for (const Tensor& tensor : tensors())
      if (const RowMatrix<T>& m = this->*tensor.member; m.size() > 0) f(tensor.name, ConstView<T>(m));
  }

  /// Numbers in all tensors together.
  Index size() const {
    Index sum = 0;
    for (const Tensor& tensor : tensors()) sum += (this->*tensor.member).size();
    return sum;
  }

  /// Sets every number.
  void fill(T value) {
    for (const Tensor& tensor : tensors()) (this->*tensor.member).setConstant(value);
  }
};

namespace detail {

/// Requires tensors of the same shapes, otherwise ShapeError.
template <class T>
void check_same_shapes(const char* function, const char* argument, const Parameters<T>& got,
                       const Parameters<T>& like) {
  for (const auto& tensor : Parameters<T>::tensors()) {
    const RowMatrix<T>&g = got.*tensor.member, &l = like.*tensor.member;
    if (g.rows() != l.rows() || g.cols() != l.cols())
      fail<ShapeError>(function, join(argument, ".", tensor.name).c_str(), join(l.rows(), " x ", l.cols()),
                       join(g.rows(), " x ", g.cols()));
  }
}

/// Requires that `out` shares no element with a tensor, otherwise ShapeError.
template <class T>
void check_apart(const char* function, const char* output, View<T> out, const char* argument,
                 const Parameters<T>& parameters) {
  for (const auto& tensor : Parameters<T>::tensors())
    check_no_alias<T>(function, output, out, argument, parameters.*tensor.member);
}

}  // namespace detail

/// Calls f(name, View<T> parameter, ConstView<T> gradient) for every tensor: what an optimiser needs.
/// Requires: equal shapes, otherwise ShapeError.
template <class T, class F>
void visit(Parameters<T>& parameters, const Parameters<T>& gradients, F&& f) {
  detail::check_same_shapes("visit", "gradients", gradients, parameters);
  for (const auto& tensor : Parameters<T>::tensors())
    if (RowMatrix<T>& m = parameters.*tensor.member; m.size() > 0)
      f(tensor.name, View<T>(m), ConstView<T>(gradients.*tensor.member));
}

}  // namespace coterie
