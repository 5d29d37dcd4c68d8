// Layers of the routing transformer for PyTorch, by the names of its state_dict.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "coterie/file/safetensors.hpp"
#include "coterie/layer/presets.hpp"
#include "coterie/layer/routing_attention.hpp"

namespace coterie {

namespace detail {

/// The tensors of a SelfAttention module under a prefix.
template <class T>
class PytorchTensors {
 public:
  PytorchTensors(const char* function, const SafetensorsView& file, std::string_view prefix)
      : function_(function), file_(file), prefix_(prefix) {}

  bool has(std::string_view name) const { return file_.find(join(prefix_, name)) != nullptr; }
  const SafetensorsTensor& required(std::string_view name) const {
    return file_.required(function_, join(prefix_, name));
  }

  /// The numbers of a tensor, which has to be of this shape.
  template <class Number = T>
  std::vector<Number> take(std::string_view name, std::initializer_list<Index> shape) {
    file_.require_shape(function_, required(name), {shape.begin(), shape.size()});
    known_.insert(join(prefix_, name));
    return file_.template numbers<Number>(join(prefix_, name));
  }

  /// Requires that everything under the prefix has been taken.
  void require_no_others() const { file_.require_no_others(function_, prefix_, known_); }

  [[noreturn]] void fail(const std::string& text) const { file_.fail(function_, text); }

 private:
  const char* function_;
  const SafetensorsView& file_;
  std::string prefix_;
  std::set<std::string> known_;
};

/// Requires a config with room for all tensors of the module, and without parameters that the module lacks.
inline void check_pytorch_config(const char* function, const RoutingAttentionConfig& c, Index queries_ahead) {
  Faults faults(function);
  const bool any_local = c.local.heads > 0, any_routed = c.routed.heads > 0;
  faults.expect(c.dense.heads == 0, "dense.heads", "0 (the module has none)", c.dense.heads);
  faults.expect(c.kv_heads == all_heads(c), "kv_heads", "as many as heads (the module has no others)", c.kv_heads);
  faults.expect(c.bias || !any_local, "bias", "true with local heads (theirs have one)", "false");
  faults.expect(c.memory == 0 || !any_local, "memory", "0 with local heads (the module's have none)", c.memory);
  if (any_routed) {
    faults.expect(c.routed.routing == Routing::learned, "routed.routing", "learned (the module has centroids)",
                  "another");
    faults.expect(c.routed.matching.normalisation == Normalisation::unit_length, "routed.matching.normalisation",
                  "unit_length (the module's centroids are means of such rows)", "layer_norm");
  }
  if (any_local) {
    const Matching& m = c.local.matching;
    faults.expect(
        !*m.shared_qk && *m.self == Self::visible && *m.logits == Logits::raw && *m.gain == 1 && !*m.learned_gain,
        "local.matching", "its default (the module's local heads are plain)", "another");
  }
  const bool turns = any_local && *c.local.positions.kind == PositionKind::rotary;
  faults.expect(!turns || c.local.positions.layout == RotaryLayout::halves, "local.positions.layout",
                "halves (the module's)", "interleaved");
  faults.expect(queries_ahead == 0 || turns, "queries_ahead", "0 without rotary positions of local heads",
                queries_ahead);
  faults.expect(queries_ahead >= 0 && queries_ahead <= (std::numeric_limits<std::int32_t>::max)(), "queries_ahead",
                "at least 0", queries_ahead);
  faults.raise();
}

/// to = rows [first, first + to.cols()) of a weight of torch, outputs x inputs, transposed.
template <class T>
void transpose_rows(const std::vector<T>& weight, Index first, View<T> to) {
  for (Index i = 0; i < to.rows(); ++i)
    for (Index j = 0; j < to.cols(); ++j) to(i, j) = weight[static_cast<std::size_t>((first + j) * to.rows() + i)];
}

/// Requires the frequencies of the rotary positions of local heads, where a file has them, to be those of the config. A
/// tolerance of a hundredth covers the rounding of short floats; another base differs by more.
template <class T>
void check_pytorch_rotary(PytorchTensors<T>& tensors, const RoutingAttentionConfig& c) {
  constexpr char name[] = "local_attn.rel_pos.inv_freq";
  if (!tensors.has(name)) return;
  if (*c.local.positions.kind != PositionKind::rotary)
    tensors.fail(join("tensor ", in_quotes(name), ": expected none but for local.positions.kind = rotary, got one"));
  const Index half = c.head_dim / 2;
  const std::vector<T> frequencies = tensors.take(name, {half});
  for (Index j = 0; j < half; ++j) {
    const double expected = std::pow(c.local.positions.base, -static_cast<double>(j) / static_cast<double>(half));
    const double got = static_cast<double>(frequencies[static_cast<std::size_t>(j)]);
    if (!(std::abs(got - expected) <= 0.01 * expected))
      tensors.fail(join("tensor ", in_quotes(name), ": expected the frequencies of local.positions.base = ",
                        c.local.positions.base, ", got ", got, " for ", expected));
  }
}

/// Turns the columns of the first `heads` heads of w_q and b_q by `ahead` positions: rotation is linear, so that
/// attention sees queries that stand so much further.
template <class T>
void turn_queries(Parameters<T>& p, Index heads, const RoutingAttentionConfig& c, Index ahead) {
  const Rotary rotary(c.head_dim, c.local.positions.base, c.local.positions.layout);
  const std::vector<std::int32_t> positions(static_cast<std::size_t>(c.model_dim), static_cast<std::int32_t>(ahead));
  Context context;
  for (RowMatrix<T>* columns : {&p.w_q, &p.b_q}) {
    const View<T> turned = view(*columns).columns(0, heads * c.head_dim);
    rotary.forward(turned, heads, std::span(positions).first(static_cast<std::size_t>(turned.rows())), context);
  }
}

/// Sets the centroids of the routers, unless the module has none yet.
template <class T>
void take_pytorch_centroids(PytorchTensors<T>& tensors, std::span<OnlineKMeans<T>> routers,
                            const RoutingAttentionConfig& c) {
  const std::vector<T> means =
      tensors.take("global_attn.kmeans.means", {c.routed.heads, c.routed.clusters, c.head_dim});
  if (tensors.template take<std::int64_t>("global_attn.kmeans.initted", {})[0] == 0) return;
  // The module's decay is constant: so is ours once the schedule (1 + t) / (10 + t) has reached it.
  const double updates = (std::min)(std::ceil((10 * c.routed.router.decay - 1) / (1 - c.routed.router.decay)), 0x1p53);
  for (Index h = 0; h < c.routed.heads; ++h) {
    const ConstView<T> centroids(means.data() + h * c.routed.clusters * c.head_dim, c.routed.clusters, c.head_dim);
    try {
      routers[static_cast<std::size_t>(h)].set_centroids(centroids, {},
                                                         (std::max)(Index(1), static_cast<Index>(updates)));
    } catch (const ValueError& error) {
      tensors.fail(join("damaged: global_attn.kmeans.means: ", error.what()));
    }
  }
}

/// Sets the memory of the routed heads from theirs, which is of every cluster.
template <class T>
void take_pytorch_memory(PytorchTensors<T>& tensors, std::string_view name, const RoutingAttentionConfig& c,
                         RowMatrix<T>& memory) {
  const std::vector<T> numbers = tensors.take(name, {c.routed.heads, c.routed.clusters, c.memory, c.head_dim});
  const Index size = c.memory * c.head_dim;
  for (Index h = 0; h < c.routed.heads; ++h) {
    const T* const first = numbers.data() + h * c.routed.clusters * size;
    for (Index cluster = 1; cluster < c.routed.clusters; ++cluster)
      if (!std::equal(first, first + size, first + cluster * size))
        tensors.fail(join("tensor ", in_quotes(name),
                          ": expected the same memory for all clusters of a head (ours is per head), got "
                          "others for the clusters 0 and ",
                          cluster, " of head ", h));
    for (Index j = 0; j < c.memory; ++j)
      std::copy_n(first + j * c.head_dim, c.head_dim, memory.row(j).data() + h * c.head_dim);
  }
}

}  // namespace detail

/// Makes a layer with the weights and centroids of a SelfAttention module of the routing transformer for PyTorch, whose
/// state_dict was saved as a safetensors file; `prefix` is the text before "to_q.weight" there, dot included.
///
///     RoutingAttention<float> layer = import_pytorch<float>(read_safetensors("encoder.safetensors"),
///         "layers.blocks.0.f.net.fn.", presets::pytorch(config));                 // of a RoutingTransformer
///
/// The config says what the layer computes with the weights; presets::pytorch reproduces the module, but for the faults
/// that it names. Sizes have to be those of the file: head_dim = dim_head, local.heads = n_local_attn_heads,
/// routed.heads = the others, routed.clusters = max_seq_len / window_size, memory = num_mem_kv.
///
/// With D = model_dim, H = heads, d = head_dim, L local and R routed heads:
///
///     local_to_qkv.weight [3*L*d, D], .bias [3*L*d]            local columns of w_q, w_k, w_v, b_q, b_k, b_v;
///                                                              other biases are 0
///     to_q.weight, to_k.weight, to_v.weight [R*d, D]           routed columns of w_q, w_k (unless shared_qk), w_v
///     to_out.weight [D, H*d]                                   w_o
///     global_attn.kmeans.means [R, clusters, d], .initted []   centroids; those of the seed where not initted
///     global_attn.mem_key, .mem_value [R, clusters, memory, d] memory_keys, memory_values
///     local_attn.rel_pos.inv_freq [d/2]                        may be missing; local.positions.kind = rotary,
///                                                              and its base
///
/// Without routed heads to_q, to_k and to_v are empty or missing. F16, BF16 and F32 are read, and F64 for double.
/// Averages continue from the centroids with the full decay, past its schedule; their counts are unknown.
///
/// A layer cannot reproduce the following, although its weights are read:
/// * The local heads of the module look back by blocks: a causal query sees its own block of local.window keys and
///   `radius` blocks before it. A window agrees with that where a sequence has at most radius + 1 blocks, with
///   local.window = (radius + 1) blocks. On longer sequences outputs differ.
/// * A RoutingTransformerLM turns queries, keys and values of its routed heads by their positions before it routes
///   them. No layer does that, so layers of a language model are read, but compute something else. Modules of a bare
///   RoutingTransformer do not turn them.
/// * Memory of routed heads is per cluster there, and per head here. It is read only where all clusters of a head have
///   the same, which training does not leave so; causal modules with separate queries and keys always have memory.
///
/// Two-sided local heads of the module (package local-attention 1.11) rotate queries too far, by the window times the
/// radius ahead of their keys, and trained weights have adapted to it. `queries_ahead` is that product: local columns
/// of w_q and b_q are rotated by it, which gives the module's outputs. With 0, positions are the real ones, as in
/// causal modules.
///
/// Requires: a config that makes sense, with bias where there are local heads, RotaryLayout::halves where those are
///   rotary, learned routing, Normalisation::unit_length, as many kv_heads as heads, and no parameter that the
///   module lacks: no gain (learned_gain = false), taps, biases by distance, nor memory beside local heads;
///   queries_ahead at least 0, and 0 without rotary local heads (ValueError). In the file, under the prefix, these
///   tensors in these shapes and no others; memory that does not differ between clusters; finite centroids (FileError).
/// Allocates: the layer.
/// Source: the package routing-transformer, class SelfAttention.
template <class T>
RoutingAttention<T> import_pytorch(const SafetensorsView& file, std::string_view prefix,
                                   const RoutingAttentionConfig& config, Index queries_ahead = 0) {
  const char* const function = "import_pytorch";
  RoutingAttention<T> layer(config);
  const RoutingAttentionConfig& c = layer.config();
  detail::check_pytorch_config(function, c, queries_ahead);
  Parameters<T>& p = layer.parameters();
  constexpr std::array<std::string_view, 10> fillable{"w_q", "w_k", "w_v", "w_o",         "b_q",
                                                      "b_k", "b_v", "b_o", "memory_keys", "memory_values"};
  p.visit([&](std::string_view name, View<T>) {
    if (std::find(fillable.begin(), fillable.end(), name) == fillable.end())
      detail::fail<ValueError>(function, "config", "no parameters that the module has not", name);
  });

  detail::PytorchTensors<T> tensors(function, file, prefix);
  const Index dim = c.model_dim, cols = static_cast<Index>(detail::all_heads(c)) * c.head_dim,
              routed_cols = c.routed.heads * c.head_dim, local_cols = cols - routed_cols;
  for (RowMatrix<T>* bias : {&p.b_q, &p.b_k, &p.b_v, &p.b_o}) bias->setZero();
  if (local_cols > 0) {
    const std::vector<T> weight = tensors.take("local_to_qkv.weight", {3 * local_cols, dim});
    const std::vector<T> bias = tensors.take("local_to_qkv.bias", {3 * local_cols});
    Index first = 0;
    for (const auto& [w, b] : {std::pair(&p.w_q, &p.b_q), std::pair(&p.w_k, &p.b_k), std::pair(&p.w_v, &p.b_v)}) {
      detail::transpose_rows<T>(weight, first, view(*w).columns(0, local_cols));
      std::copy_n(bias.begin() + first, local_cols, b->data());
      first += local_cols;
    }
    detail::check_pytorch_rotary(tensors, c);
    if (queries_ahead > 0) detail::turn_queries(p, local_cols / c.head_dim, c, queries_ahead);
  }
  const auto take_routed = [&](std::string_view name, RowMatrix<T>& w) {
    if (routed_cols == 0 && !tensors.has(name)) return;
    const std::vector<T> weight = tensors.take(name, {routed_cols, dim});
    if (routed_cols > 0) detail::transpose_rows<T>(weight, 0, view(w).columns(w.cols() - routed_cols, routed_cols));
  };
  take_routed("to_q.weight", p.w_q);
  if (!*c.routed.matching.shared_qk || routed_cols == 0) take_routed("to_k.weight", p.w_k);
  take_routed("to_v.weight", p.w_v);
  detail::transpose_rows<T>(tensors.take("to_out.weight", {dim, cols}), 0, view(p.w_o));
  if (routed_cols > 0) {
    detail::take_pytorch_centroids(tensors, layer.routers(), c);
    detail::take_pytorch_memory(tensors, "global_attn.mem_key", c, p.memory_keys);
    detail::take_pytorch_memory(tensors, "global_attn.mem_value", c, p.memory_values);
  }
  tensors.require_no_others();
  return layer;
}

}  // namespace coterie
