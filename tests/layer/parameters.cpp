#include "coterie/layer/parameters.hpp"

#include <map>
#include <set>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"

using namespace coterie;

namespace {

using Shapes = std::map<std::string, std::pair<Index, Index>>;

Shapes shapes(const RoutingAttentionConfig& config) {
  const RoutingAttention<float> layer(config);
  Shapes result;
  layer.parameters().visit([&](std::string_view name, ConstView<float> m) {
    result[std::string(name)] = {m.rows(), m.cols()};
  });
  return result;
}

const RoutingAttentionConfig named_config{.model_dim = 12,
                                          .head_dim = 5,
                                          .seed = 1,
                                          .local = {.heads = 1, .window = 6},
                                          .routed = {.heads = 3, .clusters = 4, .window = 6}};

}  // namespace

TEST_CASE("names and shapes of the parameters are fixed") {
  RoutingAttentionConfig c = named_config;
  REQUIRE(shapes(c) == Shapes{{"w_q", {12, 20}}, {"w_k", {12, 20}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}});
  c.bias = true;
  c.local.lookahead = 2;
  c.local.positions.kind = PositionKind::bias;
  REQUIRE(shapes(c) == Shapes{{"w_q", {12, 20}},
                              {"w_k", {12, 20}},
                              {"w_v", {12, 20}},
                              {"w_o", {20, 12}},
                              {"b_q", {1, 20}},
                              {"b_k", {1, 20}},
                              {"b_v", {1, 20}},
                              {"b_o", {1, 12}},
                              {"local_distance_bias", {1, 8}}});
  // Heads that share have no keys of their own.
  c = named_config;
  c.causal = true;
  REQUIRE(shapes(c) ==
          Shapes{{"w_q", {12, 20}}, {"w_k", {12, 5}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}, {"gain", {1, 3}}});
  c.routed.matching.induction = c.local.matching.induction = c.bias = true;
  c.routed.matching.key_taps = c.local.matching.key_taps = 8;
  REQUIRE(shapes(c) == Shapes{{"w_q", {12, 20}},
                              {"w_v", {12, 20}},
                              {"w_o", {20, 12}},
                              {"b_q", {1, 20}},
                              {"b_v", {1, 20}},
                              {"b_o", {1, 12}},
                              {"gain", {1, 4}},
                              {"taps", {32, 5}}});
  // Tables of positions.
  c = named_config;
  c.local.positions.kind = PositionKind::t5_buckets;
  c.routed.positions.kind = PositionKind::bias;
  c.local.positions.buckets = c.routed.positions.buckets = 6;
  c.routed.positions.distances = 7;
  Shapes expected{{"w_q", {12, 20}}, {"w_k", {12, 20}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}};
  expected["local_bucket_bias"] = {1, 6};
  expected["routed_distance_bias"] = {3, 13};
  REQUIRE(shapes(c) == expected);
  c.local.positions.kind = PositionKind::alibi;
  c.routed.positions.kind = PositionKind::t5_buckets;
  c.routed.positions.distances = 0;
  expected.erase("local_bucket_bias");
  expected.erase("routed_distance_bias");
  expected["routed_bucket_bias"] = {3, 6};
  REQUIRE(shapes(c) == expected);
  c.causal = c.local.matching.induction = true;
  c.routed.matching.shared_qk = false;
  c.local.positions.kind = PositionKind::bias;
  c.routed.positions.kind = PositionKind::bias;
  c.routed.positions.distances = 7;
  expected = {{"w_q", {12, 20}},
              {"w_k", {12, 15}},
              {"w_v", {12, 20}},
              {"w_o", {20, 12}},
              {"gain", {1, 1}},
              {"local_distance_bias", {1, 6}},
              {"routed_distance_bias", {3, 7}}};
  REQUIRE(shapes(c) == expected);
}

TEST_CASE("heads of three blocks have tables by the name of their block, and taps of their own number") {
  RoutingAttentionConfig c = named_config;
  c.causal = true;
  c.dense = {.heads = 2};
  const Positions bias{.kind = PositionKind::bias, .distances = 7}, shaw{.kind = PositionKind::shaw, .distances = 5};
  // Six heads, of which the three routed ones share queries and keys.
  REQUIRE(shapes(c) ==
          Shapes{{"w_q", {12, 30}}, {"w_k", {12, 15}}, {"w_v", {12, 30}}, {"w_o", {30, 12}}, {"gain", {1, 3}}});
  c.local.positions.kind = PositionKind::bias;
  c.routed.positions = bias;
  c.dense.positions = {.kind = PositionKind::bias, .distances = 4};
  Shapes found = shapes(c);
  REQUIRE(found["local_distance_bias"] == std::pair<Index, Index>{1, 6});
  REQUIRE(found["routed_distance_bias"] == std::pair<Index, Index>{3, 7});
  REQUIRE(found["dense_distance_bias"] == std::pair<Index, Index>{2, 4});
  REQUIRE(found.size() == 8);
  c.local.positions = {.kind = PositionKind::t5_buckets, .buckets = 4};
  c.routed.positions = {.kind = PositionKind::t5_buckets, .buckets = 6};
  c.dense.positions = {.kind = PositionKind::t5_buckets, .buckets = 8};
  found = shapes(c);
  REQUIRE(found["local_bucket_bias"] == std::pair<Index, Index>{1, 4});
  REQUIRE(found["routed_bucket_bias"] == std::pair<Index, Index>{3, 6});
  REQUIRE(found["dense_bucket_bias"] == std::pair<Index, Index>{2, 8});
  REQUIRE(found.size() == 8);
  c.local.positions = {.kind = PositionKind::shaw};
  c.routed.positions = shaw;
  c.dense.positions = {.kind = PositionKind::shaw, .distances = 3};
  found = shapes(c);
  REQUIRE(found["local_relative_keys"] == std::pair<Index, Index>{6, 5});
  REQUIRE(found["routed_relative_values"] == std::pair<Index, Index>{5, 5});
  REQUIRE(found["dense_relative_keys"] == std::pair<Index, Index>{3, 5});
  REQUIRE(found["dense_relative_values"] == std::pair<Index, Index>{3, 5});
  REQUIRE(found.size() == 11);

  c.local.matching = {.induction = true, .key_taps = 4};
  c.routed.matching = {.learned_gain = false, .induction = true, .key_taps = 3};
  c.dense.matching = {.gain = 2, .induction = true, .key_taps = 2};
  found = shapes(c);
  REQUIRE_FALSE(found.contains("w_k"));
  REQUIRE(found["gain"] == std::pair<Index, Index>{1, 3});
  REQUIRE(found["taps"] == std::pair<Index, Index>{1 * 4 + 3 * 3 + 2 * 2, 5});
  const Parameters<double> p = RoutingAttention<double>(c).parameters();
  REQUIRE(p.gain(0, 0) == 3);
  REQUIRE(p.gain(0, 1) == 2);
  REQUIRE(p.gain(0, 2) == 2);
}

TEST_CASE("relative keys and values of dense heads go on in the stream of routed ones") {
  const Positions five{.kind = PositionKind::shaw, .distances = 5}, eight{.kind = PositionKind::shaw, .distances = 8};
  RoutingAttentionConfig c = named_config;
  c.causal = true;
  c.routed.positions = eight;
  const Parameters<double> routed = RoutingAttention<double>(c).parameters();
  c.dense = {.heads = 3, .positions = eight};
  c.routed = {};
  const Parameters<double> dense = RoutingAttention<double>(c).parameters();
  REQUIRE(dense.dense_relative_keys == routed.routed_relative_keys);
  REQUIRE(dense.dense_relative_values == routed.routed_relative_values);
  c = named_config;
  c.causal = true;
  c.routed.positions = five;
  c.dense = {.heads = 1, .positions = {.kind = PositionKind::shaw, .distances = 3}};
  const Parameters<double> both = RoutingAttention<double>(c).parameters();
  REQUIRE(both.routed_relative_keys == RowMatrix<double>(routed.routed_relative_keys.topRows(5)));
  REQUIRE(both.dense_relative_keys == RowMatrix<double>(routed.routed_relative_keys.bottomRows(3)));
  REQUIRE(both.dense_relative_values == RowMatrix<double>(routed.routed_relative_values.bottomRows(3)));
}

TEST_CASE("parameters start as documented and follow from the seed") {
  const Matching induction{.gain = 2.5, .induction = true, .key_taps = 300};
  RoutingAttentionConfig c{.model_dim = 40,
                           .head_dim = 9,
                           .causal = true,
                           .bias = true,
                           .seed = 4,
                           .local = {.heads = 2, .window = 6, .matching = induction},
                           .routed = {.heads = 2, .clusters = 4, .window = 6, .matching = induction}};
  const RoutingAttention<double> layer(c), same(c);
  const Parameters<double>& p = layer.parameters();
  for (const RowMatrix<double>* w : {&p.w_q, &p.w_v, &p.w_o}) {
    const double bound = 1 / std::sqrt(static_cast<double>(w->rows()));
    REQUIRE(w->cwiseAbs().maxCoeff() <= bound);
    REQUIRE(w->cwiseAbs().maxCoeff() > 0.98 * bound);
    REQUIRE(std::abs(w->mean()) < 0.05 * bound);
    REQUIRE(w->cwiseAbs2().mean() == Approx(bound * bound / 3).epsilon(0.1));
  }
  REQUIRE(p.w_q != p.w_v);
  REQUIRE((p.gain.array() == 2.5).all());
  REQUIRE(p.b_q.isZero(0));
  REQUIRE(p.b_o.isZero(0));
  // taps * 0.9^-t are standard normal, 300 taps of 9 numbers a head.
  double sum = 0, square = 0, most = 0;
  for (Index row = 0; row < p.taps.rows(); ++row)
    for (Index j = 0; j < 9; ++j) {
      const double z = p.taps(row, j) / std::pow(0.9, static_cast<double>(row % 300));
      sum += z, square += z * z, most = std::max(most, std::abs(z));
    }
  const auto count = static_cast<double>(p.taps.size());
  REQUIRE(std::abs(sum / count) < 0.05);
  REQUIRE(square / count == Approx(1).epsilon(0.05));
  REQUIRE(most > 3);
  REQUIRE(most < 6);

  REQUIRE(same.parameters().w_q == p.w_q);
  REQUIRE(same.parameters().taps == p.taps);
  REQUIRE(same.routers()[1].centroids().eigen() == layer.routers()[1].centroids().eigen());
  REQUIRE(layer.routers()[0].centroids().eigen() != layer.routers()[1].centroids().eigen());
  const RoutingAttention<float> rounded(c);
  REQUIRE(rounded.parameters().w_q == p.w_q.cast<float>());
  c.seed = 5;
  const RoutingAttention<double> other(c);
  REQUIRE(other.parameters().w_q != p.w_q);
  REQUIRE(other.parameters().taps != p.taps);
  REQUIRE(other.routers()[1].centroids().eigen() != layer.routers()[1].centroids().eigen());
}

TEST_CASE("gradients are zeros of the same shapes, and both are visited side by side") {
  RoutingAttentionConfig c = named_config;
  c.causal = c.routed.matching.induction = true;
  c.routed.matching.key_taps = 2;
  RoutingAttention<float> layer(c);
  Parameters<float> gradients = layer.zero_gradients();
  REQUIRE(gradients.size() == layer.parameters().size());
  REQUIRE(gradients.size() == 12 * 20 + 12 * 5 + 12 * 20 + 20 * 12 + 3 + 6 * 5);
  gradients.visit([](std::string_view, View<float> m) { REQUIRE(m.eigen().isZero(0)); });
  gradients.fill(2);
  // What an optimiser does.
  const Parameters<float> before = layer.parameters();
  std::vector<std::string> names;
  visit(layer.parameters(), gradients, [&](std::string_view name, View<float> value, ConstView<float> gradient) {
    names.emplace_back(name);
    value.eigen() -= 0.5f * gradient.eigen();
  });
  REQUIRE(names == std::vector<std::string>{"w_q", "w_k", "w_v", "w_o", "gain", "taps"});
  REQUIRE(layer.parameters().w_q == RowMatrix<float>(before.w_q.array() - 1));
  REQUIRE(layer.parameters().gain == RowMatrix<float>(before.gain.array() - 1));

  Parameters<float> wrong = gradients;
  wrong.gain.resize(1, 4);
  int calls = 0;
  REQUIRE_THROWS_AS(visit(layer.parameters(), wrong, [&](std::string_view, View<float>, ConstView<float>) { ++calls; }),
                    ShapeError);
  REQUIRE(calls == 0);
}
