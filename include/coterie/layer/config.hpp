// Settings of a routing attention layer, by block of heads.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/kernel/rotary.hpp"
#include "coterie/plan/pattern.hpp"
#include "coterie/plan/plan.hpp"
#include "coterie/router/config.hpp"
#include "coterie/router/members.hpp"

namespace coterie {

/// How tokens come into the clusters of a routed head.
enum class Routing {
  learned,  ///< clusters of the layer's k-means routers
  random,   ///< clusters drawn from (seed, step, head, position): the paper's baseline
};

/// Which tokens are in a cluster of a routed head with learned routing.
enum class MembershipKind {
  nearest,   ///< tokens whose nearest centroid is that of the cluster: strictly causal
  balanced,  ///< the `window` best tokens of a sequence (the paper): even load, but NOT causal, see balanced_members
};

/// The rows whose products are the logits. Routers always see normalised rows.
enum class Logits {
  raw,              ///< queries and keys as they are projected
  normalised,       ///< both normalised
  normalised_keys,  ///< queries as they are projected, keys normalised
};

/// How heads know where queries and keys are. Distances are those of positions in the sequence, never of ranks in a
/// cluster; those of induction heads are to the key that matches, not to the value that it carries.
enum class PositionKind {
  rotary,      ///< rotations of queries and keys by the position in the sequence; routers see them unrotated
  bias,        ///< a learned number per head and distance, added to the logit
  none,        ///< positions only decide which keys a query sees
  alibi,       ///< slope * distance subtracted, with a fixed slope for each head of the block (alibi_slope)
  t5_buckets,  ///< a learned number per head and bucket of distances (PositionBuckets)
  shaw,        ///< learned vectors per distance, for all heads of the block, added to keys and to values (the paper)
};

/// How the heads of a block make queries and keys; designated initialisers in this order.
struct Matching {
  /// Whether keys are the queries. Automatic: true with induction, and in causal routed blocks where there are as many
  /// key/value heads as heads.
  std::optional<bool> shared_qk = {};
  /// Whether a token sees itself. Automatic: never with induction, only_if_alone where shared, else visible. Memory and
  /// globals do not count: a token that is alone in its cluster sees itself beside them. Sinks and recent keys count.
  std::optional<Self> self = {};
  std::optional<Logits> logits = {};      ///< automatic: normalised where shared, else raw
  std::optional<double> gain = {};        ///< logits are gain/sqrt(d) q.k; automatic: 3 where normalised, else 1
  std::optional<bool> learned_gain = {};  ///< a parameter per head, which starts at gain; automatic: where shared
  Normalisation normalisation = Normalisation::layer_norm;  ///< for logits and for routers
  bool induction = false;  ///< a key carries the value of the next position; causal only
  Index key_taps = 0;      ///< taps of the convolution of induction queries; 0: none; 8 works well

  bool operator==(const Matching&) const = default;
};

/// How the heads of a block know positions; designated initialisers in this order.
struct Positions {
  /// Automatic: rotary in local and dense blocks; none in routed blocks, of induction heads and of one column.
  std::optional<PositionKind> kind = {};
  double base = 10000;                         ///< rotary: the wave length of the slowest pair is about 2 pi base
  RotaryLayout layout = RotaryLayout::halves;  ///< rotary: which columns turn together
  Index buckets = 32;                          ///< t5_buckets; in two-sided layers half of them are for later keys
  Index max_distance = 128;                    ///< t5_buckets: about where the last bucket begins
  /// bias, shaw: distances that have an entry (on each side, where two-sided); farther keys share the last one.
  /// Required in routed and dense blocks; 0 in local blocks, whose window sets the distances.
  Index distances = 0;

  bool operator==(const Positions&) const = default;
};

/// Which clusters a token of a routed head is in; designated initialisers in this order.
struct Membership {
  MembershipKind kind = MembershipKind::nearest;
  Index probes = 1;                              ///< nearest: clusters whose keys a query sees, in one softmax
  Unassigned unassigned = Unassigned::left_out;  ///< balanced: clusters of tokens that no cluster has taken
  Combine combine = Combine::mean;               ///< balanced: mean or lse over the clusters of a query
  double mean_epsilon = 0;  ///< balanced, mean: added to the number of clusters that the sum over them is divided by
  /// Balanced, not shared: a cluster takes query_share * tokens / clusters queries of a sequence; 0: `window` queries,
  /// as many as keys.
  double query_share = 0;

  bool operator==(const Membership&) const = default;
};

/// Heads that see a window that moves with the query; designated initialisers in this order.
struct LocalHeads {
  Index heads = 0;
  Index window = 0;     ///< keys that a query sees at most, itself and those before it; required
  Index lookahead = 0;  ///< later keys that a query sees as well; two-sided only
  Matching matching = {};
  Positions positions = {};

  bool operator==(const LocalHeads&) const = default;
};

/// Heads that are routed by content: a query sees keys of its clusters; designated initialisers in this order.
struct RoutedHeads {
  Index heads = 0;
  Index clusters = 0;  ///< required; 2 * tokens / window works well
  Index window = 0;    ///< keys of a cluster that a query sees at most, itself included; required
  /// First keys of its sequence that a query sees beside its clusters, in one softmax; causal only. A key that is in a
  /// cluster as well counts once.
  Index sinks = 0;
  Index recent = 0;  ///< the same for the last keys up to the query, itself included
  Routing routing = Routing::learned;
  Membership membership = {};
  RouterConfig router = {};  ///< learned: how centroids move
  double commitment = 0;  ///< learned: weight of the commitment loss, whose gradient backward adds; 1e-4 in the paper
  Matching matching = {};
  Positions positions = {};

  bool operator==(const RoutedHeads&) const = default;
};

/// Heads that see every key (causal: every key up to the query); designated initialisers in this order.
struct DenseHeads {
  Index heads = 0;
  Matching matching = {};
  Positions positions = {};

  bool operator==(const DenseHeads&) const = default;
};

/// Settings of a RoutingAttention; designated initialisers in this order. Heads come in three blocks, in the order
/// local, routed, dense. A block without heads must be its default.
struct RoutingAttentionConfig {
  Index model_dim = 0;  ///< columns of x and y; required
  Index head_dim = 0;   ///< columns of a head; 0: model_dim / heads of all blocks
  /// Number of key/value heads over all blocks, a divisor of the number of heads; 0: one for each head. Head h reads
  /// key/value head h / (heads / kv_heads). Query heads that share a routed key/value head share its router, which
  /// assigns clusters by the sum of their normalised queries.
  Index kv_heads = 0;
  bool causal = false;  ///< nothing depends on later tokens
  bool bias = false;    ///< biases of the four projections
  Index memory = 0;     ///< learned keys and values of each head, which every query sees
  Index globals = 0;    ///< first tokens of every sequence, which all of its tokens see and which see all of them
  /// Causal: queries at the first dense_up_to positions see every key before them. Two-sided: queries of sequences of
  /// at most dense_up_to keys see every key.
  Index dense_up_to = 0;
  double soft_cap = 0;     ///< of the logits, see AttentionConfig; 0: none
  double dropout = 0;      ///< of the probabilities, in forward with a tape only; by seed and Input::step
  std::uint64_t seed = 0;  ///< of weights, centroids, random routing and dropout
  LocalHeads local = {};
  RoutedHeads routed = {};
  DenseHeads dense = {};

  bool operator==(const RoutingAttentionConfig&) const = default;
};

namespace detail {

template <class C, class Config>
concept MaybeConst = std::same_as<std::remove_const_t<C>, Config>;

// each_field(settings, f) calls f(name, field) for every field, in the order of declaration. The structured bindings do
// not compile when a struct has a field more.

template <MaybeConst<Matching> C, class F>
void each_field(C& settings, F&& f) {
  auto& [shared_qk, self, logits, gain, learned_gain, normalisation, induction, key_taps] = settings;
  f("shared_qk", shared_qk);
  f("self", self);
  f("logits", logits);
  f("gain", gain);
  f("learned_gain", learned_gain);
  f("normalisation", normalisation);
  f("induction", induction);
  f("key_taps", key_taps);
}

template <MaybeConst<Positions> C, class F>
void each_field(C& settings, F&& f) {
  auto& [kind, base, layout, buckets, max_distance, distances] = settings;
  f("kind", kind);
  f("base", base);
  f("layout", layout);
  f("buckets", buckets);
  f("max_distance", max_distance);
  f("distances", distances);
}

template <MaybeConst<Membership> C, class F>
void each_field(C& settings, F&& f) {
  auto& [kind, probes, unassigned, combine, mean_epsilon, query_share] = settings;
  f("kind", kind);
  f("probes", probes);
  f("unassigned", unassigned);
  f("combine", combine);
  f("mean_epsilon", mean_epsilon);
  f("query_share", query_share);
}

template <MaybeConst<RouterConfig> C, class F>
void each_field(C& settings, F&& f) {
  auto& [decay, average, renormalise, dead_share, split_share] = settings;
  f("decay", decay);
  f("average", average);
  f("renormalise", renormalise);
  f("dead_share", dead_share);
  f("split_share", split_share);
}

template <MaybeConst<LocalHeads> C, class F>
void each_field(C& settings, F&& f) {
  auto& [heads, window, lookahead, matching, positions] = settings;
  f("heads", heads);
  f("window", window);
  f("lookahead", lookahead);
  f("matching", matching);
  f("positions", positions);
}

template <MaybeConst<RoutedHeads> C, class F>
void each_field(C& settings, F&& f) {
  auto& [heads, clusters, window, sinks, recent, routing, membership, router, commitment, matching, positions] =
      settings;
  f("heads", heads);
  f("clusters", clusters);
  f("window", window);
  f("sinks", sinks);
  f("recent", recent);
  f("routing", routing);
  f("membership", membership);
  f("router", router);
  f("commitment", commitment);
  f("matching", matching);
  f("positions", positions);
}

template <MaybeConst<DenseHeads> C, class F>
void each_field(C& settings, F&& f) {
  auto& [heads, matching, positions] = settings;
  f("heads", heads);
  f("matching", matching);
  f("positions", positions);
}

template <MaybeConst<RoutingAttentionConfig> C, class F>
void each_field(C& settings, F&& f) {
  auto& [model_dim, head_dim, kv_heads, causal, bias, memory, globals, dense_up_to, soft_cap, dropout, seed, local,
         routed, dense] = settings;
  f("model_dim", model_dim);
  f("head_dim", head_dim);
  f("kv_heads", kv_heads);
  f("causal", causal);
  f("bias", bias);
  f("memory", memory);
  f("globals", globals);
  f("dense_up_to", dense_up_to);
  f("soft_cap", soft_cap);
  f("dropout", dropout);
  f("seed", seed);
  f("local", local);
  f("routed", routed);
  f("dense", dense);
}

/// The path of a field, "routed.membership.probes", put together while structs are visited.
class FieldPath {
 public:
  FieldPath() = default;
  FieldPath(const FieldPath& parent, std::string_view name) : FieldPath(parent) {
    if (size_ > 0) append(".");
    append(name);
  }
  std::string_view text() const { return {text_, size_}; }

 private:
  void append(std::string_view part) {
    COTERIE_ASSERT(size_ + part.size() <= sizeof text_);
    for (const char c : part) text_[size_++] = c;
  }

  char text_[64] = {};
  std::size_t size_ = 0;
};

template <class C, class F>
void visit_settings(C& settings, F& f, const FieldPath& parent) {
  each_field(settings, [&](std::string_view name, auto& field) {
    const FieldPath path(parent, name);
    if constexpr (requires { each_field(field, f); })
      visit_settings(field, f, path);
    else
      f(path.text(), field);
  });
}

}  // namespace detail

/// Calls f(path, field) for every setting of a config, const or not, in the order of declaration: "model_dim", ...,
/// "routed.membership.probes", ... All code that saves, loads or compares configs uses it. `path` is a
/// std::string_view, valid during the call.
template <detail::MaybeConst<RoutingAttentionConfig> C, class F>
void visit(C& config, F&& f) {
  detail::visit_settings(config, f, {});
}

}  // namespace coterie
