// Blocks of encoders and decoders, from the parts of transformer.hpp; to be copied and changed.
#pragma once

#include "transformer.hpp"

namespace transformer {

/// A pre-norm block: middle = x + attention(norm(x)), of its own rows or, with a source, of the source's
/// (cross-attention); y = feed_forward(middle).
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
  Gradients zero_gradients() {
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

  /// Calls f(name, weights, gradient) for every matrix of the block.
  template <class F>
  void visit(const std::string& name, const Gradients& gradients, F&& f) {
    norm_.visit(name, gradients.norm, f);
    coterie::visit(attention_.parameters(), gradients.attention, f);
    feed_forward_.visit(name, gradients.feed_forward, f);
  }

  /// Overwrites y.
  void forward(const coterie::Input<T>& input, RowMatrix<T>& y, Tape& tape, Context& context) const {
    const Index n = input.x.rows(), d = input.x.cols();
    for (RowMatrix<T>* m : {&tape.normed, &tape.middle, &tape.middle_normed, &y}) m->resize(n, d);
    tape.a.resize(n, feed_forward_.expand.cols());
    for_chunks(n, context,
               [&](const Chunk& rows) { layer_norm<T>(rows.of(input.x), norm_, rows.of(view(tape.normed))); });
    attention_.forward(normed(input, tape), tape.middle, tape.attention, context);
    // middle = x + attention(norm(x))
    tape.middle += input.x.eigen();
    feed_forward<T>(tape.middle, feed_forward_, tape.middle_normed, tape.a, y, context);
  }

  /// Undoes forward. Overwrites d_x; adds into d_source, which is as the source, and into the gradients.
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
    tape.partials.reset(n, d);
    for_chunks(n, context, [&](const Chunk& rows) {
      layer_norm_backward<T>(rows.of(input.x), norm_, rows.of(view(tape.d_normed)), rows.of(view(d_x)),
                             tape.partials.of(rows.number));
    });
    tape.partials.add_to(gradients.norm);
  }

 private:
  static coterie::Input<T> normed(const coterie::Input<T>& input, const Tape& tape) {
    return {tape.normed, input.offsets, input.source, input.source_offsets};
  }

  Attention attention_;
  LayerNorm<T> norm_;
  FeedForward<T> feed_forward_;
};

}  // namespace transformer
