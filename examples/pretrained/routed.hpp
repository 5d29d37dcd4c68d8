// A pretrained model whose attention is routed: the dense weights, and clusters of the model's own keys.
//
// Every block keeps its weights; its dense heads become routed ones that see the first keys, the recent ones and those
// of the clusters nearest to the query, in one softmax. Clusters are made of un-rotated keys; logits keep their rotary
// positions. So a token's cost does not grow with the cache, and a Decoder gives forward's rows.
#pragma once

#include <algorithm>
#include <coterie/decoder/decoder.hpp>
#include <coterie/saved/saved_layer.hpp>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "llama.hpp"

namespace pretrained {

/// Settings of routed heads; designated initialisers in this order.
struct RoutedChoice {
  Index clusters = 96;
  Index probes = 4;    ///< clusters that a query sees
  Index window = 512;  ///< last keys of a cluster that it sees
  Index sinks = 4;     ///< first keys, which every query sees
  Index recent = 64;   ///< last keys, which every query sees
};

/// The attention of a block with routed heads instead of dense ones.
inline coterie::RoutingAttentionConfig routed_attention(const LlamaConfig& config, const RoutedChoice& choice) {
  coterie::RoutingAttentionConfig c = config.attention();
  c.routed = {.heads = config.heads,
              .clusters = choice.clusters,
              .window = choice.window,
              .sinks = choice.sinks,
              .recent = choice.recent,
              .membership = {.probes = choice.probes},
              .matching = c.dense.matching,
              .positions = c.dense.positions};
  c.dense = {};
  return c;
}

/// Calls attend(block, normed rows, y), which writes y, for every block, and adds y and the feed-forward part to x.
template <class Attend>
void run_blocks(const Llama& model, View<float> x, Context& context, Attend&& attend) {
  RowMatrix<float> normed(x.rows(), x.cols()), y(x.rows(), x.cols());
  for (std::size_t l = 0; l < model.blocks.size(); ++l) {
    rms_norm(x, model.blocks[l].attention_norm, model.config.epsilon, normed, context);
    attend(l, normed, y);
    x.eigen() += y;
    add_feed_forward(model.blocks[l], model.config.epsilon, x, context);
  }
}

/// The attention of all blocks, routed. The rest of the model is the dense one's, to which this refers.
struct RoutedLlama {
  const Llama& dense;
  std::vector<coterie::RoutingAttention<float>> attention;

  /// Takes over the weights; routers start by k-means on the keys that each block has over a text.
  RoutedLlama(const Llama& model, const RoutedChoice& choice, std::span<const std::int32_t> text, Context& context)
      : RoutedLlama(model, choice) {
    RowMatrix<float> x(static_cast<Index>(text.size()), model.config.model_dim);
    embed(model, text, x);
    run_blocks(model, x, context, [&](std::size_t l, const RowMatrix<float>& normed, RowMatrix<float>& y) {
      attention[l].start_router(normed, context);
      model.blocks[l].attention.forward(normed, y, context);
    });
  }

  /// The same weights and centroids with other settings of what is seen.
  RoutedLlama(const RoutedLlama& other, const RoutedChoice& choice) : RoutedLlama(other.dense, choice) {
    for (std::size_t l = 0; l < attention.size(); ++l) {
      copy_parameters(other.attention[l].parameters(), attention[l].parameters());
      std::copy(other.attention[l].routers().begin(), other.attention[l].routers().end(),
                attention[l].routers().begin());
    }
  }

  /// Reads what save() wrote. Requires: layers that a conversion of this model makes (coterie::FileError).
  RoutedLlama(const Llama& model, const std::filesystem::path& path) : dense(model) {
    const coterie::SafetensorsView file = coterie::read_safetensors(path);
    for (std::size_t l = 0; l < model.blocks.size(); ++l) {
      attention.push_back(coterie::read_layer<float>(file, prefix(l)));
      // Whatever its clusters are: the rest must be as a conversion makes it.
      const coterie::RoutedHeads& routed = attention.back().config().routed;
      const coterie::RoutingAttention<float> expected(
          routed_attention(model.config, {.clusters = routed.clusters,
                                          .probes = routed.membership.probes,
                                          .window = routed.window,
                                          .sinks = routed.sinks,
                                          .recent = routed.recent}));
      if (attention.back().config() != expected.config())
        throw coterie::FileError("'" + path.string() + "': " + prefix(l) + ": expected a layer of this model");
    }
  }

  /// Writes the attention of all blocks; the other weights stay in the model's file.
  void save(const std::filesystem::path& path) const {
    coterie::SafetensorsWriter writer;
    for (std::size_t l = 0; l < attention.size(); ++l) coterie::add_layer(writer, prefix(l), attention[l]);
    writer.write(path);
  }

 private:
  RoutedLlama(const Llama& model, const RoutedChoice& choice) : dense(model) {
    for (const LlamaBlock& block : model.blocks) {
      attention.emplace_back(routed_attention(model.config, choice));
      copy_parameters(block.attention.parameters(), attention.back().parameters());
    }
  }

  static std::string prefix(std::size_t l) { return "blocks." + std::to_string(l) + ".attention."; }

  static void copy_parameters(const coterie::Parameters<float>& from, coterie::Parameters<float>& to) {
    coterie::visit(to, from, [](auto, View<float> w, ConstView<float> source) { w.eigen() = source.eigen(); });
  }
};

/// A routed model at work on one sequence, token by token: the cost of a token does not grow.
class RoutedSession {
 public:
  /// Refers to the model.
  explicit RoutedSession(const RoutedLlama& model) : model_(model) {
    for (const auto& layer : model.attention) decoders_.emplace_back(layer);
  }

  Index tokens() const { return decoders_.front().length(0); }

  /// Reads the next tokens. Shapes: logits 1 x vocabulary, of the last token, or none.
  void read(std::span<const std::int32_t> tokens, View<float> logits, Context& context) {
    const Index count = static_cast<Index>(tokens.size());
    x_ = RowMatrix<float>(count, model_.dense.config.model_dim);
    embed(model_.dense, tokens, x_);
    run_blocks(model_.dense, x_, context, [&](std::size_t l, const RowMatrix<float>& normed, RowMatrix<float>& y) {
      decoders_[l].prefill(normed, y, 0, context);
    });
    if (logits.rows() > 0) read_out(model_.dense, view(x_).rows(count - 1, 1), logits, context);
  }

 private:
  const RoutedLlama& model_;
  std::deque<coterie::Decoder<float>> decoders_;
  RowMatrix<float> x_;
};

}  // namespace pretrained
