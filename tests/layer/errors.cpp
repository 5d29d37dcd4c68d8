#include "coterie/layer/routing_attention.hpp"

#include <functional>
#include <limits>

#include "catch.hpp"
#include "kinds.hpp"

using namespace test;

namespace {

using Layer = RoutingAttention<float>;

const RoutingAttentionConfig called_config{.model_dim = 10,
                                           .head_dim = 4,
                                           .causal = true,
                                           .bias = true,
                                           .seed = 3,
                                           .local = {.heads = 1, .window = 8},
                                           .routed = {.heads = 2, .clusters = 5, .window = 8}};

// Everything that a call could write, and the arguments of a good call, which a test spoils.
struct Call {
  Index n = 12;
  Layer layer{called_config};
  RowMatrix<float> memory = Random(1).matrix<float>(60, 10);
  RowMatrix<float> gradient_source = Random(2).matrix<float>(12, 10);
  ConstView<float> x = view(memory).rows(0, 12), d_y = gradient_source;
  View<float> y = view(memory).rows(20, 12), d_x = view(memory).rows(40, 12);
  std::vector<Index> offsets = {0, 5, 12}, source_offsets;
  std::vector<std::int32_t> routes;
  ConstView<float> source;
  View<float> d_source;
  Parameters<float> gradients = layer.zero_gradients();
  Layer::Tape tape;
  Context context;

  Call() {
    RowMatrix<float> out(n, 10);
    layer.forward({x, offsets}, out, tape, context);
  }

  Input<float> input() const { return {x, offsets, source, source_offsets, 0, routes}; }
};

enum class Expected { shape, value };

void refuses(Expected expected, const char* argument, const std::function<void(Call&)>& spoil,
             const std::function<void(Call&)>& act) {
  INFO(argument);
  Call call;
  spoil(call);
  const RowMatrix<float> memory = call.memory;
  const Parameters<float> gradients = call.gradients;
  const Index tokens = call.tape.tokens();
  std::string text;
  try {
    act(call);
  } catch (const ShapeError& error) {
    REQUIRE(expected == Expected::shape);
    text = error.what();
  } catch (const ValueError& error) {
    REQUIRE(expected == Expected::value);
    text = error.what();
  }
  INFO(text);
  REQUIRE(text.find(argument) != std::string::npos);
  REQUIRE(text.find("RoutingAttention::") == 0);
  REQUIRE(same_bits<float>(call.memory, memory));
  REQUIRE(same_bits(call.gradients, gradients));
  REQUIRE(call.tape.tokens() == tokens);
}

void forward(Call& c) { c.layer.forward(c.input(), c.y, c.context); }
void forward_tape(Call& c) { c.layer.forward(c.input(), c.y, c.tape, c.context); }
void backward(Call& c) {
  c.layer.backward(c.input(), c.tape, c.d_y, InputGradient<float>(c.d_x, c.d_source), c.gradients, c.context);
}

}  // namespace

TEST_CASE("a good call passes") {
  Call call;
  forward(call);
  forward_tape(call);
  backward(call);
}

TEST_CASE("inputs that do not fit are refused, by all three, and nothing is written") {
  for (const auto& act : {forward, forward_tape, backward}) {
    const auto shape = [&](const char* argument, auto spoil) { refuses(Expected::shape, argument, spoil, act); };
    const auto value = [&](const char* argument, auto spoil) { refuses(Expected::value, argument, spoil, act); };
    shape("x", [](Call& c) { c.x = c.x.columns(0, 9); });
    shape("x", [](Call& c) { c.x = ConstView<float>(c.memory.data(), 12, 10, 9); });
    shape("x", [](Call& c) { c.x = ConstView<float>(nullptr, 12, 10); });
    value("offsets", [](Call& c) { c.offsets = {0, 5, 11}; });
    value("offsets", [](Call& c) { c.offsets = {1, 5, 12}; });
    value("offsets", [](Call& c) { c.offsets = {0, 6, 5, 12}; });
    value("offsets", [](Call& c) { c.offsets = {0, 13, 12}; });
    value("offsets", [](Call& c) { c.offsets = {0}; });
    value("offsets", [](Call& c) { c.offsets = {0, 12, 0}; });
    value("offsets", [](Call& c) { c.offsets = {0, std::numeric_limits<Index>::max()}; });
    value("source_offsets", [](Call& c) { c.source_offsets = {0, 12}; });
    value("source", [](Call& c) { c.source = c.x; });  // heads of this layer share queries and keys
    value("routes", [](Call& c) { c.routes.assign(23, 0); });
    value("routes", [](Call& c) { c.routes.assign(24, 5); });
    value("routes", [](Call& c) { c.routes.assign(24, -2); });
  }
}

TEST_CASE("routes are refused where nothing is routed by labels") {
  for (const auto& act : {forward, forward_tape}) {
    const auto spoil = [](const RoutingAttentionConfig& other) {
      return [other](Call& c) {
        c.layer = Layer(other);
        c.routes.assign(static_cast<std::size_t>(c.n * other.routed.heads), 0);
        if (c.routes.empty()) c.routes.assign(12, 0);
      };
    };
    RoutingAttentionConfig other = called_config;
    make_dense(other);
    refuses(Expected::value, "routes", spoil(other), act);
    other = called_config;
    other.routed = {};
    refuses(Expected::value, "routes", spoil(other), act);
  }
}

TEST_CASE("outputs that do not fit or share memory are refused, and nothing is written") {
  for (const auto& act : {forward, forward_tape}) {
    const auto shape = [&](auto spoil) { refuses(Expected::shape, "y", spoil, act); };
    shape([](Call& c) { c.y = c.y.columns(0, 9); });
    shape([](Call& c) { c.y = c.y.rows(0, 11); });
    shape([](Call& c) { c.y = View<float>(nullptr, 12, 10); });
    shape([](Call& c) { c.y = View<float>(c.y.data(), 12, 10, 5); });
    shape([](Call& c) { c.y = view(c.memory).rows(0, 12); });
    shape([](Call& c) { c.y = view(c.memory).rows(11, 12); });
    shape([](Call& c) { c.y = {c.layer.parameters().w_o.data() + 5, 12, 10}; });
  }
}

TEST_CASE("sources that do not fit are refused, and nothing is written") {
  RoutingAttentionConfig separate = called_config;
  separate.routed.matching.shared_qk = false;
  const auto with_source = [&](auto spoil) {
    return [=](Call& c) {
      c.layer = Layer(separate);
      c.gradients = c.layer.zero_gradients();
      c.source = view(c.memory).rows(52, 8);
      c.source_offsets = {0, 3, 8};
      RowMatrix<float> y(12, 10);
      c.layer.forward(c.input(), y, c.tape, c.context);
      spoil(c);
    };
  };
  for (const auto& act : {forward, forward_tape, backward}) {
    const auto shape = [&](const char* argument, auto spoil) {
      refuses(Expected::shape, argument, with_source(spoil), act);
    };
    const auto value = [&](const char* argument, auto spoil) {
      refuses(Expected::value, argument, with_source(spoil), act);
    };
    shape("source", [](Call& c) { c.source = c.source.columns(0, 9); });
    value("source", [](Call& c) { c.source = c.source.rows(0, 0); });
    value("source_offsets", [](Call& c) { c.source_offsets = {0, 8}; });
    value("source_offsets", [](Call& c) { c.source_offsets = {0, 9, 8}; });
    value("source_offsets", [](Call& c) { c.source_offsets = {}; });
    value("source_offsets", [](Call& c) { c.offsets = {}; });
    value("routes", [](Call& c) { c.routes.assign(24, 0); });
  }
  for (const auto& act : {forward, forward_tape})
    refuses(Expected::shape, "y", with_source([](Call& c) { c.source = view(c.memory).rows(24, 8); }), act);
  const auto shape = [&](const char* argument, auto spoil) {
    refuses(Expected::shape, argument, with_source(spoil), backward);
  };
  shape("d_source", [](Call&) {});
  shape("d_source", [](Call& c) { c.d_source = view(c.memory).rows(12, 7); });
  shape("d_source", [](Call& c) { c.d_source = view(c.memory).rows(4, 8); });
  shape("d_source", [](Call& c) { c.d_source = view(c.memory).rows(48, 8); });
  shape("d_source", [](Call& c) { c.d_source = view(c.memory).rows(51, 8); });
  shape("d_x", [](Call& c) { c.source = view(c.memory).rows(50, 8); });
  shape("tape", [](Call& c) { c.source = c.source.rows(0, 7), c.source_offsets = {0, 3, 7}; });
  shape("tape", [](Call& c) { c.source = {}, c.source_offsets = {}; });
  // And a good one passes.
  Call call;
  with_source([](Call& c) { c.d_source = view(c.memory).rows(12, 8); })(call);
  backward(call);
}

TEST_CASE("backward refuses what does not fit, and adds nothing") {
  const auto shape = [&](const char* argument, auto spoil) { refuses(Expected::shape, argument, spoil, backward); };
  const auto value = [&](const char* argument, auto spoil) { refuses(Expected::value, argument, spoil, backward); };
  shape("d_y", [](Call& c) { c.d_y = c.d_y.rows(0, 11); });
  shape("d_y", [](Call& c) { c.d_y = c.d_y.columns(1, 9); });
  shape("d_x", [](Call& c) { c.d_x = c.d_x.rows(0, 11); });
  shape("d_x", [](Call& c) { c.d_x = c.d_x.columns(0, 9); });
  shape("d_x", [](Call& c) { c.d_x = view(c.memory).rows(5, 12); });
  shape("d_x", [](Call& c) { c.d_y = view(c.memory).rows(40, 12); });
  shape("d_source", [](Call& c) { c.d_source = view(c.memory).rows(52, 2); });
  shape("gradients.w_o", [](Call& c) { c.gradients.w_o.resize(3, 3), c.gradients.w_o.setZero(); });
  shape("gradients.b_q", [](Call& c) { c.gradients.b_q.resize(0, 0); });
  shape("tape", [](Call& c) { c.x = view(c.memory).rows(0, 11), c.offsets = {}; });
  shape("d_x", [](Call& c) { c.d_x = {c.layer.parameters().w_q.data(), 12, 10}; });
  shape("d_x", [](Call& c) { c.d_x = {c.gradients.w_v.data() + 7, 12, 10}; });
  value("offsets", [](Call& c) { c.offsets = {0, 6, 12}; });
  value("parameters.gain", [](Call& c) { c.layer.parameters().gain(0, 0) = std::numeric_limits<float>::infinity(); });
  value("tape", [](Call& c) { c.tape = Layer::Tape(); });
  value("tape", [](Call& c) {
    RoutingAttentionConfig other = called_config;
    other.seed = 4;
    RowMatrix<float> y(12, 10);
    Layer(other).forward(c.x, y, c.tape, c.context);
  });
}

TEST_CASE("backward does not add into the layer's own parameters") {
  Call call;
  const Parameters<float> before = call.layer.parameters();
  REQUIRE_THROWS_AS(
      call.layer.backward(call.input(), call.tape, call.d_y, InputGradient<float>(call.d_x, call.d_source),
                          call.layer.parameters(), call.context),
      ShapeError);
  REQUIRE(same_bits(call.layer.parameters(), before));
}

TEST_CASE("router updates refuse what does not fit, and move no centroid") {
  const auto refused = [](Expected expected, const std::function<void(Call&, RouterStatistics<float>&)>& act) {
    Call call;
    RouterStatistics<float> statistics = call.layer.zero_statistics();
    call.layer.observe(call.tape, statistics, call.context);
    const Layer before = call.layer;
    bool threw = false;
    try {
      act(call, statistics);
    } catch (const ShapeError&) {
      threw = expected == Expected::shape;
    } catch (const ValueError&) {
      threw = expected == Expected::value;
    }
    REQUIRE(threw);
    for (std::size_t h = 0; h < 2; ++h) {
      REQUIRE(same_bits<float>(call.layer.routers()[h].centroids(), before.routers()[h].centroids()));
      REQUIRE(call.layer.routers()[h].updates() == 0);
    }
  };
  refused(Expected::value, [](Call& c, RouterStatistics<float>&) { c.layer.update_router(Layer::Tape(), c.context); });
  refused(Expected::value, [](Call& c, RouterStatistics<float>& s) { c.layer.observe(Layer::Tape(), s, c.context); });
  refused(Expected::shape, [](Call& c, RouterStatistics<float>&) {
    RouterStatistics<float> other(2, 4, 4);
    c.layer.observe(c.tape, other, c.context);
  });
  refused(Expected::shape,
          [](Call& c, RouterStatistics<float>&) { c.layer.update_router(RouterStatistics<float>(1, 5, 4)); });
  refused(Expected::value, [](Call& c, RouterStatistics<float>& s) {
    s.block().back() = std::numeric_limits<double>::quiet_NaN();  // of the last head
    c.layer.update_router(s);
  });
  refused(Expected::value, [](Call& c, RouterStatistics<float>& s) {
    s.block()[s.block().size() / 2] = -1;  // a count of the last head
    c.layer.update_router(s);
  });
}

TEST_CASE("tapes answer for the heads they have") {
  Call call;
  REQUIRE(call.tape.labels(1).size() == 12);
  REQUIRE_THROWS_AS(call.tape.labels(2), ValueError);
  REQUIRE_THROWS_AS(call.tape.labels(-1), ValueError);
  REQUIRE_THROWS_AS(call.tape.key_labels(2), ValueError);
  REQUIRE_THROWS_AS(Layer::Tape().labels(0), ValueError);
  REQUIRE(Layer::Tape().plans().empty());
  REQUIRE(call.tape.plans().size() == 2);
  REQUIRE(call.tape.dense_plans().empty());

  // A tape that another layer has used before answers for the layer that used it last.
  const Layer dense({.model_dim = call.x.cols(), .causal = true, .dense = {.heads = 1}});
  Context context;
  RowMatrix<float> y(call.x.rows(), call.x.cols());
  dense.forward(call.x, y, call.tape, context);
  REQUIRE(call.tape.plans().empty());
  REQUIRE(call.tape.local_plans().empty());
  REQUIRE(call.tape.dense_plans().size() == 1);
  REQUIRE_THROWS_AS(call.tape.labels(0), ValueError);
  REQUIRE(Layer::Tape().tokens() == -1);
}
