// A block of heads of one kind: its settings, resolved, and its positions in the weights.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "coterie/layer/config.hpp"
#include "coterie/layer/resolve.hpp"

namespace coterie::detail {

/// Which keys the heads of a block see.
enum class BlockKind {
  local,   ///< a window around the query
  routed,  ///< the members of the query's clusters
  dense,   ///< every key (causal: every key up to the query)
};

/// A block's name: its path in the config, and the prefix of its tables.
inline const char* block_name(BlockKind kind) {
  return kind == BlockKind::local ? "local" : kind == BlockKind::routed ? "routed" : "dense";
}

/// Consecutive heads of one kind, with every resolved setting that can differ between blocks. Passes read from the
/// config only what all blocks share.
struct HeadBlock {
  BlockKind kind = BlockKind::local;
  Index first = 0, count = 0;        ///< query heads
  Index kv_first = 0, kv_count = 0;  ///< key/value heads
  Index head_dim = 0;

  // How queries and keys are made and matched.
  bool shared = false;  ///< keys are the queries
  Self self = Self::visible;
  Logits logits = Logits::raw;
  double gain = 1;            ///< factor of the logits beside 1/sqrt(d); where it is learned, its first value
  bool learned_gain = false;  ///< the gain is a parameter
  Normalisation normalisation = Normalisation::layer_norm;
  bool induction = false;  ///< shared, convolved, and a key carries the next position's value
  Index taps = 0;          ///< taps of the convolution of a head's queries; 0: none

  // How heads know positions.
  PositionKind positions = PositionKind::none;
  RotaryLayout rotary_layout = RotaryLayout::halves;
  double rotary_base = 10000;
  PositionBuckets buckets;  ///< of t5_buckets
  Index distances = 0;      ///< entries of bias and shaw; of local heads their window and lookahead instead

  // Which keys they see.
  Index window = 0;     ///< keys that a query sees at most; local and routed
  Index lookahead = 0;  ///< later keys that a query sees; local

  Index sinks = 0, recent = 0;  ///< first keys of the sequence, and last ones, that a query sees as well; routed

  // Routing; routed only.
  Index clusters = 0;
  Routing routing = Routing::learned;  ///< learned or random
  bool balanced = false;               ///< clusters choose their members; else tokens choose their clusters
  Index probes = 1;
  Unassigned unassigned = Unassigned::left_out;
  Combine combine = Combine::mean;
  double mean_epsilon = 0, query_share = 0;
  double commitment = 0;  ///< weight of the commitment loss
  KMeansConfig router;    ///< of every router, but for the seed

  // Positions in the weights and in the random streams.
  Index key_first = 0;               ///< first of these key/value heads in w_k, unless shared
  Index gain_first = 0;              ///< first of these heads in gain, if learned
  Index taps_first = 0;              ///< first row of these heads in taps
  std::uint64_t dropout_stream = 0;  ///< counter of the dropout seed

  Index cols() const { return count * head_dim; }
  Index first_col() const { return first * head_dim; }
  Index kv_cols() const { return kv_count * head_dim; }
  Index kv_first_col() const { return kv_first * head_dim; }
  Index key_first_col() const { return key_first * head_dim; }
  /// Query heads of a key/value head.
  Index heads_per_kv() const { return count / kv_count; }
  /// Rows of taps.
  Index taps_rows() const { return count * taps; }

  /// Whether normalised queries are kept; and normalised keys other than those.
  bool normalises_queries() const { return shared || logits == Logits::normalised; }
  bool normalises_keys() const { return !shared && logits != Logits::raw; }
  /// Whether attention reads the same rows as queries and as keys.
  bool attends_same_rows() const { return shared && logits != Logits::normalised_keys; }

  /// Whether every key/value head has clusters, and a plan of its own.
  bool clustered() const { return kind == BlockKind::routed; }
  /// Whether every key/value head has a router.
  bool learned() const { return clustered() && routing == Routing::learned; }
  /// Whether plans come from lists of members, not from one label per token.
  bool has_members() const { return clustered() && (balanced || probes > 1); }
  /// Whether a query sees keys by position beside those of its clusters.
  bool has_sinks_recent() const { return sinks > 0 || recent > 0; }
  /// Whether a row can have several entries, in one softmax (balanced: in one or in several).
  bool has_entries() const { return has_members() || has_sinks_recent(); }
  /// Whether routers see sums over the query heads of a key/value head.
  bool sums_queries() const { return learned() && heads_per_kv() > 1; }
};

/// The blocks of a layer; those without heads have a count of 0.
struct Heads {
  std::array<HeadBlock, 3> blocks;  ///< local, routed, dense: the order of the heads
  Index key_heads = 0;              ///< key/value heads with keys of their own
  Index gains = 0;                  ///< heads with a learned gain
  Index taps_rows = 0;

  static constexpr std::size_t index(BlockKind kind) { return static_cast<std::size_t>(kind); }
  const HeadBlock& operator[](BlockKind kind) const { return blocks[index(kind)]; }
};

/// Sets what blocks of every kind have in common, if the block has heads.
template <class Settings>
void set_block(HeadBlock& block, const Settings& settings, const RoutingAttentionConfig& c) {
  block.count = settings.heads;
  block.head_dim = c.head_dim;
  if (block.count == 0) return;
  const Matching& m = settings.matching;
  block.shared = *m.shared_qk;
  block.self = *m.self;
  block.logits = *m.logits;
  block.gain = *m.gain;
  block.learned_gain = *m.learned_gain;
  block.normalisation = m.normalisation;
  block.induction = m.induction;
  block.taps = m.induction ? m.key_taps : 0;
  const Positions& p = settings.positions;
  block.positions = *p.kind;
  block.rotary_layout = p.layout;
  block.rotary_base = p.base;
  block.buckets = position_buckets(p, c.causal);
  block.distances = p.distances;
}

/// The blocks of a resolved config. Only this function reads the settings of a block from the config.
inline Heads head_blocks(const RoutingAttentionConfig& c) {
  Heads heads;
  HeadBlock &local = heads.blocks[0], &routed = heads.blocks[1], &dense = heads.blocks[2];
  local.kind = BlockKind::local;
  set_block(local, c.local, c);
  local.window = c.local.window;
  local.lookahead = c.local.lookahead;

  routed.kind = BlockKind::routed;
  set_block(routed, c.routed, c);
  routed.window = c.routed.window;
  routed.sinks = c.routed.sinks;
  routed.recent = c.routed.recent;
  routed.clusters = c.routed.clusters;
  routed.routing = c.routed.routing;
  const Membership& membership = c.routed.membership;
  routed.balanced = membership.kind == MembershipKind::balanced;
  routed.probes = membership.probes;
  routed.unassigned = membership.unassigned;
  routed.combine = membership.combine;
  routed.mean_epsilon = membership.mean_epsilon;
  routed.query_share = membership.query_share;
  routed.commitment = c.routed.commitment;
  routed.router = router_config(c, 0);

  dense.kind = BlockKind::dense;
  set_block(dense, c.dense, c);

  const Index per_kv = heads_per_kv(c);
  Index first = 0;
  std::uint64_t stream = 0;
  for (HeadBlock& block : heads.blocks) {
    block.first = first;
    block.kv_first = first / per_kv;
    block.kv_count = block.count / per_kv;
    block.key_first = heads.key_heads;
    block.gain_first = heads.gains;
    block.taps_first = heads.taps_rows;
    if (!block.shared) heads.key_heads += block.kv_count;
    if (block.learned_gain) heads.gains += block.count;
    heads.taps_rows += block.taps_rows();
    // Stream 0 belongs to local heads, whether there are any or not. Later blocks that have heads take the next ones.
    if (block.kind == BlockKind::local || block.count > 0) block.dropout_stream = stream++;
    first += block.count;
  }
  return heads;
}

/// The distances of a bias table: first, first + 1, ...
struct DistanceRange {
  Index first = 0, count = 0;
};

/// The distances that the table of a block has to hold. `longest`: keys of the longest sequence, at least 1; only ALiBi
/// depends on it. Distances outside take the nearest column.
inline DistanceRange table_distances(const RoutingAttentionConfig& c, const HeadBlock& block, Index longest) {
  const bool local = block.kind == BlockKind::local;
  Index back = block.buckets.max_distance, ahead = c.causal ? 0 : back;  // t5_buckets
  if (block.positions == PositionKind::bias || block.positions == PositionKind::shaw) {
    back = (local ? block.window : block.distances) - 1;
    ahead = local ? block.lookahead : c.causal ? 0 : back;
  } else if (block.positions == PositionKind::alibi) {
    const bool any = !local || c.globals > 0 || c.dense_up_to > 0;  // at any distance
    back = any ? longest - 1 : (std::min)(longest, block.window) - 1;
    ahead = c.causal ? 0 : any ? back : (std::min)(longest - 1, block.lookahead);
  }
  return {-ahead, ahead + 1 + back};
}

}  // namespace coterie::detail
