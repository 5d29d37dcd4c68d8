// A small transformer: embedding, blocks of routing attention and feed-forward, read-out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block.hpp"

namespace transformer {

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

/// Embedding, `layers` blocks, read-out.
template <class T>
class Model {
 public:
  struct Gradients {
    RowMatrix<T> embedding;  // vocabulary x d
    std::vector<typename Block<T>::Gradients> blocks;
    ReadOut<T> read_out;
  };

  /// What forward leaves for backward, and the probabilities. Made once, reused every step.
  struct Tape {
    std::vector<RowMatrix<T>> x;  // block i reads x[i] and writes x[i + 1]; evaluate takes turns with two of them
    std::vector<typename Block<T>::Tape> blocks;
    RowMatrix<T> normed, p;  // of the read-out; p: tokens x vocabulary
    RowMatrix<T> d_x, d_y;   // scratch
  };

  explicit Model(const ModelConfig& config) : config_(config) {
    Random random(config.attention.seed);
    const Index d = config.attention.model_dim;
    embedding_ = random_matrix<T>(config.vocabulary, d, [&] { return config.embedding_deviation * random.normal(); });
    for (Index layer = 0; layer < config.layers; ++layer) {
      coterie::RoutingAttentionConfig attention = config.attention;
      attention.seed = config.attention.seed * 1000003 + static_cast<std::uint64_t>(layer);
      blocks_.emplace_back(attention, config.feed_forward, random);
    }
    read_out_ = ReadOut<T>(d, config.vocabulary, random);
  }

  const ModelConfig& config() const { return config_; }
  const RowMatrix<T>& embedding() const { return embedding_; }
  const std::vector<Block<T>>& blocks() const { return blocks_; }
  std::vector<Block<T>>& blocks() { return blocks_; }
  const ReadOut<T>& read_out() const { return read_out_; }

  /// Gradients of the right shapes, all zero.
  Gradients zero_gradients() const {
    Gradients gradients{embedding_, {}, read_out_};
    for (const Block<T>& block : blocks_) gradients.blocks.push_back(block.zero_gradients());
    set_zero(gradients);
    return gradients;
  }
  static void set_zero(Gradients& gradients) {
    gradients.embedding.setZero();
    for (typename Block<T>::Gradients& block : gradients.blocks) Block<T>::set_zero(block);
    gradients.read_out.visit("", gradients.read_out, [](auto, View<T> gradient, ConstView<T>) { gradient.fill(0); });
  }

  /// Calls f(name, weights, gradient) for every matrix of the model.
  template <class F>
  void visit(const Gradients& gradients, F&& f) {
    f("embedding", View<T>(embedding_), ConstView<T>(gradients.embedding));
    for (std::size_t i = 0; i < blocks_.size(); ++i) blocks_[i].visit(block_name(i), gradients.blocks[i], f);
    read_out_.visit("read_out", gradients.read_out, f);
  }
  /// Calls f(name, weights) for every matrix but those of the attention.
  template <class F>
  void visit_rest(F&& f) {
    f("embedding", View<T>(embedding_));
    for (std::size_t i = 0; i < blocks_.size(); ++i) blocks_[i].visit_rest(block_name(i), f);
    read_out_.visit("read_out", read_out_, [&](std::string_view name, View<T> w, ConstView<T>) { f(name, w); });
  }
  /// The prefix of the names of a block's matrices.
  static std::string block_name(std::size_t block) { return "blocks." + std::to_string(block); }

  Index parameter_count() {
    Index count = 0;
    visit(zero_gradients(), [&](std::string_view, View<T> w, ConstView<T>) { count += w.rows() * w.cols(); });
    return count;
  }

  /// losses[t] = -log of the probability of targets[t], and tape.p. For training: keeps what backward needs.
  void forward(const Batch& batch, std::span<T> losses, Tape& tape, Context& context) const {
    const std::size_t layers = blocks_.size();
    if (tape.blocks.size() < layers) tape.blocks.resize(layers);
    start(batch, tape, layers + 1);
    for (std::size_t i = 0; i < layers; ++i)
      blocks_[i].forward(input(batch, tape.x[i]), tape.x[i + 1], tape.blocks[i], context);
    end(batch, tape.x[layers], losses, tape, context);
  }
  /// The same numbers for evaluation, in the memory of one block; the tape only lends its buffers.
  void evaluate(const Batch& batch, std::span<T> losses, Tape& tape, Context& context) const {
    if (tape.blocks.empty()) tape.blocks.resize(1);
    start(batch, tape, 2);
    for (std::size_t i = 0; i < blocks_.size(); ++i)
      blocks_[i].evaluate(input(batch, tape.x[i % 2]), tape.x[(i + 1) % 2], tape.blocks[0], context);
    end(batch, tape.x[blocks_.size() % 2], losses, tape, context);
  }

  /// Undoes forward for the mean of the losses. Adds into the gradients; uses up the tape, but for update_router.
  void backward(const Batch& batch, Tape& tape, Gradients& gradients, Context& context) const {
    const RowMatrix<T>& last = tape.x[blocks_.size()];
    // The gradient of the residual stream is tape.d_x; d_y is the one before it.
    tape.d_x.resize(last.rows(), last.cols());
    read_out_backward<T>(last, read_out_, batch.targets, tape.normed, tape.p, tape.d_x, gradients.read_out, context);
    for (std::size_t i = blocks_.size(); i-- > 0;) {
      std::swap(tape.d_x, tape.d_y);
      blocks_[i].backward(input(batch, tape.x[i]), tape.blocks[i], tape.d_y, tape.d_x, {}, gradients.blocks[i],
                          context);
    }
    embed_backward<T>(batch.tokens, batch.offsets, gradients.embedding, tape.d_x);
  }

  /// Moves the centroids of all layers by the batch that forward has seen.
  void update_router(Tape& tape, Context& context) {
    for (std::size_t i = 0; i < blocks_.size(); ++i)
      blocks_[i].attention().update_router(tape.blocks[i].attention, context);
  }

 private:
  static coterie::Input<T> input(const Batch& batch, const RowMatrix<T>& x) {
    return {x, batch.offsets, {}, {}, batch.step};
  }

  void start(const Batch& batch, Tape& tape, std::size_t buffers) const {
    if (tape.x.size() < buffers) tape.x.resize(buffers);
    tape.x[0].resize(static_cast<Index>(batch.tokens.size()), config_.attention.model_dim);
    embed<T>(batch.tokens, batch.offsets, embedding_, tape.x[0]);
  }
  void end(const Batch& batch, const RowMatrix<T>& x, std::span<T> losses, Tape& tape, Context& context) const {
    tape.normed.resize(x.rows(), x.cols());
    tape.p.resize(x.rows(), config_.vocabulary);
    transformer::read_out<T>(x, read_out_, batch.targets, tape.normed, tape.p, losses, context);
  }

  ModelConfig config_;
  RowMatrix<T> embedding_;  // vocabulary x d
  std::vector<Block<T>> blocks_;
  ReadOut<T> read_out_;
};

}  // namespace transformer
