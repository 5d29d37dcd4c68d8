#include "coterie/layer/routing_attention.hpp"

#include <limits>

#include "allocation.hpp"
#include "catch.hpp"
#include "kinds.hpp"

using namespace test;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinite = std::numeric_limits<double>::infinity();

// A layer whose centroids have seen data, on more tokens than a task has rows.
template <class T>
RoutingAttention<T> trained_layer(const RoutingAttentionConfig& config) {
  RoutingAttention<T> layer = make_layer<T>(config);
  const RowMatrix<T> x = 2 * Random(31).matrix<T>(300, 10);
  RowMatrix<T> y(300, 10);
  Context context;
  typename RoutingAttention<T>::Tape tape;
  for (int step = 0; step < 2; ++step) {
    layer.forward(x, y, tape, context);
    layer.update_router(tape, context);
  }
  return layer;
}

template <class T>
struct Results {
  RowMatrix<T> y, d_x;
  Parameters<T> gradients;
  std::vector<std::int32_t> labels;
  RowMatrix<T> centroids;
};

// Forward, backward and one router update.
template <class T>
Results<T> run(RoutingAttention<T> layer, const Input<T>& input, ConstView<T> d_y, Context& context) {
  const Index n = input.x.rows();
  Results<T> r{RowMatrix<T>(n, 10), RowMatrix<T>::Constant(n, 10, T(0.125)), layer.zero_gradients(), {}, {}};
  r.gradients.fill(T(0.25));
  typename RoutingAttention<T>::Tape tape;
  layer.forward(input, r.y, tape, context);
  layer.backward(input, tape, d_y, r.d_x, r.gradients, context);
  for (Index h = 0; h < detail::routed_kv_heads(layer.config()); ++h)
    for (const auto labels : {tape.labels(h), tape.key_labels(h)})
      r.labels.insert(r.labels.end(), labels.begin(), labels.end());
  layer.update_router(tape, context);
  if (!layer.routers().empty()) r.centroids = layer.routers().back().centroids().eigen();
  return r;
}

}  // namespace

TEMPLATE_TEST_CASE("causal layers: no later token, be it NaN, changes an earlier output or route", "", float, double) {
  const Index n = 150;
  for (const Kind& kind : kinds()) {
    if (!kind.config.causal) continue;
    INFO(kind.name);
    const RoutingAttention<TestType> layer = trained_layer<TestType>(kind.config);
    const RowMatrix<TestType> x = 2 * Random(5).matrix<TestType>(n, 10);
    RowMatrix<TestType> y(n, 10), changed_y(n, 10);
    Context context;
    typename RoutingAttention<TestType>::Tape tape, changed_tape;
    for (const bool ragged : {false, true}) {
      const std::vector<Index> offsets = three_sequences(n);
      Input<TestType> input(x);
      if (ragged) input.offsets = offsets;
      layer.forward(input, y, tape, context);
      for (const Index cut : {Index(1), Index(49), Index(50), Index(51), Index(64), Index(128), n - 1})
        for (const double value : {0.7, not_a_number, infinite, -infinite}) {
          INFO("cut " << cut << ", value " << value << ", ragged " << ragged);
          RowMatrix<TestType> changed = x;
          changed.bottomRows(n - cut).setConstant(static_cast<TestType>(value));
          Input<TestType> changed_input(changed);
          changed_input.offsets = input.offsets;
          layer.forward(changed_input, changed_y, changed_tape, context);
          REQUIRE(same_bits<TestType>(changed_y.topRows(cut), y.topRows(cut)));
          for (Index h = 0; h < detail::routed_kv_heads(layer.config()); ++h) {
            const auto before = tape.labels(h), after = changed_tape.labels(h);
            if (before.empty()) continue;
            REQUIRE(std::equal(before.begin(), before.begin() + cut, after.begin()));
          }
          // And a layer that sees nothing of a change would pass as well:
          if (value == 0.7 && cut < n - 1) REQUIRE(!same_bits<TestType>(changed_y, y));
        }
    }
  }
}

TEST_CASE("a token whose value an induction head has not reached yet does not leak, the last one included") {
  // Every token is alike, so every key matches; the value of the next position is all there is to see.
  const Index n = 12;
  for (const bool local : {false, true}) {
    RoutingAttentionConfig c{.model_dim = 8, .causal = true, .seed = 3};
    const Matching induction{.induction = true, .key_taps = 2};
    if (local)
      c.local = {.heads = 2, .window = n, .matching = induction};
    else
      c.routed = {.heads = 2, .clusters = 1, .window = n, .matching = induction};
    const RoutingAttention<double> layer(c);
    const std::vector<Index> offsets = {0, 5, 6, n};
    const RowMatrix<double> x = Random(1).matrix<double>(n, 8);
    RowMatrix<double> y(n, 8), changed_y(n, 8);
    Context context;
    layer.forward({x, offsets}, y, context);
    for (Index token = 0; token < n; ++token) {
      RowMatrix<double> changed = x;
      changed.row(token).setConstant(not_a_number);
      layer.forward({changed, offsets}, changed_y, context);
      for (Index i = 0; i < n; ++i) {
        const bool same_sequence = (i < 5) == (token < 5) && (i < 6) == (token < 6);
        INFO("token " << token << ", row " << i);
        REQUIRE(same_bits<double>(changed_y.row(i), y.row(i)) ==
                !(same_sequence && i >= token && i != 0 && i != 5 && i != 6));
      }
    }
    // The first row of a sequence sees nothing: zero, not its own next value.
    for (const Index first : {Index(0), Index(5), Index(6)}) REQUIRE(y.row(first).isZero(0));
    // The second one sees one key, which carries the value of the second row itself.
    RowMatrix<double> expected = x.row(1) * layer.parameters().w_v * layer.parameters().w_o;
    REQUIRE((y.row(1) - expected).cwiseAbs().maxCoeff() < 1e-12);
  }
}

TEMPLATE_TEST_CASE("causal layers: a prefix gives the full forward's bits", "", float, double) {
  const Index n = 140;
  for (const Kind& kind : kinds()) {
    if (!kind.config.causal) continue;
    INFO(kind.name);
    const RoutingAttention<TestType> layer = trained_layer<TestType>(kind.config);
    const RowMatrix<TestType> x = 2 * Random(5).matrix<TestType>(n, 10);
    RowMatrix<TestType> y(n, 10);
    Context context;
    layer.forward(x, y, context);
    for (const Index length : {1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 139}) {
      RowMatrix<TestType> prefix(length, 10);
      layer.forward(x.topRows(length), prefix, context);
      INFO("length " << length);
      REQUIRE(same_bits<TestType>(prefix, y.topRows(length)));
    }
  }
}

TEMPLATE_TEST_CASE("sequences end to end give the bits of one by one", "", float, double) {
  const std::vector<Index> offsets = {0, 1, 1, 60, 64, 65, 150};
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    const RoutingAttention<TestType> layer = trained_layer<TestType>(kind.config);
    const RowMatrix<TestType> x = 2 * Random(5).matrix<TestType>(150, 10), d_y = Random(6).matrix<TestType>(150, 10);
    RowMatrix<TestType> y(150, 10), d_x = RowMatrix<TestType>::Zero(150, 10);
    Context context;
    typename RoutingAttention<TestType>::Tape tape;
    Parameters<TestType> gradients = layer.zero_gradients();
    layer.forward({x, offsets}, y, tape, context);
    layer.backward({x, offsets}, tape, d_y, d_x, gradients, context);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const Index begin = offsets[s], length = offsets[s + 1] - begin;
      RowMatrix<TestType> one(length, 10), d_one = RowMatrix<TestType>::Zero(length, 10);
      layer.forward(x.middleRows(begin, length), one, tape, context);
      layer.backward(x.middleRows(begin, length), tape, d_y.middleRows(begin, length), d_one, gradients, context);
      REQUIRE(same_bits<TestType>(one, y.middleRows(begin, length)));
      REQUIRE(same_bits<TestType>(d_one, d_x.middleRows(begin, length)));
    }
  }
}

TEMPLATE_TEST_CASE("1, 2, 3 and 8 workers give the same bits", "", float, double) {
  const Index n = 1100;  // several tasks of every stage
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    RoutingAttention<TestType> layer = trained_layer<TestType>(kind.config);
    const RowMatrix<TestType> x = 2 * Random(5).matrix<TestType>(n, 10), d_y = Random(6).matrix<TestType>(n, 10);
    const std::vector<Index> offsets = {0, 1, 1, 600, n};
    Context serial;
    const Results<TestType> expected = run<TestType>(layer, {x, offsets}, d_y, serial);
    for (const Index workers : {2, 3, 8}) {
      INFO("workers " << workers);
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace);
      const Results<TestType> got = run<TestType>(layer, {x, offsets}, d_y, context);
      REQUIRE(same_bits<TestType>(got.y, expected.y));
      REQUIRE(same_bits<TestType>(got.d_x, expected.d_x));
      REQUIRE(same_bits(got.gradients, expected.gradients));
      REQUIRE(got.labels == expected.labels);
      REQUIRE(same_bits<TestType>(got.centroids, expected.centroids));
    }
  }
}

TEST_CASE("evaluation changes nothing, and tapes keep nothing from step to step") {
  const Index n = 60;
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    const RoutingAttention<float> layer = trained_layer<float>(kind.config);
    const RoutingAttention<float> before = layer;
    const RowMatrix<float> x = Random(5).matrix<float>(n, 10), other = Random(6).matrix<float>(2 * n, 10);
    RowMatrix<float> y(n, 10), again(n, 10), other_y(2 * n, 10), d_x = RowMatrix<float>::Zero(n, 10), d_again = d_x;
    Context context;
    RoutingAttention<float>::Tape tape, used;
    Parameters<float> gradients = layer.zero_gradients(), gradients_again = gradients;
    layer.forward(x, y, tape, context);
    layer.backward(x, tape, x, d_x, gradients, context);
    layer.forward(other, other_y, used, context);
    layer.forward(other, other_y, context);
    layer.forward(x, again, used, context);
    layer.backward(x, used, x, d_again, gradients_again, context);
    REQUIRE(same_bits<float>(y, again));
    REQUIRE(same_bits<float>(d_x, d_again));
    REQUIRE(same_bits(gradients, gradients_again));
    REQUIRE(same_bits(layer.parameters(), before.parameters()));
    for (std::size_t h = 0; h < layer.routers().size(); ++h) {
      const OnlineKMeans<float>&a = layer.routers()[h], &b = before.routers()[h];
      REQUIRE(same_bits<float>(a.centroids(), b.centroids()));
      REQUIRE(std::equal(a.counts().begin(), a.counts().end(), b.counts().begin()));
      REQUIRE(a.updates() == b.updates());
    }
  }
}

TEST_CASE("nothing allocates after warm-up, also not for fewer tokens") {
  for (const Kind& kind : kinds())
    for (const Index workers : {1, 3}) {
      INFO(kind.name << ", workers " << workers);
      RoutingAttention<float> layer = make_layer<float>(kind.config);
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace);
      RoutingAttention<float>::Tape tape;
      Parameters<float> gradients = layer.zero_gradients();
      const RowMatrix<float> x = Random(5).matrix<float>(1200, 10);
      RowMatrix<float> y(1200, 10), d_x = RowMatrix<float>::Zero(1200, 10);
      const RouterStatistics<float> statistics = layer.zero_statistics();  // of no token: moves no centroid
      const std::vector<Index> offsets = {0, 500, 1200}, fewer = {0, 400, 900};
      const auto step = [&](Index n, std::span<const Index> sequences) {
        const Input<float> input(x.topRows(n), sequences);
        layer.forward(input, y.topRows(n), context);
        layer.forward(input, y.topRows(n), tape, context);
        layer.backward(input, tape, x.topRows(n), d_x.topRows(n), gradients, context);
        layer.update_router(tape, context);
        layer.update_router(statistics);
      };
      // Several: which worker needs how much is a matter of chance, and partial sums follow the clusters, which move.
      for (int i = 0; i < 6; ++i) {
        step(1200, {});
        step(1200, offsets);
      }
      const long before = allocations();
      step(1200, offsets);
      const long same = allocations() - before;
      step(900, fewer);
      step(1200, {});
      const long all = allocations() - before;
      REQUIRE(same == 0);
      REQUIRE(all == 0);
    }
}

TEST_CASE("a window of the largest number sees what one of the longest sequence sees, in every block") {
  constexpr Index most = std::numeric_limits<Index>::max();
  const Index n = 40;
  const std::vector<Index> offsets = three_sequences(n);
  const RowMatrix<float> x = 2 * Random(5).matrix<float>(n, 12);
  for (const bool causal : {true, false})
    for (const PositionKind kind : {PositionKind::rotary, PositionKind::alibi, PositionKind::none}) {
      INFO("causal " << causal << ", positions " << static_cast<int>(kind));
      const auto rows = [&](Index window) {
        const RoutingAttention<float> layer(
            {.model_dim = 12,
             .causal = causal,
             .seed = 3,
             .local = {.heads = 1, .window = window, .lookahead = causal ? 0 : window, .positions = {.kind = kind}},
             .routed = {.heads = 1, .clusters = 2, .window = window, .positions = {.kind = kind}},
             .dense = {.heads = 1, .positions = {.kind = kind}}});
        RowMatrix<float> y(n, 12);
        Context context;
        layer.forward({x, offsets}, y, context);
        return y;
      };
      REQUIRE(same_bits<float>(rows(most), rows(2 * n)));
    }
}
