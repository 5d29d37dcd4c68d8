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

const RoutingAttentionConfig named_config{
    .model_dim = 12, .heads = 4, .head_dim = 5, .routed_heads = 3, .clusters = 4, .window = 6, .seed = 1};

}  // namespace

TEST_CASE("names and shapes of the parameters are fixed") {
  RoutingAttentionConfig c = named_config;
  REQUIRE(shapes(c) == Shapes{{"w_q", {12, 20}}, {"w_k", {12, 20}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}});
  c.bias = true;
  c.lookahead = 2;
  c.local_positions = PositionKind::bias;
  REQUIRE(shapes(c) == Shapes{{"w_q", {12, 20}},
                              {"w_k", {12, 20}},
                              {"w_v", {12, 20}},
                              {"w_o", {20, 12}},
                              {"b_q", {1, 20}},
                              {"b_k", {1, 20}},
                              {"b_v", {1, 20}},
                              {"b_o", {1, 12}},
                              {"distance_bias", {1, 8}}});
  // Heads that share have no keys of their own.
  c = named_config;
  c.causal = true;
  REQUIRE(shapes(c) ==
          Shapes{{"w_q", {12, 20}}, {"w_k", {12, 5}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}, {"gain", {1, 3}}});
  c.induction = c.local_induction = c.bias = true;
  c.key_taps = 8;
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
  c.local_positions = PositionKind::t5_buckets;
  c.routed_positions = PositionKind::bias;
  c.position_buckets = 6;
  c.routed_distances = 7;
  Shapes expected{{"w_q", {12, 20}}, {"w_k", {12, 20}}, {"w_v", {12, 20}}, {"w_o", {20, 12}}};
  expected["bucket_bias"] = {1, 6};
  expected["routed_distance_bias"] = {3, 13};
  REQUIRE(shapes(c) == expected);
  c.local_positions = PositionKind::alibi;
  c.routed_positions = PositionKind::t5_buckets;
  c.routed_distances = 0;
  expected.erase("bucket_bias");
  expected.erase("routed_distance_bias");
  expected["routed_bucket_bias"] = {3, 6};
  REQUIRE(shapes(c) == expected);
  c.causal = c.local_induction = true;
  c.shared_qk = false;
  c.local_positions = PositionKind::bias;
  c.routed_positions = PositionKind::bias;
  c.routed_distances = 7;
  expected = {{"w_q", {12, 20}},
              {"w_k", {12, 15}},
              {"w_v", {12, 20}},
              {"w_o", {20, 12}},
              {"gain", {1, 1}},
              {"distance_bias", {1, 6}},
              {"routed_distance_bias", {3, 7}}};
  REQUIRE(shapes(c) == expected);
}

TEST_CASE("parameters start as documented and follow from the seed") {
  RoutingAttentionConfig c{.model_dim = 40,
                           .heads = 4,
                           .head_dim = 9,
                           .routed_heads = 2,
                           .clusters = 4,
                           .window = 6,
                           .causal = true,
                           .induction = true,
                           .local_induction = true,
                           .key_taps = 300,
                           .gain = 2.5,
                           .bias = true,
                           .seed = 4};
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
  c.causal = c.induction = true;
  c.key_taps = 2;
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
