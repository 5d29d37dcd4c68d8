// Multi-head attention whose heads look nearby or, by content, anywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/layer/heads.hpp"

namespace coterie {

/// A layer of local heads and routed heads, with its weights and the centroids of its routers.
///
///     RoutingAttention<float> layer({.model_dim = 256, .heads = 8, .routed_heads = 4,
///                                    .clusters = 32, .window = 256, .causal = true, .seed = 1});
///     layer.forward(x, y, context);                           // evaluation
///     layer.forward(x, y, tape, context);                     // training: forward, backward, then the routers
///     layer.backward(x, tape, d_y, d_x, gradients, context);
///     layer.update_router(tape, context);
///
/// Formula: y = sum over heads h of attention_h w_o[h] + b_o. Local heads see their window; both kinds of heads know
/// positions as PositionKind has it. Routed heads see the members of their query's cluster, or everything:
///   shared (causal default): q = k = normalise(x w_q), logits gain/sqrt(d) q.k;
///   otherwise q = x w_q, k = x w_k, logits q.k/sqrt(d), routed by their normalised rows;
///   both kinds with other Logits, gains and Normalisation where the config says so;
///   induction: q = k = normalise(convolve(x w_q)), and key j carries the value of position j + 1 (zero keys: zero).
/// With a source, keys and values are those of its rows: cross-attention, of heads that do not share. The last causal
/// query then meets the last row of its sequence of the source, two-sided ones meet in proportion (Alignment).
/// Routing passes no gradient.
/// Allocates: nothing in forward, backward and update_router, once tape and workspace have grown to the sizes in use; the
///   first update_router allocates for its k-means++.
/// Threads and determinism: const calls with different tapes and contexts may run at the same time. A row's bits depend
///   on what that row sees and not on other sequences, later tokens (causal) or the number of workers.
/// Errors: what is wrong with an argument is thrown before anything is written.
/// Source: Roy et al. 2021, sections 4 and 5; routing by nearest centroid, shared heads' gain and induction are ours.
template <class T>
class RoutingAttention {
 public:
  using Tape = RoutingAttentionTape<T>;

  /// Draws the weights and centroids from the seed; see Parameters for shapes.
  /// Requires: a config that makes sense, otherwise ValueError, which names all its faults.
  explicit RoutingAttention(const RoutingAttentionConfig& config)
      : parts_(detail::make_layer_state<T>(detail::resolve(config))) {}

  /// The settings, with every automatic one filled in.
  const RoutingAttentionConfig& config() const { return parts_.config; }

  Parameters<T>& parameters() { return parts_.parameters; }
  const Parameters<T>& parameters() const { return parts_.parameters; }

  /// Zeros of the parameters' shapes, for backward to add into.
  Parameters<T> zero_gradients() const { return detail::zero_parameters<T>(parts_.config); }

  /// The routers of the routed heads, one per key/value head; empty unless routing is learned. Their centroids are state, not parameters.
  std::span<const OnlineKMeans<T>> routers() const { return parts_.routers; }
  std::span<OnlineKMeans<T>> routers() { return parts_.routers; }

  /// y = layer(x), for evaluation: the bits of the other forward (but for dropout, which it leaves out), and nothing kept.
  /// Shapes: x, y tokens x model_dim.
  /// Requires: matching shapes, y apart from x (ShapeError); offsets ascending from 0 to tokens, routes in
  ///   [-1, clusters) and only without a source, a source only where no head shares, with
  ///   Self::visible and without globals (ValueError).
  /// Overwrites y.
  void forward(const Input<T>& input, View<T> y, Context& context) const {
    check_forward(input, y, context);
    Scratch& scratch = context.workspace().template object<Scratch>();
    run(input, y, nullptr, scratch.places, scratch.plans, scratch.plans, context);
  }

  /// The same, keeping on the tape what backward and update_router need.
  void forward(const Input<T>& input, View<T> y, Tape& tape, Context& context) const {
    check_forward(input, y, context);
    tape.tokens_ = -1;  // no longer what it was, should something throw
    tape.config_ = parts_.config;
    run(input, y, &tape, tape.places_, tape.local_.plans, tape.routed_.plans, context);
    tape.crosses_ = input.crosses();
    tape.key_tokens_ = input.crosses() ? input.source.rows() : input.x.rows();
    tape.tokens_ = input.x.rows();
  }

  /// Adds the gradients of forward's input and parameters for the gradient d_y of its output.
  /// Shapes: d_y, d_x tokens x model_dim, d_source as source; gradients as parameters.
  /// Requires: the input and tape of one forward pass since which the parameters have not changed; matching shapes, d_x
  ///   and d_source apart from x, source, d_y and each other (ShapeError); a tape of a layer with this config
  ///   (ValueError).
  /// Adds into d_x, d_source and gradients.
  void backward(const Input<T>& input, const Tape& tape, detail::Same<ConstView<T>> d_y, InputGradient<T> d_x,
                Parameters<T>& gradients, Context& context) const {
    const char* const function = "RoutingAttention::backward";
    const Index n = input.x.rows();
    check_input(function, input);
    check_tape(function, tape);
    if (tape.tokens_ != n) detail::fail<ShapeError>(function, "tape", detail::join(n, " tokens"), tape.tokens_);
    if (tape.crosses_ != input.crosses() || (tape.crosses_ && tape.key_tokens_ != input.source.rows()))
      detail::fail<ShapeError>(function, "tape", "the tape of a forward pass with this source", "another");
    detail::check_shape<T>(function, "d_y", d_y, n, config().model_dim);
    const auto check_gradient = [&](const char* name, View<T> d, Index rows) {
      detail::check_shape<T>(function, name, d, rows, config().model_dim);
      detail::check_no_alias<T>(function, name, d, "x", input.x);
      detail::check_no_alias<T>(function, name, d, "source", input.source);
      detail::check_no_alias<T>(function, name, d, "d_y", d_y);
      detail::check_apart<T>(function, name, d, "parameters", parameters());
      detail::check_apart<T>(function, name, d, "gradients", gradients);
    };
    check_gradient("d_x", d_x.d_x, n);
    if (input.crosses()) {
      check_gradient("d_source", d_x.d_source, input.source.rows());
      detail::check_no_alias<T>(function, "d_source", d_x.d_source, "d_x", d_x.d_x);
    } else if (d_x.d_source.cols() > 0) {
      detail::fail<ShapeError>(function, "d_source", "none without a source", "one");
    }
    detail::check_same_shapes(function, "gradients", gradients, parameters());
    if (&gradients == &parts_.parameters)
      detail::fail<ShapeError>(function, "gradients", "storage of their own", "the layer's parameters");
    bool same = true;
    each_place(
        input, [&](std::size_t i, std::int32_t place) { same = same && tape.places_.queries[i] == place; },
        [&](std::size_t j, std::int32_t place) { same = same && tape.places_.keys[j] == place; });
    if (!same) detail::fail<ValueError>(function, "offsets", "those of the forward pass", "others");
    check_ready(function, context);

    if (n == 0) return;
    // y += b_o
    if (config().bias) detail::add_bias_backward<T>(d_y, gradients.b_o.data(), context);
    const detail::CheckedInput<T> in(input, tape.places_);
    const View<T> d_keys = input.crosses() ? d_x.d_source : d_x.d_x;
    const detail::Heads& heads = parts_.heads;
    if (heads.local.count > 0)
      detail::heads_backward<T>(parts_, heads.local, in, tape.local_, d_y, d_x.d_x, d_keys, gradients, context);
    if (heads.routed.count > 0)
      detail::heads_backward<T>(parts_, heads.routed, in, tape.routed_, d_y, d_x.d_x, d_keys, gradients, context);
  }

  /// The commitment loss of a forward pass, whose gradient backward adds: commitment times the sum over routed key/value heads of the
  /// mean squares of their normalised rows' distances to their nearest centroids; queries, and keys unless shared. Call it
  /// before update_router.
  /// Requires: a tape of a layer with this config (ValueError).
  double commitment_loss(const Tape& tape, Context& context) const {
    check_tape("RoutingAttention::commitment_loss", tape);
    if (parts_.routers.empty() || !(config().commitment > 0)) return 0;
    const detail::HeadBlock& group = parts_.heads.routed;
    const detail::HeadsMatrices<T>& m = tape.routed_.matrices;
    const detail::HeadsPlans& plans = tape.routed_.plans;
    const auto loss = [&](const detail::RouterRows<T>& rows, std::span<const std::int32_t> labels) {
      return detail::rows_commitment<T>(config(), parts_.routers, rows, labels, {}, context);
    };
    const double queries = loss(detail::router_queries(group, m), plans.query_labels);
    return group.shared ? queries : queries + loss(detail::router_keys(group, m), detail::key_labels(plans));
  }

  /// Moves the centroids by the rows and labels of a forward pass; the only kind of call that does. Without learned
  /// routing it does nothing.
  void update_router(const Tape& tape, Context& context) {
    check_tape("RoutingAttention::update_router", tape);
    if (parts_.routers.empty()) return;
    if (statistics_.heads() == 0) statistics_ = zero_statistics();
    statistics_.clear();
    observe(tape, statistics_, context);
    // All heads before any of them: an update that fails leaves every centroid where it was.
    const auto heads = static_cast<Index>(parts_.routers.size());
    context.for_each(heads, [&](Index h, Index) { router(h).check_update(statistics_, h); });
    context.for_each(heads, [&](Index h, Index) { router(h).update_checked(statistics_, h); });
  }

  /// Empty statistics of the routers' shapes (no heads unless routing is learned).
  RouterStatistics<T> zero_statistics() const {
    if (parts_.routers.empty()) return {};
    return RouterStatistics<T>(detail::routed_kv_heads(config()), config().clusters, config().head_dim);
  }

  /// Adds the normalised rows of a forward pass, by their labels, to the statistics: queries, and keys unless shared.
  /// Requires: a tape of a layer with this config (ValueError), statistics of its shapes (ShapeError).
  void observe(const Tape& tape, RouterStatistics<T>& statistics, Context& context) const {
    const char* const function = "RoutingAttention::observe";
    check_tape(function, tape);
    check_statistics(function, statistics);
    if (parts_.routers.empty()) return;
    const detail::HeadBlock& group = parts_.heads.routed;
    const detail::HeadsMatrices<T>& m = tape.routed_.matrices;
    context.for_each(static_cast<Index>(parts_.routers.size()), [&](Index h, Index worker) {
      const OnlineKMeans<T>& router = parts_.routers[static_cast<std::size_t>(h)];
      Arena& arena = context.workspace().worker(worker);
      Arena::Scope scope(arena);
      const View<T> scratch = arena.matrix<T>(std::max(tape.tokens_, tape.key_tokens_), config().head_dim);
      router.observe(detail::router_queries(group, m).of(h, scratch, config()), tape.labels(h), statistics, h);
      if (!group.shared)
        router.observe(detail::router_keys(group, m).of(h, scratch, config()), tape.key_labels(h), statistics, h);
    });
  }

  /// Moves the centroids by what was observed, on this machine or, with block() summed, on several.
  void update_router(const RouterStatistics<T>& statistics) {
    check_statistics("RoutingAttention::update_router", statistics);
    const Index heads = static_cast<Index>(parts_.routers.size());
    for (Index h = 0; h < heads; ++h) router(h).check_update(statistics, h);
    for (Index h = 0; h < heads; ++h) router(h).update_checked(statistics, h);
  }

  /// While frozen, update_router does nothing.
  void freeze_router(bool frozen) {
    for (OnlineKMeans<T>& router : parts_.routers) router.freeze(frozen);
  }

 private:
  friend class Decoder<T>;

  // What forward without a tape keeps in the workspace, for its memory only.
  struct Scratch {
    detail::Places places;
    detail::HeadsPlans plans;
  };

  OnlineKMeans<T>& router(Index head) { return parts_.routers[static_cast<std::size_t>(head)]; }

  void check_input(const char* function, const Input<T>& input) const {
    const Index n = input.x.rows();
    detail::check_shape<T>(function, "x", input.x, n, config().model_dim);
    detail::check_count(function, "tokens", n);
    detail::Faults faults(function);
    if (!input.offsets.empty()) detail::check_offsets(faults, "offsets", input.offsets, n);
    if (input.crosses()) check_source(function, faults, input);
    faults.expect(input.crosses() || input.source_offsets.empty(), "source_offsets", "none without a source", "some");
    // Phrases are put together where something is wrong only: a good call allocates nothing.
    const Index labels = static_cast<Index>(input.routes.size()), expected = detail::routed_kv_heads(config()) * n;
    if (labels > 0 && input.crosses())
      faults.expect(false, "routes", "none with a source (they would label its keys as well)", labels);
    else if (labels > 0 && (config().routed_heads == 0 || config().routing == Routing::dense))
      faults.expect(false, "routes", "none without learned or random routing", labels);
    else if (labels > 0 && detail::has_members(config()))
      faults.expect(false, "routes", "none with balanced membership or several probes (a label is one cluster)",
                    labels);
    else if (labels > 0 && labels != expected)
      faults.expect(false, "routes", detail::join("routed key/value heads * tokens = ", expected, " labels"), labels);
    else
      for (std::size_t i = 0; i < input.routes.size(); ++i)
        if (input.routes[i] < -1 || input.routes[i] >= config().clusters) {
          faults.expect(false, "routes", detail::join("labels in [-1, ", config().clusters, ")"),
                        detail::join(input.routes[i], " at ", i));
          break;
        }
    faults.raise();
  }

  void check_source(const char* function, detail::Faults& faults, const Input<T>& input) const {
    const Index rows = input.source.rows();
    detail::check_shape<T>(function, "source", input.source, rows, config().model_dim);
    detail::check_count(function, "source", rows);
    faults.expect(rows > 0, "source", "at least one row", rows);
    const bool share = (parts_.heads.local.count > 0 && parts_.heads.local.shared) ||
                       (parts_.heads.routed.count > 0 && parts_.heads.routed.shared);
    faults.expect(!share, "source", "a layer whose heads have keys of their own (shared_qk = false)",
                  "one whose heads share them with queries");
    faults.expect(config().globals == 0, "source", "a layer without global tokens, for they are queries and keys",
                  "one with some");
    faults.expect(config().routed_heads == 0 || *config().self == Self::visible, "source",
                  "a layer with Self::visible, for queries of x have no self there", "another");
    faults.expect(input.source_offsets.size() == input.offsets.size(), "source_offsets", "as many as offsets",
                  input.source_offsets.size());
    if (!input.source_offsets.empty()) detail::check_offsets(faults, "source_offsets", input.source_offsets, rows);
  }

  void check_forward(const Input<T>& input, View<T> y, Context& context) const {
    const char* const function = "RoutingAttention::forward";
    check_input(function, input);
    detail::check_shape<T>(function, "y", y, input.x.rows(), config().model_dim);
    detail::check_no_alias<T>(function, "y", y, "x", input.x);
    detail::check_no_alias<T>(function, "y", y, "source", input.source);
    detail::check_apart<T>(function, "y", y, "parameters", parameters());
    check_ready(function, context);
  }

  // What the calls inside would find out too late.
  void check_ready(const char* function, const Context& context) const {
    detail::resolve(context.instructions());
    const RowMatrix<T>& gain = parameters().gain;
    if (!detail::finite_row(gain.data(), gain.size()))
      detail::fail<ValueError>(function, "parameters.gain", "finite numbers", "NaN or infinity");
  }

  void check_tape(const char* function, const Tape& tape) const {
    if (tape.tokens_ < 0) detail::fail<ValueError>(function, "tape", "the tape of a forward pass", "an empty one");
    if (!(tape.config_ == config()))
      detail::fail<ValueError>(function, "tape", "the tape of this layer", "that of a layer with another config");
  }

  // Shapes only: numbers are checked once, where an update takes them.
  void check_statistics(const char* function, const RouterStatistics<T>& s) const {
    if (parts_.routers.empty()) return;
    const RoutingAttentionConfig& c = config();
    const Index heads = detail::routed_kv_heads(c);
    if (s.heads() != heads || s.clusters() != c.clusters || s.dim() != c.head_dim)
      detail::fail<ShapeError>(function, "statistics", detail::join(heads, " x ", c.clusters, " x ", c.head_dim),
                               detail::join(s.heads(), " x ", s.clusters(), " x ", s.dim()));
  }

  // Calls of_query(row, place) and, with a source, of_key(row, place) for all rows: where each is in its sequence, keys by
  // their number, queries among the keys as the plans align them.
  template <class Query, class Key>
  void each_place(const Input<T>& input, Query&& of_query, Key&& of_key) const {
    detail::Pattern pattern;
    pattern.tokens = input.x.rows();
    pattern.keys = input.crosses() ? input.source.rows() : input.x.rows();
    pattern.alignment = config().causal ? Alignment::bottom_right : Alignment::proportional;
    pattern.offsets = input.offsets;
    pattern.key_offsets = input.crosses() ? input.source_offsets : input.offsets;
    for (Index s = 0; s < pattern.sequences(); ++s) {
      const detail::Sequence sequence = pattern.sequence(s);
      for (Index i = sequence.query_begin; i < sequence.query_begin + sequence.tokens; ++i)
        of_query(static_cast<std::size_t>(i), static_cast<std::int32_t>(sequence.position(i)));
      for (Index j = 0; j < sequence.keys && input.crosses(); ++j)
        of_key(static_cast<std::size_t>(sequence.key_begin + j), static_cast<std::int32_t>(j));
    }
  }

  void run(const Input<T>& input, View<T> y, Tape* tape, detail::Places& places, detail::HeadsPlans& local_plans,
           detail::HeadsPlans& routed_plans, Context& context) const {
    places.queries.resize(static_cast<std::size_t>(input.x.rows()));
    places.keys.resize(static_cast<std::size_t>(input.crosses() ? input.source.rows() : 0));
    each_place(
        input, [&](std::size_t i, std::int32_t place) { places.queries[i] = place; },
        [&](std::size_t j, std::int32_t place) { places.keys[j] = place; });
    const detail::CheckedInput<T> in(input, places);
    const detail::Heads& heads = parts_.heads;
    if (heads.local.count > 0)
      detail::heads_forward(parts_, heads.local, in, y, false, tape ? &tape->local_ : nullptr, tape != nullptr,
                            local_plans, context);
    if (heads.routed.count > 0)
      detail::heads_forward(parts_, heads.routed, in, y, heads.local.count > 0, tape ? &tape->routed_ : nullptr,
                            tape != nullptr, routed_plans, context);
    if (config().bias) detail::add_bias(y, parts_.parameters.b_o.data(), context);
  }

  detail::LayerState<T> parts_;
  RouterStatistics<T> statistics_;  // of update_router(tape, context), for its memory only
};

}  // namespace coterie
