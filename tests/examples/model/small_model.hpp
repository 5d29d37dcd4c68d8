#pragma once

#include "model/model.hpp"

namespace test {

/// A model of two layers with local and routed heads, quick to train and to run.
inline transformer::ModelConfig small_model(transformer::Index vocabulary = 40, transformer::Index feed_forward = 50) {
  transformer::ModelConfig config{
      .vocabulary = vocabulary, .layers = 2, .feed_forward = feed_forward, .embedding_deviation = 0.5};
  config.attention.model_dim = 24;
  config.attention.causal = true;
  config.attention.local = {.heads = 2, .window = 16, .positions = {.kind = coterie::PositionKind::bias}};
  config.attention.routed = {.heads = 2, .clusters = 3, .window = 16, .matching = {.induction = true, .key_taps = 3}};
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
