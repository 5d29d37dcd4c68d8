#pragma once

#include "model/model.hpp"

namespace test {

/// A model of two layers with local and routed heads, quick to train and to run.
inline transformer::ModelConfig small_model(transformer::Index vocabulary = 40, transformer::Index feed_forward = 50) {
  transformer::ModelConfig config{
      .vocabulary = vocabulary, .layers = 2, .feed_forward = feed_forward, .embedding_deviation = 0.5};
  config.attention.model_dim = 24;
  config.attention.heads = 4;
  config.attention.routed_heads = 2;
  config.attention.clusters = 3;
  config.attention.window = 16;
  config.attention.causal = true;
  config.attention.induction = true;
  config.attention.key_taps = 3;
  config.attention.local_positions = coterie::PositionKind::bias;
  config.attention.seed = 4;
  return config;
}

/// The same for bytes.
inline transformer::ModelConfig byte_model() {
  transformer::ModelConfig config = small_model(256);
  config.attention.seed = 0;
  return config;
}

}  // namespace test
