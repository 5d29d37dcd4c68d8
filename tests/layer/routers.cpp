#include "coterie/layer/routing_attention.hpp"

#include <algorithm>
#include <limits>

#include "catch.hpp"
#include "kinds.hpp"

using namespace test;

namespace {

const RoutingAttentionConfig shared_config{
    .model_dim = 10,
    .head_dim = 4,
    .causal = true,
    .seed = 3,
    .local = {.heads = 1, .window = 8},
    .routed = {.heads = 2, .clusters = 5, .window = 8, .router = {.decay = 0.9}}};

RoutingAttentionConfig separate_config() {
  RoutingAttentionConfig c = shared_config;
  c.causal = false;
  return c;
}

template <class T>
bool same_routers(const RoutingAttention<T>& a, const RoutingAttention<T>& b) {
  bool same = a.routers().size() == b.routers().size();
  for (std::size_t h = 0; same && h < a.routers().size(); ++h)
    same = same_bits<T>(a.routers()[h].centroids(), b.routers()[h].centroids()) &&
           std::equal(a.routers()[h].sums().begin(), a.routers()[h].sums().end(), b.routers()[h].sums().begin()) &&
           a.routers()[h].updates() == b.routers()[h].updates();
  return same;
}

}  // namespace

TEMPLATE_TEST_CASE("both forms of the router update do the same, step after step", "", float, double) {
  for (const RoutingAttentionConfig& config : {shared_config, separate_config()}) {
    RoutingAttention<TestType> brief(config), full(config);
    Context context;
    typename RoutingAttention<TestType>::Tape tape;
    RouterStatistics<TestType> statistics = full.zero_statistics();
    REQUIRE(statistics.heads() == 2);
    REQUIRE(statistics.clusters() == 5);
    REQUIRE(statistics.dim() == 4);
    for (int step = 0; step < 4; ++step) {
      const RowMatrix<TestType> x = Random(static_cast<std::uint64_t>(step)).matrix<TestType>(70, 10);
      RowMatrix<TestType> y(70, 10);
      brief.forward(x, y, tape, context);
      const RoutingAttention<TestType> before = brief;
      brief.update_router(tape, context);
      REQUIRE(!same_routers(brief, before));
      full.forward(x, y, tape, context);
      statistics.clear();
      full.observe(tape, statistics, context);
      full.update_router(statistics);
      REQUIRE(same_routers(brief, full));
    }
    REQUIRE(brief.routers()[0].updates() == 4);
  }
}

TEST_CASE("statistics count the queries, and the keys that are not shared, by their labels") {
  for (const RoutingAttentionConfig& config : {shared_config, separate_config()}) {
    const RoutingAttention<double> layer(config);
    const Index n = 50;
    const RowMatrix<double> x = Random(1).matrix<double>(n, 10);
    RowMatrix<double> y(n, 10);
    Context context;
    RoutingAttention<double>::Tape tape;
    layer.forward(x, y, tape, context);
    RouterStatistics<double> statistics = layer.zero_statistics();
    layer.observe(tape, statistics, context);
    for (Index h = 0; h < 2; ++h) {
      std::vector<double> counts(5, 0.0);
      RowMatrix<double> sums = RowMatrix<double>::Zero(5, 4);
      const auto add = [&](const RowMatrix<double>& w, Index head, std::span<const std::int32_t> labels) {
        const RowMatrix<double> rows = x * w.middleCols(head * 4, 4);
        for (Index i = 0; i < n; ++i) {
          const auto label = labels[static_cast<std::size_t>(i)];
          const RowMatrix<double> centred = rows.row(i).array() - rows.row(i).mean();
          sums.row(label) += centred / std::sqrt(centred.squaredNorm() / 4 + 1e-6);
          counts[static_cast<std::size_t>(label)] += 1;
        }
      };
      add(layer.parameters().w_q, 1 + h, tape.labels(h));
      if (!*layer.config().routed.matching.shared_qk) add(layer.parameters().w_k, 1 + h, tape.key_labels(h));
      for (Index c = 0; c < 5; ++c) {
        REQUIRE(statistics.counts(h)[static_cast<std::size_t>(c)] == counts[static_cast<std::size_t>(c)]);
        for (Index j = 0; j < 4; ++j)
          REQUIRE(statistics.sums(h)[static_cast<std::size_t>(c * 4 + j)] == Approx(sums(c, j)).margin(1e-10));
      }
    }
  }
}

TEST_CASE("micro-batches add up, and blocks of two machines sum to one update") {
  RoutingAttention<double> whole(shared_config), split(shared_config);
  const RowMatrix<double> x = Random(1).matrix<double>(80, 10);
  RowMatrix<double> y(80, 10);
  Context context;
  RoutingAttention<double>::Tape tape, second;
  const std::vector<Index> offsets = {0, 30, 80};
  whole.forward({x, offsets}, y, tape, context);
  whole.update_router(tape, context);

  RouterStatistics<double> statistics = split.zero_statistics();
  split.forward(x.topRows(30), y.topRows(30), tape, context);
  split.observe(tape, statistics, context);
  split.forward(x.bottomRows(50), y.bottomRows(50), tape, context);
  split.observe(tape, statistics, context);
  split.update_router(statistics);
  REQUIRE(same_routers(whole, split));

  // A second update, past the first one's sampling: counts and sums of two machines added.
  whole.forward({x, offsets}, y, tape, context);
  split.forward(x.topRows(30), y.topRows(30), second, context);
  RouterStatistics<double> one = split.zero_statistics(), two = split.zero_statistics();
  split.observe(second, one, context);
  split.forward(x.bottomRows(50), y.bottomRows(50), second, context);
  split.observe(second, two, context);
  for (std::size_t i = 0; i < one.block().size(); ++i) one.block()[i] += two.block()[i];
  whole.update_router(tape, context);
  split.update_router(one);
  for (std::size_t h = 0; h < 2; ++h)
    REQUIRE((whole.routers()[h].centroids().eigen() - split.routers()[h].centroids().eigen()).cwiseAbs().maxCoeff() <
            1e-12);
}

TEST_CASE("a frozen router stays, and moves again when thawed") {
  RoutingAttention<float> layer(shared_config);
  const RowMatrix<float> x = Random(1).matrix<float>(80, 10);
  RowMatrix<float> y(80, 10);
  Context context;
  RoutingAttention<float>::Tape tape;
  layer.forward(x, y, tape, context);
  const RoutingAttention<float> before = layer;
  layer.freeze_router(true);
  layer.update_router(tape, context);
  REQUIRE(same_routers(layer, before));
  layer.freeze_router(false);
  layer.update_router(tape, context);
  REQUIRE(!same_routers(layer, before));
}

TEST_CASE("T6: forward, backward and observing move no centroid") {
  for (const RoutingAttentionConfig& config : {shared_config, separate_config()}) {
    RoutingAttention<float> layer(config);
    const RowMatrix<float> x = Random(1).matrix<float>(80, 10), d_y = Random(2).matrix<float>(80, 10);
    RowMatrix<float> y(80, 10), d_x = RowMatrix<float>::Zero(80, 10);
    Context context;
    RoutingAttention<float>::Tape tape;
    for (int step = 0; step < 2; ++step) {  // before the first update, and after it
      const RoutingAttention<float> before = layer;
      layer.forward(x, y, context);
      for (int again = 0; again < 2; ++again) layer.forward(x, y, tape, context);
      Parameters<float> gradients = layer.zero_gradients();
      layer.backward(x, tape, d_y, d_x, gradients, context);
      RouterStatistics<float> statistics = layer.zero_statistics();
      layer.observe(tape, statistics, context);
      REQUIRE(same_routers(layer, before));
      layer.update_router(statistics);
      REQUIRE(!same_routers(layer, before));
    }
  }
}

TEST_CASE("T27: centroids are no parameters: what an optimiser does to every weight leaves them") {
  RoutingAttention<float> layer(shared_config);
  const RoutingAttention<float> before = layer;
  layer.parameters().visit([](std::string_view name, View<float> weight) {
    REQUIRE(name.find("centroid") == std::string_view::npos);
    weight.fill(0.5f);
  });
  REQUIRE(same_routers(layer, before));
}

TEST_CASE("routing that is not learned has no routers and nothing to update") {
  for (const bool dense : {false, true}) {
    RoutingAttentionConfig config = shared_config;
    config.routed.router = {};
    if (dense)
      make_dense(config);
    else
      config.routed.routing = Routing::random;
    RoutingAttention<float> layer(config);
    REQUIRE(layer.routers().empty());
    REQUIRE(layer.zero_statistics().heads() == 0);
    const RowMatrix<float> x = Random(1).matrix<float>(20, 10);
    RowMatrix<float> y(20, 10);
    Context context;
    RoutingAttention<float>::Tape tape;
    layer.forward(x, y, tape, context);
    layer.update_router(tape, context);
    RouterStatistics<float> statistics = layer.zero_statistics();
    layer.observe(tape, statistics, context);
    layer.update_router(statistics);
    layer.freeze_router(true);
    REQUIRE(tape.plans().size() == (dense ? 0u : 2u));
    REQUIRE(tape.local_plans().size() == 1);
    REQUIRE(tape.dense_plans().size() == (dense ? 1u : 0u));
    if (dense)
      REQUIRE_THROWS_AS(tape.labels(0), ValueError);
    else
      REQUIRE(tape.labels(1).size() == 20);
  }
}

TEST_CASE("random routes are a function of seed, step, head and position") {
  RoutingAttentionConfig config = shared_config;
  config.routed.router = {};
  config.routed.routing = Routing::random;
  const Index n = 4000;
  const auto labels = [&](std::uint64_t seed, std::uint64_t step, Index head, const std::vector<Index>& offsets = {}) {
    config.seed = seed;
    const RoutingAttention<float> layer(config);
    const RowMatrix<float> x = RowMatrix<float>::Zero(n, 10);
    RowMatrix<float> y(n, 10);
    Context context;
    RoutingAttention<float>::Tape tape;
    layer.forward({x, offsets, {}, {}, step}, y, tape, context);
    return std::vector<std::int32_t>(tape.labels(head).begin(), tape.labels(head).end());
  };
  const auto first = labels(1, 0, 0);
  REQUIRE(first == labels(1, 0, 0));
  const auto agreement = [&](const std::vector<std::int32_t>& other) {
    double same = 0;
    for (std::size_t i = 0; i < first.size(); ++i) same += first[i] == other[i];
    return same / static_cast<double>(n);
  };
  REQUIRE(agreement(labels(1, 1, 0)) == Approx(0.2).margin(0.04));
  REQUIRE(agreement(labels(2, 0, 0)) == Approx(0.2).margin(0.04));
  REQUIRE(agreement(labels(1, 0, 1)) == Approx(0.2).margin(0.04));
  for (std::int32_t c = 0; c < 5; ++c)
    REQUIRE(std::count(first.begin(), first.end(), c) == Approx(static_cast<double>(n) / 5).epsilon(0.15));
  // By position in the sequence, so that sequences end to end are routed as one by one.
  const auto ragged = labels(1, 0, 0, {0, 1000, n});
  REQUIRE(std::equal(first.begin(), first.begin() + 1000, ragged.begin()));
  REQUIRE(std::equal(first.begin(), first.begin() + 3000, ragged.begin() + 1000));
}

TEMPLATE_TEST_CASE("routers start by k-means on the layer's own keys, unrotated", "", float, double) {
  // Keys of their own at four far directions, which queries do not have.
  RoutingAttentionConfig config{.model_dim = 8,
                                .head_dim = 4,
                                .kv_heads = 2,
                                .causal = true,
                                .seed = 5,
                                .routed = {.heads = 4,
                                           .clusters = 4,
                                           .window = 8,
                                           .sinks = 1,
                                           .recent = 3,
                                           .matching = {.normalisation = Normalisation::unit_length},
                                           .positions = {.kind = PositionKind::rotary}}};
  RoutingAttention<TestType> layer(config);
  layer.parameters().w_k.setZero();
  for (Index j = 0; j < 8; ++j) layer.parameters().w_k(j, j) = 1;
  RowMatrix<TestType> x = Random(3).matrix<TestType>(60, 8) * static_cast<TestType>(0.01);
  for (Index i = 0; i < 60; ++i) x(i, i % 4) += 1, x(i, 4 + (i / 4) % 4) += 2;
  x(7, 2) = std::numeric_limits<TestType>::quiet_NaN();
  Workspace workspace;
  ThreadPool pool(3);
  Context context(pool, workspace), serial;
  RoutingAttention<TestType> same = layer;
  layer.start_router(x, context);
  same.start_router(x, serial);
  REQUIRE(same_routers(layer, same));
  for (Index h = 0; h < 2; ++h) {
    const OnlineKMeans<TestType>& router = layer.routers()[static_cast<std::size_t>(h)];
    REQUIRE(router.updates() == 1);
    std::vector<bool> found(4, false);
    for (Index c = 0; c < 4; ++c)
      for (Index j = 0; j < 4; ++j)
        found[static_cast<std::size_t>(j)] = found[static_cast<std::size_t>(j)] || router.centroids()(c, j) > 0.98;
    REQUIRE(std::count(found.begin(), found.end(), true) == 4);
  }
  // Again from another text: nothing of the past is left, of frozen routers neither.
  const RowMatrix<TestType> text = Random(4).matrix<TestType>(50, 8);
  layer.freeze_router(true);
  layer.start_router(text, context);
  RoutingAttention<TestType> fresh = same;
  fresh.start_router(text, serial);
  REQUIRE(same_routers(layer, fresh));
  REQUIRE(layer.routers()[0].frozen());
  REQUIRE(!same_routers(layer, same));
}

TEST_CASE("routers start on the queries of shared heads, as their first update does; errors change nothing") {
  RoutingAttention<float> layer(shared_config), updated(shared_config);
  const RowMatrix<float> x = Random(8).matrix<float>(70, 10);
  RowMatrix<float> y(70, 10);
  Context context;
  RoutingAttention<float>::Tape tape;
  updated.forward(x, y, tape, context);
  updated.update_router(tape, context);
  layer.start_router(x, context);
  REQUIRE(same_routers(layer, updated));
  const RowMatrix<float> bad = RowMatrix<float>::Constant(5, 10, std::numeric_limits<float>::infinity());
  REQUIRE_THROWS_AS(layer.start_router(bad, context), ValueError);
  REQUIRE_THROWS_AS(layer.start_router(x.topRows(0), context), ValueError);
  REQUIRE_THROWS_AS(layer.start_router(x.leftCols(9), context), ShapeError);
  REQUIRE(same_routers(layer, updated));
  RoutingAttentionConfig local = shared_config;
  local.routed = {};
  RoutingAttention<float>(local).start_router(x, context);
}
