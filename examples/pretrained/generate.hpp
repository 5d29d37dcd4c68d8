// Writing: tokens drawn from a model's logits, one after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "../model/sampling.hpp"
#include "session.hpp"

namespace pretrained {

/// The likeliest token; of equal ones the lowest.
inline std::int32_t likeliest(ConstView<float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.row(0), logits.row(0) + logits.cols()) - logits.row(0));
}

/// Draws tokens from logits. A token is a function of the logits, the seed and the position alone.
class TokenSampler {
 public:
  explicit TokenSampler(const transformer::SamplingConfig& config)
      : greedy_(config.temperature == 0), sampler_(config) {}

  /// Shapes: logits 1 x vocabulary.
  std::int32_t draw(ConstView<float> logits, Index position) {
    if (greedy_) return likeliest(logits);
    const float highest = *std::max_element(logits.row(0), logits.row(0) + logits.cols());
    p_.resize(1, logits.cols());
    for (Index j = 0; j < logits.cols(); ++j) p_(0, j) = std::exp(double(logits(0, j) - highest));
    return sampler_.draw<double>(p_, 0, static_cast<std::uint64_t>(position));
  }

 private:
  bool greedy_;
  transformer::Sampler sampler_;
  RowMatrix<double> p_;
};

/// Reads `prompt`, then writes up to `count` tokens: each is given to write(token) at once. Stops before a token `end`,
/// which is then read, so that the session holds the whole message. Returns the tokens written.
/// Requires: a prompt of at least one token of the vocabulary (coterie::ValueError).
template <class Write>
Index generate(Session& session, std::span<const std::int32_t> prompt, Index count, std::optional<std::int32_t> end,
               TokenSampler& sampler, Context& context, Write&& write) {
  if (prompt.empty()) throw coterie::ValueError("generate: prompt: expected at least one token, got none");
  RowMatrix<float> logits(1, session.model().config.vocabulary);
  session.read(prompt, logits, context);
  for (Index i = 0; i < count; ++i) {
    const std::int32_t token = sampler.draw(logits, session.tokens());
    const bool ends = end && token == *end;
    if (!ends) write(token);
    if (ends) session.read({&token, 1}, context);
    if (ends) return i;
    session.read({&token, 1}, logits, context);
  }
  return count;
}

}  // namespace pretrained
