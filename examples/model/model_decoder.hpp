// A Model token by token, with caches of the tokens before.
#pragma once

#include <algorithm>
#include <coterie/decoder/decoder.hpp>
#include <string>
#include <utility>

#include "model.hpp"

namespace transformer {

/// The decoders of a model's layers, and the last tokens, which the embedding of the next one needs.
///
///     ModelDecoder<float> decoder(model);
///     RowMatrix<float> p(1, model.config().vocabulary);
///     decoder.prefill(prompt, p, 0, context);          // p: probabilities of the token after the prompt
///     decoder.step({&token, 1}, p, context);           // .. and of the one after `token`
///
/// Probabilities are bit-identical to those of Model::evaluate, on the same instruction set. Random routing draws as in
/// Batch::step 0.
/// Requires: a causal model (see coterie::Decoder), which must stay at its address and not change.
/// Allocates: as coterie::Decoder.
/// Threads and determinism: the same bits for any number of workers.
template <class T>
class ModelDecoder {
 public:
  explicit ModelDecoder(const Model<T>& model, const coterie::DecoderConfig& config = {}) : model_(&model) {
    for (const Block<T>& block : model.blocks()) decoders_.emplace_back(block.attention(), config);
    kept_ = static_cast<std::size_t>(config.max_rollback) + 1;
    recent_.resize(static_cast<std::size_t>(config.sequences));
    for (std::vector<std::int32_t>& recent : recent_) recent.reserve(kept_);
    for (std::int32_t s = 0; s < static_cast<std::int32_t>(config.sequences); ++s) all_.push_back(s);
  }

  Index sequences() const { return static_cast<Index>(recent_.size()); }
  /// The number of tokens of a sequence so far. Requires: a sequence (ValueError).
  Index length(Index sequence) const {
    check_sequence(sequence);
    return decoders_.front().length(sequence);
  }
  /// Bytes of the caches of all layers.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const coterie::Decoder<T>& decoder : decoders_) sum += decoder.bytes();
    return sum;
  }

  /// The next token of every sequence; p: probabilities of the one after it.
  /// Shapes: p sequences x vocabulary.
  /// Requires: that (ShapeError), a token of the vocabulary for each sequence, centroids that have not moved
  ///   (ValueError).
  /// Overwrites p.
  void step(std::span<const std::int32_t> tokens, View<T> p, Context& context) { step(tokens, p, all_, context); }

  /// The same for some of the sequences, row by row, each of them once.
  void step(std::span<const std::int32_t> tokens, View<T> p, std::span<const std::int32_t> sequences,
            Context& context) {
    const Index count = static_cast<Index>(sequences.size());
    if (tokens.size() != sequences.size())
      throw coterie::ShapeError("ModelDecoder::step: tokens: expected " + std::to_string(count) + ", got " +
                                std::to_string(tokens.size()));
    for (const std::int32_t s : sequences) check_sequence(s);
    check_tokens(tokens);
    check_probabilities(p, count);
    coterie::Arena& arena = context.workspace().shared();
    coterie::Arena::Scope scope(arena);
    const View<T> x = arena.template matrix<T>(count, model_->config().attention.model_dim);
    for (Index i = 0; i < count; ++i) {
      const std::vector<std::int32_t>& before = recent(sequences[static_cast<std::size_t>(i)]);
      embed_token<T>(tokens[static_cast<std::size_t>(i)], before.empty() ? -1 : before.back(), model_->embedding(),
                     x.rows(i, 1));
    }
    const ConstView<T> last = run(x, context, [&](coterie::Decoder<T>& decoder, ConstView<T> in, View<T> out) {
      decoder.step(in, out, sequences, context);
    });
    probabilities(last, p, context);
    for (std::size_t i = 0; i < tokens.size(); ++i) remember(sequences[i], tokens[i]);
  }

  /// The next tokens of a sequence, many at once; p: probabilities of the one after the last.
  /// Shapes: p 1 x vocabulary.
  /// Requires: as step, at least one token, and a sequence (ValueError).
  /// Overwrites p. Allocates: memory of a forward pass of so many tokens in the context's workspace.
  void prefill(std::span<const std::int32_t> tokens, View<T> p, Index sequence, Context& context) {
    check_sequence(sequence);
    if (tokens.empty()) throw coterie::ValueError("ModelDecoder::prefill: tokens: expected at least one, got none");
    check_tokens(tokens);
    check_probabilities(p, 1);
    const Index n = static_cast<Index>(tokens.size());
    coterie::Arena& arena = context.workspace().shared();
    coterie::Arena::Scope scope(arena);
    const View<T> x = arena.template matrix<T>(n, model_->config().attention.model_dim);
    std::int32_t previous = recent(sequence).empty() ? -1 : recent(sequence).back();
    for (Index i = 0; i < n; ++i) {
      const std::int32_t token = tokens[static_cast<std::size_t>(i)];
      embed_token<T>(token, std::exchange(previous, token), model_->embedding(), x.rows(i, 1));
    }
    const ConstView<T> all = run(x, context, [&](coterie::Decoder<T>& decoder, ConstView<T> in, View<T> out) {
      decoder.prefill(in, out, sequence, context);
    });
    probabilities(all.rows(n - 1, 1), p, context);
    for (const std::int32_t token : tokens.last(std::min(tokens.size(), kept_))) remember(sequence, token);
  }

  /// Removes the last tokens of a sequence, as if they had never been appended. Requires: as
  /// coterie::Decoder::rollback.
  void rollback(Index sequence, Index tokens) {
    check_sequence(sequence);
    for (coterie::Decoder<T>& decoder : decoders_) decoder.rollback(sequence, tokens);
    recent(sequence).resize(recent(sequence).size() - static_cast<std::size_t>(tokens));
  }
  /// Empties a sequence. Requires: a sequence (ValueError).
  void clear(Index sequence) {
    check_sequence(sequence);
    for (coterie::Decoder<T>& decoder : decoders_) decoder.clear(sequence);
    recent(sequence).clear();
  }
  /// Makes sequence `to` a copy of sequence `from`. Requires: sequences (ValueError).
  void copy_sequence(Index from, Index to) {
    check_sequence(from);
    check_sequence(to);
    for (coterie::Decoder<T>& decoder : decoders_) decoder.copy_sequence(from, to);
    if (from != to) recent(to) = recent(from);
  }

 private:
  void check_sequence(Index sequence) const {
    if (sequence < 0 || sequence >= sequences())
      throw coterie::ValueError("ModelDecoder: sequence: expected 0 to " + std::to_string(sequences() - 1) + ", got " +
                                std::to_string(sequence));
  }
  void check_tokens(std::span<const std::int32_t> tokens) const {
    const Index vocabulary = model_->config().vocabulary;
    for (const std::int32_t token : tokens)
      if (token < 0 || token >= vocabulary)
        throw coterie::ValueError("ModelDecoder: tokens: expected 0 to " + std::to_string(vocabulary - 1) + ", got " +
                                  std::to_string(token));
  }
  void check_probabilities(ConstView<T> p, Index rows) const {
    const auto size = [](Index m, Index n) { return std::to_string(m) + " x " + std::to_string(n); };
    if (p.rows() != rows || p.cols() != model_->config().vocabulary)
      throw coterie::ShapeError("ModelDecoder: p: expected " + size(rows, model_->config().vocabulary) + ", got " +
                                size(p.rows(), p.cols()));
  }

  std::vector<std::int32_t>& recent(Index sequence) { return recent_[static_cast<std::size_t>(sequence)]; }

  void remember(Index sequence, std::int32_t token) {
    std::vector<std::int32_t>& tokens = recent(sequence);
    if (tokens.size() == kept_) tokens.erase(tokens.begin());
    tokens.push_back(token);
  }

  /// The residual stream after the last block; its memory is the caller's scope of the shared arena.
  template <class Attend>
  ConstView<T> run(View<T> x, Context& context, Attend&& attend) {
    const Index n = x.rows(), d = x.cols(), hidden = model_->config().feed_forward;
    coterie::Arena& arena = context.workspace().shared();
    const View<T> normed = arena.template matrix<T>(n, d), middle = arena.template matrix<T>(n, d);
    const View<T> middle_normed = arena.template matrix<T>(n, d), a = arena.template matrix<T>(n, hidden);
    View<T> next = arena.template matrix<T>(n, d);
    for (std::size_t i = 0; i < decoders_.size(); ++i) {
      model_->blocks()[i].run(x, normed, middle, middle_normed, a, next, context,
                              [&](ConstView<T> in, View<T> out) { attend(decoders_[i], in, out); });
      std::swap(x, next);
    }
    return x;
  }

  void probabilities(ConstView<T> x, View<T> p, Context& context) {
    coterie::Arena& arena = context.workspace().shared();
    const View<T> normed = arena.template matrix<T>(x.rows(), x.cols());
    read_out<T>(x, model_->read_out(), {}, normed, p, {}, context);
  }

  const Model<T>* model_;
  std::vector<coterie::Decoder<T>> decoders_;
  std::vector<std::vector<std::int32_t>> recent_;  // the last tokens of every sequence, kept_ at most
  std::vector<std::int32_t> all_;
  std::size_t kept_ = 1;
};

}  // namespace transformer
