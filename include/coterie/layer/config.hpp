// What a routing attention layer is made of: heads, plans, positions, routing.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "coterie/attention/distance_bias.hpp"
#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/kernel/rotary.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/router/config.hpp"
#include "coterie/router/members.hpp"

namespace coterie {

/// The plan of the routed ("content") heads.
enum class Routing {
  learned,  ///< clusters of the layer's k-means routers
  random,   ///< clusters drawn from (seed, step, head, position): the paper's baseline
  dense,    ///< every head sees everything (causal: everything before it)
};

/// Which tokens are in a cluster of a routed head with learned routing.
enum class Membership {
  nearest,  ///< those that it is the nearest cluster of: strictly causal
  balanced,  ///< its `window` best in each sequence (the paper): evenly loaded, but NOT strictly causal, see balanced_members
};

/// What the logits of routed heads are made of. Routers always see normalised rows.
enum class Logits {
  raw,              ///< queries and keys as they are projected
  normalised,       ///< both normalised
  normalised_keys,  ///< queries as they are projected, keys normalised
};

/// How heads know where queries and keys are. Distances are those of places in the sequence, never of ranks in a cluster;
/// those of induction heads are to the key that matches, not to the value that it carries.
enum class PositionKind {
  rotary,      ///< rotations of queries and keys by the place in the sequence; routers see them as they were
  bias,        ///< a learned number per head and distance, added to the logit
  none,        ///< only by which keys a query sees
  alibi,       ///< slope * distance less, with fixed slopes (alibi_slope): as many as these heads
  t5_buckets,  ///< a learned number per head and bucket of distances (PositionBuckets)
  shaw,        ///< learned vectors per distance, for all of these heads, added to keys and to values (the paper)
};

/// Settings of a RoutingAttention; designated initialisers in this order.
struct RoutingAttentionConfig {
  Index model_dim = 0;  ///< columns of x and y; required
  Index heads = 0;      ///< local and routed heads together; required
  Index kv_heads =
      0;  ///< key/value heads, a divisor of heads; 0: as heads. Head h reads number h / (heads / kv_heads);
          ///< the query heads of a routed one share its router, and go where the sum of their
          ///< normalised queries is nearest
  Index head_dim = 0;      ///< columns of a head; 0: model_dim / heads
  Index routed_heads = 0;  ///< the last so many heads go by content, the ones before are local; whole groups of a
                           ///< key/value head
  Index clusters = 0;      ///< clusters of a routed head, for learned and random; 2 * tokens / window is a good number
  Index window = 0;        ///< keys that a query sees at most, itself included; required but for dense routing
  Index local_window = 0;  ///< the same for local heads; 0: as window
  Index lookahead = 0;     ///< later keys that a query of a local head sees as well; two-sided only
  bool causal = false;     ///< nothing depends on later tokens
  Routing routing = Routing::learned;
  Membership membership = Membership::nearest;
  Index probes = 1;  ///< nearest membership: clusters that a query looks into, one softmax over all of their keys
  Unassigned unassigned = Unassigned::left_out;  ///< balanced: what becomes of tokens that no cluster takes
  Combine combine = Combine::mean;               ///< balanced: mean or lse over the clusters of a query
  double mean_epsilon = 0;  ///< balanced, mean: added to the number of clusters that the sum over them is divided by
  double query_share = 0;   ///< balanced, not shared: a cluster takes query_share * tokens / clusters queries of a
                            ///< sequence; 0: window of them, as of keys
  std::optional<bool> shared_qk = {};  ///< routed heads: keys are the queries; automatic: when causal, with as many
                                       ///< key/value heads as heads
  std::optional<Self> self = {};       ///< routed heads: whether a token sees itself; automatic: only_if_alone when
                                       ///< shared, never when induction, else visible
  bool induction = false;        ///< routed heads are induction heads: a key carries the value of the next position
  bool local_induction = false;  ///< so are the local ones, within their window: the fair control
  Index key_taps = 0;            ///< taps of the convolution of induction queries; 0: none, 8 is a good number
  Normalisation normalisation = Normalisation::layer_norm;  ///< of routed and local induction heads
  std::optional<Logits> logits = {};      ///< routed heads; automatic: normalised when shared, else raw
  std::optional<double> gain = {};        ///< of routed and local induction heads, whose logits are gain/sqrt(d) q.k;
                                          ///< automatic: 3 where both are normalised, else 1
  std::optional<bool> learned_gain = {};  ///< routed heads: the gain is a parameter per head; automatic: when shared
  Index memory = 0;                       ///< learned keys and values of each head, which every query sees
  double soft_cap = 0;                    ///< of the logits, see AttentionConfig; 0: none
  double dropout = 0;     ///< of the probabilities, in forward with a tape only; by seed and Input::step
  bool bias = false;      ///< biases of the four projections
  Index globals = 0;      ///< first tokens of every sequence, which all of its tokens see and which see all of them
  Index dense_up_to = 0;  ///< causal: the queries of the first so many positions see all before them; two-sided: those
                          ///< of sequences of at most so many keys see all
  std::optional<PositionKind> local_positions = {};  ///< automatic: rotary; none for induction heads, and for width 1
  PositionKind routed_positions = PositionKind::none;
  RotaryLayout rotary_layout = RotaryLayout::halves;
  double rotary_base = 10000;
  Index position_buckets = 32;  ///< of t5_buckets; two-sided layers have half of them for later keys
  Index max_distance = 128;     ///< of t5_buckets: about where the last bucket begins
  Index routed_distances = 0;   ///< PositionKind::bias and shaw: how many distances have an entry (of each side,
                                ///< where two-sided); farther ones take the last. Required there, else 0
  double decay = 0.999;         ///< of the centroids, reached by the schedule min(decay, (1 + t) / (10 + t))
  Average average = Average::counts_and_sums;  ///< of the routers, this and the next three: see KMeansConfig
  bool renormalise = false;
  double dead_share = 0.1;
  double split_share = 0;
  double commitment = 0;   ///< weight of the commitment loss, whose gradient backward adds; 0: none, 1e-4 in the paper
  std::uint64_t seed = 0;  ///< of weights, centroids and random routing

  bool operator==(const RoutingAttentionConfig&) const = default;
};

namespace detail {

/// Whether routed heads have plans of lists of members, not of one label a token.
inline bool has_members(const RoutingAttentionConfig& c) {
  return c.routed_heads > 0 && (c.membership == Membership::balanced || c.probes > 1);
}

/// Key/value heads of the routed heads of a resolved config: each has a router and a plan.
inline Index routed_kv_heads(const RoutingAttentionConfig& c) { return c.routed_heads / (c.heads / c.kv_heads); }

/// The part of resolve that is about membership.
inline void check_membership(const RoutingAttentionConfig& c, Faults& faults) {
  const bool learned = c.routed_heads > 0 && c.routing == Routing::learned;
  const bool balanced = c.membership == Membership::balanced;
  faults.expect(balanced || c.membership == Membership::nearest, "membership", "nearest or balanced",
                static_cast<int>(c.membership));
  faults.expect(!balanced || learned, "membership", "nearest without heads of learned routing (nothing scores tokens)",
                "balanced");
  faults.expect(c.probes >= 1, "probes", "at least 1", c.probes);
  if (c.probes > 1) {
    faults.expect(learned, "probes", "1 without heads of learned routing (nothing scores clusters)", c.probes);
    faults.expect(!balanced, "probes", "1 with balanced membership (clusters choose their queries)", c.probes);
    faults.expect(!learned || c.probes <= c.clusters, "probes", join("at most clusters = ", c.clusters), c.probes);
  }
  faults.expect(c.unassigned == Unassigned::left_out || (balanced && c.unassigned == Unassigned::nearest), "unassigned",
                "left_out, or nearest with balanced membership", static_cast<int>(c.unassigned));
  faults.expect(c.combine == Combine::mean || (balanced && c.combine == Combine::lse), "combine",
                "mean, or lse with balanced membership (several probes are one softmax anyway)",
                static_cast<int>(c.combine));
  faults.expect(c.query_share == 0 || (balanced && c.query_share > 0 && std::isfinite(c.query_share)), "query_share",
                "0, or a positive number with balanced membership", c.query_share);
  faults.expect(c.mean_epsilon == 0 ||
                    (balanced && c.combine == Combine::mean && c.mean_epsilon > 0 && std::isfinite(c.mean_epsilon)),
                "mean_epsilon", "0, or a positive number with the mean over clusters of balanced membership",
                c.mean_epsilon);
  faults.expect(c.query_share == 0 || !*c.shared_qk, "query_share",
                "0 with shared_qk (lists of keys are those of queries)", c.query_share);
}

/// The buckets of heads with t5_buckets.
inline PositionBuckets position_buckets(const RoutingAttentionConfig& c) {
  return {.buckets = c.position_buckets, .max_distance = c.max_distance, .causal = c.causal};
}

/// The part of resolve that is about positions.
inline void resolve_positions(RoutingAttentionConfig& c, Faults& faults) {
  const bool any_routed = c.routed_heads > 0, any_local = c.routed_heads < c.heads;
  const auto known = [](PositionKind p) {
    return static_cast<int>(p) >= 0 && static_cast<int>(p) <= static_cast<int>(PositionKind::shaw);
  };
  if (!c.local_positions)
    c.local_positions = c.local_induction || c.head_dim == 1 ? PositionKind::none : PositionKind::rotary;
  faults.expect(known(*c.local_positions), "local_positions", "rotary, bias, none, alibi, t5_buckets or shaw",
                static_cast<int>(*c.local_positions));
  faults.expect(known(c.routed_positions), "routed_positions", "rotary, bias, none, alibi, t5_buckets or shaw",
                static_cast<int>(c.routed_positions));
  faults.expect(any_routed || c.routed_positions == PositionKind::none, "routed_positions", "none without routed heads",
                static_cast<int>(c.routed_positions));
  const auto used = [&](PositionKind p) {
    return (any_local && *c.local_positions == p) || (any_routed && c.routed_positions == p);
  };
  faults.expect(c.rotary_layout == RotaryLayout::halves || c.rotary_layout == RotaryLayout::interleaved,
                "rotary_layout", "halves or interleaved", static_cast<int>(c.rotary_layout));
  faults.expect(c.rotary_base > 0 && std::isfinite(c.rotary_base), "rotary_base", "a positive number", c.rotary_base);
  faults.expect(!used(PositionKind::rotary) || c.head_dim != 1, "head_dim",
                "at least 2 with rotary positions (pairs of columns turn)", c.head_dim);
  if (used(PositionKind::t5_buckets)) check_buckets(faults, "position_buckets", "max_distance", position_buckets(c));
  const bool by_distance =
      any_routed && (c.routed_positions == PositionKind::bias || c.routed_positions == PositionKind::shaw);
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  faults.expect(by_distance ? c.routed_distances >= 1 && c.routed_distances <= most : c.routed_distances == 0,
                "routed_distances",
                by_distance ? "at least 1 with PositionKind::bias or shaw (farther keys share the last entry)"
                            : "0 without PositionKind::bias or shaw (nothing else has entries by distance)",
                c.routed_distances);
}

/// The settings of a routed head's router.
inline KMeansConfig router_config(const RoutingAttentionConfig& c, std::uint64_t seed) {
  return {.clusters = c.clusters,
          .dim = c.head_dim,
          .seed = seed,
          .normalisation = c.normalisation,
          .router = {c.decay, c.average, c.renormalise, c.dead_share, c.split_share}};
}

/// The part of resolve that is about routers.
inline void check_routers(const RoutingAttentionConfig& c, Faults& faults) {
  const RouterConfig usual;
  check_router(faults, router_config(c, 0).router, "");
  faults.expect(c.commitment >= 0 && std::isfinite(c.commitment), "commitment", "0, or a positive number",
                c.commitment);
  if (c.routed_heads > 0 && c.routing == Routing::learned) return;
  const auto unused = [&](bool changed, const char* argument) {
    faults.expect(!changed, argument, "its default without heads of learned routing (there is no router)", "another");
  };
  unused(c.average != usual.average, "average");
  unused(c.renormalise, "renormalise");
  unused(c.dead_share != usual.dead_share, "dead_share");
  unused(c.split_share != 0, "split_share");
  unused(c.commitment > 0, "commitment");
}

/// The part of resolve that is about what logits are made of.
inline void resolve_logits(RoutingAttentionConfig& c, Faults& faults) {
  const bool any_routed = c.routed_heads > 0, local_induction = c.routed_heads < c.heads && c.local_induction;
  check_normalisation(faults, c.normalisation);
  // Of heads that there are not, nothing but what would have been automatic.
  const auto unused = [&](bool changed, const char* argument, const char* without) {
    faults.expect(!changed, argument, without, "another");
  };
  const Logits usual = *c.shared_qk ? Logits::normalised : Logits::raw;
  if (!any_routed) {
    unused(c.logits.value_or(usual) != usual, "logits", "automatic without routed heads");
    unused(c.learned_gain.value_or(*c.shared_qk) != *c.shared_qk, "learned_gain", "automatic without routed heads");
    if (!local_induction) {
      unused(c.gain.has_value(), "gain", "automatic without routed or local induction heads");
      unused(c.normalisation != Normalisation::layer_norm, "normalisation",
             "its default without routed or local induction heads");
    }
  }
  if (!c.logits) c.logits = usual;
  const auto logits = static_cast<int>(*c.logits);
  faults.expect(logits >= 0 && logits <= static_cast<int>(Logits::normalised_keys), "logits",
                "raw, normalised or normalised_keys", logits);
  faults.expect(!c.induction || *c.logits == Logits::normalised, "logits",
                "normalised or automatic with induction (what came before is matched by its direction)", logits);
  if (c.gain) faults.expect(std::isfinite(*c.gain), "gain", "a finite number", *c.gain);
  if (!c.learned_gain) c.learned_gain = *c.shared_qk;
  const bool normalises =
      (any_routed && (*c.shared_qk || c.routing == Routing::learned || *c.logits != Logits::raw)) || local_induction;
  const Index least = least_width(c.normalisation);
  faults.expect(!normalises || c.head_dim >= least || c.head_dim <= 0, "head_dim",
                least == 3
                    ? "at least 3 where queries and keys are normalised (a layer norm over fewer leaves only signs)"
                    : "at least 2 where queries and keys are normalised (one column has no direction but a sign)",
                c.head_dim);
}

/// The config with every automatic value filled in.
/// Requires: settings that make sense together; otherwise ValueError, which names all faults.
inline RoutingAttentionConfig resolve(RoutingAttentionConfig c) {
  Faults faults("RoutingAttentionConfig");
  faults.expect(c.model_dim >= 1, "model_dim", "at least 1", c.model_dim);
  faults.expect(c.heads >= 1, "heads", "at least 1", c.heads);
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  const bool grouped = c.heads >= 1 && c.kv_heads >= 1 && c.heads % c.kv_heads == 0;
  faults.expect(grouped || c.heads < 1, "kv_heads", join("a divisor of heads = ", c.heads), c.kv_heads);
  faults.expect(c.head_dim >= 0, "head_dim", "at least 1, or 0 for model_dim / heads", c.head_dim);
  if (c.head_dim == 0 && c.model_dim >= 1 && c.heads >= 1) {
    faults.expect(c.model_dim % c.heads == 0, "model_dim", join("a multiple of heads = ", c.heads, ", or a head_dim"),
                  c.model_dim);
    c.head_dim = c.model_dim / c.heads;
  }
  faults.expect(c.routed_heads >= 0 && c.routed_heads <= c.heads, "routed_heads", join("0 to heads = ", c.heads),
                c.routed_heads);
  if (grouped && c.routed_heads % (c.heads / c.kv_heads) != 0)
    faults.expect(false, "routed_heads", join("a multiple of heads / kv_heads = ", c.heads / c.kv_heads),
                  c.routed_heads);
  const bool any_routed = c.routed_heads > 0, any_local = c.routed_heads < c.heads;
  const bool clustered = any_routed && c.routing != Routing::dense;
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  faults.expect(c.clusters <= most && c.clusters >= (clustered ? 1 : 0), "clusters",
                join("1 to ", most, " with learned or random routing (2 * tokens / window is a good number)"),
                c.clusters);
  const bool own_local_window = c.local_window != 0;
  if (!own_local_window) c.local_window = c.window;
  faults.expect(c.window >= 0 && (!clustered || c.window >= 1), "window",
                "at least 1 (as long as the longest sequence: no limit)", c.window);
  faults.expect((c.local_window >= 0 && (!any_local || c.local_window >= 1)) || (!own_local_window && c.window < 0),
                "local_window", "at least 1, or a window to take", c.local_window);
  faults.expect(c.lookahead >= 0, "lookahead", "at least 0", c.lookahead);
  faults.expect(!c.causal || c.lookahead <= 0, "lookahead", "0 with causal (it shows later tokens)", c.lookahead);

  resolve_positions(c, faults);
  faults.expect(c.routing == Routing::learned || c.routing == Routing::random || c.routing == Routing::dense, "routing",
                "learned, random or dense", static_cast<int>(c.routing));
  if (c.self) check_self(faults, *c.self);

  const bool asked_self = c.self.has_value();
  faults.expect(!c.induction || c.causal, "induction", "causal (a key carries the value of the next position)",
                "a two-sided layer");
  faults.expect(!c.local_induction || c.causal, "local_induction",
                "causal (a key carries the value of the next position)", "a two-sided layer");
  faults.expect(!c.induction || c.shared_qk.value_or(true), "shared_qk", "true or automatic with induction", "false");
  if (!c.shared_qk) c.shared_qk = (c.causal && c.kv_heads == c.heads) || c.induction;
  faults.expect(c.kv_heads == c.heads || !((any_routed && *c.shared_qk) || (any_local && c.local_induction)),
                "kv_heads", "as many as heads with shared_qk, induction or local_induction (a key is its head's query)",
                c.kv_heads);
  if (!c.self) c.self = c.induction ? Self::never : *c.shared_qk ? Self::only_if_alone : Self::visible;
  faults.expect(!c.induction || !asked_self || *c.self == Self::never, "self",
                "never or automatic with induction (a token's own key carries the next token)", "another");
  faults.expect(c.key_taps >= 0, "key_taps", "at least 0", c.key_taps);
  faults.expect(c.key_taps <= 0 || c.induction || c.local_induction, "key_taps",
                "0 without induction or local_induction (only their queries are convolved)", c.key_taps);
  resolve_logits(c, faults);
  check_membership(c, faults);
  faults.expect(c.memory >= 0 && c.memory <= most, "memory", join("0 to ", most), c.memory);
  faults.expect(c.memory <= 0 || !any_routed || c.causal || *c.self == Self::visible, "self",
                "visible with memory in a two-sided layer (else a query had three intervals of keys)", "another");
  faults.expect(c.soft_cap >= 0 && std::isfinite(c.soft_cap), "soft_cap", "0, or a positive number", c.soft_cap);
  faults.expect(c.dropout >= 0 && c.dropout < 1, "dropout", "at least 0 and below 1", c.dropout);
  const bool all_dense = any_routed && !any_local && c.routing == Routing::dense;
  faults.expect(c.globals >= 0 && c.globals <= most, "globals", join("0 to ", most), c.globals);
  if (c.globals > 0) {
    faults.expect(!all_dense, "globals", "0 where all heads are dense (every token is global)", c.globals);
    faults.expect(!has_members(c), "globals", "0 with balanced membership or several probes (one entry for a token)",
                  c.globals);
    faults.expect(!any_routed || c.causal || *c.self == Self::visible, "self",
                  "visible with globals in a two-sided layer (else a query had three intervals of keys)", "another");
  }
  faults.expect(c.dense_up_to >= 0 && c.dense_up_to <= most, "dense_up_to", join("0 to ", most), c.dense_up_to);
  faults.expect(c.dense_up_to <= 0 || !all_dense, "dense_up_to", "0 where all heads are dense at any length",
                c.dense_up_to);
  check_routers(c, faults);
  faults.raise();
  return c;
}

}  // namespace detail
}  // namespace coterie
