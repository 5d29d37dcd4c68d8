// The modules of a transformer around attention: layer norm, feed-forward, embedding, read-out.
//
// Every backward function follows its forward function, takes the same arguments in the same order, and adds into
// the gradients of weights. A row of an output depends on that row of the input alone, bit for bit: one token gives the
// same numbers as many. Numbers do not depend on the number of threads either.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/core/context.hpp>
#include <coterie/kernel/normalise.hpp>
#include <coterie/kernel/product.hpp>
#include <cstdint>
#include <span>
#include <string>

#include "random.hpp"

namespace transformer {

using coterie::ConstView;
using coterie::Context;
using coterie::view;
using coterie::View;

// -------------------------------------------------------------------------------------------------------------- rows

/// Rows of a task; where rows are cut does not depend on the number of workers.
inline constexpr Index task_rows = 128;

/// Calls f(i) for every row.
template <class F>
void for_rows(Index rows, Context& context, F&& f) {
  context.for_chunks(rows, task_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) f(i);
  });
}

/// sums(0, j) += the sum over i of term(i, j). Rows are summed task by task.
template <class T, class Term>
void add_column_sums(Index rows, View<T> sums, Context& context, Term&& term) {
  const Index tasks = (rows + task_rows - 1) / task_rows;
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<T> partial = arena.template matrix<T>(tasks, sums.cols());
  context.for_chunks(rows, task_rows, [&](Index first, Index last, Index) {
    T* const sum = partial.row(first / task_rows);
    std::fill_n(sum, sums.cols(), T(0));
    for (Index i = first; i < last; ++i)
      for (Index j = 0; j < sums.cols(); ++j) sum[j] += term(i, j);
  });
  for (Index task = 0; task < tasks; ++task)
    for (Index j = 0; j < sums.cols(); ++j) sums(0, j) += partial(task, j);
}

// -------------------------------------------------------------------------------------------------------- layer norm

/// y = (x - mean) / deviation * scale + shift, row by row.
template <class T>
struct LayerNorm {
  RowMatrix<T> scale, shift;  // 1 x d

  LayerNorm() = default;
  explicit LayerNorm(Index d) : scale(RowMatrix<T>::Ones(1, d)), shift(RowMatrix<T>::Zero(1, d)) {}

  template <class F>
  void visit(const std::string& name, const LayerNorm& gradient, F&& f) {
    f(name + ".scale", View<T>(scale), ConstView<T>(gradient.scale));
    f(name + ".shift", View<T>(shift), ConstView<T>(gradient.shift));
  }
};

/// Overwrites y.
template <class T>
void layer_norm(ConstView<T> x, const LayerNorm<T>& norm, View<T> y, Context& context) {
  coterie::normalise_rows<T>(x, y, {}, x.cols(), context);
  for_rows(x.rows(), context, [&](Index i) {
    for (Index j = 0; j < x.cols(); ++j) y(i, j) = y(i, j) * norm.scale(0, j) + norm.shift(0, j);
  });
}

/// Undoes layer_norm. Adds into d_x and d_norm.
template <class T>
void layer_norm_backward(ConstView<T> x, const LayerNorm<T>& norm, ConstView<T> d_y, View<T> d_x, LayerNorm<T>& d_norm,
                         Context& context) {
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<T> unit = arena.template matrix<T>(x.rows(), x.cols());
  const View<T> d_unit = arena.template matrix<T>(x.rows(), x.cols());
  const View<T> inverse = arena.template matrix<T>(x.rows(), 1);
  coterie::normalise_rows<T>(x, unit, inverse, x.cols(), context);
  // y = unit * scale + shift
  add_column_sums<T>(x.rows(), d_norm.scale, context, [&](Index i, Index j) { return d_y(i, j) * unit(i, j); });
  add_column_sums<T>(x.rows(), d_norm.shift, context, [&](Index i, Index j) { return d_y(i, j); });
  for_rows(x.rows(), context, [&](Index i) {
    for (Index j = 0; j < x.cols(); ++j) d_unit(i, j) = d_y(i, j) * norm.scale(0, j);
  });
  coterie::normalise_rows_backward<T>(unit, inverse, d_unit, d_x, x.cols(), context);
}

// ------------------------------------------------------------------------------------------------------ feed-forward

/// y = x + gelu(norm(x) expand + expand_bias) contract + contract_bias.
template <class T>
struct FeedForward {
  LayerNorm<T> norm;
  RowMatrix<T> expand, expand_bias;      // d x hidden, 1 x hidden
  RowMatrix<T> contract, contract_bias;  // hidden x d, 1 x d

  FeedForward() = default;
  FeedForward(Index d, Index hidden, Random& random)
      : norm(d),
        expand(linear_weights<T>(d, hidden, random)),
        expand_bias(RowMatrix<T>::Zero(1, hidden)),
        contract(linear_weights<T>(hidden, d, random)),
        contract_bias(RowMatrix<T>::Zero(1, d)) {}

  Index hidden() const { return expand.cols(); }

  template <class F>
  void visit(const std::string& name, const FeedForward& gradient, F&& f) {
    norm.visit(name + ".norm", gradient.norm, f);
    f(name + ".expand", View<T>(expand), ConstView<T>(gradient.expand));
    f(name + ".expand_bias", View<T>(expand_bias), ConstView<T>(gradient.expand_bias));
    f(name + ".contract", View<T>(contract), ConstView<T>(gradient.contract));
    f(name + ".contract_bias", View<T>(contract_bias), ConstView<T>(gradient.contract_bias));
  }
};

// gelu(a) = a s(a) with s(a) = 1 / (1 + exp(-2 c (a + b a^3))), which is a/2 (1 + tanh(c (a + b a^3))).
inline constexpr double gelu_b = 0.044715, gelu_c = 0.7978845608028654;

/// s of gelu.
template <class T>
T gelu_share(T a) {
  return 1 / (1 + std::exp(static_cast<T>(-2 * gelu_c) * (a + static_cast<T>(gelu_b) * a * a * a)));
}

/// Keeps `normed` (as x) and `a` (tokens x hidden) for backward. Overwrites normed, a and y.
template <class T>
void feed_forward(ConstView<T> x, const FeedForward<T>& w, View<T> normed, View<T> a, View<T> y, Context& context) {
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<T> g = arena.template matrix<T>(a.rows(), a.cols());
  layer_norm<T>(x, w.norm, normed, context);
  // a = norm(x) expand + expand_bias
  coterie::product<T>(normed, w.expand, a, context);
  // g = gelu(a)
  for_rows(x.rows(), context, [&](Index i) {
    for (Index j = 0; j < a.cols(); ++j) {
      a(i, j) += w.expand_bias(0, j);
      g(i, j) = a(i, j) * gelu_share(a(i, j));
    }
  });
  // y = x + g contract + contract_bias
  coterie::product<T>(g, w.contract, y, context);
  for_rows(x.rows(), context, [&](Index i) {
    for (Index j = 0; j < x.cols(); ++j) y(i, j) += x(i, j) + w.contract_bias(0, j);
  });
}

/// Undoes feed_forward. Overwrites d_x, adds into d_w.
template <class T>
void feed_forward_backward(ConstView<T> x, const FeedForward<T>& w, ConstView<T> normed, ConstView<T> a,
                           ConstView<T> d_y, View<T> d_x, FeedForward<T>& d_w, Context& context) {
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<T> g = arena.template matrix<T>(a.rows(), a.cols()), d_a = arena.template matrix<T>(a.rows(), a.cols());
  const View<T> d_normed = arena.template matrix<T>(x.rows(), x.cols());
  // y = x + g contract + contract_bias
  coterie::product_input_gradient<T>(d_y, w.contract, d_a, context);
  add_column_sums<T>(x.rows(), d_w.contract_bias, context, [&](Index i, Index j) { return d_y(i, j); });
  // g = a s(a): d_a = d_g (s + a s (1 - s) 2 c (1 + 3 b a^2))
  for_rows(x.rows(), context, [&](Index i) {
    for (Index j = 0; j < a.cols(); ++j) {
      const T v = a(i, j), s = gelu_share(v);
      const T slope = static_cast<T>(2 * gelu_c) * (1 + static_cast<T>(3 * gelu_b) * v * v);
      g(i, j) = v * s;
      d_a(i, j) *= s + v * s * (1 - s) * slope;
    }
  });
  coterie::product_weight_gradient<T>(g, d_y, d_w.contract, context);
  // a = norm(x) expand + expand_bias
  coterie::product_input_gradient<T>(d_a, w.expand, d_normed, context);
  coterie::product_weight_gradient<T>(normed, d_a, d_w.expand, context);
  add_column_sums<T>(x.rows(), d_w.expand_bias, context, [&](Index i, Index j) { return d_a(i, j); });
  d_x.eigen() = d_y.eigen();
  layer_norm_backward<T>(x, w.norm, d_normed, d_x, d_w.norm, context);
}

// --------------------------------------------------------------------------------------------------------- embedding

/// The row x of a token: E[token], plus E[previous] on the upper half of the channels; a negative `previous`: there is
/// none. Overwrites x.
template <class T>
void embed_token(std::int32_t token, std::int32_t previous, const RowMatrix<T>& embedding, View<T> x) {
  const Index upper = embedding.cols() - embedding.cols() / 2;
  x.eigen().row(0) = embedding.row(token);
  if (previous >= 0) x.eigen().row(0).tail(upper) += embedding.row(previous).tail(upper);
}

/// x_t = E[token_t], plus E[token_(t-1)] on the upper half of the channels, except at the start of a sequence ("smear":
/// the model sees pairs of neighbours from the first layer on). Overwrites x.
template <class T>
void embed(std::span<const std::int32_t> tokens, std::span<const Index> offsets, const RowMatrix<T>& embedding,
           View<T> x) {
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index t = offsets[s]; t < offsets[s + 1]; ++t) {
      const std::int32_t previous = t > offsets[s] ? tokens[static_cast<std::size_t>(t - 1)] : -1;
      embed_token<T>(tokens[static_cast<std::size_t>(t)], previous, embedding, x.rows(t, 1));
    }
}

/// Undoes embed. Adds into d_embedding.
template <class T>
void embed_backward(std::span<const std::int32_t> tokens, std::span<const Index> offsets, RowMatrix<T>& d_embedding,
                    ConstView<T> d_x) {
  const Index half = d_embedding.cols() / 2, upper = d_embedding.cols() - half;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index t = offsets[s]; t < offsets[s + 1]; ++t) {
      const auto d_x_t = d_x.eigen().row(t);
      d_embedding.row(tokens[static_cast<std::size_t>(t)]) += d_x_t;
      if (t > offsets[s]) d_embedding.row(tokens[static_cast<std::size_t>(t - 1)]).tail(upper) += d_x_t.tail(upper);
    }
}

// ---------------------------------------------------------------------------------------------------------- read-out

/// p = softmax(norm(x) weights) and loss_t = -log p_t[target_t].
template <class T>
struct ReadOut {
  LayerNorm<T> norm;
  RowMatrix<T> weights;  // d x vocabulary

  ReadOut() = default;
  ReadOut(Index d, Index vocabulary, Random& random) : norm(d), weights(linear_weights<T>(d, vocabulary, random)) {}

  template <class F>
  void visit(const std::string& name, const ReadOut& gradient, F&& f) {
    norm.visit(name + ".norm", gradient.norm, f);
    f(name + ".weights", View<T>(weights), ConstView<T>(gradient.weights));
  }
};

/// Softmax of a row in place, and -log p[target]; 0 for a negative target.
template <class T>
T softmax_row(T* p, Index count, Index target) {
  const T highest = *std::max_element(p, p + count), logit = target < 0 ? T(0) : p[target];
  T sum = 0;
  for (Index j = 0; j < count; ++j) sum += p[j] = std::exp(p[j] - highest);
  for (Index j = 0; j < count; ++j) p[j] /= sum;
  // loss = log(sum exp(logits)) - logits[target]
  return target < 0 ? T(0) : std::log(sum) + highest - logit;
}

/// A row whose target is negative has loss 0. Overwrites normed, p and losses; without targets no losses.
template <class T>
void read_out(ConstView<T> x, const ReadOut<T>& w, std::span<const std::int32_t> targets, View<T> normed, View<T> p,
              std::span<T> losses, Context& context) {
  layer_norm<T>(x, w.norm, normed, context);
  // logits = norm(x) weights
  coterie::product<T>(normed, w.weights, p, context);
  for_rows(x.rows(), context, [&](Index i) {
    const std::size_t t = static_cast<std::size_t>(i);
    const T loss = softmax_row(p.row(i), p.cols(), targets.empty() ? -1 : targets[t]);
    if (!targets.empty()) losses[t] = loss;
  });
}

/// Undoes read_out for the mean of the losses. `p` becomes the gradient of the logits. Overwrites d_x, adds into d_w.
template <class T>
void read_out_backward(ConstView<T> x, const ReadOut<T>& w, std::span<const std::int32_t> targets, ConstView<T> normed,
                       View<T> p, View<T> d_x, ReadOut<T>& d_w, Context& context) {
  const auto counted = std::count_if(targets.begin(), targets.end(), [](std::int32_t target) { return target >= 0; });
  const T share = 1 / static_cast<T>(std::max<std::ptrdiff_t>(counted, 1));
  // loss = log(sum exp(logits)) - logits[target]: d_logits = p - [target]
  for_rows(x.rows(), context, [&](Index i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    for (Index j = 0; j < p.cols(); ++j) p(i, j) *= target < 0 ? T(0) : share;
    if (target >= 0) p(i, target) -= share;
  });
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<T> d_normed = arena.template matrix<T>(x.rows(), x.cols());
  // logits = norm(x) weights
  coterie::product_input_gradient<T>(p, w.weights, d_normed, context);
  coterie::product_weight_gradient<T>(normed, p, d_w.weights, context);
  d_x.fill(0);
  layer_norm_backward<T>(x, w.norm, d_normed, d_x, d_w.norm, context);
}

}  // namespace transformer
