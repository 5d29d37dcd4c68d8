// Traps of the known implementations of routed attention, one by one, and where each is tested. T1 to T28 are:
//
//   T1  later tokens choose the clusters of earlier ones     T15 tokens in no cluster
//   T2  a triangle over ranks with lists of their own        T16 fewer tokens than a cluster takes: here
//   T3  lists that are not in order                          T17 lengths that do not divide, windows beyond them: here
//   T4  rows that see no key                                 T18 the commitment loss and its centroids
//   T5  queries that are their own keys: here                T19 rotation before routing, and of values
//   T6  evaluation that moves or makes centroids             T20 thresholds of sampling: tests/examples
//   T7  statistics of several machines                       T21 decoding that differs from forward: decoder.cpp
//   T8  centroids that start wrong, dead clusters            T22 statistics in half precision
//   T9  the norm of centroids decides                        T25 widths of keys and values that have to agree: here
//   T10 updates by hooks: here                               T26 keys before the first one: here
//   T11 padding: here                                        T27 optimisers that move centroids
//   T12 ranks taken for distances
//   T13 means with an epsilon, padded duplicates
//
// Tests have these names; those not said to be here are found by them. Four concern others' code alone:
//   T14 is what weights of one published checkpoint mean; they are not read here, and presets::google says what it reproduces.
//   T23 is about hashing in place of centroids, which there is none of.
//   T24 is a cache of biases with too small a key: there are no such caches; tables are arguments of a call.
//   T28 are slips in configurations of experiments; ours are checked when a layer is made (config.cpp, option_pairs.cpp).
#include <cmath>

#include "catch.hpp"
#include "coterie/attention/reference.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "coterie/plan/clustered.hpp"
#include "kinds.hpp"

using namespace test;

namespace {

// One head whose value is its input.
template <class T>
RoutingAttention<T> plain_head(RoutingAttentionConfig c) {
  c.model_dim = c.head_dim = 6;
  RoutingAttention<T> layer(c);
  layer.parameters().w_v.setIdentity();
  layer.parameters().w_o.setIdentity();
  return layer;
}

}  // namespace

TEST_CASE("T5: where queries are keys, a token sees itself only if alone: no logit of its own swamps the others") {
  const Index n = 30;
  const RoutingAttention<double> layer = plain_head<double>(
      {.causal = true, .seed = 2, .routed = {.heads = 1, .clusters = 1, .window = n, .matching = {.gain = 40.0}}});
  RowMatrix<double> x = Random(3).matrix<double>(n, 6), y(n, 6);
  Context context;
  layer.forward(x, y, context);
  REQUIRE(y.row(0) == x.row(0));
  REQUIRE(y.allFinite());
  // The last row is a mean of the others' values, so it lies among them; its own, far off, is not in it.
  x.row(n - 1) *= 1000;
  layer.forward(x, y, context);
  REQUIRE(y.row(n - 1).cwiseAbs().maxCoeff() <= x.topRows(n - 1).cwiseAbs().maxCoeff());
}

TEST_CASE("T10: centroids move when they are told to, once, by the passes that there were") {
  const Index n = 40;
  const RoutingAttentionConfig c{
      .model_dim = 8, .causal = true, .seed = 4, .routed = {.heads = 2, .clusters = 3, .window = 8}};
  RoutingAttention<double> layer(c), other(c);
  const RowMatrix<double> x = Random(1).matrix<double>(n, 8), d_y = Random(2).matrix<double>(n, 8);
  RowMatrix<double> y(n, 8), d_x = RowMatrix<double>::Zero(n, 8);
  Context context;
  RoutingAttention<double>::Tape tape;
  Parameters<double> gradients = layer.zero_gradients();
  const RowMatrix<double> start = layer.routers()[0].centroids().eigen();
  // Forward twice, backward three times, as recomputation does: nothing has moved.
  layer.forward(x, y, tape, context);
  layer.forward(x, y, tape, context);
  for (int i = 0; i < 3; ++i) layer.backward(x, tape, d_y, d_x, gradients, context);
  REQUIRE(start == layer.routers()[0].centroids().eigen());
  layer.update_router(tape, context);
  REQUIRE(layer.routers()[0].updates() == 1);
  // A layer that did not run has no statistics to bring: nothing to assert, nothing to move.
  RouterStatistics<double> none = other.zero_statistics();
  other.update_router(none);
  REQUIRE(other.routers()[0].updates() == 0);
}

TEST_CASE("T11: there is no padding: a ragged batch brings the statistics of its sequences, one after the other") {
  const Index n = 50;
  const std::vector<Index> offsets = {0, 9, 9, 30, n};
  for (const bool shared : {true, false}) {
    const RoutingAttention<float> layer(
        {.model_dim = 8,
         .seed = 4,
         .local = {.heads = 1, .window = 6},
         .routed = {.heads = 1, .clusters = 4, .window = 6, .matching = {.shared_qk = shared}}});
    const RowMatrix<float> x = Random(1).matrix<float>(n, 8);
    RowMatrix<float> y(n, 8);
    Context context;
    RoutingAttention<float>::Tape tape;
    RouterStatistics<float> together = layer.zero_statistics(), alone = layer.zero_statistics();
    layer.forward({x, offsets}, y, tape, context);
    layer.observe(tape, together, context);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const Index count = offsets[s + 1] - offsets[s];
      RowMatrix<float> own(count, 8);
      layer.forward(x.middleRows(offsets[s], count), own, tape, context);
      layer.observe(tape, alone, context);
      REQUIRE(same_bits<float>(own, y.middleRows(offsets[s], count)));
    }
    double rows = 0;
    for (const double count : together.counts(0)) rows += count;
    REQUIRE(rows == static_cast<double>(shared ? n : 2 * n));
    for (std::size_t i = 0; i < together.block().size(); ++i)
      REQUIRE(together.block()[i] == Approx(alone.block()[i]).epsilon(1e-12).margin(1e-12));
  }
}

TEST_CASE("T16: a sequence shorter than the window costs what it has pairs, however many clusters there are") {
  for (const Index n : {1, 2, 7, 16})
    for (const bool causal : {true, false}) {
      const RoutingAttention<float> layer(
          {.model_dim = 6, .causal = causal, .seed = 1, .routed = {.heads = 1, .clusters = 32, .window = 16}});
      const RowMatrix<float> x = Random(1).matrix<float>(n, 6);
      RowMatrix<float> y(n, 6);
      Context context;
      RoutingAttention<float>::Tape tape;
      layer.forward(x, y, tape, context);
      REQUIRE(statistics(tape.plans()[0]).visible_pairs <= (causal ? n * (n + 1) / 2 : n * n));
    }
}

TEST_CASE("T17: any length, windows beyond it: one cluster and dense are the same") {
  for (const Index n : {1, 2, 5, 6, 7, 13})
    for (const Index window : {n, n + 1, 5 * n})
      for (const bool causal : {true, false}) {
        INFO("n " << n << ", window " << window << ", causal " << causal);
        RoutingAttentionConfig c{
            .model_dim = 6,
            .causal = causal,
            .seed = 1,
            .routed = {.heads = 1, .clusters = 1, .window = causal ? window : 2 * window}};  // centred
        const RowMatrix<float> x = Random(1).matrix<float>(n, 6);
        RowMatrix<float> y(n, 6), dense_y(n, 6), balanced_y(n, 6);
        Context context;
        RoutingAttention<float>(c).forward(x, y, context);
        RoutingAttentionConfig balanced = c;
        balanced.routed.membership.kind = MembershipKind::balanced;
        RoutingAttention<float>(balanced).forward(x, balanced_y, context);
        make_dense(c);
        RoutingAttention<float>(c).forward(x, dense_y, context);
        REQUIRE(same_bits<float>(y, dense_y));
        REQUIRE((y - balanced_y).cwiseAbs().maxCoeff() < 1e-6f);
      }
}

TEST_CASE("T25: values may have another width than queries and keys") {
  const Index n = 20, d = 3, dv = 7;
  Random random(3);
  const RowMatrix<double> q = random.matrix<double>(n, d), k = random.matrix<double>(n, d),
                          v = random.matrix<double>(n, dv);
  const auto labels = random.labels(n, 3);
  AttentionPlan plan;
  plan_clustered(labels, labels, {.clusters = 3, .window = 5, .causal = true}, plan);
  RowMatrix<double> out(n, dv), expected(n, dv);
  Context context;
  attention_forward(plan, q, k, v, out, {}, context);
  reference_forward(plan, q, k, v, view(expected), {}, {});
  REQUIRE((out - expected).cwiseAbs().maxCoeff() < 1e-12);
}

TEST_CASE("T26: the first rows of local heads see the keys there are, were they zeros") {
  const Index n = 12;
  RoutingAttention<double> layer = plain_head<double>(
      {.causal = true, .seed = 2, .local = {.heads = 1, .window = 8, .positions = {.kind = PositionKind::none}}});
  layer.parameters().w_q.setZero();  // all keys alike: means of the values in the window
  RowMatrix<double> x = Random(3).matrix<double>(n, 6), y(n, 6);
  x.topRows(2).setZero();
  Context context;
  layer.forward(x, y, context);
  for (Index i = 0; i < n; ++i) {
    const Index first = std::max<Index>(0, i - 7);
    const Eigen::RowVectorXd mean = x.middleRows(first, i - first + 1).colwise().mean();
    REQUIRE((y.row(i) - mean).norm() < 1e-12);
  }
}
