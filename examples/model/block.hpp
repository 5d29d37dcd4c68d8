// A pre-norm block of routing attention and feed-forward: of encoders, decoders, and cross-attention.
#pragma once

#include <coterie/layer/routing_attention.hpp>
#include <string_view>

#include "modules.hpp"

namespace transformer {

/// middle = x + attention(norm(x)), y = feed_forward(middle), or y = middle where `hidden` is 0.
///
/// With a source, attention reads keys and values from its rows as they are (cross-attention): normalise them once, at
/// the end of the encoder.
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
    RowMatrix<T> d_middle, d_normed;  // scratch
  };

  Block(const coterie::RoutingAttentionConfig& config, Index hidden, Random& random)
      : attention_(config), norm_(config.model_dim) {
    if (hidden > 0) feed_forward_ = FeedForward<T>(config.model_dim, hidden, random);
  }

  Attention& attention() { return attention_; }
  const Attention& attention() const { return attention_; }
  /// Columns between the two products of the feed-forward; 0: there is none.
  Index hidden() const { return feed_forward_.hidden(); }

  /// Gradients of the right shapes, all zero.
  Gradients zero_gradients() const {
    Gradients gradients{norm_, attention_.zero_gradients(), feed_forward_};
    set_zero(gradients);
    return gradients;
  }
  static void set_zero(Gradients& gradients) {
    const auto zero = [](auto, View<T> gradient, ConstView<T>) { gradient.fill(0); };
    gradients.norm.visit("", gradients.norm, zero);
    gradients.attention.fill(0);
    if (gradients.feed_forward.hidden() > 0) gradients.feed_forward.visit("", gradients.feed_forward, zero);
  }

  /// Calls f(name, weights, gradient) for every matrix of the block; `name` is a prefix of the names.
  template <class F>
  void visit(const std::string& name, const Gradients& gradients, F&& f) {
    norm_.visit(name + ".norm", gradients.norm, f);
    if (hidden() > 0) feed_forward_.visit(name + ".feed_forward", gradients.feed_forward, f);
    coterie::visit(attention_.parameters(), gradients.attention,
                   [&](std::string_view tensor, View<T> w, ConstView<T> gradient) {
                     f(name + ".attention." + std::string(tensor), w, gradient);
                   });
  }
  /// Calls f(name, weights) for every matrix but those of the attention.
  template <class F>
  void visit_rest(const std::string& name, F&& f) {
    const auto weights = [&](std::string_view tensor, View<T> w, ConstView<T>) { f(tensor, w); };
    norm_.visit(name + ".norm", norm_, weights);
    if (hidden() > 0) feed_forward_.visit(name + ".feed_forward", feed_forward_, weights);
  }

  /// Overwrites y, which must not be what the input refers to.
  void forward(const coterie::Input<T>& input, RowMatrix<T>& y, Tape& tape, Context& context) const {
    run_in(input, y, tape, context,
           [&](ConstView<T> x, View<T> out) { attention_.forward(with_x(input, x), out, tape.attention, context); });
  }
  /// The same numbers for evaluation; the tape only lends its buffers.
  void evaluate(const coterie::Input<T>& input, RowMatrix<T>& y, Tape& tape, Context& context) const {
    run_in(input, y, tape, context,
           [&](ConstView<T> x, View<T> out) { attention_.forward(with_x(input, x), out, context); });
  }

  /// The block with attend(normed, out) as its attention, which overwrites `out`: what all passes and decoders share.
  /// Overwrites all views: normed, middle and y as x; middle_normed as x and a (tokens x hidden()) with feed-forward.
  template <class Attend>
  void run(ConstView<T> x, View<T> normed, View<T> middle, View<T> middle_normed, View<T> a, View<T> y,
           Context& context, Attend&& attend) const {
    layer_norm<T>(x, norm_, normed, context);
    const View<T> sum = hidden() > 0 ? middle : y;
    attend(ConstView<T>(normed), sum);
    for_rows(x.rows(), context, [&](Index i) {
      for (Index j = 0; j < x.cols(); ++j) sum(i, j) += x(i, j);
    });
    if (hidden() > 0) feed_forward<T>(middle, feed_forward_, middle_normed, a, y, context);
  }

  /// Undoes forward. Overwrites d_x; adds into d_source, which is as the source (empty without one), and into the
  /// gradients.
  void backward(const coterie::Input<T>& input, Tape& tape, ConstView<T> d_y, RowMatrix<T>& d_x, View<T> d_source,
                Gradients& gradients, Context& context) const {
    const Index n = input.x.rows(), d = input.x.cols();
    tape.d_middle.resize(n, d);
    if (hidden() > 0)
      feed_forward_backward<T>(tape.middle, feed_forward_, tape.middle_normed, tape.a, d_y, tape.d_middle,
                               gradients.feed_forward, context);
    else
      tape.d_middle = d_y.eigen();
    // middle = x + attention(norm(x))
    tape.d_normed.setZero(n, d);
    attention_.backward(with_x(input, tape.normed), tape.attention, tape.d_middle, {tape.d_normed, d_source},
                        gradients.attention, context);
    d_x = tape.d_middle;
    layer_norm_backward<T>(input.x, norm_, tape.d_normed, d_x, gradients.norm, context);
  }

 private:
  template <class Attend>
  void run_in(const coterie::Input<T>& input, RowMatrix<T>& y, Tape& tape, Context& context, Attend&& attend) const {
    const Index n = input.x.rows(), d = input.x.cols();
    for (RowMatrix<T>* m : {&tape.normed, &y}) m->resize(n, d);
    if (hidden() > 0) {
      for (RowMatrix<T>* m : {&tape.middle, &tape.middle_normed}) m->resize(n, d);
      tape.a.resize(n, hidden());
    }
    run(input.x, tape.normed, tape.middle, tape.middle_normed, tape.a, y, context, attend);
  }

  // What attention reads: the input with normalised rows.
  static coterie::Input<T> with_x(coterie::Input<T> input, ConstView<T> x) {
    input.x = x;
    return input;
  }

  Attention attention_;
  LayerNorm<T> norm_;
  FeedForward<T> feed_forward_;
};

}  // namespace transformer
