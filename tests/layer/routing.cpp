#include "coterie/layer/routing.hpp"

#include <cmath>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "errors.hpp"
#include "gradient.hpp"
#include "oracle.hpp"

using namespace test;

namespace {

std::vector<Kind> member_kinds() {
  const RoutingAttentionConfig two{
      .model_dim = 10, .head_dim = 4, .seed = 3, .routed = {.heads = 2, .clusters = 3, .window = 5}};
  std::vector<Kind> all;
  const auto add = [&](const char* name, auto change) {
    Kind kind{name, two};
    change(kind.config);
    all.push_back(kind);
  };
  add("balanced, shared, causal", [](auto& c) {
    c.causal = true;
    c.routed.membership.kind = MembershipKind::balanced;
  });
  add("balanced, separate, two-sided, lse", [](auto& c) {
    c.routed.membership.kind = MembershipKind::balanced;
    c.routed.membership.combine = Combine::lse;
  });
  add("balanced, all joined, mixed heads", [](auto& c) {
    c.causal = true;
    set_heads(c, 1, 1);
    c.local.window = 5;
    c.routed.membership.kind = MembershipKind::balanced;
    c.routed.membership.unassigned = Unassigned::nearest;
    c.routed.matching.self = Self::visible;
  });
  add("two probes, shared, causal", [](auto& c) {
    c.causal = true;
    c.routed.membership.probes = 2;
  });
  add("two probes, separate, two-sided", [](auto& c) { c.routed.membership.probes = 2; });
  add("two probes, induction", [](auto& c) {
    c.causal = c.routed.matching.induction = true;
    c.routed.membership.probes = 2;
    c.routed.matching.key_taps = 3;
  });
  return all;
}

bool same_plan(const AttentionPlan& a, const AttentionPlan& b) {
  const auto same = [](const std::vector<Interval>& x, const std::vector<Interval>& y) {
    return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin(), [](Interval i, Interval j) {
             return i.begin == j.begin && i.end == j.end;
           });
  };
  return a.combine == b.combine && a.entries == b.entries && a.keys == b.keys && same(a.visible, b.visible) &&
         same(a.visible_too, b.visible_too);
}

}  // namespace

TEST_CASE("the layer's plans are those of its routers' scores") {
  // Values of queries that are their rows: identity weights show the router's rows from outside.
  RoutingAttentionConfig c{
      .model_dim = 6, .head_dim = 6, .seed = 2, .routed = {.heads = 1, .clusters = 4, .window = 7}};
  Context context;
  Random random(3);
  const Index n = 40;
  const RowMatrix<double> x = random.matrix<double>(n, 6);
  const std::vector<Index> offsets = {0, 13, 13, 40};
  for (const bool causal : {false, true})
    for (const bool balanced : {false, true}) {
      c.causal = causal;
      c.routed.matching.shared_qk = true;
      c.routed.matching.self = Self::visible;
      c.routed.membership.kind = balanced ? MembershipKind::balanced : MembershipKind::nearest;
      c.routed.membership.probes = balanced ? 1 : 3;
      RoutingAttention<double> layer(c);
      layer.parameters().w_q = RowMatrix<double>::Identity(6, 6);
      RoutingAttention<double>::Tape tape;
      RowMatrix<double> y(n, 6), rows(n, 6), scores(n, 4);
      layer.forward({x, offsets}, y, tape, context);
      normalise_rows(x, view(rows), {}, 6, context);
      layer.routers()[0].scores(rows, view(scores), context);
      ClusterMembers queries, keys;
      AttentionPlan expected;
      if (balanced) {
        balanced_members(scores, {.members = 7, .offsets = offsets}, keys, context);
        plan_members(keys, keys, {.causal = causal, .offsets = offsets}, expected);
      } else {
        nearest_members(scores, {.probes = 3, .offsets = offsets}, queries, context);
        nearest_members(scores, {.offsets = offsets}, keys, context);
        plan_members(queries, keys, {.window = 7, .causal = causal, .combine = Combine::lse, .offsets = offsets},
                     expected);
      }
      REQUIRE(same_plan(tape.plans()[0], expected));
      std::vector<std::int32_t> labels(static_cast<std::size_t>(n));
      layer.routers()[0].assign(rows, labels, context);
      REQUIRE(std::equal(labels.begin(), labels.end(), tape.labels(0).begin(), tape.labels(0).end()));
    }
}

TEST_CASE("layers with members: gradients of x and of every parameter are those of central differences") {
  const Index n = 21;
  for (const Kind& kind : member_kinds())
    for (const bool ragged : {false, true}) {
      INFO(kind.name << ", ragged " << ragged);
      RoutingAttention<double> layer = make_layer<double>(kind.config);
      Random random(7);
      RowMatrix<double> x = 2 * random.matrix<double>(n, 10);
      const RowMatrix<double> d_y = random.matrix<double>(n, 10);
      const std::vector<Index> offsets = ragged ? three_sequences(n) : std::vector<Index>{0, n};
      Context context;
      RoutingAttention<double>::Tape tape;
      RowMatrix<double> y(n, 10), again(n, 10);
      layer.forward({x, offsets}, y, tape, context);
      layer.forward({x, offsets}, again, context);
      REQUIRE(same_bits<double>(y, again));
      Parameters<double> gradients = layer.zero_gradients();
      RowMatrix<double> d_x = RowMatrix<double>::Zero(n, 10);
      layer.backward({x, offsets}, tape, d_y, d_x, gradients, context);
      const auto loss = [&] {
        layer.forward({x, offsets}, y, context);
        return y.cwiseProduct(d_y).sum();
      };
      require_gradient(x, d_x, loss, 1e-6);
      visit(layer.parameters(), gradients, [&](std::string_view name, View<double> p, ConstView<double> g) {
        INFO(name);
        require_gradient(p, g, loss, 1e-6);
      });
    }
}

TEST_CASE("layers with members: same bits for any workers, sequences end to end equal the same ones alone") {
  const Index n = 60;
  for (const Kind& kind : member_kinds()) {
    INFO(kind.name);
    const RoutingAttention<float> layer = make_layer<float>(kind.config);
    Random random(9);
    const RowMatrix<float> x = random.matrix<float>(n, 10);
    const std::vector<Index> offsets = three_sequences(n);
    Context context;
    RowMatrix<float> y(n, 10), other(n, 10);
    layer.forward({x, offsets}, y, context);
    ThreadPool pool(3);
    Workspace workspace;
    Context three(pool, workspace);
    layer.forward({x, offsets}, other, three);
    REQUIRE(same_bits<float>(y, other));
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const Index begin = offsets[s], count = offsets[s + 1] - begin;
      RowMatrix<float> alone(count, 10);
      layer.forward(x.middleRows(begin, count), alone, context);
      REQUIRE(same_bits<float>(alone, y.middleRows(begin, count)));
    }
  }
}

TEST_CASE("several probes stay strictly causal, balanced membership does not") {
  const Index n = 64;
  Index changed_balanced = 0;
  for (const Kind& kind : member_kinds()) {
    if (!kind.config.causal) continue;
    INFO(kind.name);
    const RoutingAttention<float> layer = make_layer<float>(kind.config);
    Random random(4);
    RowMatrix<float> x = random.matrix<float>(n, 10);
    Context context;
    RowMatrix<float> y(n, 10), other(n, 10);
    layer.forward(x, y, context);
    x.bottomRows(n / 2) = random.matrix<float>(n / 2, 10);
    layer.forward(x, other, context);
    Index changed = 0;
    for (Index i = 0; i < n / 2; ++i) changed += !same_bits<float>(y.row(i), other.row(i));
    if (kind.config.routed.membership.kind == MembershipKind::balanced)
      changed_balanced += changed;
    else
      REQUIRE(changed == 0);
  }
  REQUIRE(changed_balanced > 0);
}

TEST_CASE("cross-attention of layers with members: the formula, and gradients of x, source and parameters") {
  const Index n = 13, m = 19;
  const std::vector<Index> offsets = {0, 3, 3, 4, 12, n}, source_offsets = {0, 2, 4, 4, 18, m};
  for (const Kind& kind : member_kinds())
    for (const bool causal : {false, true}) {
      if (kind.config.routed.matching.induction) continue;
      RoutingAttentionConfig config = kind.config;
      config.causal = causal;
      config.routed.matching.shared_qk = false;
      config.routed.matching.self = Self::visible;
      INFO(kind.name << ", causal " << causal);
      RoutingAttention<double> layer = make_layer<double>(config);
      Random random(7);
      RowMatrix<double> x = 2 * random.matrix<double>(n, 10), source = 2 * random.matrix<double>(m, 10);
      const RowMatrix<double> d_y = random.matrix<double>(n, 10);
      const Input<double> input(x, offsets, source, source_offsets);
      RowMatrix<double> y(n, 10);
      Context context;
      RoutingAttention<double>::Tape tape;
      layer.forward(input, y, tape, context);
      Oracle oracle{layer.config(), layer.parameters(), offsets, {}, {}, source_offsets, source};
      std::vector<ConstView<double>> centroids;
      for (const auto& router : layer.routers()) centroids.push_back(router.centroids());
      oracle.route(x, centroids);
      for (Index i = 0; i < n; ++i) {
        const std::vector<double> expected = oracle.row(x, i);
        for (Index j = 0; j < 10; ++j) REQUIRE(std::abs(y(i, j) - expected[static_cast<std::size_t>(j)]) < 1e-12);
      }
      Parameters<double> gradients = layer.zero_gradients();
      RowMatrix<double> d_x = RowMatrix<double>::Zero(n, 10), d_source = RowMatrix<double>::Zero(m, 10);
      layer.backward(input, tape, d_y, InputGradient<double>(d_x, d_source), gradients, context);
      const auto loss = [&] {
        layer.forward(input, y, context);
        return y.cwiseProduct(d_y).sum();
      };
      require_gradient(x, d_x, loss, 1e-6);
      require_gradient(source, d_source, loss, 1e-6);
      require_gradient(layer.parameters().w_k, gradients.w_k, loss, 1e-6);
    }
}

TEST_CASE("T18: the commitment loss reaches x and the weights, with centroids as constants") {
  const Index n = 20;
  for (const bool shared : {true, false}) {
    RoutingAttentionConfig c{
        .model_dim = 8,
        .head_dim = 4,
        .causal = true,
        .seed = 5,
        .local = {.heads = 1, .window = 6},
        .routed = {.heads = 2, .clusters = 3, .window = 6, .commitment = 0.7, .matching = {.shared_qk = shared}}};
    RoutingAttention<double> layer(c);
    Random random(3);
    RowMatrix<double> x = 2 * random.matrix<double>(n, 8);
    const RowMatrix<double> d_y = random.matrix<double>(n, 8);
    Context context;
    RoutingAttention<double>::Tape tape;
    RowMatrix<double> y(n, 8);
    const auto loss = [&] {
      layer.forward(x, y, tape, context);
      return y.cwiseProduct(d_y).sum() + layer.commitment_loss(tape, context);
    };
    loss();
    REQUIRE(layer.commitment_loss(tape, context) > 0.1);
    Parameters<double> gradients = layer.zero_gradients();
    RowMatrix<double> d_x = RowMatrix<double>::Zero(n, 8);
    layer.backward(x, tape, d_y, d_x, gradients, context);
    require_gradient(x, d_x, loss, 1e-6);
    visit(layer.parameters(), gradients, [&](std::string_view name, View<double> p, ConstView<double> g) {
      INFO(name);
      require_gradient(p, g, loss, 1e-6);
    });
    // The loss itself, from its parts: more of the same weight.
    loss();
    const double once = layer.commitment_loss(tape, context);
    c.routed.commitment = 1.4;
    const RoutingAttention<double> twice(c);
    RoutingAttention<double>::Tape other;
    twice.forward(x, y, other, context);
    REQUIRE(twice.commitment_loss(other, context) == Approx(2 * once));
    c.routed.commitment = 0;
    const RoutingAttention<double> none(c);
    none.forward(x, y, other, context);
    REQUIRE(none.commitment_loss(other, context) == 0);
  }
}

TEST_CASE("the routers of a layer have its settings") {
  const RoutingAttention<float> layer({.model_dim = 8,
                                       .routed = {.heads = 1,
                                                  .clusters = 3,
                                                  .window = 4,
                                                  .router = {.decay = 0.9,
                                                             .average = Average::batch_mean,
                                                             .renormalise = true,
                                                             .dead_share = 0.2,
                                                             .split_share = 3}}});
  const KMeansConfig& k = layer.routers()[0].config();
  REQUIRE(k.router.decay == 0.9);
  REQUIRE(k.router.average == Average::batch_mean);
  REQUIRE(k.router.renormalise);
  REQUIRE(k.router.dead_share == 0.2);
  REQUIRE(k.router.split_share == 3);
}

TEST_CASE("dropout: in training only, by seed and step, with its gradients; soft cap: in both") {
  const Index n = 24;
  RoutingAttentionConfig c{.model_dim = 8,
                           .causal = true,
                           .seed = 6,
                           .local = {.heads = 1, .window = 9},
                           .routed = {.heads = 1, .clusters = 2, .window = 9}};
  const RoutingAttention<double> plain(c);
  c.dropout = 0.3;
  RoutingAttention<double> layer(c);
  c.dropout = 0;
  c.soft_cap = 0.4;
  const RoutingAttention<double> capped(c);
  Random random(2);
  RowMatrix<double> x = 3 * random.matrix<double>(n, 8);
  const RowMatrix<double> d_y = random.matrix<double>(n, 8);
  Context context;
  RowMatrix<double> y(n, 8), other(n, 8);
  RoutingAttention<double>::Tape tape;
  plain.forward(x, y, context);
  layer.forward(x, other, context);
  REQUIRE(same_bits<double>(y, other));
  capped.forward(x, other, context);
  REQUIRE_FALSE(same_bits<double>(y, other));
  const auto train = [&](std::uint64_t step, RowMatrix<double>& out) {
    Input<double> input(x);
    input.step = step;
    layer.forward(input, out, tape, context);
  };
  train(1, y);
  train(1, other);
  REQUIRE(same_bits<double>(y, other));
  train(2, other);
  REQUIRE_FALSE(same_bits<double>(y, other));
  train(1, y);
  Parameters<double> gradients = layer.zero_gradients();
  RowMatrix<double> d_x = RowMatrix<double>::Zero(n, 8);
  Input<double> input(x);
  input.step = 1;
  layer.backward(input, tape, d_y, d_x, gradients, context);
  const auto loss = [&] {
    train(1, y);
    return y.cwiseProduct(d_y).sum();
  };
  require_gradient(x, d_x, loss, 1e-6);
}

TEST_CASE("membership settings that mean nothing together are refused, all at once") {
  const RoutingAttentionConfig good{
      .model_dim = 8, .local = {.heads = 1, .window = 8}, .routed = {.heads = 1, .clusters = 4, .window = 8}};
  const auto refused = [&](auto change, const char* argument) {
    RoutingAttentionConfig c = good;
    change(c);
    INFO(argument);
    CHECK(contains(message_of<ValueError>([&] { RoutingAttention<float> layer(c); }), argument));
  };
  refused([](auto& c) { c.routed.routing = Routing::random, c.routed.membership.kind = MembershipKind::balanced; },
          "routed.membership.kind: ");
  refused([](auto& c) { c.routed = {.membership = {.kind = MembershipKind::balanced}}; }, "routed: ");
  refused([](auto& c) { c.routed.membership.kind = static_cast<MembershipKind>(5); }, "routed.membership.kind: ");
  refused([](auto& c) { c.routed.membership.probes = 0; }, "routed.membership.probes: ");
  refused([](auto& c) { c.routed.membership.probes = 5; }, "routed.membership.probes: ");
  refused([](auto& c) { c.routed.membership.probes = 2, c.routed.routing = Routing::random; },
          "routed.membership.probes: ");
  refused([](auto& c) { c.routed.membership = {.kind = MembershipKind::balanced, .probes = 2}; },
          "routed.membership.probes: ");
  refused([](auto& c) { c.routed.membership.unassigned = Unassigned::nearest; }, "routed.membership.unassigned: ");
  refused([](auto& c) { c.routed.membership.combine = Combine::lse; }, "routed.membership.combine: ");
  refused([](auto& c) { c.routed.membership.combine = Combine::single; }, "routed.membership.combine: ");
  refused([](auto& c) { c.memory = -1; }, "memory: ");
  refused([](auto& c) { c.memory = 1, c.routed.matching.self = Self::never; }, "routed.matching.self: ");
  refused([](auto& c) { c.dropout = 1, c.soft_cap = -1; }, "dropout: ");
  refused([](auto& c) { c.dropout = 1, c.soft_cap = -1; }, "soft_cap: ");
  refused([](auto& c) { c.routed.routing = Routing::random, c.routed.commitment = 1; }, "routed.commitment: ");
  refused([](auto& c) { c.routed.commitment = -1; }, "routed.commitment: ");
  refused([](auto& c) { c.routed.router.split_share = 0.5; }, "routed.router.split_share: ");
  refused([](auto& c) { c.routed.routing = Routing::random, c.routed.router.split_share = 2; }, "routed.router: ");
  refused([](auto& c) { c.routed.router.dead_share = 1; }, "routed.router.dead_share: ");
  refused([](auto& c) { c.routed.router.average = static_cast<Average>(9); }, "routed.router.average: ");
  refused([](auto& c) { c.routed.routing = Routing::random, c.routed.router.renormalise = true; }, "routed.router: ");
  RoutingAttentionConfig c = good;
  c.routed.membership.probes = 2;
  const RoutingAttention<float> layer(c);
  const RowMatrix<float> x = RowMatrix<float>::Zero(3, 8);
  RowMatrix<float> y = x;
  Context context;
  Input<float> input(x);
  const std::vector<std::int32_t> routes(3, 0);
  input.routes = routes;
  CHECK(contains(message_of<ValueError>([&] { layer.forward(input, y, context); }), "routes"));
}
