// Tokens per second of writing, after caches of several lengths.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../support/console.hpp"
#include "generate.hpp"

namespace pretrained {

/// Tokens per second of reading one token after the other, by the median time of a token. The session ends as it was.
inline double tokens_per_second(Session& session, Index tokens, Context& context) {
  const Index before = session.tokens();
  RowMatrix<float> logits(1, session.model().config.vocabulary);
  std::vector<double> seconds;
  std::int32_t token = 1 % static_cast<std::int32_t>(session.model().config.vocabulary);
  for (Index i = 0; i < tokens + 2; ++i) {
    examples::Stopwatch watch;
    session.read({&token, 1}, logits, context);
    if (i >= 2) seconds.push_back(watch.seconds());  // memory has grown by then
    token = likeliest(logits);
  }
  session.rollback(before, context);
  std::nth_element(seconds.begin(), seconds.begin() + tokens / 2, seconds.end());
  return 1 / seconds[static_cast<std::size_t>(tokens / 2)];
}

}  // namespace pretrained
