// A pass of a block of heads, forward and backward: project, normalise, route, attend, output.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "coterie/attention/attention.hpp"
#include "coterie/kernel/convolution.hpp"
#include "coterie/kernel/normalise.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/kernel/rows.hpp"
#include "coterie/layer/input.hpp"
#include "coterie/layer/layer_state.hpp"
#include "coterie/layer/positions.hpp"
#include "coterie/layer/routing.hpp"
#include "coterie/layer/tape.hpp"

namespace coterie::detail {

/// Gradients that a backward pass adds into.
template <class T>
struct PassGradients {
  View<T> d_x, d_source;  ///< d_source: of the rows that keys and values are made from; d_x itself without a source
  Parameters<T>& parameters;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// One pass of a block of heads over one input. Start reading at run() and backward(), which order the steps.
///
/// Each step of backward follows the step of forward that it undoes, and names its line. A decoder takes the same
/// steps, with its own convolution and attention.
/// Allocates: nothing once the workspace, the plans and the tape have grown to the sizes in use.
template <class T>
class HeadsPass {
 public:
  HeadsPass(const LayerState<T>& layer, const HeadBlock& block, const CheckedInput<T>& in, Context& context)
      : layer_(layer), block_(block), in_(in), context_(context), scratch_(context.workspace().shared()) {}

  /// y (+)= the block's share of the output, for evaluation. The first block of heads overwrites y, later ones add.
  void forward(View<T> y, HeadsPlans& plans);
  /// The same for training: with dropout, and a tape for backward.
  void forward(View<T> y, HeadsTape<T>& tape);
  /// The same for evaluation, keeping matrices and plans on the tape.
  void prefill(View<T> y, HeadsTape<T>& tape);
  /// The steps before attention, into rows of the caller: the rows that attention reads. Not of induction heads.
  void prepare(View<T> q, View<T> k, View<T> v);
  /// Undoes forward: adds into the gradients of the input and of the parameters.
  void backward(ConstView<T> d_y, const HeadsTape<T>& tape, const PassGradients<T>& gradients);

  // The steps of forward.
  void take_matrices(Arena& arena);
  void project();
  void convolve();
  void normalise();
  void route(HeadsPlans& plans);
  void rotate();
  void attend(const HeadsPlans& plans, AttentionTape<T>* tape);
  void output(View<T> y) { output(m_.out, y); }
  void output(ConstView<T> out, View<T> y);

  /// The matrices so far.
  const HeadsMatrices<T>& matrices() const { return m_; }
  const CheckedInput<T>& input() const { return in_; }
  /// The first step of route(): labels, and members of clusters where a token can be in several.
  void assign(HeadsPlans& plans);
  /// Settings of attention, with dropout in training; the scales are in scratch.
  AttentionConfig attention_config(bool training);
  /// Terms of attention: tables by distance, in scratch, and memory; or memory alone.
  AttentionTerms<T> attention_terms();
  AttentionTerms<T> memory_terms() const;

 private:
  // Gradients of the matrices of the same names; a gradient has no columns until something is added into it.
  struct MatrixGradients {
    View<T> out, attended_q, attended_k, projected_v, routed_q, normalised_q, normalised_k, projected_q, projected_k;
    View<T> spare;  // memory of the shape of the queries that is free for reuse
  };

  void run(View<T> y, HeadsPlans& plans, AttentionTape<T>* tape);
  void take_matrices(HeadsTape<T>& tape);
  std::span<const double> logit_scales();

  // The steps of backward, in their order.
  void output_backward(ConstView<T> d_y);
  void attend_backward(const HeadsTape<T>& tape);
  void gain_backward(std::span<const double> d_scales);
  void rotate_backward();
  void route_backward(const HeadsPlans& plans);
  void normalise_backward();
  void convolve_backward();
  void project_backward();
  void product_backward(ConstView<T> x, ConstView<T> d_product, View<T> d_input, RowMatrix<T> Parameters<T>::*w,
                        RowMatrix<T> Parameters<T>::*b, Index first);

  View<T> zeros(Index rows, Index cols);
  View<T> zero_queries();

  // The values that attention reads: of induction heads, key j carries the value of row j + 1.
  View<T> carried(View<T> v) const { return v.rows(block_.induction ? 1 : 0, in_.source.rows()); }
  ConstView<T> columns(const RowMatrix<T>& m, Index first, Index count) const { return view(m).columns(first, count); }

  const LayerState<T>& layer_;
  const HeadBlock& block_;
  const CheckedInput<T>& in_;
  Context& context_;
  Arena& scratch_;
  HeadsMatrices<T> m_;
  MatrixGradients d_;
  const PassGradients<T>* gradients_ = nullptr;  // during backward
};

template <class T>
void HeadsPass<T>::forward(View<T> y, HeadsPlans& plans) {
  Arena::Scope scope(scratch_);
  take_matrices(scratch_);
  run(y, plans, nullptr);
}

template <class T>
void HeadsPass<T>::forward(View<T> y, HeadsTape<T>& tape) {
  Arena::Scope scope(scratch_);
  take_matrices(tape);
  run(y, tape.plans, &tape.attention);
}

template <class T>
void HeadsPass<T>::prefill(View<T> y, HeadsTape<T>& tape) {
  Arena::Scope scope(scratch_);
  take_matrices(tape);
  run(y, tape.plans, nullptr);
}

template <class T>
void HeadsPass<T>::prepare(View<T> q, View<T> k, View<T> v) {
  Arena::Scope scope(scratch_);
  take_matrices(scratch_);
  project();
  convolve();
  normalise();
  rotate();
  copy_rows<T>(q, m_.attended_q, context_);
  copy_rows<T>(k, m_.attended_k, context_);
  copy_rows<T>(v, m_.projected_v, context_);
}

// Forward, line by line.
template <class T>
void HeadsPass<T>::run(View<T> y, HeadsPlans& plans, AttentionTape<T>* tape) {
  project();
  convolve();
  normalise();
  route(plans);
  rotate();
  attend(plans, tape);
  output(y);
}

// The same lines from the last to the first.
template <class T>
void HeadsPass<T>::backward(ConstView<T> d_y, const HeadsTape<T>& tape, const PassGradients<T>& gradients) {
  Arena::Scope scope(scratch_);
  m_ = tape.matrices;
  d_ = {};
  gradients_ = &gradients;
  output_backward(d_y);
  attend_backward(tape);
  rotate_backward();
  route_backward(tape.plans);
  normalise_backward();
  convolve_backward();
  project_backward();
}

template <class T>
void HeadsPass<T>::take_matrices(Arena& arena) {
  m_ = HeadsMatrices<T>(block_, in_.x.rows(), in_.source.rows(), arena);
}

template <class T>
void HeadsPass<T>::take_matrices(HeadsTape<T>& tape) {
  tape.arena.clear();
  tape.arena.reserve(HeadsMatrices<T>::bytes(block_, in_.x.rows(), in_.source.rows()));
  take_matrices(tape.arena);
  tape.matrices = m_;
}

template <class T>
void HeadsPass<T>::project() {
  const Parameters<T>& p = layer_.parameters;
  const auto product_of = [&](ConstView<T> x, const RowMatrix<T>& w, const RowMatrix<T>& b, Index first, View<T> to) {
    product<T>(x, columns(w, first, to.cols()), to, context_);
    if (layer_.config.bias) add_bias(to, b.data() + first, context_);
  };
  // q = x w_q + b_q
  product_of(in_.x, p.w_q, p.b_q, block_.first_col(), m_.projected_q);
  // k = source w_k + b_k
  if (!block_.shared) product_of(in_.source, p.w_k, p.b_k, block_.key_first_col(), m_.projected_k);
  // v = source w_v + b_v; the last key of induction heads has no next value: it carries zeros, and no query sees it
  product_of(in_.source, p.w_v, p.b_v, block_.kv_first_col(), m_.projected_v.rows(0, in_.source.rows()));
  if (block_.induction) m_.projected_v.rows(in_.source.rows(), 1).fill(0);
}

template <class T>
void HeadsPass<T>::project_backward() {
  using P = Parameters<T>;
  const View<T> d_x = gradients_->d_x, d_source = gradients_->d_source;
  // q = x w_q + b_q
  product_backward(in_.x, d_.projected_q, d_x, &P::w_q, &P::b_q, block_.first_col());
  // k = source w_k + b_k
  if (!block_.shared) product_backward(in_.source, d_.projected_k, d_source, &P::w_k, &P::b_k, block_.key_first_col());
  // v = source w_v + b_v
  const View<T> d_v = d_.projected_v.rows(0, in_.source.rows());
  product_backward(in_.source, d_v, d_source, &P::w_v, &P::b_v, block_.kv_first_col());
}

// Undoes product = x w + b, where w and b are columns of the parameters from `first` on.
template <class T>
void HeadsPass<T>::product_backward(ConstView<T> x, ConstView<T> d_product, View<T> d_input,
                                    RowMatrix<T> Parameters<T>::*w, RowMatrix<T> Parameters<T>::*b, Index first) {
  Parameters<T>& d_parameters = gradients_->parameters;
  product_weight_gradient<T>(x, d_product, view(d_parameters.*w).columns(first, d_product.cols()), context_);
  product_input_gradient<T>(d_product, columns(layer_.parameters.*w, first, d_product.cols()), d_input, context_, true);
  if (layer_.config.bias) add_bias_backward(d_product, (d_parameters.*b).data() + first, context_);
}

template <class T>
void HeadsPass<T>::convolve() {
  // c = convolve(q), where normalised_q will be
  if (block_.taps > 0)
    detail::convolve<T>(m_.projected_q, view(layer_.parameters.taps).rows(block_.taps_first, block_.taps_rows()),
                        block_.taps, in_.positions, m_.normalised_q, context_);
}

template <class T>
void HeadsPass<T>::convolve_backward() {
  // c = convolve(q): projected_q's gradient is so far that of c
  if (block_.taps == 0) return;
  const View<T> d_q = d_.normalised_q;  // its memory is free by now
  detail::convolve_backward<T>(m_.projected_q, view(layer_.parameters.taps).rows(block_.taps_first, block_.taps_rows()),
                               block_.taps, in_.positions, d_.projected_q, d_q,
                               view(gradients_->parameters.taps).rows(block_.taps_first, block_.taps_rows()), context_);
  d_.projected_q = d_q;
}

template <class T>
void HeadsPass<T>::normalise() {
  const Index d = block_.head_dim;
  // normalised_q = normalise(q), or normalise(c) in place
  if (block_.normalises_queries())
    normalise_rows<T>(block_.taps > 0 ? m_.normalised_q : m_.projected_q, m_.normalised_q, m_.q_inverse_deviation, d,
                      context_, block_.normalisation);
  // k = normalise(k)
  if (block_.normalises_keys())
    normalise_rows<T>(m_.projected_k, m_.projected_k, m_.k_inverse_deviation, d, context_, block_.normalisation);
  // routed_q = sum of normalised_q over the heads of a key/value head
  if (block_.sums_queries()) sum_queries<T>(block_, m_.normalised_q, m_.routed_q, context_);
}

template <class T>
void HeadsPass<T>::normalise_backward() {
  const Index d = block_.head_dim;
  // routed_q = sum of normalised_q
  if (d_.routed_q.cols() > 0)
    sum_queries_backward<T>(block_, m_.normalised_q, d_.routed_q,
                            block_.normalises_queries() ? d_.normalised_q : d_.projected_q, context_);
  // normalised_q = normalise(q), or normalise(c)
  if (d_.normalised_q.cols() > 0) {
    if (d_.projected_q.cols() == 0) d_.projected_q = zero_queries();
    normalise_rows_backward<T>(m_.normalised_q, m_.q_inverse_deviation, d_.normalised_q, d_.projected_q, d, context_,
                               block_.normalisation);
  }
  // k = normalise(k)
  if (d_.normalised_k.cols() > 0) {
    d_.projected_k = zeros(d_.normalised_k.rows(), d_.normalised_k.cols());
    normalise_rows_backward<T>(m_.projected_k, m_.k_inverse_deviation, d_.normalised_k, d_.projected_k, d, context_,
                               block_.normalisation);
  }
}

template <class T>
void HeadsPass<T>::route(HeadsPlans& plans) {
  HeadsRouting<T>(layer_, block_, in_, m_, context_).build_plans(plans);
}

template <class T>
void HeadsPass<T>::assign(HeadsPlans& plans) {
  HeadsRouting<T>(layer_, block_, in_, m_, context_).assign(plans);
}

// Adds the gradient of the commitment loss; routing itself passes none.
template <class T>
void HeadsPass<T>::route_backward(const HeadsPlans& plans) {
  if (!(block_.commitment > 0)) return;
  View<T>* d_rows = block_.normalises_queries() ? &d_.normalised_q : &d_.projected_q;
  if (block_.sums_queries()) d_rows = &d_.routed_q;
  if (d_rows->cols() == 0)
    *d_rows = block_.sums_queries() ? zeros(m_.routed_q.rows(), m_.routed_q.cols()) : zero_queries();
  rows_commitment<T>(layer_.routers, router_queries(block_, m_), plans.query_labels, *d_rows, context_);
  if (!block_.shared)
    rows_commitment<T>(layer_.routers, router_keys(block_, m_), plans.key_labels(),
                       block_.normalises_keys() ? d_.normalised_k : d_.projected_k, context_);
}

template <class T>
void HeadsPass<T>::rotate() {
  if (block_.positions != PositionKind::rotary) return;
  const auto turn = [&](View<T> from, View<T> to, Index heads, std::span<const std::int32_t> positions) {
    if (to.data() != from.data()) copy_rows<T>(to, from, context_);
    layer_.rotary_of(block_).forward(to, heads, positions, context_);
  };
  // attended_q = R(position) (normalised_q or projected_q), attended_k likewise; rows that are both turn once
  turn(block_.logits == Logits::normalised ? m_.normalised_q : m_.projected_q, m_.attended_q, block_.count,
       in_.positions);
  if (!block_.attends_same_rows())
    turn(block_.shared ? m_.normalised_q : m_.projected_k, m_.attended_k, block_.kv_count, in_.key_positions);
}

template <class T>
void HeadsPass<T>::rotate_backward() {
  // attended = R(position) rows
  if (block_.positions == PositionKind::rotary) {
    layer_.rotary_of(block_).backward(d_.attended_q, block_.count, in_.positions, context_);
    layer_.rotary_of(block_).backward(d_.attended_k, block_.kv_count, in_.key_positions, context_);
  }
  // rows = normalised_q or projected_q, for keys also projected_k
  (block_.logits == Logits::normalised ? d_.normalised_q : d_.projected_q) = d_.attended_q;
  if (block_.attends_same_rows()) {
    add_rows<T>(d_.attended_q, d_.attended_k, context_);
    d_.spare = d_.attended_k;
  } else if (block_.shared) {
    d_.normalised_q = d_.attended_k;
  } else {
    (block_.normalises_keys() ? d_.normalised_k : d_.projected_k) = d_.attended_k;
  }
}

template <class T>
void HeadsPass<T>::attend(const HeadsPlans& plans, AttentionTape<T>* tape) {
  // out = attention(q, k, v)
  const ConstView<T> q = m_.attended_q, k = m_.attended_k, v = carried(m_.projected_v);
  const AttentionConfig config = attention_config(tape != nullptr);
  const AttentionTerms<T> terms = attention_terms();
  if (tape)
    attention_forward(Plans(plans.used()), q, k, v, m_.out, *tape, config, context_, terms);
  else
    attention_forward(Plans(plans.used()), q, k, v, m_.out, config, context_, terms);
}

template <class T>
void HeadsPass<T>::attend_backward(const HeadsTape<T>& tape) {
  // out = attention(q, k, v)
  const Index kv_cols = block_.kv_cols();
  d_.attended_q = zeros(in_.x.rows(), block_.cols());
  d_.attended_k = zeros(in_.source.rows(), kv_cols);
  d_.projected_v = zeros(m_.projected_v.rows(), kv_cols);
  Parameters<T>& d_parameters = gradients_->parameters;
  const AttentionConfig config = attention_config(true);
  const AttentionTerms<T> terms = attention_terms();
  AttentionTermGradients<T> d_terms = position_term_gradients(terms, d_parameters, block_, scratch_);
  if (block_.learned_gain) {
    d_terms.d_scales = {scratch_.template take<double>(block_.count), static_cast<std::size_t>(block_.count)};
    std::fill(d_terms.d_scales.begin(), d_terms.d_scales.end(), 0.0);
  }
  if (layer_.config.memory > 0) {
    d_terms.d_memory_keys = view(d_parameters.memory_keys).columns(block_.kv_first_col(), kv_cols);
    d_terms.d_memory_values = view(d_parameters.memory_values).columns(block_.kv_first_col(), kv_cols);
  }
  const ConstView<T> q = m_.attended_q, k = m_.attended_k, v = carried(m_.projected_v);
  attention_backward(Plans(tape.plans.used()), q, k, v, ConstView<T>(m_.out), tape.attention, ConstView<T>(d_.out),
                     d_.attended_q, d_.attended_k, carried(d_.projected_v), config, context_, terms, d_terms);
  position_terms_backward(terms, d_terms.d_bias, d_parameters, block_);
  gain_backward(d_terms.d_scales);
}

template <class T>
void HeadsPass<T>::output(ConstView<T> out, View<T> y) {
  // y (+)= out w_o
  product<T>(out, view(layer_.parameters.w_o).rows(block_.first_col(), block_.cols()), y, context_, block_.first > 0);
}

template <class T>
void HeadsPass<T>::output_backward(ConstView<T> d_y) {
  // y += out w_o
  const Index first = block_.first_col(), cols = block_.cols();
  d_.out = scratch_.template matrix<T>(in_.x.rows(), cols);
  product_weight_gradient<T>(m_.out, d_y, view(gradients_->parameters.w_o).rows(first, cols), context_);
  product_input_gradient<T>(d_y, view(layer_.parameters.w_o).rows(first, cols), d_.out, context_);
}

template <class T>
AttentionConfig HeadsPass<T>::attention_config(bool training) {
  AttentionConfig config;
  config.heads = block_.count;
  config.kv_heads = block_.kv_count;
  config.scales = logit_scales();
  config.soft_cap = layer_.config.soft_cap;
  config.mean_epsilon = block_.mean_epsilon;
  if (training) {
    config.dropout = layer_.config.dropout;
    config.dropout_seed =
        random_bits(layer_.config.seed, static_cast<std::uint64_t>(LayerStream::dropout), block_.dropout_stream);
    config.dropout_step = in_.input.step;
  }
  return config;
}

// Logit scales, in scratch; empty where the gain is always 1.
template <class T>
std::span<const double> HeadsPass<T>::logit_scales() {
  if (!block_.learned_gain && block_.gain == 1) return {};
  double* const scales = scratch_.template take<double>(block_.count);
  for (Index h = 0; h < block_.count; ++h) {
    const double gain =
        block_.learned_gain ? static_cast<double>(layer_.parameters.gain(0, block_.gain_first + h)) : block_.gain;
    // scale = gain / sqrt(d)
    scales[h] = gain / std::sqrt(static_cast<double>(block_.head_dim));
  }
  return {scales, static_cast<std::size_t>(block_.count)};
}

template <class T>
void HeadsPass<T>::gain_backward(std::span<const double> d_scales) {
  // scale = gain / sqrt(d)
  for (Index h = 0; h < block_.count && block_.learned_gain; ++h)
    gradients_->parameters.gain(0, block_.gain_first + h) +=
        static_cast<T>(d_scales[static_cast<std::size_t>(h)] / std::sqrt(static_cast<double>(block_.head_dim)));
}

template <class T>
AttentionTerms<T> HeadsPass<T>::attention_terms() {
  AttentionTerms<T> terms = position_terms(layer_.config, layer_.parameters, block_, in_.key_positions, scratch_);
  const AttentionTerms<T> memory = memory_terms();
  terms.memory_keys = memory.memory_keys;
  terms.memory_values = memory.memory_values;
  return terms;
}

template <class T>
AttentionTerms<T> HeadsPass<T>::memory_terms() const {
  AttentionTerms<T> terms;
  if (layer_.config.memory == 0) return terms;
  terms.memory_keys = columns(layer_.parameters.memory_keys, block_.kv_first_col(), block_.kv_cols());
  terms.memory_values = columns(layer_.parameters.memory_values, block_.kv_first_col(), block_.kv_cols());
  return terms;
}

template <class T>
View<T> HeadsPass<T>::zeros(Index rows, Index cols) {
  const View<T> m = scratch_.template matrix<T>(rows, cols);
  fill_rows(m, T(0), context_);
  return m;
}

// Zeros of the shape of the queries.
template <class T>
View<T> HeadsPass<T>::zero_queries() {
  if (d_.spare.cols() == 0) return zeros(in_.x.rows(), block_.cols());
  const View<T> m = d_.spare;
  d_.spare = {};
  fill_rows(m, T(0), context_);
  return m;
}

}  // namespace COTERIE_FLAGS_NAMESPACE

// As for kernels (dispatch.hpp): with COTERIE_EXTERN_HEADS a file leaves passes to another one, which defines
// COTERIE_INSTANTIATE_HEADS.
#if defined(COTERIE_INSTANTIATE_HEADS)
template class HeadsPass<float>;
template class HeadsPass<double>;
#elif defined(COTERIE_EXTERN_HEADS)
extern template class HeadsPass<float>;
extern template class HeadsPass<double>;
#endif

}  // namespace coterie::detail
