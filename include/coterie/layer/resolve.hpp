// Resolution of a layer's config: automatic values and checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "coterie/attention/distance_bias.hpp"
#include "coterie/core/check.hpp"
#include "coterie/layer/config.hpp"

namespace coterie::detail {

/// The largest size: the product of two such sizes fits into 64 bits.
inline constexpr Index largest_size = (std::numeric_limits<std::int32_t>::max)();

/// Heads of all blocks together; numbers out of range count as the nearest in range.
inline std::int64_t all_heads(const RoutingAttentionConfig& c) {
  std::int64_t sum = 0;
  for (const Index heads : {c.local.heads, c.routed.heads, c.dense.heads})
    sum += std::clamp<Index>(heads, 0, largest_size);
  return sum;
}

/// Query heads of a key/value head of a resolved config.
inline Index heads_per_kv(const RoutingAttentionConfig& c) { return static_cast<Index>(all_heads(c)) / c.kv_heads; }

/// Key/value heads of the routed block of a resolved config: each has a router and a plan.
inline Index routed_kv_heads(const RoutingAttentionConfig& c) { return c.routed.heads / heads_per_kv(c); }

/// Whether the plans of routed heads come from lists of members, not from one label per token.
inline bool has_members(const RoutingAttentionConfig& c) {
  return c.routed.heads > 0 && (c.routed.membership.kind == MembershipKind::balanced || c.routed.membership.probes > 1);
}

/// Whether routed heads see keys by position beside those of their clusters.
inline bool has_sinks_recent(const RoutingAttentionConfig& c) { return c.routed.sinks > 0 || c.routed.recent > 0; }

/// The settings of the router of a routed key/value head.
inline KMeansConfig router_config(const RoutingAttentionConfig& c, std::uint64_t seed) {
  return {.clusters = c.routed.clusters,
          .dim = c.head_dim,
          .seed = seed,
          .normalisation = c.routed.matching.normalisation,
          .router = c.routed.router};
}

/// The buckets of a block whose positions are t5_buckets.
inline PositionBuckets position_buckets(const Positions& positions, bool causal) {
  return {.buckets = positions.buckets, .max_distance = positions.max_distance, .causal = causal};
}

/// The automatic values of a block that has heads.
template <class Block>
void fill_block(Block& block, const RoutingAttentionConfig& c) {
  constexpr bool routed = std::is_same_v<Block, RoutedHeads>;
  if (block.heads <= 0) return;
  Matching& m = block.matching;
  if (!m.shared_qk) m.shared_qk = m.induction || (routed && c.causal && c.kv_heads == all_heads(c));
  if (!m.self) m.self = m.induction ? Self::never : *m.shared_qk ? Self::only_if_alone : Self::visible;
  if (!m.logits) m.logits = *m.shared_qk ? Logits::normalised : Logits::raw;
  if (!m.gain) m.gain = *m.logits == Logits::normalised ? 3.0 : 1.0;
  if (!m.learned_gain) m.learned_gain = *m.shared_qk;
  if (!block.positions.kind)
    block.positions.kind = routed || m.induction || c.head_dim == 1 ? PositionKind::none : PositionKind::rotary;
}

/// The config with every automatic value filled in; blocks without heads stay as they are. Checks nothing.
inline RoutingAttentionConfig fill(const RoutingAttentionConfig& given) {
  RoutingAttentionConfig c = given;
  const std::int64_t heads = all_heads(c);
  if (c.kv_heads == 0) c.kv_heads = static_cast<Index>(heads);
  if (c.head_dim == 0 && c.model_dim >= 1 && heads >= 1)
    c.head_dim = static_cast<Index>(static_cast<std::int64_t>(c.model_dim) / heads);
  fill_block(c.local, c);
  fill_block(c.routed, c);
  fill_block(c.dense, c);
  return c;
}

/// Collects faults under the path of a block.
class BlockFaults {
 public:
  BlockFaults(Faults& faults, const char* block) : faults_(faults), block_(block) {}

  void expect(bool good, const char* setting, const MessagePart& expected, const MessagePart& got) {
    if (!good) add(setting, expected, got);
  }
  std::string path(const char* setting) const { return join(block_, ".", setting); }
  Faults& faults() { return faults_; }

 private:
  [[gnu::cold, gnu::noinline]] void add(const char* setting, const MessagePart& expected, const MessagePart& got) {
    faults_.expect(false, path(setting).c_str(), expected, got);
  }

  Faults& faults_;
  const char* block_;
};

/// Checks how a block makes queries and keys. `routers`: the block has routers, which see normalised rows.
inline void check_matching(const Matching& m, const RoutingAttentionConfig& c, bool routers, BlockFaults& faults) {
  faults.expect(!m.induction || c.causal, "matching.induction",
                "false in a two-sided layer (a key carries the value of the next position)", "true");
  faults.expect(!m.induction || *m.shared_qk, "matching.shared_qk",
                "true or automatic with induction (a key is matched as a query is)", "false");
  const int self = static_cast<int>(*m.self), logits = static_cast<int>(*m.logits);
  faults.expect(self >= 0 && self <= static_cast<int>(Self::never), "matching.self", "visible, only_if_alone or never",
                self);
  faults.expect(!m.induction || *m.self == Self::never, "matching.self",
                "never or automatic with induction (a token's own key carries the next token)", "another");
  if (!c.causal && *m.self != Self::visible)
    faults.expect(c.memory <= 0, "matching.self",
                  "visible with memory in a two-sided layer (else a query had three intervals of keys)", "another");
  faults.expect(logits >= 0 && logits <= static_cast<int>(Logits::normalised_keys), "matching.logits",
                "raw, normalised or normalised_keys", logits);
  faults.expect(!m.induction || *m.logits == Logits::normalised, "matching.logits",
                "normalised or automatic with induction (what came before is matched by its direction)", "another");
  faults.expect(std::isfinite(*m.gain), "matching.gain", "a finite number", *m.gain);
  faults.expect(m.key_taps >= 0 && m.key_taps <= largest_size, "matching.key_taps", join("0 to ", largest_size),
                m.key_taps);
  faults.expect(m.key_taps <= 0 || m.induction, "matching.key_taps",
                "0 without induction (only its queries are convolved)", m.key_taps);

  const bool known = m.normalisation == Normalisation::layer_norm || m.normalisation == Normalisation::unit_length;
  faults.expect(known, "matching.normalisation", "layer_norm or unit_length", static_cast<int>(m.normalisation));
  const bool normalises = routers || *m.shared_qk || *m.logits != Logits::raw;
  faults.expect(!known || normalises || m.normalisation == Normalisation::layer_norm, "matching.normalisation",
                "its default with raw logits of queries and keys of their own (nothing is normalised)", "another");
  const Index least = least_width(m.normalisation);
  if (normalises && c.head_dim > 0 && c.head_dim < least)
    faults.faults().expect(
        false, "head_dim",
        join("at least ", least, " for ", faults.path("matching.normalisation"),
             least == 3 ? " (a layer norm over fewer leaves only signs)" : " (one column has no direction but a sign)"),
        c.head_dim);
  if (*m.shared_qk && c.kv_heads >= 1)
    if (const std::int64_t heads = all_heads(c); c.kv_heads != heads)
      faults.faults().expect(false, "kv_heads",
                             join("as many as heads = ", heads, " with ", faults.path("matching.shared_qk"),
                                  " (a key is its head's query)"),
                             c.kv_heads);
}

/// Checks how a block knows positions. `own_range`: its window sets which distances have an entry.
inline void check_positions(const Positions& p, const RoutingAttentionConfig& c, bool own_range, BlockFaults& faults) {
  const int kind = static_cast<int>(*p.kind);
  faults.expect(kind >= 0 && kind <= static_cast<int>(PositionKind::shaw), "positions.kind",
                "rotary, bias, none, alibi, t5_buckets or shaw", kind);
  faults.expect(p.base > 0 && std::isfinite(p.base), "positions.base", "a positive number", p.base);
  faults.expect(p.layout == RotaryLayout::halves || p.layout == RotaryLayout::interleaved, "positions.layout",
                "halves or interleaved", static_cast<int>(p.layout));
  if (*p.kind == PositionKind::rotary && c.head_dim == 1)
    faults.faults().expect(false, "head_dim",
                           join("at least 2 with rotary ", faults.path("positions"), " (pairs of columns turn)"), 1);
  if (*p.kind == PositionKind::t5_buckets)
    check_buckets(faults.faults(), faults.path("positions.buckets").c_str(),
                  faults.path("positions.max_distance").c_str(), position_buckets(p, c.causal));
  const bool by_distance = *p.kind == PositionKind::bias || *p.kind == PositionKind::shaw;
  if (own_range)
    faults.expect(p.distances == 0, "positions.distances", "0 (the window says which distances have an entry)",
                  p.distances);
  else if (by_distance)
    faults.expect(p.distances >= 1 && p.distances <= largest_size, "positions.distances",
                  join("1 to ", largest_size, " with bias or shaw (farther keys share the last entry)"), p.distances);
  else
    faults.expect(p.distances == 0, "positions.distances",
                  "0 without bias or shaw (nothing else has entries by distance)", p.distances);
}

/// Checks the settings that every kind of block has. Returns whether the block has heads and so needs further checks.
template <class Block>
bool check_block(const Block& block, const RoutingAttentionConfig& c, const char* name, Faults& faults) {
  BlockFaults own(faults, name);
  own.expect(block.heads >= 0 && block.heads <= largest_size, "heads", join("0 to ", largest_size), block.heads);
  if (block.heads < 0) return false;
  if (block.heads == 0) {
    faults.expect(block == Block{}, name, "its default without heads", "another");
    return false;
  }
  if (const std::int64_t heads = all_heads(c); c.kv_heads >= 1 && heads % c.kv_heads == 0)
    own.expect(block.heads % (heads / c.kv_heads) == 0, "heads",
               join("a multiple of heads / kv_heads = ", heads / c.kv_heads), block.heads);
  bool routers = false;
  if constexpr (std::is_same_v<Block, RoutedHeads>) routers = block.routing == Routing::learned;
  check_matching(block.matching, c, routers, own);
  check_positions(block.positions, c, std::is_same_v<Block, LocalHeads>, own);
  return true;
}

inline void check_local(const LocalHeads& local, const RoutingAttentionConfig& c, BlockFaults& faults) {
  faults.expect(local.window >= 1, "window", "at least 1 (as long as the longest sequence: no limit)", local.window);
  faults.expect(local.lookahead >= 0, "lookahead", "at least 0", local.lookahead);
  faults.expect(!c.causal || local.lookahead <= 0, "lookahead", "0 with causal (it shows later tokens)",
                local.lookahead);
  if (*local.positions.kind != PositionKind::bias && *local.positions.kind != PositionKind::shaw) return;
  faults.expect(local.window <= largest_size, "window", join("at most ", largest_size, " with an entry per distance"),
                local.window);
  faults.expect(local.lookahead <= largest_size, "lookahead",
                join("at most ", largest_size, " with an entry per distance"), local.lookahead);
}

inline void check_membership(const RoutedHeads& routed, BlockFaults& faults) {
  const Membership& m = routed.membership;
  const bool learned = routed.routing == Routing::learned, balanced = m.kind == MembershipKind::balanced;
  faults.expect(balanced || m.kind == MembershipKind::nearest, "membership.kind", "nearest or balanced",
                static_cast<int>(m.kind));
  faults.expect(!balanced || learned, "membership.kind", "nearest without learned routing (nothing scores tokens)",
                "balanced");
  faults.expect(m.probes >= 1, "membership.probes", "at least 1", m.probes);
  if (m.probes > 1) {
    faults.expect(learned, "membership.probes", "1 without learned routing (nothing scores clusters)", m.probes);
    faults.expect(!balanced, "membership.probes", "1 with balanced membership (clusters choose their queries)",
                  m.probes);
    faults.expect(m.probes <= routed.clusters, "membership.probes", join("at most clusters = ", routed.clusters),
                  m.probes);
  }
  faults.expect(m.unassigned == Unassigned::left_out || (balanced && m.unassigned == Unassigned::nearest),
                "membership.unassigned", "left_out, or nearest with balanced membership",
                static_cast<int>(m.unassigned));
  faults.expect(m.combine == Combine::mean || (balanced && m.combine == Combine::lse), "membership.combine",
                "mean, or lse with balanced membership (several probes are one softmax anyway)",
                static_cast<int>(m.combine));
  faults.expect(m.mean_epsilon == 0 ||
                    (balanced && m.combine == Combine::mean && m.mean_epsilon > 0 && std::isfinite(m.mean_epsilon)),
                "membership.mean_epsilon", "0, or a positive number with the mean over clusters of balanced membership",
                m.mean_epsilon);
  faults.expect(m.query_share == 0 || (balanced && m.query_share > 0 && std::isfinite(m.query_share)),
                "membership.query_share", "0, or a positive number with balanced membership", m.query_share);
  faults.expect(m.query_share == 0 || !*routed.matching.shared_qk, "membership.query_share",
                "0 with shared_qk (lists of keys are those of queries)", m.query_share);
}

/// Checks the keys that routed heads see by position.
inline void check_sinks_recent(const RoutedHeads& routed, const RoutingAttentionConfig& c, BlockFaults& faults) {
  const auto expect_count = [&](const char* setting, Index count) {
    faults.expect(count >= 0 && count <= largest_size, setting, join("0 to ", largest_size), count);
    faults.expect(count <= 0 || c.causal, setting,
                  "0 in a two-sided layer (globals and local heads see by position there)", count);
  };
  expect_count("sinks", routed.sinks);
  expect_count("recent", routed.recent);
  const Membership& m = routed.membership;
  faults.expect(!has_sinks_recent(c) || m.kind != MembershipKind::balanced || m.combine == Combine::lse,
                "membership.combine", "lse with sinks or recent keys (one softmax over them and the clusters)",
                "another");
}

inline void check_routed(const RoutedHeads& routed, BlockFaults& faults) {
  faults.expect(routed.clusters >= 1 && routed.clusters <= largest_size, "clusters",
                join("1 to ", largest_size, " (2 * tokens / window is a good number)"), routed.clusters);
  faults.expect(routed.window >= 1, "window", "at least 1 (as long as the longest sequence: no limit)", routed.window);
  const bool learned = routed.routing == Routing::learned;
  faults.expect(learned || routed.routing == Routing::random, "routing", "learned or random",
                static_cast<int>(routed.routing));
  check_membership(routed, faults);
  faults.expect(routed.commitment >= 0 && std::isfinite(routed.commitment), "commitment", "0, or a positive number",
                routed.commitment);
  if (learned) return check_router(faults.faults(), routed.router, faults.path("router."));
  faults.expect(routed.router == RouterConfig{}, "router", "its default without learned routing (there is no router)",
                "another");
  faults.expect(routed.commitment <= 0, "commitment", "0 without learned routing (there is no router)",
                routed.commitment);
}

/// Checks memory, globals and dense_up_to. A layer of dense heads alone needs neither of the last two.
inline void check_additions(const RoutingAttentionConfig& c, Faults& faults) {
  const bool all_dense = c.local.heads <= 0 && c.routed.heads <= 0 && c.dense.heads > 0;
  faults.expect(c.memory >= 0 && c.memory <= largest_size, "memory", join("0 to ", largest_size), c.memory);
  faults.expect(c.globals >= 0 && c.globals <= largest_size, "globals", join("0 to ", largest_size), c.globals);
  if (c.globals > 0) {
    faults.expect(!all_dense, "globals", "0 where all heads are dense (every token is global)", c.globals);
    faults.expect(!has_members(c), "globals", "0 with balanced membership or several probes (one entry for a token)",
                  c.globals);
    faults.expect(!has_sinks_recent(c), "globals", "0 with routed.sinks or routed.recent (one entry for a token)",
                  c.globals);
    const auto check_self = [&](const auto& block, const char* path) {
      faults.expect(block.heads <= 0 || c.causal || *block.matching.self == Self::visible, path,
                    "visible with globals in a two-sided layer (else a query had three intervals of keys)", "another");
    };
    check_self(c.local, "local.matching.self");
    check_self(c.routed, "routed.matching.self");
  }
  faults.expect(c.dense_up_to >= 0 && c.dense_up_to <= largest_size, "dense_up_to", join("0 to ", largest_size),
                c.dense_up_to);
  faults.expect(c.dense_up_to <= 0 || !all_dense, "dense_up_to", "0 where all heads are dense at any length",
                c.dense_up_to);
}

/// Checks a config as given and as filled in by fill(): ValueError, which names all faults by path.
inline void check_settings(const RoutingAttentionConfig& given, const RoutingAttentionConfig& c) {
  Faults faults("RoutingAttentionConfig");
  const std::int64_t heads = all_heads(c);
  faults.expect(c.model_dim >= 1 && c.model_dim <= largest_size, "model_dim", join("1 to ", largest_size), c.model_dim);
  faults.expect(heads >= 1 && heads <= largest_size, "heads",
                join("1 to ", largest_size, " in the blocks local, routed and dense together"), heads);
  if (given.head_dim == 0 && c.model_dim >= 1 && heads >= 1)
    faults.expect(c.model_dim % heads == 0, "model_dim", join("a multiple of heads = ", heads, ", or a head_dim"),
                  c.model_dim);
  else
    faults.expect(c.head_dim >= 0 && c.head_dim <= largest_size, "head_dim",
                  join("1 to ", largest_size, ", or 0 for model_dim / heads"), c.head_dim);
  faults.expect(heads < 1 || (c.kv_heads >= 1 && heads % c.kv_heads == 0), "kv_heads",
                join("a divisor of heads = ", heads), c.kv_heads);
  faults.expect(c.soft_cap >= 0 && std::isfinite(c.soft_cap), "soft_cap", "0, or a positive number", c.soft_cap);
  faults.expect(c.dropout >= 0 && c.dropout < 1, "dropout", "at least 0 and below 1", c.dropout);
  BlockFaults local(faults, "local"), routed(faults, "routed");
  if (check_block(c.local, c, "local", faults)) check_local(c.local, c, local);
  if (check_block(c.routed, c, "routed", faults)) {
    check_routed(c.routed, routed);
    check_sinks_recent(c.routed, c, routed);
  }
  check_block(c.dense, c, "dense", faults);
  check_additions(c, faults);
  faults.raise();
}

/// The config with every automatic value filled in.
/// Requires: settings that make sense together; otherwise ValueError, which names all faults.
inline RoutingAttentionConfig resolve(const RoutingAttentionConfig& given) {
  const RoutingAttentionConfig config = fill(given);
  check_settings(given, config);
  return config;
}

}  // namespace coterie::detail
