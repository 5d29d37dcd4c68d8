// Generation: a Model writes tokens, one after the other.
#pragma once

#include "model_decoder.hpp"
#include "sampling.hpp"

namespace transformer {

/// `count` tokens after `prompt`: each is drawn from the model's probabilities, and given to write(token) at once.
/// Requires: a prompt of at least one token of the vocabulary (ValueError).
template <class T, class Write>
void generate(const Model<T>& model, std::span<const std::int32_t> prompt, Index count, const SamplingConfig& sampling,
              Context& context, Write&& write) {
  Sampler sampler(sampling);
  ModelDecoder<T> decoder(model, {.reserve = static_cast<Index>(prompt.size())});
  RowMatrix<T> p(1, model.config().vocabulary);
  decoder.prefill(prompt, p, 0, context);
  for (Index i = 0; i < count; ++i) {
    const std::int32_t token = sampler.draw<T>(p, 0, static_cast<std::uint64_t>(decoder.length(0)));
    write(token);
    if (i + 1 < count) decoder.step({&token, 1}, p, context);
  }
}

}  // namespace transformer
