// Training of routed attention to give what dense attention gives, block by block.
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <span>
#include <string_view>
#include <vector>

#include "../model/adamw.hpp"
#include "routed.hpp"

namespace pretrained {

/// Distils a dense model into a routed one. The dense model reads a text; each routed block sees the same inputs, and
/// is trained on the difference of its output from the dense one. No gradient passes from block to block.
///
/// Loss of a block: |routed - dense|^2 / |dense|^2 over the rows of a text. Only weights are trained: centroids stay
/// where k-means on keys has put them, for update_router, which counts queries as well, made this loss three times as
/// large in eight steps.
class Distillation {
 public:
  /// Refers to the model.
  explicit Distillation(RoutedLlama& model) : model_(model), blocks_(model.attention.size()) {
    for (std::size_t l = 0; l < blocks_.size(); ++l) blocks_[l].gradients = model.attention[l].zero_gradients();
  }

  /// One step on a text; returns the mean loss over the blocks, before the step.
  double step(std::span<const std::int32_t> text, double learning_rate, Context& context) {
    const Index n = static_cast<Index>(text.size()), d = model_.dense.config.model_dim;
    RowMatrix<float> x(n, d), routed(n, d), d_y(n, d), d_x(n, d);
    embed(model_.dense, text, x);
    double sum = 0;
    run_blocks(model_.dense, x, context, [&](std::size_t l, const RowMatrix<float>& normed, RowMatrix<float>& y) {
      Block& block = blocks_[l];
      coterie::RoutingAttention<float>& layer = model_.attention[l];
      model_.dense.blocks[l].attention.forward(normed, y, context);
      layer.forward(normed, routed, tape_, context);
      const double all = static_cast<double>(y.squaredNorm());
      d_y = routed - y;
      sum += static_cast<double>(d_y.squaredNorm()) / all;
      d_y *= static_cast<float>(2 / all);
      d_x.setZero();
      block.gradients.visit([](std::string_view, View<float> g) { g.fill(0); });
      layer.backward(normed, tape_, d_y, d_x, block.gradients, context);
      Trained trained{layer};
      block.optimizer.step(trained, block.gradients, learning_rate);
    });
    return sum / static_cast<double>(blocks_.size());
  }

 private:
  /// A layer as AdamW sees it.
  struct Trained {
    using Gradients = coterie::Parameters<float>;
    coterie::RoutingAttention<float>& layer;
    template <class F>
    void visit(const Gradients& gradients, F&& f) {
      coterie::visit(layer.parameters(), gradients, f);
    }
  };
  struct Block {
    coterie::Parameters<float> gradients;
    transformer::AdamW<float> optimizer{{.weight_decay = 0}};
  };

  RoutedLlama& model_;
  std::vector<Block> blocks_;
  coterie::RoutingAttention<float>::Tape tape_;
};

/// Nats of the last tokens of a text with routed attention, the tokens before them read densely; and what it saw.
struct RoutedScore {
  std::vector<double> nats;
  double keys_seen = 0;  ///< mean share of the keys up to each scored row
};

/// Scores the last `scored` tokens of a text with each of several models of the same dense one. The first result is
/// dense attention's.
inline std::vector<RoutedScore> score_routed(const Llama& dense, std::span<const RoutedLlama* const> models,
                                             std::span<const std::int32_t> text, Index scored, Context& context) {
  // Rows that predict the scored tokens come last; the last token predicts nothing.
  const Index n = static_cast<Index>(text.size()) - 1, first = n - scored, d = dense.config.model_dim;
  RowMatrix<float> x(n, d), normed(n, d), y(n, d), mixed(n, d);
  embed(dense, text.first(static_cast<std::size_t>(n)), x);
  std::vector<RowMatrix<float>> late(models.size(), RowMatrix<float>(x.bottomRows(scored)));
  std::vector<RoutedScore> scores(models.size() + 1);
  scores[0].keys_seen = 1;
  coterie::RoutingAttention<float>::Tape tape;
  for (std::size_t l = 0; l < dense.blocks.size(); ++l) {
    const LlamaBlock& block = dense.blocks[l];
    const double epsilon = dense.config.epsilon;
    rms_norm(x, block.attention_norm, epsilon, normed, context);
    for (std::size_t m = 0; m < models.size(); ++m) {
      // Keys of the rows before are the dense run's.
      mixed.topRows(first) = normed.topRows(first);
      rms_norm(late[m], block.attention_norm, epsilon, view(mixed).rows(first, scored), context);
      models[m]->attention[l].forward(mixed, y, tape, context);
      late[m] += y.bottomRows(scored);
      add_feed_forward(block, epsilon, late[m], context);
      for (const coterie::AttentionPlan& plan : tape.plans())
        for (Index row = first; row < n; ++row) {
          Index seen = 0;
          for (std::int32_t e = plan.row_begin[std::size_t(row)]; e < plan.row_begin[std::size_t(row) + 1]; ++e) {
            const auto entry = static_cast<std::size_t>(plan.row_entries[std::size_t(e)]);
            seen += plan.visible[entry].end - plan.visible[entry].begin;
            if (!plan.visible_too.empty()) seen += plan.visible_too[entry].end - plan.visible_too[entry].begin;
          }
          scores[m + 1].keys_seen += double(seen) / double(row + 1) / double(scored) / double(tape.plans().size()) /
                                     double(dense.blocks.size());
        }
    }
    block.attention.forward(normed, y, context);
    x += y;
    add_feed_forward(block, epsilon, x, context);
  }
  constexpr Index block = 128;
  RowMatrix<float> logits(std::min(block, scored), dense.config.vocabulary);
  for (std::size_t m = 0; m <= models.size(); ++m)
    for (Index begin = 0; begin < scored; begin += block) {
      const Index count = std::min(block, scored - begin);
      const RowMatrix<float>& rows = m == 0 ? x : late[m - 1];
      read_out(dense, view(rows).rows((m == 0 ? first : 0) + begin, count), view(logits).rows(0, count), context);
      for (Index i = 0; i < count; ++i) {
        const auto row = logits.row(i).array();
        const float highest = row.maxCoeff();
        const double sum = static_cast<double>((row - highest).exp().sum());
        const std::int32_t target = text[static_cast<std::size_t>(first + begin + i + 1)];
        scores[m].nats.push_back(std::log(sum) - static_cast<double>(row(target) - highest));
      }
    }
  return scores;
}

}  // namespace pretrained
