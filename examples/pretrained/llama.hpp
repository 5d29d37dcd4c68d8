// A language model of the llama architecture: its settings, its weights, and the parts of a block around attention.
//
// The attention of each block is a RoutingAttention with one dense block of heads: grouped queries, rotary positions on
// pairs of neighbouring columns as GGUF files store them. session.hpp runs the model; llama_file.hpp reads it.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/core/context.hpp>
#include <coterie/kernel/product.hpp>
#include <coterie/layer/routing_attention.hpp>
#include <cstdint>
#include <string>
#include <vector>

namespace pretrained {

using coterie::ConstView;
using coterie::Context;
using coterie::Index;
using coterie::RowMatrix;
using coterie::view;
using coterie::View;

/// Sizes of a model; designated initialisers in this order.
struct LlamaConfig {
  Index layers = 0, model_dim = 0, feed_forward = 0, vocabulary = 0;
  Index heads = 0, kv_heads = 0, head_dim = 0;
  Index context = 0;         ///< tokens that the model was trained for
  double rope_base = 10000;  ///< of the rotary positions
  double epsilon = 1e-5;     ///< added to the mean square in RMSNorm

  Index kv_dim() const { return kv_heads * head_dim; }
  Index q_dim() const { return heads * head_dim; }

  /// The attention of a block, as a layer of Coterie.
  coterie::RoutingAttentionConfig attention() const {
    return {.model_dim = model_dim,
            .head_dim = head_dim,
            .kv_heads = kv_heads,
            .causal = true,
            .dense = {.heads = heads,
                      .matching = {.shared_qk = false},
                      .positions = {.kind = coterie::PositionKind::rotary,
                                    .base = rope_base,
                                    .layout = coterie::RotaryLayout::interleaved}}};
  }
};

/// One block: x += attention(norm(x)), then x += (silu(norm(x) gate) * norm(x) up) down.
struct LlamaBlock {
  coterie::RoutingAttention<float> attention;
  RowMatrix<float> attention_norm, feed_norm;  ///< 1 x model_dim
  RowMatrix<float> gate_up;                    ///< model_dim x 2 feed_forward: gate, then up
  RowMatrix<float> down;                       ///< feed_forward x model_dim

  explicit LlamaBlock(const LlamaConfig& config)
      : attention(config.attention()),
        attention_norm(RowMatrix<float>::Ones(1, config.model_dim)),
        feed_norm(attention_norm),
        gate_up(RowMatrix<float>::Zero(config.model_dim, 2 * config.feed_forward)),
        down(RowMatrix<float>::Zero(config.feed_forward, config.model_dim)) {}
};

/// A model with its weights as float. A product is y = x w.
struct Llama {
  LlamaConfig config;
  RowMatrix<float> embedding;  ///< vocabulary x model_dim
  std::vector<LlamaBlock> blocks;
  RowMatrix<float> output_norm;  ///< 1 x model_dim
  RowMatrix<float> output;       ///< model_dim x vocabulary

  /// Numbers in all weights; tied embeddings count once.
  Index parameter_count(bool tied) const {
    Index sum = embedding.size() + (tied ? 0 : output.size()) + output_norm.size();
    for (const LlamaBlock& b : blocks)
      sum += b.attention.parameters().size() + b.attention_norm.size() + b.feed_norm.size() + b.gate_up.size() +
             b.down.size();
    return sum;
  }
};

/// y = x / root of (mean square of x + epsilon) * scale, row by row. Overwrites y, which may be x.
inline void rms_norm(ConstView<float> x, const RowMatrix<float>& scale, double epsilon, View<float> y,
                     Context& context) {
  context.for_chunks(x.rows(), 32, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) {
      double sum = 0;
      for (Index j = 0; j < x.cols(); ++j) sum += double(x(i, j)) * double(x(i, j));
      const float factor = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(x.cols()) + epsilon));
      for (Index j = 0; j < x.cols(); ++j) y(i, j) = x(i, j) * factor * scale(0, j);
    }
  });
}

/// y = silu(gate) * up, row by row, with silu(a) = a / (1 + e^-a).
/// Shapes: gate_up tokens x 2 feed_forward, y tokens x feed_forward. Overwrites y.
inline void swiglu(ConstView<float> gate_up, View<float> y, Context& context) {
  const Index width = y.cols();
  context.for_chunks(y.rows(), 16, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) {
      const float *gate = gate_up.row(i), *up = gate + width;
      for (Index j = 0; j < width; ++j) y(i, j) = gate[j] / (1 + std::exp(-gate[j])) * up[j];
    }
  });
}

/// x += (silu(norm(x) gate) * norm(x) up) down.
inline void add_feed_forward(const LlamaBlock& block, double epsilon, View<float> x, Context& context) {
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<float> normed = arena.matrix<float>(x.rows(), x.cols());
  const View<float> gate_up = arena.matrix<float>(x.rows(), block.gate_up.cols());
  const View<float> hidden = arena.matrix<float>(x.rows(), block.down.rows());
  rms_norm(x, block.feed_norm, epsilon, normed, context);
  coterie::product<float>(normed, block.gate_up, gate_up, context);
  swiglu(gate_up, hidden, context);
  coterie::product<float>(hidden, block.down, x, context, true);
}

/// The row of every token. Requires: tokens of the vocabulary, otherwise coterie::ValueError. Overwrites x.
inline void embed(const Llama& model, std::span<const std::int32_t> tokens, View<float> x) {
  for (const std::int32_t token : tokens)
    if (token < 0 || token >= model.config.vocabulary)
      throw coterie::ValueError("embed: tokens: expected numbers from 0 to " +
                                std::to_string(model.config.vocabulary - 1) + ", got " + std::to_string(token));
  for (std::size_t i = 0; i < tokens.size(); ++i)
    std::copy_n(model.embedding.data() + tokens[i] * model.embedding.cols(), x.cols(), x.row(static_cast<Index>(i)));
}

/// logits = norm(x) output. Overwrites logits.
/// Shapes: x tokens x model_dim, logits tokens x vocabulary.
inline void read_out(const Llama& model, ConstView<float> x, View<float> logits, Context& context) {
  coterie::Arena& arena = context.workspace().shared();
  coterie::Arena::Scope scope(arena);
  const View<float> normed = arena.matrix<float>(x.rows(), x.cols());
  rms_norm(x, model.output_norm, model.config.epsilon, normed, context);
  coterie::product<float>(normed, model.output, logits, context);
}

}  // namespace pretrained
