// A small transformer around coterie::RoutingAttention, to be copied and changed: embedding with token smear, layer norm,
// feed-forward, cross-entropy, AdamW, and a model of pre-norm blocks. Needs nothing but coterie and Eigen.
//
// Every backward function stands below its forward function, takes the same arguments in the same order, and adds into
// the gradients. Work is cut into rows or tiles of a fixed size, so the numbers do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/coterie.hpp>
#include <cstdint>
#include <locale>
#include <numbers>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace transformer {

using coterie::ConstView;
using coterie::Context;
using coterie::Index;
using coterie::RowMatrix;
using coterie::view;
using coterie::View;

/// Random numbers that are the same with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  /// Uniform in {0, ..., count - 1}.
  Index below(Index count) { return std::min(static_cast<Index>(uniform() * static_cast<double>(count)), count - 1); }
  /// Puts elements into a random order.
  template <class Element>
  void shuffle(std::vector<Element>& elements) {
    for (std::size_t i = elements.size(); i > 1; --i)
      std::swap(elements[i - 1], elements[static_cast<std::size_t>(below(static_cast<Index>(i)))]);
  }
  /// Standard normal, by Box and Muller.
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

  /// Where the stream stands, as text.
  std::string state() const {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << engine_;
    return text.str();
  }
  /// Goes on from there; returns whether that was a state, and changes nothing if not.
  bool restore(const std::string& state) {
    std::istringstream text(state);
    text.imbue(std::locale::classic());
    std::mt19937_64 engine;
    if (!(text >> engine) || !(text >> std::ws).eof()) return false;
    engine_ = engine;
    return true;
  }

 private:
  std::mt19937_64 engine_;
};

/// A matrix of the given size with every element drawn from `draw`.
template <class T, class Draw>
RowMatrix<T> random_matrix(Index rows, Index cols, Draw&& draw) {
  RowMatrix<T> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(draw());
  return m;
}

/// Weights x in -> out, uniform in +-1/sqrt(in).
template <class T>
RowMatrix<T> linear_weights(Index in, Index out, Random& random) {
  return random_matrix<T>(in, out, [&] { return (2 * random.uniform() - 1) / std::sqrt(static_cast<double>(in)); });
}

// ---------------------------------------------------------------------------------------------------- work in pieces

inline constexpr Index chunk_rows = 128;  // so that a chunk's activations stay in the second-level cache
inline constexpr Index tile = 48;         // weight gradients are cut into tile x tile pieces

inline Index chunks(Index rows) { return (rows + chunk_rows - 1) / chunk_rows; }

/// Some rows, and scratch memory of the thread that works on them.
struct Chunk {
  Index number, first, count;
  coterie::Arena& arena;

  /// These rows of a view.
  template <class V>
  V of(V all) const {
    return all.rows(first, count);
  }
};

/// Calls f(Chunk) for all rows, a chunk at a time.
template <class F>
void for_chunks(Index rows, Context& context, F&& f) {
  context.for_each(chunks(rows), [&](Index number, Index worker) {
    coterie::Arena& arena = context.workspace().worker(worker);
    coterie::Arena::Scope scope(arena);
    const Index first = number * chunk_rows;
    f(Chunk{number, first, std::min(chunk_rows, rows - first), arena});
  });
}

/// d_w += x^T d_y, and d_bias += the column sums of d_y if `d_bias` is given: undoes y = x w + bias.
template <class T>
void linear_weight_gradient(ConstView<T> x, ConstView<T> d_y, View<T> d_w, View<T> d_bias, Context& context) {
  const Index across = (d_w.cols() + tile - 1) / tile, down = (d_w.rows() + tile - 1) / tile;
  context.for_each(across * down, [&](Index task, Index) {
    const Index row = task / across * tile, rows = std::min(tile, d_w.rows() - row);
    const Index col = task % across * tile, cols = std::min(tile, d_w.cols() - col);
    const auto d_y_part = d_y.columns(col, cols).eigen();
    d_w.rows(row, rows).columns(col, cols).eigen().noalias() += x.columns(row, rows).eigen().transpose() * d_y_part;
    if (row == 0 && d_bias.data() != nullptr) d_bias.columns(col, cols).eigen() += d_y_part.colwise().sum();
  });
}

// -------------------------------------------------------------------------------------------------------- layer norm

inline constexpr double norm_epsilon = 1e-5;

/// y = (x - mean) / deviation * scale + shift, row by row.
template <class T>
struct LayerNorm {
  RowMatrix<T> scale, shift;  // 1 x d

  LayerNorm() = default;
  explicit LayerNorm(Index d) : scale(RowMatrix<T>::Ones(1, d)), shift(RowMatrix<T>::Zero(1, d)) {}

  template <class F>
  void visit(const std::string& name, const LayerNorm& gradient, F&& f) {
    f(name + ".norm.scale", View<T>(scale), ConstView<T>(gradient.scale));
    f(name + ".norm.shift", View<T>(shift), ConstView<T>(gradient.shift));
  }
};

/// Overwrites y.
template <class T>
void layer_norm(ConstView<T> x, const LayerNorm<T>& norm, View<T> y) {
  const auto scale = norm.scale.row(0).array(), shift = norm.shift.row(0).array();
  for (Index i = 0; i < x.rows(); ++i) {
    const auto x_i = x.eigen().row(i).array();
    auto y_i = y.eigen().row(i).array();
    const T mean = x_i.mean();
    const T inverse = 1 / std::sqrt((x_i - mean).square().mean() + static_cast<T>(norm_epsilon));
    y_i = (x_i - mean) * inverse * scale + shift;
  }
}

/// Undoes layer_norm. `d_norm` is 2 x d: scale, shift. Adds into d_x and d_norm.
template <class T>
void layer_norm_backward(ConstView<T> x, const LayerNorm<T>& norm, ConstView<T> d_y, View<T> d_x, View<T> d_norm) {
  const auto scale = norm.scale.row(0).array();
  auto d_scale = d_norm.eigen().row(0).array(), d_shift = d_norm.eigen().row(1).array();
  for (Index i = 0; i < x.rows(); ++i) {
    const auto x_i = x.eigen().row(i).array(), d_y_i = d_y.eigen().row(i).array();
    auto d_x_i = d_x.eigen().row(i).array();
    const T mean = x_i.mean();
    const T inverse = 1 / std::sqrt((x_i - mean).square().mean() + static_cast<T>(norm_epsilon));
    const auto unit = (x_i - mean) * inverse;
    const T sum = (d_y_i * scale).mean(), dot = (d_y_i * scale * unit).mean();
    d_scale += d_y_i * unit;
    d_shift += d_y_i;
    d_x_i += (d_y_i * scale - sum - unit * dot) * inverse;
  }
}

/// One partial gradient of a layer norm per chunk of rows, to be summed in order.
template <class T>
struct LayerNormPartials {
  RowMatrix<T> sums;

  void reset(Index rows, Index d) { sums.setZero(2 * chunks(rows), d); }
  View<T> of(Index chunk) { return View<T>(sums).rows(2 * chunk, 2); }
  void add_to(LayerNorm<T>& d_norm) const {
    for (Index i = 0; i < sums.rows(); i += 2) {
      d_norm.scale += sums.row(i);
      d_norm.shift += sums.row(i + 1);
    }
  }
};

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

  template <class F>
  void visit(const std::string& name, const FeedForward& gradient, F&& f) {
    norm.visit(name, gradient.norm, f);
    f(name + ".expand", View<T>(expand), ConstView<T>(gradient.expand));
    f(name + ".expand_bias", View<T>(expand_bias), ConstView<T>(gradient.expand_bias));
    f(name + ".contract", View<T>(contract), ConstView<T>(gradient.contract));
    f(name + ".contract_bias", View<T>(contract_bias), ConstView<T>(gradient.contract_bias));
  }
};

// gelu(a) = a/2 (1 + t) with t = tanh(c (a + b a^3)).
inline constexpr double gelu_b = 0.044715, gelu_c = 0.7978845608028654;

/// t of gelu. Overwrites t.
template <class T>
void gelu_tanh(ConstView<T> a, View<T> t) {
  const auto a_ = a.eigen().array();
  t.eigen().array() = ((static_cast<T>(gelu_b) * a_.square() + 1) * a_ * static_cast<T>(gelu_c)).tanh();
}

/// Keeps `normed` (as x) and `a` (tokens x hidden) for backward. Overwrites normed, a and y.
template <class T>
void feed_forward(ConstView<T> x, const FeedForward<T>& w, View<T> normed, View<T> a, View<T> y, Context& context) {
  for_chunks(x.rows(), context, [&](const Chunk& rows) {
    const View<T> g = rows.arena.template matrix<T>(rows.count, w.expand.cols());
    auto normed_rows = rows.of(normed).eigen(), a_rows = rows.of(a).eigen(), y_rows = rows.of(y).eigen();
    layer_norm<T>(rows.of(x), w.norm, normed_rows);
    // a = norm(x) expand + expand_bias
    a_rows.rowwise() = w.expand_bias.row(0);
    a_rows.noalias() += normed_rows * w.expand;
    // g = a/2 (1 + t)
    gelu_tanh<T>(a_rows, g);
    g.eigen().array() = a_rows.array() * (g.eigen().array() + 1) / 2;
    // y = x + g contract + contract_bias
    y_rows = rows.of(x).eigen().rowwise() + w.contract_bias.row(0);
    y_rows.noalias() += g.eigen() * w.contract;
  });
}

/// Undoes feed_forward. Overwrites d_x and the scratch g and d_a (both as a), adds into d_w.
template <class T>
void feed_forward_backward(ConstView<T> x, const FeedForward<T>& w, ConstView<T> normed, ConstView<T> a,
                           ConstView<T> d_y, View<T> g, View<T> d_a, View<T> d_x, FeedForward<T>& d_w,
                           LayerNormPartials<T>& partials, Context& context) {
  partials.reset(x.rows(), x.cols());
  for_chunks(x.rows(), context, [&](const Chunk& rows) {
    const View<T> d_normed = rows.arena.template matrix<T>(rows.count, x.cols());
    auto d_y_rows = rows.of(d_y).eigen();
    auto d_a_rows = rows.of(d_a).eigen();
    auto a_rows = rows.of(a).eigen().array();
    auto g_rows = rows.of(g).eigen().array();
    gelu_tanh<T>(rows.of(a), rows.of(g));
    // y = x + g contract: d_g = d_y contract^T
    d_a_rows.noalias() = d_y_rows * w.contract.transpose();
    // g = a/2 (1 + t): d_a = d_g (1 + t + a (1 - t^2) c (1 + 3 b a^2)) / 2
    const T b = static_cast<T>(3 * gelu_b), c = static_cast<T>(gelu_c);
    d_a_rows.array() *= (1 + g_rows + a_rows * (1 - g_rows.square()) * (c + b * c * a_rows.square())) / 2;
    g_rows = a_rows * (g_rows + 1) / 2;
    // a = norm(x) expand: d_norm = d_a expand^T
    d_normed.eigen().noalias() = d_a_rows * w.expand.transpose();
    rows.of(d_x).eigen() = d_y_rows;
    layer_norm_backward<T>(rows.of(x), w.norm, d_normed, rows.of(d_x), partials.of(rows.number));
  });
  partials.add_to(d_w.norm);
  linear_weight_gradient<T>(g, d_y, d_w.contract, d_w.contract_bias, context);
  linear_weight_gradient<T>(normed, d_a, d_w.expand, d_w.expand_bias, context);
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
    norm.visit(name, gradient.norm, f);
    f(name, View<T>(weights), ConstView<T>(gradient.weights));
  }
};

/// A row whose target is negative has loss 0. Overwrites normed, p and losses; without targets no losses.
template <class T>
void read_out(ConstView<T> x, const ReadOut<T>& w, std::span<const std::int32_t> targets, View<T> normed, View<T> p,
              std::span<T> losses, Context& context) {
  for_chunks(x.rows(), context, [&](const Chunk& rows) {
    auto normed_rows = rows.of(normed).eigen(), p_rows = rows.of(p).eigen();
    layer_norm<T>(rows.of(x), w.norm, normed_rows);
    // logits = norm(x) weights
    p_rows.noalias() = normed_rows * w.weights;
    for (Index i = 0; i < rows.count; ++i) {
      auto p_i = p_rows.row(i).array();
      const std::size_t t = static_cast<std::size_t>(rows.first + i);
      const Index target = targets.empty() ? -1 : targets[t];
      const T highest = p_i.maxCoeff(), logit = target < 0 ? T(0) : p_i(target);
      p_i = (p_i - highest).exp();
      const T sum = p_i.sum();
      p_i /= sum;
      // loss = log(sum exp(logits)) - logits[target]
      if (!targets.empty()) losses[t] = target < 0 ? T(0) : std::log(sum) + highest - logit;
    }
  });
}

/// Undoes read_out for the mean of the losses. `p` becomes the gradient of the logits. Overwrites d_x, adds into d_w.
template <class T>
void read_out_backward(ConstView<T> x, const ReadOut<T>& w, std::span<const std::int32_t> targets, ConstView<T> normed,
                       View<T> p, View<T> d_x, ReadOut<T>& d_w, LayerNormPartials<T>& partials, Context& context) {
  const auto counted = std::count_if(targets.begin(), targets.end(), [](std::int32_t target) { return target >= 0; });
  const T share = 1 / static_cast<T>(std::max<std::ptrdiff_t>(counted, 1));
  partials.reset(x.rows(), x.cols());
  for_chunks(x.rows(), context, [&](const Chunk& rows) {
    const View<T> d_normed = rows.arena.template matrix<T>(rows.count, x.cols());
    auto p_rows = rows.of(p).eigen();
    // loss = log(sum exp(logits)) - logits[target]: d_logits = p - [target]
    for (Index i = 0; i < rows.count; ++i) {
      const Index target = targets[static_cast<std::size_t>(rows.first + i)];
      p_rows.row(i) *= target < 0 ? T(0) : share;
      if (target >= 0) p_rows(i, target) -= share;
    }
    // logits = norm(x) weights: d_norm = d_logits weights^T
    d_normed.eigen().noalias() = p_rows * w.weights.transpose();
    rows.of(d_x).eigen().setZero();
    layer_norm_backward<T>(rows.of(x), w.norm, d_normed, rows.of(d_x), partials.of(rows.number));
  });
  partials.add_to(d_w.norm);
  linear_weight_gradient<T>(normed, p, d_w.weights, {}, context);
}

// ------------------------------------------------------------------------------------------------------------- model

/// Sequences that lie end to end: sequence s is [offsets[s], offsets[s+1]).
struct Batch {
  std::span<const std::int32_t> tokens;
  std::span<const std::int32_t> targets;  // as tokens; negative: nothing to predict there
  std::span<const Index> offsets;
  std::uint64_t step = 0;  // what random routing draws from, together with the seed
};

struct ModelConfig {
  Index vocabulary = 256;
  Index layers = 1;
  Index feed_forward = 0;  // hidden width; 0: blocks of attention only
  double embedding_deviation = 1;
  coterie::RoutingAttentionConfig attention = {};  // of every layer, each with a seed of its own
};

/// Embedding, `layers` pre-norm blocks of routing attention and feed-forward, read-out.
template <class T>
class Model {
 public:
  using Attention = coterie::RoutingAttention<T>;

  /// All weights but the attention's; the same type holds their gradients.
  struct Weights {
    RowMatrix<T> embedding;  // vocabulary x d
    std::vector<LayerNorm<T>> norms;
    std::vector<FeedForward<T>> feed_forwards;
    ReadOut<T> read_out;
  };
  struct Gradients {
    Weights weights;
    std::vector<coterie::Parameters<T>> attention;
  };

  /// What forward leaves for backward, and the probabilities. Made once, reused every step.
  struct Tape {
    struct Block {
      RowMatrix<T> x, normed, middle, middle_normed, a;  // x -> attention -> middle -> feed-forward -> the next x
      typename Attention::Tape attention;
    };
    std::vector<Block> blocks;
    RowMatrix<T> x, normed, p;                   // of the read-out; p: tokens x vocabulary
    RowMatrix<T> y, d_x, d_y, d_normed, g, d_a;  // scratch
    LayerNormPartials<T> partials;
  };

  explicit Model(const ModelConfig& config) : config_(config) {
    Random random(config.attention.seed);
    const Index d = config.attention.model_dim;
    weights_.embedding =
        random_matrix<T>(config.vocabulary, d, [&] { return config.embedding_deviation * random.normal(); });
    for (Index layer = 0; layer < config.layers; ++layer) {
      coterie::RoutingAttentionConfig attention = config.attention;
      attention.seed = config.attention.seed * 1000003 + static_cast<std::uint64_t>(layer);
      attention_.emplace_back(attention);
      weights_.norms.emplace_back(d);
      if (config.feed_forward > 0) weights_.feed_forwards.emplace_back(d, config.feed_forward, random);
    }
    weights_.read_out = ReadOut<T>(d, config.vocabulary, random);
  }

  const ModelConfig& config() const { return config_; }
  const std::vector<Attention>& attention() const { return attention_; }
  std::vector<Attention>& attention() { return attention_; }
  const Weights& weights() const { return weights_; }

  /// Gradients of the right shapes, all zero.
  Gradients zero_gradients() const {
    Gradients gradients{weights_, {}};
    for (const Attention& layer : attention_) gradients.attention.push_back(layer.zero_gradients());
    set_zero(gradients);
    return gradients;
  }
  static void set_zero(Gradients& gradients) {
    visit(gradients.weights, gradients.weights,
          [](std::string_view, View<T> gradient, ConstView<T>) { gradient.eigen().setZero(); });
    for (coterie::Parameters<T>& layer : gradients.attention) layer.fill(0);
  }

  /// Calls f(name, weights, gradient) for every matrix of the model.
  template <class F>
  void visit(const Gradients& gradients, F&& f) {
    visit(weights_, gradients.weights, f);
    for (std::size_t i = 0; i < attention_.size(); ++i)
      coterie::visit(attention_[i].parameters(), gradients.attention[i], f);
  }
  /// Calls f(name, weights) for every matrix but those of the attention.
  template <class F>
  void visit_weights(F&& f) {
    visit(weights_, weights_, [&](std::string_view name, View<T> w, ConstView<T>) { f(name, w); });
  }
  Index parameter_count() {
    Index count = 0;
    visit(zero_gradients(), [&](std::string_view, View<T> w, ConstView<T>) { count += w.rows() * w.cols(); });
    return count;
  }

  /// losses[t] = -log of the probability of targets[t], and tape.p. For training: keeps what backward needs.
  void forward(const Batch& batch, std::span<T> losses, Tape& tape, Context& context) const {
    run(batch, losses, tape, context, true);
  }
  /// The same numbers for evaluation, in the memory of one block; the tape only lends its buffers.
  void evaluate(const Batch& batch, std::span<T> losses, Tape& tape, Context& context) const {
    run(batch, losses, tape, context, false);
  }

  /// Undoes forward for the mean of the losses. Adds into the gradients; uses up the tape, but for update_router.
  void backward(const Batch& batch, Tape& tape, Gradients& gradients, Context& context) const {
    Weights& d_w = gradients.weights;
    const Index n = tape.x.rows(), d = tape.x.cols();
    for (RowMatrix<T>* m : {&tape.d_x, &tape.d_y, &tape.d_normed}) m->resize(n, d);
    for (RowMatrix<T>* m : {&tape.g, &tape.d_a}) m->resize(n, config_.feed_forward);
    // The gradient of the residual stream is tape.d_x; d_y is the one before it.
    read_out_backward<T>(tape.x, weights_.read_out, batch.targets, tape.normed, tape.p, tape.d_x, d_w.read_out,
                         tape.partials, context);
    for (std::size_t i = attention_.size(); i-- > 0;) {
      typename Tape::Block& block = tape.blocks[i];
      if (config_.feed_forward > 0) {
        std::swap(tape.d_x, tape.d_y);
        feed_forward_backward<T>(block.middle, weights_.feed_forwards[i], block.middle_normed, block.a, tape.d_y,
                                 tape.g, tape.d_a, tape.d_x, d_w.feed_forwards[i], tape.partials, context);
      }
      // middle = x + attention(norm(x))
      tape.d_normed.setZero();
      attention_[i].backward({block.normed, batch.offsets, {}, {}, batch.step}, block.attention, tape.d_x,
                             tape.d_normed, gradients.attention[i], context);
      tape.partials.reset(n, d);
      for_chunks(n, context, [&](const Chunk& rows) {
        layer_norm_backward<T>(rows.of(view(block.x)), weights_.norms[i], rows.of(view(tape.d_normed)),
                               rows.of(view(tape.d_x)), tape.partials.of(rows.number));
      });
      tape.partials.add_to(d_w.norms[i]);
    }
    embed_backward<T>(batch.tokens, batch.offsets, d_w.embedding, tape.d_x);
  }

  /// Moves the centroids of all layers by the batch that forward has seen.
  void update_router(Tape& tape, Context& context) {
    for (std::size_t i = 0; i < attention_.size(); ++i) attention_[i].update_router(tape.blocks[i].attention, context);
  }

 private:
  void run(const Batch& batch, std::span<T> losses, Tape& tape, Context& context, bool training) const {
    const Index n = static_cast<Index>(batch.tokens.size()), d = config_.attention.model_dim;
    const std::size_t layers = attention_.size();
    if (tape.blocks.size() < (training ? layers : 1)) tape.blocks.resize(training ? layers : 1);
    for (RowMatrix<T>* m : {&tape.x, &tape.y, &tape.normed}) m->resize(n, d);
    tape.p.resize(n, config_.vocabulary);

    tape.blocks[0].x.resize(n, d);
    embed<T>(batch.tokens, batch.offsets, weights_.embedding, tape.blocks[0].x);
    for (std::size_t i = 0; i < layers; ++i) {
      typename Tape::Block& block = tape.blocks[training ? i : 0];
      RowMatrix<T>& next = i + 1 == layers ? tape.x : tape.blocks[training ? i + 1 : 0].x;
      const bool with_feed_forward = config_.feed_forward > 0;
      RowMatrix<T>& middle = with_feed_forward ? block.middle : next;
      next.resize(n, d);
      middle.resize(n, d);
      block.normed.resize(n, d);

      // middle = x + attention(norm(x))
      for_chunks(n, context, [&](const Chunk& rows) {
        layer_norm<T>(rows.of(view(block.x)), weights_.norms[i], rows.of(view(block.normed)));
      });
      const coterie::Input<T> input{block.normed, batch.offsets, {}, {}, batch.step};
      if (training)
        attention_[i].forward(input, tape.y, block.attention, context);
      else
        attention_[i].forward(input, tape.y, context);
      for_chunks(n, context, [&](const Chunk& rows) {
        rows.of(view(middle)).eigen() = rows.of(view(block.x)).eigen() + rows.of(view(tape.y)).eigen();
      });
      if (with_feed_forward) {
        block.middle_normed.resize(n, d);
        block.a.resize(n, config_.feed_forward);
        feed_forward<T>(middle, weights_.feed_forwards[i], block.middle_normed, block.a, next, context);
      }
    }
    read_out<T>(tape.x, weights_.read_out, batch.targets, tape.normed, tape.p, losses, context);
  }

  template <class F>
  static void visit(Weights& w, const Weights& gradient, F&& f) {
    f("embedding", View<T>(w.embedding), ConstView<T>(gradient.embedding));
    for (std::size_t i = 0; i < w.norms.size(); ++i)
      w.norms[i].visit("norms." + std::to_string(i), gradient.norms[i], f);
    for (std::size_t i = 0; i < w.feed_forwards.size(); ++i)
      w.feed_forwards[i].visit("feed_forwards." + std::to_string(i), gradient.feed_forwards[i], f);
    w.read_out.visit("read_out", gradient.read_out, f);
  }

  ModelConfig config_;
  std::vector<Attention> attention_;
  Weights weights_;
};

// --------------------------------------------------------------------------------------------------------- optimiser

/// Warm-up, then a cosine from 1 to `floor`: the factor of the learning rate at `step`, with `progress` of the training
/// (0 to 1) behind us.
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
      squares += static_cast<double>(g.eigen().squaredNorm());
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

    Index begin = 0;
    model.visit(gradients, [&](std::string_view name, View<T> w, ConstView<T> g) {
      const T keep = static_cast<T>(decays(name) ? 1 - learning_rate * config_.weight_decay : 1);
      for (Index i = 0; i < w.rows(); ++i, begin += w.cols()) {
        auto w_i = w.eigen().row(i).array();
        const auto g_i = g.eigen().row(i).array() * clip;
        auto m = first_.row(0).segment(begin, w.cols()).array(), v = second_.row(0).segment(begin, w.cols()).array();
        m = beta1 * m + (1 - beta1) * g_i;
        v = beta2 * v + (1 - beta2) * g_i.square();
        w_i = keep * w_i - rate * m / (v.sqrt() * correction + epsilon);
      }
    });
    return length;
  }

  /// Means of the gradients and of their squares, 1 x parameters in the order of visit; empty before the first step.
  const RowMatrix<T>& first() const { return first_; }
  const RowMatrix<T>& second() const { return second_; }
  Index steps() const { return steps_; }
  /// Goes on from what those three were.
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
