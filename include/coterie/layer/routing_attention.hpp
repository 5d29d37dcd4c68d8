// The layer: multi-head attention whose heads see a window, tokens of similar content, or every key.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "coterie/layer/checks.hpp"
#include "coterie/layer/heads_pass.hpp"
#include "coterie/router/update_routers.hpp"

namespace coterie {

template <class T>
class Decoder;

/// A layer of local, routed and dense heads, with its weights and the centroids of its routers.
///
///     RoutingAttention<float> layer({.model_dim = 256, .causal = true, .seed = 1,
///                                    .local = {.heads = 4, .window = 256},
///                                    .routed = {.heads = 4, .clusters = 32, .window = 256}});
///     layer.forward(x, y, context);                           // evaluation
///     layer.forward(x, y, tape, context);                     // training: forward, backward, then the routers
///     layer.backward(x, tape, d_y, d_x, gradients, context);
///     layer.update_router(tape, context);
///
/// Formula: y = sum over heads h of attention_h w_o[h] + b_o. Local heads see a window around the query, routed heads
/// the members of its clusters, dense heads every key. In a causal layer no head sees a key after the query.
///   shared:     q = k = normalise(x w_q), logits gain/sqrt(d) q.k;
///   otherwise:  q = x w_q, k = x w_k, logits q.k/sqrt(d); routers see normalised rows;
///   in both cases the config can set other logits, gains and normalisation;
///   induction:  q = k = normalise(convolve(x w_q)), and key j carries the value of position j + 1 (zero keys: zero).
/// With a source, keys and values are made from its rows: cross-attention, of heads that do not share queries and keys.
/// Causal queries are then aligned with the end of their sequence of the source, two-sided ones in proportion
/// (Alignment). Routing passes no gradient.
/// Requires: arguments that fit (ShapeError, ValueError); nothing is written before all of them have been checked.
/// Allocates: nothing in forward, backward and update_router(tape, context), once tape and workspace have grown to the
///   sizes in use; the first update_router allocates for its k-means++.
/// Threads and determinism: const calls with different tapes and contexts may run at the same time. The bits of a row
///   depend on what that row sees, not on other sequences, later tokens (causal) or the number of workers.
/// Source: Roy et al. 2021, sections 4 and 5; routing by nearest centroid, shared heads' gain and induction are ours.
template <class T>
class RoutingAttention {
 public:
  using Tape = RoutingAttentionTape<T>;

  /// Draws the weights and centroids from the seed; see Parameters for shapes.
  /// Requires: a config that makes sense, otherwise ValueError, which names all its faults.
  explicit RoutingAttention(const RoutingAttentionConfig& config)
      : state_(detail::make_layer_state<T>(detail::resolve(config))) {}

  /// The settings, with every automatic one filled in.
  const RoutingAttentionConfig& config() const { return state_.config; }

  Parameters<T>& parameters() { return state_.parameters; }
  const Parameters<T>& parameters() const { return state_.parameters; }

  /// Zeros of the parameters' shapes, for backward to add into.
  Parameters<T> zero_gradients() const { return detail::zero_parameters<T>(state_.config); }

  /// The routers of the routed heads, one per key/value head; empty unless routing is learned. Centroids are state, not
  /// parameters.
  std::span<const OnlineKMeans<T>> routers() const { return state_.routers; }
  std::span<OnlineKMeans<T>> routers() { return state_.routers; }

  /// y = layer(x), for evaluation: bit-identical to the other forward, but without dropout, and nothing is kept.
  /// Shapes: x, y tokens x model_dim.
  /// Requires: matching shapes, y apart from x (ShapeError); offsets ascending from 0 to tokens, routes in
  ///   [-1, clusters) and only without a source; a source only where no head shares queries and keys, with
  ///   Self::visible and without globals (ValueError).
  /// Overwrites y.
  void forward(const Input<T>& input, View<T> y, Context& context) const {
    detail::LayerChecks<T>("RoutingAttention::forward", state_).forward(input, y, context);
    Scratch& scratch = context.workspace().template object<Scratch>();
    run(input, y, scratch.positions, context,
        [&](detail::HeadsPass<T> pass, std::size_t) { pass.forward(y, scratch.plans); });
  }

  /// The same, keeping on the tape what backward and update_router need.
  void forward(const Input<T>& input, View<T> y, Tape& tape, Context& context) const {
    detail::LayerChecks<T>("RoutingAttention::forward", state_).forward(input, y, context);
    tape.tokens_ = -1;  // empty, should something throw
    tape.config_ = state_.config;
    run(input, y, tape.positions_, context,
        [&](detail::HeadsPass<T> pass, std::size_t block) { pass.forward(y, tape.blocks_[block]); });
    tape.crosses_ = input.crosses();
    tape.key_tokens_ = input.crosses() ? input.source.rows() : input.x.rows();
    tape.tokens_ = input.x.rows();
  }

  /// q, k, v = the rows of x that attention reads, projected, normalised and rotated: the first half of forward, for
  /// programs with an attention or a cache of their own.
  /// Shapes: x tokens x model_dim, q tokens x heads*d, k and v tokens x kv_heads*d, heads in the order local, routed,
  ///   dense. Rows of x are one sequence; x.row(0) is at `first_position`.
  /// Formula: forward(x) = output(attention(q, k, v)), where attention sees what the blocks' heads see. Logit scales,
  ///   terms of positions other than rotary, memory and soft cap belong to attention.
  /// Requires: matching shapes, outputs apart from x, from each other and from the parameters (ShapeError);
  ///   first_position at least 0, the last position below 2^31, and no induction heads, whose keys carry the value of a
  ///   later row (ValueError).
  /// Overwrites q, k and v.
  /// Threads and determinism: a row's bits depend on that row of x and its position alone, but with key_taps.
  void project(ConstView<T> x, Index first_position, View<T> q, View<T> k, View<T> v, Context& context) const {
    detail::LayerChecks<T>("RoutingAttention::project", state_).project(x, first_position, q, k, v, context);
    std::vector<std::int32_t>& positions = context.workspace().template object<Scratch>().positions.queries;
    positions.resize(static_cast<std::size_t>(x.rows()));
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first_position));
    const Input<T> input(x);
    each_block(detail::CheckedInput<T>(input, positions), context, [&](detail::HeadsPass<T> pass, std::size_t i) {
      const detail::HeadBlock& block = state_.heads.blocks[i];
      pass.prepare(q.columns(block.first_col(), block.cols()), k.columns(block.kv_first_col(), block.kv_cols()),
                   v.columns(block.kv_first_col(), block.kv_cols()));
    });
  }

  /// y = attended w_o + b_o: the second half of forward, after an attention of the program's own.
  /// Shapes: attended tokens x heads*d, the output of attention in the columns of project's q; y tokens x model_dim.
  /// Requires: matching shapes, y apart from `attended` and the parameters (ShapeError).
  /// Overwrites y.
  /// Threads and determinism: a row's bits depend on that row of `attended` alone.
  void output(ConstView<T> attended, View<T> y, Context& context) const {
    detail::LayerChecks<T>("RoutingAttention::output", state_).output(attended, y, context);
    const Input<T> input(attended);
    each_block(detail::CheckedInput<T>(input, std::span<const std::int32_t>()), context,
               [&](detail::HeadsPass<T> pass, std::size_t i) {
                 const detail::HeadBlock& block = state_.heads.blocks[i];
                 pass.output(attended.columns(block.first_col(), block.cols()), y);
               });
    // y += b_o
    if (config().bias) detail::add_bias(y, state_.parameters.b_o.data(), context);
  }

  /// Adds the gradients of forward's input and parameters for the gradient d_y of its output.
  /// Shapes: d_y, d_x tokens x model_dim, d_source as source; gradients as parameters.
  /// Requires: the input and tape of one forward pass since which the parameters have not changed; matching shapes, d_x
  ///   and d_source apart from x, source, d_y and each other (ShapeError); a tape of a layer with this config
  ///   (ValueError).
  /// Adds into d_x, d_source and gradients.
  void backward(const Input<T>& input, const Tape& tape, detail::Same<ConstView<T>> d_y, InputGradient<T> d_x,
                Parameters<T>& gradients, Context& context) const {
    const detail::LayerChecks<T> checks("RoutingAttention::backward", state_);
    checks.backward(input, tape, d_y);
    checks.gradients(input, d_y, d_x, gradients);
    checks.positions(input, tape);
    checks.ready(context);

    if (input.x.rows() == 0) return;
    // y += b_o
    if (config().bias) detail::add_bias_backward<T>(d_y, gradients.b_o.data(), context);
    const detail::PassGradients<T> into{d_x.d_x, input.crosses() ? d_x.d_source : d_x.d_x, gradients};
    each_block(detail::CheckedInput<T>(input, tape.positions_), context,
               [&](detail::HeadsPass<T> pass, std::size_t block) { pass.backward(d_y, tape.blocks_[block], into); });
  }

  /// The commitment loss of a forward pass; backward adds its gradient. Call it before update_router.
  /// Formula: commitment times the sum over routed key/value heads of the mean square distance of their normalised rows
  ///   from their nearest centroids; of queries, and of keys unless shared.
  /// Requires: a tape of a layer with this config (ValueError).
  double commitment_loss(const Tape& tape, Context& context) const {
    detail::LayerChecks<T>("RoutingAttention::commitment_loss", state_).tape(tape);
    const detail::HeadBlock& block = state_.routed();
    if (state_.routers.empty() || !(block.commitment > 0)) return 0;
    const detail::HeadsTape<T>& routed = tape.block(block.kind);
    const auto loss = [&](const detail::RouterRows<T>& rows, std::span<const std::int32_t> labels) {
      return detail::rows_commitment<T>(state_.routers, rows, labels, {}, context);
    };
    const double queries = loss(detail::router_queries(block, routed.matrices), routed.plans.query_labels);
    return block.shared ? queries
                        : queries + loss(detail::router_keys(block, routed.matrices), routed.plans.key_labels());
  }

  /// Moves the centroids by the rows and labels of a forward pass; no other kind of call moves them. Without learned
  /// routing it does nothing.
  /// Requires: a tape of a layer with this config (ValueError). After any error, also of a task or of memory, all
  ///   centroids are where they were.
  void update_router(const Tape& tape, Context& context) {
    detail::LayerChecks<T>("RoutingAttention::update_router", state_).tape(tape);
    if (state_.routers.empty()) return;
    if (statistics_.heads() == 0) statistics_ = zero_statistics();
    statistics_.clear();
    observe(tape, statistics_, context);
    detail::update_routers<T>(state_.routers, statistics_, context);
  }

  /// Empty statistics of the routers' shapes (no heads unless routing is learned).
  RouterStatistics<T> zero_statistics() const {
    if (state_.routers.empty()) return {};
    const detail::HeadBlock& routed = state_.routed();
    return RouterStatistics<T>(routed.kv_count, routed.clusters, routed.head_dim);
  }

  /// Adds the normalised rows of a forward pass, by their labels, to the statistics: queries, and keys unless shared.
  /// Requires: a tape of a layer with this config (ValueError), statistics of its shapes (ShapeError).
  void observe(const Tape& tape, RouterStatistics<T>& statistics, Context& context) const {
    const detail::LayerChecks<T> checks("RoutingAttention::observe", state_);
    checks.tape(tape);
    checks.statistics(statistics);
    if (state_.routers.empty()) return;
    const detail::HeadBlock& block = state_.routed();
    const detail::HeadsMatrices<T>& m = tape.block(block.kind).matrices;
    const detail::RouterRows<T> queries = detail::router_queries(block, m), keys = detail::router_keys(block, m);
    context.for_each(block.kv_count, [&](Index h, Index worker) {
      const OnlineKMeans<T>& router = state_.routers[static_cast<std::size_t>(h)];
      Arena& arena = context.workspace().worker(worker);
      Arena::Scope scope(arena);
      const View<T> scratch = arena.matrix<T>((std::max)(tape.tokens_, tape.key_tokens_), block.head_dim);
      router.observe(queries.of(h, scratch), tape.labels(h), statistics, h);
      if (!block.shared) router.observe(keys.of(h, scratch), tape.key_labels(h), statistics, h);
    });
  }

  /// Moves the centroids by statistics of this machine or, with block() summed, of several. Without learned routing it
  /// does nothing.
  /// Requires: statistics of the routers' shapes (ShapeError), finite numbers (ValueError). After any error all
  ///   centroids are where they were.
  /// Allocates: nothing, but for the k-means++ of the first update.
  void update_router(const RouterStatistics<T>& statistics) {
    detail::LayerChecks<T>("RoutingAttention::update_router", state_).statistics(statistics);
    if (state_.routers.empty()) return;
    Serial serial;
    detail::update_routers<T>(state_.routers, statistics, serial);
  }

  /// While frozen, update_router does nothing.
  void freeze_router(bool frozen) {
    for (OnlineKMeans<T>& router : state_.routers) router.freeze(frozen);
  }

 private:
  friend class Decoder<T>;

  // Memory of forward without a tape, kept in the workspace from call to call.
  struct Scratch {
    detail::RowPositions positions;
    detail::HeadsPlans plans;
  };

  // Calls f(pass, number) for every block that has heads.
  template <class F>
  void each_block(const detail::CheckedInput<T>& in, Context& context, const F& f) const {
    for (std::size_t i = 0; i < state_.heads.blocks.size(); ++i)
      if (const detail::HeadBlock& block = state_.heads.blocks[i]; block.count > 0)
        f(detail::HeadsPass<T>(state_, block, in, context), i);
  }

  template <class F>
  void run(const Input<T>& input, View<T> y, detail::RowPositions& positions, Context& context,
           const F& forward) const {
    detail::find_positions(input, config().causal, positions);
    each_block(detail::CheckedInput<T>(input, positions), context, forward);
    // y += b_o
    if (config().bias) detail::add_bias(y, state_.parameters.b_o.data(), context);
  }

  detail::LayerState<T> state_;
  RouterStatistics<T> statistics_;  // memory of update_router(tape, context), kept from call to call
};

}  // namespace coterie
