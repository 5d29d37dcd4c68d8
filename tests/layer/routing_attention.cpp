#include "coterie/layer/routing_attention.hpp"

#include "catch.hpp"
#include "oracle.hpp"

using namespace test;

namespace {

template <class T>
double largest_difference(const RowMatrix<T>& y, const RowMatrix<double>& expected) {
  return (y.template cast<double>() - expected).cwiseAbs().maxCoeff();
}

// Labels of every routed head on the tape, as lists.
template <class T>
void read_labels(const RoutingAttentionTape<T>& tape, const RoutingAttentionConfig& c, Oracle& oracle) {
  if (c.routed.heads == 0) return;
  for (Index h = 0; h < detail::routed_kv_heads(c); ++h) {
    oracle.query_labels.emplace_back(tape.labels(h).begin(), tape.labels(h).end());
    oracle.key_labels.emplace_back(tape.key_labels(h).begin(), tape.key_labels(h).end());
  }
}

// Labels for all routed heads, head by head, some of them none.
std::vector<std::int32_t> some_routes(const RoutingAttentionConfig& c, Index n) {
  if (c.routed.heads == 0) return {};
  return Random(23).labels(detail::routed_kv_heads(c) * n, c.routed.clusters, -1);
}

}  // namespace

TEMPLATE_TEST_CASE("the layer computes its formula, of every kind", "", float, double) {
  const Index n = 29;
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    const RoutingAttention<double> exact = make_layer<double>(kind.config);
    const RoutingAttention<TestType> layer = make_layer<TestType>(kind.config);
    RowMatrix<double> x(n, 10);
    Random random(5);
    for (Index i = 0; i < x.size(); ++i)
      x.data()[i] = static_cast<double>(static_cast<TestType>(random.uniform(-2, 2)));
    const RowMatrix<TestType> x_in = x.cast<TestType>();
    RowMatrix<TestType> y(n, 10), y_kept(n, 10);
    Context context;
    RoutingAttentionTape<TestType> tape;
    for (const bool ragged : {false, true})
      for (const bool injected : {false, true}) {
        INFO("ragged " << ragged << ", injected " << injected);
        const std::vector<Index> offsets = three_sequences(n);
        const std::vector<std::int32_t> routes = some_routes(layer.config(), n);
        Input<TestType> input(x_in);
        if (ragged) input.offsets = offsets;
        if (injected) input.routes = routes;
        layer.forward(input, y_kept, tape, context);
        layer.forward(input, y, context);
        REQUIRE(same_bits<TestType>(y, y_kept));

        Oracle oracle{layer.config(), exact.parameters(), ragged ? offsets : std::vector<Index>{0, n}};
        read_labels(tape, layer.config(), oracle);
        RowMatrix<double> expected(n, 10);
        for (Index i = 0; i < n; ++i) {
          const std::vector<double> row = oracle.row(x, i);
          for (Index j = 0; j < 10; ++j) expected(i, j) = row[static_cast<std::size_t>(j)];
        }
        REQUIRE(largest_difference(y, expected) < (sizeof(TestType) == 4 ? 2e-5 : 1e-12));
      }
  }
}

TEST_CASE("cross-attention computes its formula and gradients") {
  const Index n = 13, m = 19;
  const std::vector<Index> one = {0, n}, one_source = {0, m}, several = {0, 3, 3, 4, 12, n},
                           several_source = {0, 2, 4, 4, 18, m};
  for (const Kind& kind : kinds()) {
    Kind cross = kind;
    for_each_block(cross.config, [](auto& block) {
      block.matching.shared_qk = false;
      block.matching.self = Self::visible;
    });
    if (any_block(kind.config, [](const auto& block) { return block.matching.induction; }) || kind.config.globals > 0)
      continue;
    for (const bool ragged : {false, true}) {
      INFO(kind.name << ", ragged " << ragged);
      RoutingAttention<double> layer = make_layer<double>(cross.config);
      Random random(7);
      RowMatrix<double> x = 2 * random.matrix<double>(n, 10), source = 2 * random.matrix<double>(m, 10);
      const RowMatrix<double> d_y = random.matrix<double>(n, 10);
      const auto& offsets = ragged ? several : one;
      const auto& source_offsets = ragged ? several_source : one_source;
      const Input<double> input(x, offsets, source, source_offsets, 3);
      RowMatrix<double> y(n, 10), y_kept(n, 10);
      Context context;
      RoutingAttention<double>::Tape tape;
      layer.forward(input, y_kept, tape, context);
      layer.forward(input, y, context);
      REQUIRE(same_bits<double>(y, y_kept));
      Oracle oracle{layer.config(), layer.parameters(), offsets, {}, {}, source_offsets, source};
      read_labels(tape, layer.config(), oracle);
      double worst = 0;
      for (Index i = 0; i < n; ++i) {
        const std::vector<double> row = oracle.row(x, i);
        for (Index j = 0; j < 10; ++j) worst = std::max(worst, std::abs(row[static_cast<std::size_t>(j)] - y(i, j)));
      }
      REQUIRE(worst < 1e-12);

      // Gradients, where a small step changes no label: of the source and x on its way.
      Parameters<double> gradients = layer.zero_gradients();
      RowMatrix<double> d_x = RowMatrix<double>::Constant(n, 10, -0.25),
                        d_source = RowMatrix<double>::Constant(m, 10, 2);
      layer.backward(input, tape, d_y, InputGradient<double>(d_x, d_source), gradients, context);
      const auto check = [&](RowMatrix<double>& value, const RowMatrix<double>& gradient, double start) {
        for (Index i = 0; i < value.size(); ++i) {
          const double old = value.data()[i], step = 1e-6;
          value.data()[i] = old + step;
          layer.forward(input, y, context);
          const double up = y.cwiseProduct(d_y).sum();
          value.data()[i] = old - step;
          layer.forward(input, y, context);
          const double down = y.cwiseProduct(d_y).sum();
          value.data()[i] = old;
          REQUIRE(gradient.data()[i] - start == Approx((up - down) / (2 * step)).epsilon(1e-6).margin(1e-7));
        }
      };
      check(x, d_x, -0.25);
      check(source, d_source, 2);
      RowMatrix<double> zero = RowMatrix<double>::Zero(10, gradients.w_k.cols());
      check(layer.parameters().w_k, gradients.w_k, 0);
      check(layer.parameters().w_v, gradients.w_v, 0);
      REQUIRE(gradients.w_k != zero);
      layer.update_router(tape, context);
      if (!layer.routers().empty()) REQUIRE(layer.routers()[0].updates() == 1);
    }
  }
}

TEST_CASE("cross-attention to itself has the bits of self-attention") {
  const Index n = 37;
  for (const Kind& kind : kinds()) {
    if (any_block(detail::resolve(kind.config),
                  [](const auto& block) { return *block.matching.shared_qk || block.matching.self == Self::never; }))
      continue;
    if (kind.config.globals > 0) continue;
    INFO(kind.name);
    const RoutingAttention<float> layer = make_layer<float>(kind.config);
    const RowMatrix<float> x = Random(3).matrix<float>(n, 10), copy = x;
    RowMatrix<float> y(n, 10), cross(n, 10);
    Context context;
    const std::vector<Index> offsets = three_sequences(n);
    layer.forward({x, offsets}, y, context);
    layer.forward({x, offsets, copy, offsets}, cross, context);
    REQUIRE(same_bits<float>(y, cross));
  }
}

TEST_CASE("routed heads go to the nearest centroid of their normalised queries and keys") {
  const Index n = 40;
  for (const bool shared : {true, false}) {
    const RoutingAttention<double> layer(
        {.model_dim = 8,
         .seed = 9,
         .routed = {.heads = 2, .clusters = 4, .window = 5, .matching = {.shared_qk = shared}}});
    const RowMatrix<double> x = Random(3).matrix<double>(n, 8);
    RowMatrix<double> y(n, 8);
    Context context;
    RoutingAttention<double>::Tape tape;
    layer.forward(x, y, tape, context);
    const Oracle oracle{layer.config(), layer.parameters(), {0, n}};
    const auto nearest = [&](Index h, const std::vector<double>& row) {
      const ConstView<double> centroids = layer.routers()[static_cast<std::size_t>(h)].centroids();
      Index best = 0;
      double most = -1e300;
      for (Index c = 0; c < 4; ++c) {
        double score = 0;
        for (Index l = 0; l < 4; ++l) score += centroids(c, l) * row[static_cast<std::size_t>(l)];
        if (score > most) most = score, best = c;
      }
      return best;
    };
    Index differ = 0;
    for (Index h = 0; h < 2; ++h) {
      const std::vector<double> sizes = tape.cluster_sizes(h);
      double sum = 0;
      for (const double size : sizes) sum += size;
      REQUIRE(sum == static_cast<double>(n));
      for (Index i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        REQUIRE(tape.labels(h)[at] == nearest(h, oracle.router_query(x, i, h)));
        REQUIRE(tape.key_labels(h)[at] == nearest(h, oracle.router_key(x, i, h)));
        differ += tape.labels(h)[at] != tape.key_labels(h)[at];
      }
    }
    REQUIRE((differ > 0) == !shared);
  }
}

TEST_CASE("gradients of x and of every parameter are central differences, of every kind, and are added") {
  const Index n = 11;
  for (const Kind& kind : kinds())
    for (const bool ragged : {false, true}) {
      INFO(kind.name << ", ragged " << ragged);
      RoutingAttention<double> layer = make_layer<double>(kind.config);
      Random random(7);
      RowMatrix<double> x = 2 * random.matrix<double>(n, 10);
      const RowMatrix<double> d_y = random.matrix<double>(n, 10);
      const std::vector<Index> offsets = three_sequences(n);
      const std::vector<std::int32_t> routes = some_routes(layer.config(), n);
      Input<double> input(x);
      if (ragged) input.offsets = offsets;
      input.routes = routes;
      Context context;
      RoutingAttention<double>::Tape tape;
      RowMatrix<double> y(n, 10);

      Parameters<double> gradients = layer.zero_gradients();
      gradients.fill(0.5);
      RowMatrix<double> d_x = RowMatrix<double>::Constant(n, 10, -0.25);
      layer.forward(input, y, tape, context);
      layer.backward(input, tape, d_y, d_x, gradients, context);

      const auto loss = [&] {
        layer.forward(input, y, context);
        return y.cwiseProduct(d_y).sum();
      };
      const auto worst = [&](View<double> value, ConstView<double> gradient, double start) {
        double most = 0;
        for (Index i = 0; i < value.rows(); ++i)
          for (Index j = 0; j < value.cols(); ++j) {
            const double old = value(i, j), step = 1e-5;
            value(i, j) = old + step;
            const double up = loss();
            value(i, j) = old - step;
            const double down = loss();
            value(i, j) = old;
            const double difference = (up - down) / (2 * step);
            const double error = std::abs(gradient(i, j) - start - difference) / (1 + std::abs(difference));
            if (std::isnan(error)) return error;
            most = std::max(most, error);
          }
        return most;
      };
      REQUIRE(worst(x, d_x, -0.25) < 1e-6);
      visit(layer.parameters(), gradients, [&](std::string_view name, View<double> value, ConstView<double> gradient) {
        INFO(std::string(name));
        REQUIRE(worst(value, gradient, 0.5) < 1e-6);
        double size = 0;  // a gradient that is zero everywhere would pass too easily
        for (Index i = 0; i < gradient.rows(); ++i)
          for (Index j = 0; j < gradient.cols(); ++j) size += std::abs(gradient(i, j) - 0.5);
        const bool softmax_ignores_it = name == "b_k";
        REQUIRE((size > 1e-6 || softmax_ignores_it));
      });
    }
}

TEST_CASE("x is read through blocks, maps and strided views, and gradients go there") {
  const RoutingAttention<float> layer({.model_dim = 6, .causal = true, .seed = 2, .local = {.heads = 2, .window = 4}});
  RowMatrix<float> wide = Random(1).matrix<float>(9, 20), y_wide = wide, d_wide = RowMatrix<float>::Zero(9, 20);
  const RowMatrix<float> x = wide.middleCols(3, 6), d_y = Random(2).matrix<float>(9, 6);
  RowMatrix<float> y(9, 6), d_x = RowMatrix<float>::Zero(9, 6);
  Context context;
  RoutingAttention<float>::Tape tape;
  Parameters<float> gradients = layer.zero_gradients(), others = layer.zero_gradients();
  layer.forward(x, y, tape, context);
  layer.backward(x, tape, d_y, d_x, gradients, context);
  layer.forward(wide.middleCols(3, 6), y_wide.middleCols(11, 6), tape, context);
  layer.backward(wide.middleCols(3, 6), tape, d_y, d_wide.middleCols(7, 6), others, context);
  REQUIRE(same_bits<float>(y, y_wide.middleCols(11, 6)));
  REQUIRE(same_bits<float>(d_x, d_wide.middleCols(7, 6)));
  REQUIRE(same_bits(gradients, others));
  REQUIRE(y_wide.leftCols(11) == wide.leftCols(11));
  REQUIRE(y_wide.rightCols(3) == wide.rightCols(3));
  REQUIRE(d_wide.leftCols(7).isZero(0));
  REQUIRE(d_wide.rightCols(7).isZero(0));
}

TEST_CASE("no token, and one token, are inputs like others") {
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    RoutingAttention<float> layer = make_layer<float>(kind.config);
    Context context;
    RoutingAttention<float>::Tape tape;
    Parameters<float> gradients = layer.zero_gradients();
    const std::vector<Index> none = {0}, empty = {0, 0, 0};
    for (const auto& [n, offsets] :
         {std::pair(Index(0), std::span<const Index>()), std::pair(Index(0), std::span(none)),
          std::pair(Index(0), std::span(empty)), std::pair(Index(1), std::span<const Index>())}) {
      const RowMatrix<float> x = Random(1).matrix<float>(n, 10), d_y = x;
      RowMatrix<float> y(n, 10), d_x = RowMatrix<float>::Zero(n, 10);
      layer.forward({x, offsets}, y, tape, context);
      layer.backward({x, offsets}, tape, d_y, d_x, gradients, context);
      layer.update_router(tape, context);
      REQUIRE(tape.tokens() == n);
      REQUIRE(y.allFinite());
      REQUIRE(d_x.allFinite());
    }
  }
}

TEST_CASE("routed heads take over the weights of dense ones: what they leave out is all that differs") {
  const Index n = 70;
  const std::vector<Index> offsets = {0, 20, n};
  const Positions rotary{.kind = PositionKind::rotary, .base = 100, .layout = RotaryLayout::interleaved};
  const RoutingAttentionConfig dense_config{
      .model_dim = 10,
      .head_dim = 4,
      .kv_heads = 2,
      .causal = true,
      .seed = 3,
      .dense = {.heads = 6, .matching = {.shared_qk = false}, .positions = rotary}};
  const RoutingAttention<double> dense = make_layer<double>(dense_config);
  const RowMatrix<double> x = 2 * Random(5).matrix<double>(n, 10);
  RowMatrix<double> expected(n, 10), y(n, 10);
  Context context;
  dense.forward({x, offsets}, expected, context);
  const auto difference = [&](Index sinks, Index recent, Index clusters, Index window) {
    RoutingAttentionConfig config = dense_config;
    config.dense = {};
    config.routed = {.heads = 6,
                     .clusters = clusters,
                     .window = window,
                     .sinks = sinks,
                     .recent = recent,
                     .matching = {.shared_qk = false},
                     .positions = rotary};
    RoutingAttention<double> routed(config);
    routed.parameters() = dense.parameters();
    routed.start_router({x, offsets}, context);
    routed.forward({x, offsets}, y, context);
    return largest_difference(y, expected);
  };
  REQUIRE(difference(0, n, 5, 4) < 1e-13);
  REQUIRE(difference(n, 0, 5, 4) < 1e-13);
  REQUIRE(difference(25, 25, 5, 1) < 1e-13);
  REQUIRE(difference(3, 7, 1, n) < 1e-13);
  REQUIRE(difference(3, 7, 5, n) > 1e-3);
}
