// Decoding by a causal layer, token by token, at a cost that does not grow with the position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "coterie/decoder/decoder_heads.hpp"
#include "coterie/layer/routing_attention.hpp"

namespace coterie {

/// Settings of a Decoder; designated initialisers in this order.
struct DecoderConfig {
  Index sequences = 1;     ///< sequences decoded side by side, each at its own position; at least 1
  Index max_rollback = 0;  ///< tokens of a sequence that rollback() may take back at a time
  Index reserve = 0;       ///< tokens of every sequence to allocate memory for at once; more is allocated as needed
};

/// Decodes with a layer from caches of the tokens before: step() gives the rows that forward() gives.
///
///     Decoder<float> decoder(layer, {.sequences = 1, .reserve = 4096});
///     decoder.prefill(prompt, y_prompt, 0, context);    // with the fast forward
///     decoder.step(x, y, context);                      // one token of every sequence
///
/// Local heads keep the last keys and values of their window, routed heads the last ones of every cluster, in lists
/// that take memory as they fill, and dense heads keep all. Each keeps max_rollback more, and the first tokens where
/// they stay visible (globals, dense_up_to, sinks). Recent keys of routed heads are kept once more.
///
/// A row is bit-identical to forward's row of the same prefix, routes included, on the same instruction set. Random
/// routing draws the clusters of Input::step 0; dropout is off. A copy is independent of the original, but has no
/// reserve; for branches and beams, see also copy_sequence().
///
/// Requires: a causal layer whose memberships do not depend on later tokens (not balanced), and self-attention. The
///   layer must stay at its address. Weights must not change between steps (not checked), nor may centroids move
///   (ValueError). Where a call throws, also for a cancelled task or want of memory, the sequences are as they were
///   before it; prefill() names the one exception. Some rows of an output may be written.
/// Allocates: nothing in step() within the tokens reserved, once a context has been used for it; otherwise where lists
///   grow. Lists take at most 2 sequences kv_heads (clusters + 1) (window + max_rollback) head_dim numbers, windows
///   rounded up to 16, beside globals, dense_up_to and sinks first tokens, recent + max_rollback + 1 last ones, and 4
///   bytes a row and head for positions.
/// Threads and determinism: the same bits for any number of workers. A decoder is used by one thread at a time.
/// Cost: a token takes about model_dim^2 and heads * (clusters + window + memory + globals + sinks + recent) * head_dim
///   operations, at any position. Dense heads, and others below dense_up_to, read all tokens before.
/// Source: the cache of window and cluster members, exact because membership is by the nearest centroid: ours.
template <class T>
class Decoder {
 public:
  /// A decoder of empty sequences. Requires: a layer as above, settings as DecoderConfig says (ValueError).
  explicit Decoder(const RoutingAttention<T>& layer, const DecoderConfig& config = {}) : layer_(&layer) {
    const RoutingAttentionConfig& c = layer.config();
    detail::Faults faults("Decoder");
    faults.expect(c.causal, "layer", "a causal one (a later token changes earlier rows of others)", "a two-sided one");
    faults.expect(c.routed.membership.kind == MembershipKind::nearest, "layer",
                  "nearest membership (with balanced a later token changes the clusters of earlier ones)", "balanced");
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    faults.expect(config.sequences >= 1 && config.sequences <= most, "sequences", "at least 1", config.sequences);
    faults.expect(config.max_rollback >= 0 && config.max_rollback <= most, "max_rollback", "at least 0",
                  config.max_rollback);
    faults.expect(config.reserve >= 0 && config.reserve <= most, "reserve", "at least 0", config.reserve);
    faults.raise();
    for (const detail::HeadBlock& block : layer.state_.heads.blocks)
      if (block.count > 0) {
        heads_.emplace_back(layer.state_, block, config.sequences, config.max_rollback);
        if (config.reserve > 0) heads_.back().reserve(config.reserve);
      }
    lengths_.assign(static_cast<std::size_t>(config.sequences), 0);
    taken_back_.assign(static_cast<std::size_t>(config.sequences), 0);
    for (std::int32_t s = 0; s < static_cast<std::int32_t>(config.sequences); ++s) all_.push_back(s);
    positions_.reserve(all_.size());
    named_.assign(all_.size(), 0);
    max_rollback_ = config.max_rollback;
    for (const OnlineKMeans<T>& router : layer.routers()) revisions_.push_back(router.revision());
  }
  explicit Decoder(RoutingAttention<T>&&, const DecoderConfig& = {}) = delete;  // the layer would not outlive it

  Decoder(const Decoder&) = default;
  Decoder(Decoder&&) = default;
  Decoder& operator=(Decoder&&) = default;
  /// Copies all of it or, on error, nothing.
  Decoder& operator=(const Decoder& other) {
    if (this != &other) *this = Decoder(other);
    return *this;
  }

  Index sequences() const { return static_cast<Index>(lengths_.size()); }
  /// Tokens of a sequence so far. Requires: a sequence (ValueError).
  Index length(Index sequence) const {
    check_sequence("Decoder::length", sequence);
    return lengths_[static_cast<std::size_t>(sequence)];
  }
  /// Bytes of caches and lists.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const detail::DecoderHeads<T>& heads : heads_) sum += heads.bytes();
    return sum;
  }

  /// Appends a token to every sequence: y = the layer's row for x at the end of the sequence.
  ///
  /// Shapes: x, y sequences x model_dim, row s of sequence s.
  /// Requires: those, y apart from x and the parameters (ShapeError); centroids that have not moved since the decoder
  ///   was made (ValueError). On these errors nothing is written. After any other one, of a task or of memory, no
  ///   sequence has changed and the step can be repeated; y can hold anything.
  /// Overwrites y.
  void step(ConstView<T> x, View<T> y, Context& context) { advance("Decoder::step", x, y, all_, context); }

  /// The same for some of the sequences, row by row, each of them once.
  void step(ConstView<T> x, View<T> y, std::span<const std::int32_t> sequences, Context& context) {
    const char* const function = "Decoder::step";
    for (const std::int32_t s : sequences) check_sequence(function, s);
    std::fill(named_.begin(), named_.end(), 0);
    for (const std::int32_t s : sequences)
      if (named_[static_cast<std::size_t>(s)]++ > 0)
        detail::fail<ValueError>(function, "sequences", "each sequence once", detail::join(s, " twice"));
    advance(function, x, y, sequences, context);
  }

  /// Appends many tokens to a sequence: to an empty one by the layer's forward, otherwise step by step.
  ///
  /// Shapes: x, y tokens x model_dim.
  /// Requires: as step, and a sequence (ValueError). After an error of a task or of memory an empty sequence is still
  ///   empty. A sequence with tokens keeps those stepped before the error, whose rows are written; length() counts
  ///   them.
  /// Overwrites y.
  /// Allocates: memory of a forward pass of so many tokens, which is given back.
  void prefill(ConstView<T> x, View<T> y, Index sequence, Context& context) {
    const char* const function = "Decoder::prefill";
    check_sequence(function, sequence);
    check_rows(function, x, y, x.rows());
    check_layer(function, context);
    const auto s = static_cast<std::size_t>(sequence);
    check_length(function, lengths_[s] + x.rows());
    if (x.rows() == 0) return;
    if (lengths_[s] > 0) {
      const std::int32_t number = static_cast<std::int32_t>(sequence);
      for (Index i = 0; i < x.rows(); ++i) advance(function, x.rows(i, 1), y.rows(i, 1), {&number, 1}, context);
      return;
    }
    const detail::LayerState<T>& state = layer_->state_;
    detail::RowPositions positions;
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(x.rows()); ++i) positions.queries.push_back(i);
    const Input<T> input(x);
    const detail::CheckedInput<T> in(input, positions);
    try {
      for (detail::DecoderHeads<T>& heads : heads_) {
        detail::HeadsTape<T> tape;
        detail::HeadsPass<T>(state, heads.block(), in, context).prefill(y, tape);
        heads.fill(sequence, tape, x.rows());
      }
      if (state.config.bias) detail::add_bias(y, state.parameters.b_o.data(), context);
    } catch (...) {
      for (detail::DecoderHeads<T>& heads : heads_) heads.clear(sequence);
      throw;
    }
    lengths_[s] = x.rows();
    taken_back_[s] = 0;
  }

  /// Removes the last `tokens` tokens of a sequence, as if they had never been appended.
  ///
  /// Requires: a sequence, no more tokens than it has, and at most max_rollback, counting tokens of earlier rollbacks
  ///   that no new token has replaced since (ValueError).
  void rollback(Index sequence, Index tokens) {
    const char* const function = "Decoder::rollback";
    check_sequence(function, sequence);
    const auto s = static_cast<std::size_t>(sequence);
    const Index most = (std::min)(lengths_[s], max_rollback_ - taken_back_[s]);
    if (tokens < 0 || tokens > most)
      detail::fail<ValueError>(function, "tokens",
                               detail::join("0 to ", most, " (", lengths_[s], " tokens, max_rollback ", max_rollback_,
                                            ", ", taken_back_[s], " of them used)"),
                               tokens);
    for (Index i = 0; i < tokens; ++i, --lengths_[s])
      for (detail::DecoderHeads<T>& heads : heads_) heads.take_back(sequence, lengths_[s]);
    taken_back_[s] += tokens;
  }

  /// Empties a sequence; other sequences can use its memory.
  /// Requires: a sequence (ValueError). Allocates nothing.
  void clear(Index sequence) {
    check_sequence("Decoder::clear", sequence);
    for (detail::DecoderHeads<T>& heads : heads_) heads.clear(sequence);
    lengths_[static_cast<std::size_t>(sequence)] = taken_back_[static_cast<std::size_t>(sequence)] = 0;
  }

  /// Makes sequence `to` a copy of sequence `from`, for the branches of a beam.
  ///
  /// Requires: sequences (ValueError). On any error both are as they were.
  /// Allocates: where `from` keeps more than `to` has memory for.
  /// Cost: what `from` keeps is copied.
  void copy_sequence(Index from, Index to) {
    const char* const function = "Decoder::copy_sequence";
    check_sequence(function, from);
    check_sequence(function, to);
    if (from == to) return;
    for (detail::DecoderHeads<T>& heads : heads_) heads.make_room_to_copy(from, to);
    for (detail::DecoderHeads<T>& heads : heads_) heads.copy(from, to);
    lengths_[static_cast<std::size_t>(to)] = lengths_[static_cast<std::size_t>(from)];
    taken_back_[static_cast<std::size_t>(to)] = taken_back_[static_cast<std::size_t>(from)];
  }

 private:
  void check_sequence(const char* function, Index sequence) const {
    if (sequence < 0 || sequence >= sequences())
      detail::fail<ValueError>(function, "sequence", detail::join("0 to ", sequences() - 1), sequence);
  }

  void check_length(const char* function, Index length) const {
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    if (length > most) detail::fail<ValueError>(function, "x", detail::join("at most ", most, " tokens"), length);
  }

  void check_rows(const char* function, ConstView<T> x, View<T> y, Index rows) const {
    const Index model_dim = layer_->config().model_dim;
    detail::check_shape<T>(function, "x", x, rows, model_dim);
    detail::check_shape<T>(function, "y", y, rows, model_dim);
    detail::check_no_alias<T>(function, "y", y, "x", x);
    detail::check_apart<T>(function, "y", y, "parameters", layer_->parameters());
  }

  void check_layer(const char* function, const Context& context) const {
    detail::LayerChecks<T>(function, layer_->state_).ready(context);
    const std::span<const OnlineKMeans<T>> routers = layer_->routers();
    bool same = routers.size() == revisions_.size();
    for (std::size_t h = 0; h < revisions_.size() && same; ++h) same = routers[h].revision() == revisions_[h];
    if (!same)
      detail::fail<ValueError>(function, "layer", "the centroids by which the cache was filled (make a new decoder)",
                               "others");
  }

  void advance(const char* function, ConstView<T> x, View<T> y, std::span<const std::int32_t> sequences,
               Context& context) {
    check_rows(function, x, y, static_cast<Index>(sequences.size()));
    check_layer(function, context);
    positions_.clear();
    for (const std::int32_t s : sequences) {
      check_length(function, lengths_[static_cast<std::size_t>(s)] + 1);
      positions_.push_back(static_cast<std::int32_t>(lengths_[static_cast<std::size_t>(s)]));
    }
    if (sequences.empty()) return;
    const detail::LayerState<T>& state = layer_->state_;
    const Input<T> input(x);
    const detail::CheckedInput<T> in(input, positions_);
    const detail::StepTokens tokens{sequences, positions_};
    std::size_t entered = 0;  // blocks whose caches have the tokens
    try {
      for (detail::DecoderHeads<T>& heads : heads_) {
        heads.step(in, tokens, y, context);
        ++entered;
      }
      if (state.config.bias) detail::add_bias(y, state.parameters.b_o.data(), context);
    } catch (...) {
      for (std::size_t b = 0; b < entered; ++b) heads_[b].undo_step(tokens);
      throw;
    }
    for (const std::int32_t s : sequences) {
      ++lengths_[static_cast<std::size_t>(s)];
      Index& taken_back = taken_back_[static_cast<std::size_t>(s)];
      taken_back = (std::max<Index>)(0, taken_back - 1);
    }
  }

  const RoutingAttention<T>* layer_;
  std::vector<detail::DecoderHeads<T>> heads_;  // one for each block that has heads
  std::vector<Index> lengths_, taken_back_;
  std::vector<std::int32_t> all_, positions_, named_;
  std::vector<std::uint64_t> revisions_;
  Index max_rollback_ = 0;
};

}  // namespace coterie
