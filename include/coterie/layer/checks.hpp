// Checks of the arguments of a layer's functions, made before anything is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "coterie/core/finite.hpp"
#include "coterie/kernel/dispatch.hpp"
#include "coterie/layer/layer_state.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/router/statistics.hpp"

namespace coterie::detail {

/// Checks of the arguments of one function of a layer; each throws ShapeError or ValueError in its name.
template <class T>
class LayerChecks {
 public:
  LayerChecks(const char* function, const LayerState<T>& layer) : function_(function), layer_(layer) {}

  /// The arguments of forward.
  void forward(const Input<T>& in, View<T> y, const Context& context) const {
    input(in);
    check_shape<T>(function_, "y", y, in.x.rows(), layer_.config.model_dim);
    check_no_alias<T>(function_, "y", y, "x", in.x);
    check_no_alias<T>(function_, "y", y, "source", in.source);
    check_apart<T>(function_, "y", y, "parameters", layer_.parameters);
    ready(context);
  }

  /// The arguments of project.
  void project(ConstView<T> x, Index first_position, View<T> q, View<T> k, View<T> v, const Context& context) const {
    const RoutingAttentionConfig& config = layer_.config;
    const Index n = x.rows();
    check_shape<T>(function_, "x", x, n, config.model_dim);
    check_count(function_, "tokens", n);
    const Index heads = config.local.heads + config.routed.heads + config.dense.heads;
    check_row_output("q", q, n, heads * config.head_dim, "x", x);
    check_row_output("k", k, n, config.kv_heads * config.head_dim, "x", x);
    check_row_output("v", v, n, config.kv_heads * config.head_dim, "x", x);
    check_no_alias<T>(function_, "k", k, "q", q);
    check_no_alias<T>(function_, "v", v, "q", q);
    check_no_alias<T>(function_, "v", v, "k", k);
    Faults faults(function_);
    faults.expect(first_position >= 0 && first_position <= (std::numeric_limits<std::int32_t>::max)() - n,
                  "first_position", "at least 0, and the last one below 2^31", first_position);
    for (const HeadBlock& block : layer_.heads.blocks)
      faults.expect(block.count == 0 || !block.induction, "layer",
                    "one without induction heads, whose keys carry the value of a later row", "one with some");
    faults.raise();
    ready(context);
  }

  /// The arguments of output.
  void output(ConstView<T> attended, View<T> y, const Context& context) const {
    const RoutingAttentionConfig& config = layer_.config;
    const Index heads = config.local.heads + config.routed.heads + config.dense.heads;
    check_shape<T>(function_, "attended", attended, attended.rows(), heads * config.head_dim);
    check_row_output("y", y, attended.rows(), config.model_dim, "attended", attended);
    ready(context);
  }

  /// An input from which routers start.
  void start(const Input<T>& in, const Context& context) const {
    input(in);
    ready(context);
  }

  /// The arguments of backward but for the gradients.
  void backward(const Input<T>& in, const RoutingAttentionTape<T>& of, ConstView<T> d_y) const {
    const Index n = in.x.rows();
    input(in);
    tape(of);
    if (of.tokens_ != n) fail<ShapeError>(function_, "tape", join(n, " tokens"), of.tokens_);
    if (of.crosses_ != in.crosses() || (of.crosses_ && of.key_tokens_ != in.source.rows()))
      fail<ShapeError>(function_, "tape", "the tape of a forward pass with this source", "another");
    check_shape<T>(function_, "d_y", d_y, n, layer_.config.model_dim);
  }

  /// The gradients that backward adds into.
  void gradients(const Input<T>& in, ConstView<T> d_y, InputGradient<T> d_in, const Parameters<T>& d_parameters) const {
    const auto check_apart_from_input = [&](const char* name, View<T> d, Index rows) {
      check_shape<T>(function_, name, d, rows, layer_.config.model_dim);
      check_no_alias<T>(function_, name, d, "x", in.x);
      check_no_alias<T>(function_, name, d, "source", in.source);
      check_no_alias<T>(function_, name, d, "d_y", d_y);
      check_apart<T>(function_, name, d, "parameters", layer_.parameters);
      check_apart<T>(function_, name, d, "gradients", d_parameters);
    };
    check_apart_from_input("d_x", d_in.d_x, in.x.rows());
    if (in.crosses()) {
      check_apart_from_input("d_source", d_in.d_source, in.source.rows());
      check_no_alias<T>(function_, "d_source", d_in.d_source, "d_x", d_in.d_x);
    } else if (d_in.d_source.cols() > 0) {
      fail<ShapeError>(function_, "d_source", "none without a source", "one");
    }
    check_same_shapes(function_, "gradients", d_parameters, layer_.parameters);
    if (&d_parameters == &layer_.parameters)
      fail<ShapeError>(function_, "gradients", "storage of their own", "the layer's parameters");
  }

  /// Requires the sequences of the forward pass (ValueError). Call it after backward().
  void positions(const Input<T>& in, const RoutingAttentionTape<T>& of) const {
    if (!has_positions(in, layer_.config.causal, of.positions_))
      fail<ValueError>(function_, "offsets", "those of the forward pass", "others");
  }

  /// Checks that the calls inside would make too late, with something written already.
  void ready(const Context& context) const {
    detail::resolve(context.instructions());
    const RowMatrix<T>& gain = layer_.parameters.gain;
    if (!finite_row(gain.data(), gain.size()))
      fail<ValueError>(function_, "parameters.gain", "finite numbers", "NaN or infinity");
  }

  /// Requires the tape of a forward pass of a layer with this config (ValueError).
  void tape(const RoutingAttentionTape<T>& of) const {
    if (of.tokens_ < 0) fail<ValueError>(function_, "tape", "the tape of a forward pass", "an empty one");
    if (!(of.config_ == layer_.config))
      fail<ValueError>(function_, "tape", "the tape of this layer", "that of a layer with another config");
  }

  /// Checks shapes only; update_routers checks the numbers.
  void statistics(const RouterStatistics<T>& s) const {
    if (layer_.routers.empty()) return;
    const HeadBlock& routed = layer_.routed();
    if (s.heads() != routed.kv_count || s.clusters() != routed.clusters || s.dim() != routed.head_dim)
      fail<ShapeError>(function_, "statistics", join(routed.kv_count, " x ", routed.clusters, " x ", routed.head_dim),
                       join(s.heads(), " x ", s.clusters(), " x ", s.dim()));
  }

 private:
  void input(const Input<T>& in) const {
    const Index n = in.x.rows();
    check_shape<T>(function_, "x", in.x, n, layer_.config.model_dim);
    check_count(function_, "tokens", n);
    Faults faults(function_);
    if (!in.offsets.empty()) check_offsets(faults, "offsets", in.offsets, n);
    if (in.crosses()) source(faults, in);
    faults.expect(in.crosses() || in.source_offsets.empty(), "source_offsets", "none without a source", "some");
    if (!in.routes.empty()) routes(faults, in);
    faults.raise();
  }

  void source(Faults& faults, const Input<T>& in) const {
    const Index rows = in.source.rows();
    check_shape<T>(function_, "source", in.source, rows, layer_.config.model_dim);
    check_count(function_, "source", rows);
    faults.expect(rows > 0, "source", "at least one row", rows);
    bool shares = false, all_visible = true;
    for (const HeadBlock& block : layer_.heads.blocks)
      if (block.count > 0) {
        shares = shares || block.shared;
        all_visible = all_visible && block.self == Self::visible;
      }
    faults.expect(!shares, "source", "a layer whose heads have keys of their own (shared_qk = false)",
                  "one whose heads share them with queries");
    faults.expect(layer_.config.globals == 0, "source", "a layer without global tokens, for they are queries and keys",
                  "one with some");
    faults.expect(all_visible, "source", "a layer with Self::visible, for queries of x have no self there", "another");
    faults.expect(in.source_offsets.size() == in.offsets.size(), "source_offsets", "as many as offsets",
                  in.source_offsets.size());
    if (!in.source_offsets.empty()) check_offsets(faults, "source_offsets", in.source_offsets, rows);
  }

  // An output beside an input and the parameters.
  void check_row_output(const char* name, View<T> out, Index rows, Index cols, const char* other,
                        ConstView<T> m) const {
    check_shape<T>(function_, name, out, rows, cols);
    check_no_alias<T>(function_, name, out, other, m);
    check_apart<T>(function_, name, out, "parameters", layer_.parameters);
  }

  // Messages are built only where something is wrong, so that a good call allocates nothing.
  void routes(Faults& faults, const Input<T>& in) const {
    const HeadBlock& routed = layer_.routed();
    const Index labels = static_cast<Index>(in.routes.size()), expected = routed.kv_count * in.x.rows();
    if (in.crosses()) {
      faults.expect(false, "routes", "none with a source (they would label its keys as well)", labels);
    } else if (routed.count == 0) {
      faults.expect(false, "routes", "none without learned or random routing", labels);
    } else if (routed.has_members()) {
      faults.expect(false, "routes", "none with balanced membership or several probes (a label is one cluster)",
                    labels);
    } else if (labels != expected) {
      faults.expect(false, "routes", join("routed key/value heads * tokens = ", expected, " labels"), labels);
    } else {
      for (std::size_t i = 0; i < in.routes.size(); ++i) {
        if (in.routes[i] >= -1 && in.routes[i] < routed.clusters) continue;
        faults.expect(false, "routes", join("labels in [-1, ", routed.clusters, ")"), join(in.routes[i], " at ", i));
        break;
      }
    }
  }

  const char* function_;
  const LayerState<T>& layer_;
};

}  // namespace coterie::detail
