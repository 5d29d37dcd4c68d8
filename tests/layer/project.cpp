// The two halves of a layer around an attention of the caller's own.

#include <cstring>
#include <limits>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "random.hpp"

using namespace test;
using namespace coterie;

namespace {

bool bit_identical(const RowMatrix<float>& a, const RowMatrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), sizeof(float) * static_cast<std::size_t>(a.size())) == 0;
}

struct Projected {
  RowMatrix<float> q, k, v;
  Projected(const RoutingAttention<float>& layer, Index tokens)
      : q(RowMatrix<float>::Constant(tokens, layer.parameters().w_o.rows(), 7)),
        k(RowMatrix<float>::Constant(tokens, layer.config().kv_heads * layer.config().head_dim, 7)),
        v(k) {}
};

// A llama block's attention: grouped queries, pairs of neighbouring columns.
RoutingAttentionConfig grouped() {
  return {.model_dim = 36,
          .head_dim = 6,
          .kv_heads = 2,
          .causal = true,
          .bias = true,
          .seed = 5,
          .dense = {.heads = 6,
                    .matching = {.shared_qk = false},
                    .positions = {.base = 700, .layout = RotaryLayout::interleaved}}};
}

RoutingAttentionConfig all_three_blocks(bool shared) {
  return {.model_dim = 20,
          .head_dim = 4,
          .causal = true,
          .seed = 6,
          .local = {.heads = 2, .window = 5},
          .routed = {.heads = 2, .clusters = 3, .window = 6, .matching = {.shared_qk = shared}},
          .dense = {.heads = 1, .matching = {.shared_qk = shared}}};
}

// attended = the attention of one block of a layer, along the plans of its forward pass.
void attend(const RoutingAttention<float>& layer, std::span<const AttentionPlan> plans, Index first, Index heads,
            const Matching& matching, const Projected& p, RowMatrix<float>& attended, Context& context) {
  if (heads == 0) return;
  const Index d = layer.config().head_dim, per_kv = p.q.cols() / p.k.cols();
  const auto columns = [&](const RowMatrix<float>& m, Index share) {
    return view(m).columns(first * d / share, heads * d / share);
  };
  attention_forward(Plans(plans), columns(p.q, 1), columns(p.k, per_kv), columns(p.v, per_kv),
                    view(attended).columns(first * d, heads * d),
                    {.heads = heads, .kv_heads = heads / per_kv, .scale = *matching.gain / std::sqrt(double(d))},
                    context);
}

}  // namespace

TEST_CASE("project, attention and output are forward, bit by bit") {
  Context context;
  for (const RoutingAttentionConfig& config : {grouped(), all_three_blocks(false), all_three_blocks(true)}) {
    const RoutingAttention<float> layer(config);
    const RoutingAttentionConfig& c = layer.config();
    const Index tokens = 41;
    const RowMatrix<float> x = Random(1).matrix<float>(tokens, c.model_dim);
    RowMatrix<float> expected(tokens, c.model_dim), y(tokens, c.model_dim);
    RoutingAttention<float>::Tape tape;
    layer.forward(x, expected, tape, context);

    Projected p(layer, tokens);
    layer.project(x, 0, p.q, p.k, p.v, context);
    RowMatrix<float> attended(tokens, p.q.cols());
    attend(layer, tape.local_plans(), 0, c.local.heads, c.local.matching, p, attended, context);
    attend(layer, tape.plans(), c.local.heads, c.routed.heads, c.routed.matching, p, attended, context);
    attend(layer, tape.dense_plans(), c.local.heads + c.routed.heads, c.dense.heads, c.dense.matching, p, attended,
           context);
    layer.output(attended, y, context);
    REQUIRE(bit_identical(y, expected));

    // Rows of later positions, projected by themselves.
    for (const Index first : {1, 17, 40}) {
      Projected late(layer, tokens - first);
      layer.project(view(x).rows(first, tokens - first), first, late.q, late.k, late.v, context);
      REQUIRE(bit_identical(late.q, p.q.bottomRows(tokens - first)));
      REQUIRE(bit_identical(late.k, p.k.bottomRows(tokens - first)));
      REQUIRE(bit_identical(late.v, p.v.bottomRows(tokens - first)));
      RowMatrix<float> late_y(tokens - first, c.model_dim);
      layer.output(view(attended).rows(first, tokens - first), late_y, context);
      REQUIRE(bit_identical(late_y, expected.bottomRows(tokens - first)));
    }
    Projected none(layer, 0);
    layer.project(RowMatrix<float>(0, c.model_dim), 3, none.q, none.k, none.v, context);
  }
}

TEST_CASE("project and output refuse wrong shapes, positions and induction heads, and write nothing") {
  Context context;
  const RoutingAttention<float> layer(grouped());
  const RowMatrix<float> x = Random(1).matrix<float>(4, 36);
  Projected p(layer, 4);
  const Projected before = p;
  RowMatrix<float> narrow(4, 11), short_rows(3, 12), y(4, 36);
  REQUIRE_THROWS_AS(layer.project(x, 0, narrow, p.k, p.v, context), ShapeError);
  REQUIRE_THROWS_AS(layer.project(x, 0, p.q, short_rows, p.v, context), ShapeError);
  REQUIRE_THROWS_AS(layer.project(x, 0, p.q, p.k, narrow, context), ShapeError);
  REQUIRE_THROWS_AS(layer.project(x, 0, p.q, p.k, p.k, context), ShapeError);
  REQUIRE_THROWS_AS(layer.project(RowMatrix<float>(4, 35), 0, p.q, p.k, p.v, context), ShapeError);
  REQUIRE_THROWS_AS(layer.project(x, -1, p.q, p.k, p.v, context), ValueError);
  REQUIRE_THROWS_AS(layer.project(x, (std::numeric_limits<std::int32_t>::max)(), p.q, p.k, p.v, context), ValueError);
  REQUIRE_THROWS_AS(layer.output(p.k, y, context), ShapeError);
  REQUIRE_THROWS_AS(layer.output(p.q, narrow, context), ShapeError);
  REQUIRE_THROWS_AS(layer.output(p.q, p.q, context), ShapeError);
  REQUIRE(bit_identical(p.q, before.q));
  REQUIRE(bit_identical(p.k, before.k));
  REQUIRE(bit_identical(p.v, before.v));

  RoutingAttentionConfig config = grouped();
  config.kv_heads = 0;
  config.dense.matching = {.induction = true};
  config.dense.positions = {};
  const RoutingAttention<float> induction(config);
  Projected q(induction, 4);
  REQUIRE_THROWS_WITH(induction.project(x, 0, q.q, q.k, q.v, context),
                      "RoutingAttention::project: layer: expected one without induction heads, whose keys carry the "
                      "value of a later row, got one with some");
}
