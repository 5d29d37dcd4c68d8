#include "coterie/layer/config.hpp"

#include <limits>
#include <map>
#include <set>
#include <string>

#include "catch.hpp"
#include "coterie/layer/initialise.hpp"
#include "coterie/layer/resolve.hpp"
#include "errors.hpp"

using namespace coterie;

namespace {

using C = RoutingAttentionConfig;

const C valid_config{.model_dim = 64,
                     .causal = true,
                     .local = {.heads = 2, .window = 16},
                     .routed = {.heads = 2, .clusters = 8, .window = 16}};

const C three_blocks{.model_dim = 64,
                     .local = {.heads = 2, .window = 16},
                     .routed = {.heads = 4, .clusters = 8, .window = 16},
                     .dense = {.heads = 2}};

// The error of a config, empty if there is none.
template <class Change>
std::string config_fault(Change change, C config = valid_config) {
  change(config);
  try {
    detail::resolve(config);
  } catch (const ValueError& error) {
    return error.what();
  }
  return {};
}

template <class V>
struct IsOptional : std::false_type {};
template <class V>
struct IsOptional<std::optional<V>> : std::true_type {};

}  // namespace

TEST_CASE("every setting has a path of its own, in the order of declaration") {
  C config;
  std::set<std::string> paths;
  std::set<const void*> addresses;
  const char* last = nullptr;
  std::size_t bytes = 0;
  visit(config, [&](std::string_view path, auto& field) {
    const char* const at = reinterpret_cast<const char*>(&field);
    REQUIRE((last == nullptr || at > last));
    last = at;
    bytes += sizeof field;
    paths.emplace(path);
    addresses.insert(&field);
  });
  REQUIRE(paths.size() == 75);
  REQUIRE(addresses.size() == paths.size());
  REQUIRE(bytes <= sizeof config);
  for (const char* path : {"model_dim", "seed", "local.lookahead", "local.matching.key_taps", "local.positions.kind",
                           "routed.clusters", "routed.membership.probes", "routed.router.decay", "routed.commitment",
                           "dense.heads", "dense.matching.shared_qk"})
    REQUIRE(paths.contains(path));
  // A constant config gives constants, of the same fields.
  const C constant;
  std::size_t count = 0;
  visit(constant, [&](std::string_view path, const auto&) { count += paths.contains(std::string(path)); });
  REQUIRE(count == paths.size());
}

TEST_CASE("visit can set every field, and equality sees each") {
  const C before;
  std::size_t number = 0, total = 0;
  visit(before, [&](std::string_view, const auto&) { ++total; });
  for (; number < total; ++number) {
    C config;
    std::size_t i = 0;
    visit(config, [&](std::string_view, auto& field) {
      if (i++ != number) return;
      using V = std::remove_cvref_t<decltype(field)>;
      if constexpr (IsOptional<V>::value)
        field.emplace();
      else if constexpr (std::is_enum_v<V>)
        field = static_cast<V>(static_cast<int>(field) == 0 ? 1 : 0);
      else if constexpr (std::is_same_v<V, bool>)
        field = !field;
      else
        field += 1;
    });
    INFO(number);
    REQUIRE(config != before);
  }
}

TEST_CASE("automatic settings are filled in") {
  C c = detail::resolve(valid_config);
  REQUIRE(c.head_dim == 16);
  REQUIRE(c.kv_heads == 4);
  REQUIRE(c.routed.matching.shared_qk == true);
  REQUIRE(c.routed.matching.self == Self::only_if_alone);
  REQUIRE(c.routed.matching.logits == Logits::normalised);
  REQUIRE(c.routed.matching.gain == 3.0);
  REQUIRE(c.routed.matching.learned_gain == true);
  REQUIRE(c.routed.positions.kind == PositionKind::none);
  REQUIRE(c.local.matching.shared_qk == false);
  REQUIRE(c.local.matching.self == Self::visible);
  REQUIRE(c.local.matching.logits == Logits::raw);
  REQUIRE(c.local.matching.gain == 1.0);
  REQUIRE(c.local.matching.learned_gain == false);
  REQUIRE(c.local.positions.kind == PositionKind::rotary);
  REQUIRE(c.dense == DenseHeads{});
  REQUIRE(detail::resolve(c) == c);

  C two_sided = valid_config;
  two_sided.causal = false;
  c = detail::resolve(two_sided);
  REQUIRE(c.routed.matching.shared_qk == false);
  REQUIRE(c.routed.matching.self == Self::visible);
  REQUIRE(c.routed.matching.logits == Logits::raw);
  REQUIRE(c.routed.matching.gain == 1.0);
  REQUIRE(c.routed.matching.learned_gain == false);
  two_sided.routed.matching.shared_qk = true;
  REQUIRE(detail::resolve(two_sided).routed.matching.self == Self::only_if_alone);

  C grouped = valid_config;
  grouped.kv_heads = 2;
  REQUIRE(detail::resolve(grouped).routed.matching.shared_qk == false);

  // A gain of 3 is for logits of normalised rows, however they came to be.
  C raw = valid_config;
  raw.routed.matching.logits = Logits::raw;
  raw.local.matching.logits = Logits::normalised;
  REQUIRE(detail::resolve(raw).routed.matching.gain == 1.0);
  REQUIRE(detail::resolve(raw).local.matching.gain == 3.0);

  C wide = valid_config;
  wide.local.heads = 3;
  wide.head_dim = 7;
  REQUIRE(detail::resolve(wide).head_dim == 7);
}

TEST_CASE("automatic settings of three blocks") {
  C c = detail::resolve(three_blocks);
  REQUIRE(c.head_dim == 8);
  REQUIRE(c.kv_heads == 8);
  C causal = three_blocks;
  causal.causal = true;
  c = detail::resolve(causal);
  // Dense heads do not share unless they are asked to.
  REQUIRE(c.routed.matching.shared_qk == true);
  REQUIRE(c.dense.matching.shared_qk == false);
  REQUIRE(c.dense.matching.learned_gain == false);
  REQUIRE(c.dense.positions.kind == PositionKind::rotary);
  // Key/value heads are counted over all blocks.
  causal.kv_heads = 4;
  c = detail::resolve(causal);
  REQUIRE(c.routed.matching.shared_qk == false);
  REQUIRE(detail::routed_kv_heads(c) == 2);
  causal.kv_heads = 0;

  // Sharing brings the rest along, in every block.
  causal.local.matching.shared_qk = causal.dense.matching.shared_qk = true;
  c = detail::resolve(causal);
  for (const Matching& m : {c.local.matching, c.routed.matching, c.dense.matching}) {
    REQUIRE(m.self == Self::only_if_alone);
    REQUIRE(m.logits == Logits::normalised);
    REQUIRE(m.gain == 3.0);
    REQUIRE(m.learned_gain == true);
  }

  // So does induction, and then no token sees itself, and no position is known unless asked for.
  causal.local.matching = causal.routed.matching = causal.dense.matching = {.induction = true};
  causal.dense.positions.kind = PositionKind::rotary;
  c = detail::resolve(causal);
  for (const Matching& m : {c.local.matching, c.routed.matching, c.dense.matching}) {
    REQUIRE(m.shared_qk == true);
    REQUIRE(m.self == Self::never);
    REQUIRE(m.logits == Logits::normalised);
  }
  REQUIRE(c.local.positions.kind == PositionKind::none);
  REQUIRE(c.dense.positions.kind == PositionKind::rotary);
  REQUIRE(detail::resolve(c) == c);

  // Of one column nothing turns.
  C narrow = three_blocks;
  narrow.routed = {};
  narrow.head_dim = 1;
  c = detail::resolve(narrow);
  REQUIRE(c.local.positions.kind == PositionKind::none);
  REQUIRE(c.dense.positions.kind == PositionKind::none);

  // Settings of positions do not say that there are any.
  C settings = three_blocks;
  settings.routed.positions.base = 50;
  REQUIRE(detail::resolve(settings).routed.positions.kind == PositionKind::none);
}

TEST_CASE("what makes no sense is refused, naming the setting by its path") {
  struct Bad {
    const char* path;
    void (*change)(C&);
  };
  constexpr Index most = std::numeric_limits<Index>::max();
  const Bad faults[] = {
      {"model_dim", [](C& c) { c.model_dim = 0; }},
      {"model_dim", [](C& c) { c.model_dim = 63; }},
      {"model_dim", [](C& c) { c.model_dim = most; }},
      {"heads", [](C& c) { c.local = {}, c.routed = {}; }},
      {"heads", [](C& c) { c.local.heads = c.routed.heads = (Index(1) << 31) - 2; }},
      {"local.heads", [](C& c) { c.local.heads = -2; }},
      {"routed.heads", [](C& c) { c.routed.heads = -1; }},
      {"routed.heads", [](C& c) { c.routed.heads = most; }},
      {"dense.heads", [](C& c) { c.dense.heads = -1; }},
      {"local.heads", [](C& c) { c.kv_heads = 2, c.local.heads = 1, c.routed.heads = 3; }},
      {"routed.heads", [](C& c) { c.kv_heads = 2, c.local.heads = 1, c.routed.heads = 3; }},
      {"dense.heads", [](C& c) { c.kv_heads = 3, c.dense.heads = 1, c.routed.heads = 3; }},
      {"local", [](C& c) { c.local.heads = 0; }},
      {"local", [](C& c) { c.local = {.positions = {.base = 3}}; }},
      {"routed", [](C& c) { c.routed.heads = 0; }},
      {"routed", [](C& c) { c.routed = {.router = {.decay = 0.5}}; }},
      {"routed", [](C& c) { c.routed = {.matching = {.normalisation = Normalisation::unit_length}}; }},
      {"dense", [](C& c) { c.dense.matching.gain = 2; }},
      {"dense", [](C& c) { c.dense.positions.kind = PositionKind::none; }},
      {"kv_heads", [](C& c) { c.kv_heads = 3; }},
      {"kv_heads", [](C& c) { c.kv_heads = -1; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.routed.matching.shared_qk = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.local.matching.shared_qk = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.routed.matching.induction = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.local.matching.induction = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 3, c.dense = {.heads = 2, .matching = {.shared_qk = true}}; }},
      {"head_dim", [](C& c) { c.head_dim = -1; }},
      {"head_dim", [](C& c) { c.head_dim = most; }},
      {"head_dim", [](C& c) { c.head_dim = 2; }},
      {"head_dim", [](C& c) { c.causal = false, c.head_dim = 2; }},
      {"head_dim", [](C& c) { c.local.matching.induction = true, c.routed = {}, c.head_dim = 1; }},
      {"head_dim", [](C& c) { c.dense = {.heads = 2, .matching = {.logits = Logits::normalised}}, c.head_dim = 2; }},
      {"head_dim", [](C& c) { c.routed.matching.normalisation = Normalisation::unit_length, c.head_dim = 1; }},
      {"head_dim", [](C& c) { c.routed = {}, c.head_dim = 1, c.local.positions.kind = PositionKind::rotary; }},
      {"memory", [](C& c) { c.memory = -1; }},
      {"soft_cap", [](C& c) { c.soft_cap = -1; }},
      {"dropout", [](C& c) { c.dropout = 1; }},
      {"globals", [](C& c) { c.globals = -1; }},
      {"globals", [](C& c) { c.globals = 1, c.local = {}, c.routed = {}, c.dense.heads = 4; }},
      {"globals", [](C& c) { c.globals = 1, c.routed.membership.kind = MembershipKind::balanced; }},
      {"globals", [](C& c) { c.globals = 1, c.routed.membership.probes = 2; }},
      {"routed.matching.self", [](C& c) { c.globals = 1, c.causal = false, c.routed.matching.self = Self::never; }},
      {"local.matching.self", [](C& c) { c.globals = 1, c.causal = false, c.local.matching.shared_qk = true; }},
      {"routed.matching.self", [](C& c) { c.memory = 1, c.causal = false, c.routed.matching.self = Self::never; }},
      {"dense.matching.self",
       [](C& c) { c.memory = 1, c.causal = false, c.dense = {.heads = 4, .matching = {.self = Self::never}}; }},
      {"dense_up_to", [](C& c) { c.dense_up_to = -1; }},
      {"dense_up_to", [](C& c) { c.dense_up_to = 9, c.local = {}, c.routed = {}, c.dense.heads = 4; }},
      {"local.window", [](C& c) { c.local.window = 0; }},
      {"local.window", [](C& c) { c.local.window = -1; }},
      {"local.window", [](C& c) { c.local.window = most, c.local.positions.kind = PositionKind::bias; }},
      {"local.window", [](C& c) { c.local.window = most, c.local.positions.kind = PositionKind::shaw; }},
      {"local.lookahead", [](C& c) { c.local.lookahead = 1; }},
      {"local.lookahead", [](C& c) { c.causal = false, c.local.lookahead = -1; }},
      {"local.lookahead",
       [](C& c) { c.causal = false, c.local.lookahead = most, c.local.positions.kind = PositionKind::bias; }},
      {"local.positions.distances", [](C& c) { c.local.positions.distances = 8; }},
      {"local.positions.distances",
       [](C& c) { c.local.positions.distances = 8, c.local.positions.kind = PositionKind::bias; }},
      {"local.positions.base", [](C& c) { c.local.positions.base = 0; }},
      {"local.positions.buckets",
       [](C& c) { c.local.positions.kind = PositionKind::t5_buckets, c.local.positions.buckets = 1; }},
      {"local.matching.normalisation", [](C& c) { c.local.matching.normalisation = Normalisation::unit_length; }},
      {"local.matching.induction", [](C& c) { c.causal = false, c.local.matching.induction = true; }},
      {"local.matching.key_taps", [](C& c) { c.local.matching.key_taps = 8; }},
      {"routed.clusters", [](C& c) { c.routed.clusters = 0; }},
      {"routed.clusters", [](C& c) { c.routed.clusters = -1; }},
      {"routed.clusters", [](C& c) { c.routed.clusters = most; }},
      {"routed.window", [](C& c) { c.routed.window = 0; }},
      {"routed.window", [](C& c) { c.routed.window = -5; }},
      {"routed.sinks", [](C& c) { c.routed.sinks = -1; }},
      {"routed.recent", [](C& c) { c.routed.recent = most; }},
      {"routed.sinks", [](C& c) { c.causal = false, c.routed.sinks = 1; }},
      {"routed.recent", [](C& c) { c.causal = false, c.routed.recent = 1; }},
      {"globals", [](C& c) { c.globals = c.routed.recent = 1; }},
      {"globals", [](C& c) { c.globals = c.routed.sinks = 1; }},
      {"routed.membership.combine",
       [](C& c) { c.routed.recent = 1, c.routed.membership.kind = MembershipKind::balanced; }},
      {"routed", [](C& c) { c.routed = {.sinks = 1}; }},
      {"routed.matching.logits", [](C& c) { c.routed.matching.logits = static_cast<Logits>(3); }},
      {"routed.matching.logits",
       [](C& c) { c.routed.matching.induction = true, c.routed.matching.logits = Logits::raw; }},
      {"routed.matching.normalisation", [](C& c) { c.routed.matching.normalisation = static_cast<Normalisation>(2); }},
      {"routed.matching.normalisation",
       [](C& c) {
         c.routed.routing = Routing::random;
         c.routed.matching = {.shared_qk = false, .normalisation = Normalisation::unit_length};
       }},
      {"routed.matching.induction", [](C& c) { c.causal = false, c.routed.matching.induction = true; }},
      {"routed.matching.shared_qk",
       [](C& c) { c.routed.matching.induction = true, c.routed.matching.shared_qk = false; }},
      {"routed.matching.self",
       [](C& c) { c.routed.matching.induction = true, c.routed.matching.self = Self::only_if_alone; }},
      {"routed.matching.self",
       [](C& c) { c.routed.matching.induction = true, c.routed.matching.self = Self::visible; }},
      {"routed.matching.key_taps", [](C& c) { c.routed.matching.key_taps = 8; }},
      {"routed.matching.key_taps", [](C& c) { c.routed.matching = {.induction = true, .key_taps = -1}; }},
      {"routed.matching.key_taps", [](C& c) { c.routed.matching = {.induction = true, .key_taps = Index(1) << 62}; }},
      {"routed.matching.gain", [](C& c) { c.routed.matching.gain = std::numeric_limits<double>::infinity(); }},
      {"dense.matching.gain",
       [](C& c) { c.dense = {.heads = 4, .matching = {.gain = std::numeric_limits<double>::quiet_NaN()}}; }},
      {"dense.matching.induction",
       [](C& c) { c.causal = false, c.dense = {.heads = 4, .matching = {.induction = true}}; }},
      {"dense.matching.key_taps", [](C& c) { c.dense = {.heads = 4, .matching = {.key_taps = 3}}; }},
      {"routed.positions.base", [](C& c) { c.routed.positions.base = std::numeric_limits<double>::infinity(); }},
      {"routed.positions.buckets",
       [](C& c) {
         c.causal = false;
         c.routed.positions = {.kind = PositionKind::t5_buckets, .buckets = 7};
       }},
      {"routed.positions.max_distance",
       [](C& c) { c.routed.positions = {.kind = PositionKind::t5_buckets, .max_distance = 16}; }},
      {"routed.positions.distances", [](C& c) { c.routed.positions.kind = PositionKind::bias; }},
      {"routed.positions.distances", [](C& c) { c.routed.positions.kind = PositionKind::shaw; }},
      {"routed.positions.distances", [](C& c) { c.routed.positions = {.kind = PositionKind::bias, .distances = -1}; }},
      {"routed.positions.distances",
       [](C& c) { c.routed.positions = {.kind = PositionKind::bias, .distances = most}; }},
      {"routed.positions.distances", [](C& c) { c.routed.positions = {.kind = PositionKind::alibi, .distances = 8}; }},
      {"routed.positions.distances", [](C& c) { c.routed.positions.distances = 8; }},
      {"dense.positions.distances", [](C& c) { c.dense = {.heads = 4, .positions = {.kind = PositionKind::bias}}; }},
      {"dense.positions.distances", [](C& c) { c.dense = {.heads = 4, .positions = {.distances = 4}}; }},
      {"routed.membership.probes", [](C& c) { c.routed.membership.probes = 0; }},
      {"routed.membership.probes", [](C& c) { c.routed.membership.probes = 9; }},
      {"routed.membership.probes", [](C& c) { c.routed.membership = {.kind = MembershipKind::balanced, .probes = 2}; }},
      {"routed.membership.probes", [](C& c) { c.routed.routing = Routing::random, c.routed.membership.probes = 2; }},
      {"routed.membership.kind",
       [](C& c) { c.routed.routing = Routing::random, c.routed.membership.kind = MembershipKind::balanced; }},
      {"routed.membership.unassigned", [](C& c) { c.routed.membership.unassigned = Unassigned::nearest; }},
      {"routed.membership.combine", [](C& c) { c.routed.membership.combine = Combine::lse; }},
      {"routed.membership.query_share", [](C& c) { c.routed.membership.query_share = 1; }},
      {"routed.membership.query_share",
       [](C& c) { c.routed.membership = {.kind = MembershipKind::balanced, .query_share = 1}; }},
      {"routed.membership.mean_epsilon", [](C& c) { c.routed.membership.mean_epsilon = 0.1; }},
      {"routed.membership.mean_epsilon",
       [](C& c) {
         c.routed.membership = {.kind = MembershipKind::balanced, .combine = Combine::lse};
         c.routed.membership.mean_epsilon = 1;
       }},
      {"routed.router.decay", [](C& c) { c.routed.router.decay = 1; }},
      {"routed.router.decay", [](C& c) { c.routed.router.decay = -0.1; }},
      {"routed.router.decay", [](C& c) { c.routed.router.decay = std::numeric_limits<double>::quiet_NaN(); }},
      {"routed.router.dead_share", [](C& c) { c.routed.router.dead_share = 1; }},
      {"routed.router.split_share", [](C& c) { c.routed.router.split_share = 0.5; }},
      {"routed.router", [](C& c) { c.routed.routing = Routing::random, c.routed.router.decay = 0.5; }},
      {"routed.commitment", [](C& c) { c.routed.commitment = -1; }},
      {"routed.commitment", [](C& c) { c.routed.routing = Routing::random, c.routed.commitment = 1e-4; }},
  };
  REQUIRE(config_fault([](C&) {}).empty());
  REQUIRE(config_fault([](C&) {}, three_blocks).empty());
  for (const Bad& bad : faults) {
    const std::string text = config_fault(bad.change);
    INFO(bad.path << " | " << text);
    REQUIRE((test::contains(text, ": " + std::string(bad.path) + ": expected") ||
             test::contains(text, "; " + std::string(bad.path) + ": expected")));
  }
}

TEST_CASE("values that no enumerator has are refused") {
  const auto refused = [](const char* path, auto change) {
    INFO(path);
    REQUIRE(test::contains(config_fault(change), std::string(path) + ": expected"));
  };
  refused("routed.routing", [](auto& c) { c.routed.routing = static_cast<Routing>(7); });
  refused("local.positions.kind", [](auto& c) { c.local.positions.kind = static_cast<PositionKind>(-1); });
  refused("routed.positions.kind", [](auto& c) { c.routed.positions.kind = static_cast<PositionKind>(6); });
  refused("local.positions.layout", [](auto& c) { c.local.positions.layout = static_cast<RotaryLayout>(2); });
  refused("routed.matching.self", [](auto& c) { c.routed.matching.self = static_cast<Self>(3); });
  refused("routed.membership.kind", [](auto& c) { c.routed.membership.kind = static_cast<MembershipKind>(2); });
  refused("routed.membership.combine", [](auto& c) { c.routed.membership.combine = Combine::single; });
  refused("routed.router.average", [](auto& c) { c.routed.router.average = static_cast<Average>(3); });
}

TEST_CASE("narrow heads are fine where nothing is normalised") {
  REQUIRE(config_fault([](C& c) { c.routed = {}, c.head_dim = 1; }).empty());
  REQUIRE(config_fault([](C& c) { c.causal = false, c.routed.routing = Routing::random, c.head_dim = 2; }).empty());
  REQUIRE(config_fault([](C& c) { c.routed = {}, c.dense.heads = 2, c.head_dim = 1; }).empty());
  // Where nothing is sorted into buckets, their number is nobody's.
  REQUIRE(config_fault([](C& c) { c.local.positions.buckets = 1, c.local.positions.max_distance = 0; }).empty());
  REQUIRE(config_fault([](C& c) { c.routed.router.decay = 0; }).empty());
}

TEST_CASE("a window of the largest number is no limit") {
  constexpr Index most = std::numeric_limits<Index>::max();
  REQUIRE(config_fault([](C& c) { c.local.window = c.routed.window = most; }).empty());
  REQUIRE(config_fault([](C& c) { c.causal = false, c.local.window = c.local.lookahead = most; }).empty());
  C alibi = valid_config;
  alibi.causal = false;
  alibi.local = {.heads = 2, .window = most, .lookahead = most, .positions = {.kind = PositionKind::alibi}};
  const detail::Heads heads = detail::head_blocks(detail::resolve(alibi));
  const detail::DistanceRange range = detail::table_distances(alibi, heads.blocks[0], 10);
  REQUIRE(range.first == -9);
  REQUIRE(range.count == 19);
}

TEST_CASE("one error names all faults") {
  const std::string text = config_fault([](C& c) {
    c.model_dim = 0;
    c.routed.clusters = 0;
    c.routed.router.decay = 2;
    c.routed.matching.key_taps = 3;
    c.local.positions.kind = PositionKind::t5_buckets;
    c.local.positions.max_distance = 0;
    c.routed.positions.distances = 3;
    c.routed.positions.base = -1;
    c.dense.positions.layout = RotaryLayout::interleaved;
  });
  for (const char* path :
       {"RoutingAttentionConfig: model_dim: ", "; routed.clusters: ", "; routed.router.decay: ",
        "; routed.matching.key_taps: ", "; local.positions.max_distance: ", "; routed.positions.distances: ",
        "; routed.positions.base: ", "; dense: expected its default without heads"})
    REQUIRE(test::contains(text, path));
}
