// One attention head with random numbers and its buffers, ready to be timed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "peak.hpp"
#include "random.hpp"

namespace benchmarks {

/// Labels of clusters of exactly `size` tokens (the last one may have fewer), the tokens shuffled over them.
inline std::vector<std::int32_t> shuffled_labels(Index tokens, Index size) {
  std::vector<std::int32_t> labels(static_cast<std::size_t>(tokens));
  for (Index i = 0; i < tokens; ++i) labels[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i / size);
  test::Random random(3);
  for (Index i = tokens - 1; i > 0; --i)
    std::swap(labels[static_cast<std::size_t>(i)], labels[static_cast<std::size_t>(random.below(i + 1))]);
  return labels;
}

inline coterie::AttentionPlan dense_plan(Index tokens) {
  coterie::AttentionPlan plan;
  coterie::plan_dense({.tokens = tokens, .causal = true}, plan);
  return plan;
}

inline coterie::AttentionPlan local_plan(Index tokens, Index window) {
  coterie::AttentionPlan plan;
  coterie::plan_local({.tokens = tokens, .window = window, .causal = true}, plan);
  return plan;
}

inline coterie::AttentionPlan routed_plan(const std::vector<std::int32_t>& labels, Index window) {
  coterie::AttentionPlan plan;
  const std::int32_t clusters = *std::max_element(labels.begin(), labels.end()) + 1;
  coterie::plan_clustered(labels, labels, {.clusters = clusters, .window = window, .causal = true}, plan);
  return plan;
}

/// A plan with the queries, keys and values of one head of width d (or of several heads that share the plan).
template <class T>
struct Head {
  Head(coterie::AttentionPlan given, Index width, InstructionSet instructions = InstructionSet::automatic,
       Index count = 1)
      : plan(std::move(given)), d(width), heads(count), context(instructions) {
    test::Random random(1);
    q = random.matrix<T>(plan.tokens, heads * d);
    k = random.matrix<T>(plan.key_tokens, heads * d);
    v = random.matrix<T>(plan.key_tokens, heads * d);
    out.resize(plan.tokens, heads * d);
    pairs = static_cast<double>(heads * coterie::statistics(plan).visible_pairs);
  }

  double forward_flops() const { return 4 * static_cast<double>(d) * pairs; }
  double backward_flops() const { return 10 * static_cast<double>(d) * pairs; }

  /// A bias for each of `distances` distances from 0 on.
  void add_bias(Index distances) {
    bias = test::Random(4).matrix<T>(1, distances);
    d_bias.setZero(1, distances);
    terms.bias = bias;
    term_gradients.d_bias = d_bias;
  }
  /// Shaw's relative keys and values for each of `distances` distances from 0 on.
  void add_relative(Index distances) {
    relative_keys = test::Random(5).matrix<T>(distances, d);
    relative_values = test::Random(6).matrix<T>(distances, d);
    d_relative_keys.setZero(distances, d);
    d_relative_values.setZero(distances, d);
    terms.relative_keys = relative_keys;
    terms.relative_values = relative_values;
    term_gradients.d_relative_keys = d_relative_keys;
    term_gradients.d_relative_values = d_relative_values;
  }

  void forward(Context& on) { coterie::attention_forward(plan, q, k, v, out, tape, {.heads = heads}, on, terms); }
  void forward() { forward(context); }

  /// What backward() needs, once.
  void prepare_backward() {
    forward();
    d_out = test::Random(2).matrix<T>(plan.tokens, heads * d);
    d_q.setZero(plan.tokens, heads * d);
    d_k.setZero(plan.key_tokens, heads * d);
    d_v.setZero(plan.key_tokens, heads * d);
  }
  void backward() {
    coterie::attention_backward(plan, q, k, v, out, tape, d_out, d_q, d_k, d_v, {.heads = heads}, context, terms,
                                term_gradients);
  }

  coterie::AttentionPlan plan;
  Index d, heads;
  Context context;
  RowMatrix<T> q, k, v, out, d_out, d_q, d_k, d_v;
  RowMatrix<T> bias, relative_keys, relative_values, d_bias, d_relative_keys, d_relative_values;
  coterie::AttentionTerms<T> terms;
  coterie::AttentionTermGradients<T> term_gradients;
  coterie::AttentionTape<T> tape;
  double pairs = 0;
};

}  // namespace benchmarks
