// Blocks of encoders and decoders, from the parts of transformer.hpp; to be copied and changed.
#pragma once

#include "transformer.hpp"

namespace transformer {

/// y = norm(x). Overwrites y.
template <class T>
void normalise(const coterie::ConstView<T>& x, const LayerNorm<T>& norm, RowMatrix<T>& y, Context& context) {
  y.resize(x.rows(), x.cols());
  for_chunks(x.rows(), context, [&](const Chunk& rows) { layer_norm<T>(rows.of(x), norm, rows.of(view(y))); });
}

/// Undoes normalise. Adds into d_x and d_norm.
template <class T>
void normalise_backward(const coterie::ConstView<T>& x, const LayerNorm<T>& norm, const RowMatrix<T>& d_y,
                        RowMatrix<T>& d_x, LayerNorm<T>& d_norm, LayerNormPartials<T>& partials, Context& context) {
  partials.reset(x.rows(), x.cols());
  for_chunks(x.rows(), context, [&](const Chunk& rows) {
    layer_norm_backward<T>(rows.of(x), norm, rows.of(view(d_y)), rows.of(view(d_x)), partials.of(rows.number));
  });
  partials.add_to(d_norm);
}

/// A pre-norm block: middle = x + attention(norm(x)), y = feed_forward(middle). With a source, attention reads keys and
/// values from its rows as they are (cross-attention): normalise them once, at the end of the encoder.
template <class T>
class Block {
 public:
  using Attention = coterie::RoutingAttention<T>;

  struct Gradients {
    LayerNorm<T> norm;
    coterie::Parameters<T> attention;
    FeedForward<T> feed_forward;
  };

  /// What forward leaves for backward. Made once, reused every step.
  struct Tape {
    RowMatrix<T> normed, middle, middle_normed, a;
    typename Attention::Tape attention;
    RowMatrix<T> d_middle, d_normed, g, d_a;  // scratch
    LayerNormPartials<T> partials;
  };

  Block(const coterie::RoutingAttentionConfig& config, Index hidden, Random& random)
      : attention_(config), norm_(config.model_dim), feed_forward_(config.model_dim, hidden, random) {}

  Attention& attention() { return attention_; }

  /// Gradients of the right shapes, all zero.
  Gradients zero_gradients() const {
    Gradients gradients{norm_, attention_.zero_gradients(), feed_forward_};
    set_zero(gradients);
    return gradients;
  }
  static void set_zero(Gradients& gradients) {
    const auto zero = [](auto, View<T> gradient, ConstView<T>) { gradient.eigen().setZero(); };
    gradients.norm.visit("", gradients.norm, zero);
    gradients.attention.fill(0);
    gradients.feed_forward.visit("", gradients.feed_forward, zero);
  }

  /// Calls f(name, weights, gradient) for every matrix of the block; `name` stands before the names.
  template <class F>
  void visit(const std::string& name, const Gradients& gradients, F&& f) {
    norm_.visit(name + ".attention", gradients.norm, f);
    coterie::visit(attention_.parameters(), gradients.attention,
                   [&](std::string_view tensor, View<T> w, ConstView<T> gradient) {
                     f(name + ".attention." + std::string(tensor), w, gradient);
                   });
    feed_forward_.visit(name + ".feed_forward", gradients.feed_forward, f);
  }

  /// Overwrites y, which must not be what the input refers to.
  void forward(const coterie::Input<T>& input, RowMatrix<T>& y, Tape& tape, Context& context) const {
    const Index n = input.x.rows(), d = input.x.cols();
    for (RowMatrix<T>* m : {&tape.middle, &tape.middle_normed, &y}) m->resize(n, d);
    tape.a.resize(n, feed_forward_.expand.cols());
    normalise<T>(input.x, norm_, tape.normed, context);
    attention_.forward(normed(input, tape), tape.middle, tape.attention, context);
    // middle = x + attention(norm(x))
    tape.middle += input.x.eigen();
    feed_forward<T>(tape.middle, feed_forward_, tape.middle_normed, tape.a, y, context);
  }

  /// Undoes forward. Overwrites d_x; adds into d_source, which is as the source (empty without one), and into the
  /// gradients.
  void backward(const coterie::Input<T>& input, Tape& tape, ConstView<T> d_y, RowMatrix<T>& d_x, View<T> d_source,
                Gradients& gradients, Context& context) const {
    const Index n = input.x.rows(), d = input.x.cols();
    for (RowMatrix<T>* m : {&tape.d_middle, &d_x}) m->resize(n, d);
    for (RowMatrix<T>* m : {&tape.g, &tape.d_a}) m->resize(n, feed_forward_.expand.cols());
    feed_forward_backward<T>(tape.middle, feed_forward_, tape.middle_normed, tape.a, d_y, tape.g, tape.d_a,
                             tape.d_middle, gradients.feed_forward, tape.partials, context);
    // middle = x + attention(norm(x))
    tape.d_normed.setZero(n, d);
    attention_.backward(normed(input, tape), tape.attention, tape.d_middle, {tape.d_normed, d_source},
                        gradients.attention, context);
    d_x = tape.d_middle;
    normalise_backward<T>(input.x, norm_, tape.d_normed, d_x, gradients.norm, tape.partials, context);
  }

 private:
  // What attention reads: the input with normalised rows.
  static coterie::Input<T> normed(coterie::Input<T> input, const Tape& tape) {
    input.x = tape.normed;
    return input;
  }

  Attention attention_;
  LayerNorm<T> norm_;
  FeedForward<T> feed_forward_;
};

}  // namespace transformer
