#include "coterie/layer/config.hpp"

#include <limits>
#include <string>

#include "catch.hpp"

using namespace coterie;

namespace {

const RoutingAttentionConfig valid_config{
    .model_dim = 64, .heads = 4, .routed_heads = 2, .clusters = 8, .window = 16, .causal = true};

// The error of a config, empty if there is none.
template <class Change>
std::string config_fault(Change change) {
  RoutingAttentionConfig config = valid_config;
  change(config);
  try {
    detail::resolve(config);
  } catch (const ValueError& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("automatic settings are filled in") {
  RoutingAttentionConfig c = detail::resolve(valid_config);
  REQUIRE(c.head_dim == 16);
  REQUIRE(c.local_window == 16);
  REQUIRE(c.shared_qk == true);
  REQUIRE(c.self == Self::only_if_alone);
  REQUIRE(c.kv_heads == 4);
  REQUIRE(c.logits == Logits::normalised);
  REQUIRE(c.learned_gain == true);
  REQUIRE(c.local_positions == PositionKind::rotary);
  REQUIRE(detail::resolve(c) == c);

  RoutingAttentionConfig two_sided = valid_config;
  two_sided.causal = false;
  c = detail::resolve(two_sided);
  REQUIRE(c.shared_qk == false);
  REQUIRE(c.self == Self::visible);
  two_sided.shared_qk = true;
  REQUIRE(detail::resolve(two_sided).self == Self::only_if_alone);
  REQUIRE(c.logits == Logits::raw);
  REQUIRE(c.learned_gain == false);

  RoutingAttentionConfig grouped = valid_config;
  grouped.kv_heads = 2;
  REQUIRE(detail::resolve(grouped).shared_qk == false);

  RoutingAttentionConfig induction = valid_config;
  induction.induction = true;
  c = detail::resolve(induction);
  REQUIRE(c.shared_qk == true);
  REQUIRE(c.self == Self::never);

  // Of induction heads and heads of one column: none, unless asked for.
  RoutingAttentionConfig control = valid_config;
  control.local_induction = true;
  REQUIRE(detail::resolve(control).local_positions == PositionKind::none);
  control.local_positions = PositionKind::rotary;
  REQUIRE(detail::resolve(control).local_positions == PositionKind::rotary);
  RoutingAttentionConfig narrow = valid_config;
  narrow.routed_heads = 0;
  narrow.head_dim = 1;
  REQUIRE(detail::resolve(narrow).local_positions == PositionKind::none);

  RoutingAttentionConfig wide = valid_config;
  wide.heads = 5;
  wide.head_dim = 7;
  REQUIRE(detail::resolve(wide).head_dim == 7);
}

TEST_CASE("defaults are those of the documentation") {
  const RoutingAttentionConfig c;
  REQUIRE(c.kv_heads == 0);
  REQUIRE(c.head_dim == 0);
  REQUIRE(c.routed_heads == 0);
  REQUIRE(c.clusters == 0);
  REQUIRE(c.local_window == 0);
  REQUIRE(c.lookahead == 0);
  REQUIRE(!c.causal);
  REQUIRE(c.routing == Routing::learned);
  REQUIRE(!c.shared_qk);
  REQUIRE(!c.self);
  REQUIRE(!c.induction);
  REQUIRE(!c.local_induction);
  REQUIRE(c.key_taps == 0);
  REQUIRE(!c.gain);
  REQUIRE(!c.learned_gain);
  REQUIRE(!c.logits);
  REQUIRE(c.normalisation == Normalisation::layer_norm);
  REQUIRE(c.query_share == 0);
  REQUIRE(c.mean_epsilon == 0);
  REQUIRE(c.globals == 0);
  REQUIRE(c.dense_up_to == 0);
  REQUIRE(!c.bias);
  REQUIRE(!c.local_positions);
  REQUIRE(c.routed_positions == PositionKind::none);
  REQUIRE(c.rotary_layout == RotaryLayout::halves);
  REQUIRE(c.rotary_base == 10000);
  REQUIRE(c.position_buckets == 32);
  REQUIRE(c.max_distance == 128);
  REQUIRE(c.routed_distances == 0);
  REQUIRE(c.decay == 0.999);
  REQUIRE(c.seed == 0);
}

TEST_CASE("what makes no sense is refused, naming the setting") {
  using C = RoutingAttentionConfig;
  struct Bad {
    const char* name;
    void (*change)(C&);
  };
  const Bad faults[] = {
      {"model_dim", [](C& c) { c.model_dim = 0; }},
      {"model_dim", [](C& c) { c.model_dim = 63; }},
      {"heads", [](C& c) { c.heads = 0; }},
      {"heads", [](C& c) { c.heads = -2; }},
      {"kv_heads", [](C& c) { c.kv_heads = 3; }},
      {"kv_heads", [](C& c) { c.kv_heads = -1; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.shared_qk = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.induction = true; }},
      {"kv_heads", [](C& c) { c.kv_heads = 2, c.local_induction = true; }},
      {"routed_heads", [](C& c) { c.kv_heads = 2, c.routed_heads = 1; }},
      {"logits", [](C& c) { c.logits = static_cast<Logits>(3); }},
      {"logits", [](C& c) { c.routed_heads = 0, c.logits = Logits::raw; }},
      {"learned_gain", [](C& c) { c.routed_heads = 0, c.learned_gain = false; }},
      {"gain", [](C& c) { c.routed_heads = 0, c.gain = 2; }},
      {"normalisation", [](C& c) { c.routed_heads = 0, c.normalisation = Normalisation::unit_length; }},
      {"logits", [](C& c) { c.induction = true, c.logits = Logits::raw; }},
      {"normalisation", [](C& c) { c.normalisation = static_cast<Normalisation>(2); }},
      {"head_dim", [](C& c) { c.normalisation = Normalisation::unit_length, c.head_dim = 1; }},
      {"query_share", [](C& c) { c.query_share = 1; }},
      {"query_share", [](C& c) { c.membership = Membership::balanced, c.query_share = 1; }},
      {"globals", [](C& c) { c.globals = -1; }},
      {"globals", [](C& c) { c.globals = 1, c.routed_heads = 4, c.routing = Routing::dense; }},
      {"globals", [](C& c) { c.globals = 1, c.membership = Membership::balanced; }},
      {"globals", [](C& c) { c.globals = 1, c.probes = 2; }},
      {"self", [](C& c) { c.globals = 1, c.causal = false, c.self = Self::never; }},
      {"dense_up_to", [](C& c) { c.dense_up_to = -1; }},
      {"dense_up_to", [](C& c) { c.dense_up_to = 9, c.routed_heads = 4, c.routing = Routing::dense; }},
      {"head_dim", [](C& c) { c.head_dim = -1; }},
      {"routed_heads", [](C& c) { c.routed_heads = 5; }},
      {"routed_heads", [](C& c) { c.routed_heads = -1; }},
      {"clusters", [](C& c) { c.clusters = 0; }},
      {"clusters", [](C& c) { c.clusters = -1; }},
      {"clusters", [](C& c) { c.clusters = std::numeric_limits<Index>::max(); }},
      {"window", [](C& c) { c.window = 0; }},
      {"window", [](C& c) { c.window = -5; }},
      {"local_window", [](C& c) { c.local_window = -1; }},
      {"local_window", [](C& c) { c.window = 0, c.routing = Routing::dense; }},
      {"lookahead", [](C& c) { c.lookahead = 1; }},
      {"lookahead", [](C& c) { c.causal = false, c.lookahead = -1; }},
      {"induction", [](C& c) { c.causal = false, c.induction = true; }},
      {"local_induction", [](C& c) { c.causal = false, c.local_induction = true; }},
      {"shared_qk", [](C& c) { c.induction = true, c.shared_qk = false; }},
      {"self", [](C& c) { c.induction = true, c.self = Self::only_if_alone; }},
      {"self", [](C& c) { c.induction = true, c.self = Self::visible; }},
      {"key_taps", [](C& c) { c.key_taps = 8; }},
      {"key_taps", [](C& c) { c.induction = true, c.key_taps = -1; }},
      {"head_dim", [](C& c) { c.head_dim = 2; }},
      {"head_dim", [](C& c) { c.causal = false, c.head_dim = 2; }},
      {"head_dim", [](C& c) { c.local_induction = true, c.routed_heads = 0, c.head_dim = 1; }},
      {"gain", [](C& c) { c.gain = std::numeric_limits<double>::infinity(); }},
      {"routed_positions", [](C& c) { c.routed_heads = 0, c.routed_positions = PositionKind::alibi; }},
      {"rotary_base", [](C& c) { c.rotary_base = 0; }},
      {"rotary_base", [](C& c) { c.rotary_base = std::numeric_limits<double>::infinity(); }},
      {"head_dim", [](C& c) { c.routed_heads = 0, c.head_dim = 1, c.local_positions = PositionKind::rotary; }},
      {"position_buckets", [](C& c) { c.local_positions = PositionKind::t5_buckets, c.position_buckets = 1; }},
      {"position_buckets",
       [](C& c) { c.causal = false, c.routed_positions = PositionKind::t5_buckets, c.position_buckets = 7; }},
      {"max_distance", [](C& c) { c.routed_positions = PositionKind::t5_buckets, c.max_distance = 16; }},
      {"routed_distances", [](C& c) { c.routed_positions = PositionKind::bias; }},
      {"routed_distances", [](C& c) { c.routed_positions = PositionKind::shaw; }},
      {"mean_epsilon", [](C& c) { c.mean_epsilon = 0.1; }},
      {"mean_epsilon", [](C& c) { c.membership = Membership::balanced, c.combine = Combine::lse, c.mean_epsilon = 1; }},
      {"routed_distances", [](C& c) { c.routed_positions = PositionKind::bias, c.routed_distances = -1; }},
      {"routed_distances", [](C& c) { c.routed_positions = PositionKind::alibi, c.routed_distances = 8; }},
      {"routed_distances", [](C& c) { c.routed_distances = 8; }},
      {"decay", [](C& c) { c.decay = 1; }},
      {"decay", [](C& c) { c.decay = std::numeric_limits<double>::quiet_NaN(); }},
  };
  REQUIRE(config_fault([](C&) {}).empty());
  for (const Bad& bad : faults) {
    INFO(bad.name);
    REQUIRE(config_fault(bad.change).find(std::string(bad.name) + ": expected") != std::string::npos);
  }
}

TEST_CASE("values that no enumerator has are refused") {
  REQUIRE(config_fault([](auto& c) { c.routing = static_cast<Routing>(7); }).find("routing: expected") !=
          std::string::npos);
  REQUIRE(config_fault([](auto& c) {
            c.local_positions = static_cast<PositionKind>(-1);
          }).find("local_positions: expected") != std::string::npos);
  REQUIRE(config_fault([](auto& c) {
            c.routed_positions = static_cast<PositionKind>(6);
          }).find("routed_positions: expected") != std::string::npos);
  REQUIRE(config_fault([](auto& c) {
            c.rotary_layout = static_cast<RotaryLayout>(2);
          }).find("rotary_layout: expected") != std::string::npos);
  REQUIRE(config_fault([](auto& c) { c.self = static_cast<Self>(3); }).find("self: expected") != std::string::npos);
}

TEST_CASE("narrow heads are fine where nothing is normalised") {
  using C = RoutingAttentionConfig;
  REQUIRE(config_fault([](C& c) { c.routed_heads = 0, c.head_dim = 1; }).empty());
  REQUIRE(config_fault([](C& c) { c.causal = false, c.routing = Routing::random, c.head_dim = 2; }).empty());
  REQUIRE(config_fault([](C& c) { c.routed_heads = 0, c.clusters = 0; }).empty());
  // Where nothing is sorted into buckets, their number is nobody's.
  REQUIRE(config_fault([](C& c) { c.position_buckets = 1, c.max_distance = 0; }).empty());
  REQUIRE(
      config_fault([](C& c) { c.routing = Routing::dense, c.clusters = 0, c.window = 0, c.local_window = 3; }).empty());
}

TEST_CASE("one error names all faults") {
  const std::string text = config_fault([](RoutingAttentionConfig& c) {
    c.model_dim = 0;
    c.clusters = 0;
    c.decay = 2;
    c.key_taps = 3;
    c.local_positions = PositionKind::t5_buckets;
    c.max_distance = 0;
    c.routed_distances = 3;
    c.rotary_base = -1;
  });
  for (const char* name : {"RoutingAttentionConfig", "model_dim", "clusters", "decay", "key_taps", "max_distance",
                           "routed_distances", "rotary_base"})
    REQUIRE(text.find(name) != std::string::npos);
}
