// Perplexity of the end of a text: what each way of attending makes of the same keys and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "session.hpp"

namespace pretrained {

/// Nats of each token of `tokens` after the tokens that the session has read, whose last one is `previous`.
///
/// The session has then read `previous` and all tokens but the last: previous must not have been read before.
/// progress(done) is called with shares of the work.
template <class Report>
std::vector<double> read_and_score(Session& session, std::int32_t previous, std::span<const std::int32_t> tokens,
                                   Context& context, Report&& progress) {
  constexpr std::size_t block = 256;
  const Index vocabulary = session.model().config.vocabulary;
  std::vector<double> nats(tokens.size());
  std::vector<std::int32_t> inputs(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) inputs[i] = i == 0 ? previous : tokens[i - 1];
  RowMatrix<float> logits;
  for (std::size_t first = 0; first < tokens.size(); first += block) {
    const std::size_t count = std::min(block, tokens.size() - first);
    logits.resize(static_cast<Index>(count), vocabulary);
    session.read(std::span(inputs).subspan(first, count), logits, context);
    context.for_chunks(static_cast<Index>(count), 8, [&](Index begin, Index end, Index) {
      for (Index i = begin; i < end; ++i) {
        const auto row = logits.row(i).array();
        const float highest = row.maxCoeff();
        double sum = 0;
        for (Index j = 0; j < vocabulary; ++j) sum += static_cast<double>(std::exp(row(j) - highest));
        const std::size_t at = first + static_cast<std::size_t>(i);
        // -log p = log sum e^(z - highest) - (z_target - highest)
        nats[at] = std::log(sum) - static_cast<double>(row(tokens[at]) - highest);
      }
    });
    progress(static_cast<double>(first + count) / static_cast<double>(tokens.size()));
  }
  return nats;
}

/// The score of one way of attending.
struct Score {
  double perplexity = 0;
  double change = 0;        ///< of the perplexity against dense attention, as a share
  double change_error = 0;  ///< its standard error over tokens, paired
  double keys_seen = 1, estimated_mass = 0;
};

/// Compares nats of the same tokens. Formula: perplexity = e^(mean nats), change = e^(mean difference) - 1.
inline Score score(const std::vector<double>& nats, const std::vector<double>& dense) {
  const double n = static_cast<double>(nats.size());
  double sum = 0, difference = 0, squares = 0;
  for (std::size_t i = 0; i < nats.size(); ++i) {
    const double d = nats[i] - dense[i];
    sum += nats[i];
    difference += d;
    squares += d * d;
  }
  const double mean = difference / n;
  const double variance = std::max(0.0, squares / n - mean * mean);
  return {.perplexity = std::exp(sum / n),
          .change = std::expm1(mean),
          .change_error = std::exp(mean) * std::sqrt(variance / n)};
}

}  // namespace pretrained
