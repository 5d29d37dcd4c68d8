#include "coterie/layer/positions.hpp"

#include "catch.hpp"
#include "oracle.hpp"

using namespace test;

namespace {

constexpr PositionKind all_positions[] = {PositionKind::rotary, PositionKind::bias,       PositionKind::none,
                                          PositionKind::alibi,  PositionKind::t5_buckets, PositionKind::shaw};

// Routed heads alone, with positions; narrow clusters.
RoutingAttentionConfig routed(PositionKind positions, bool causal, bool shared) {
  RoutingAttentionConfig c{.model_dim = 10,
                           .head_dim = 4,
                           .causal = causal,
                           .seed = 3,
                           .routed = {.heads = 2,
                                      .clusters = 3,
                                      .window = 50,
                                      .matching = {.shared_qk = shared},
                                      .positions = {.kind = positions, .buckets = 8, .max_distance = 12}}};
  if (positions == PositionKind::bias || positions == PositionKind::shaw) c.routed.positions.distances = 20;
  return c;
}

}  // namespace

TEST_CASE("tables hold the distances that their heads can tell apart") {
  RoutingAttentionConfig c{
      .model_dim = 8,
      .local = {.heads = 1, .window = 6, .lookahead = 3, .positions = {.buckets = 8, .max_distance = 10}},
      .routed = {
          .heads = 1, .clusters = 2, .window = 6, .positions = {.buckets = 8, .max_distance = 10, .distances = 5}}};
  const auto range = [&](PositionKind positions, bool is_routed, Index longest) {
    c.routed.positions.distances = positions == PositionKind::bias ? 5 : 0;
    c.local.positions.kind = positions;
    c.routed.positions.kind = positions;
    const RoutingAttentionConfig resolved = detail::resolve(c);
    const detail::Heads heads = detail::head_blocks(resolved);
    const auto r = detail::table_distances(
        resolved, heads[is_routed ? detail::BlockKind::routed : detail::BlockKind::local], longest);
    return std::pair(r.first, r.first + r.count - 1);
  };
  using Range = std::pair<Index, Index>;
  REQUIRE(range(PositionKind::bias, false, 100) == Range(-3, 5));
  REQUIRE(range(PositionKind::bias, true, 100) == Range(-4, 4));
  REQUIRE(range(PositionKind::alibi, false, 100) == Range(-3, 5));
  REQUIRE(range(PositionKind::alibi, false, 2) == Range(-1, 1));
  REQUIRE(range(PositionKind::alibi, true, 100) == Range(-99, 99));
  REQUIRE(range(PositionKind::t5_buckets, true, 100) == Range(-10, 10));
  c.causal = true;
  c.local.lookahead = 0;
  REQUIRE(range(PositionKind::bias, false, 100) == Range(0, 5));
  REQUIRE(range(PositionKind::bias, true, 100) == Range(0, 4));
  REQUIRE(range(PositionKind::alibi, false, 100) == Range(0, 5));
  REQUIRE(range(PositionKind::alibi, true, 1) == Range(0, 0));
  REQUIRE(range(PositionKind::t5_buckets, false, 100) == Range(0, 10));
}

TEST_CASE("T12: routed heads take distances by places in the sequence, not by ranks in the cluster") {
  // The members of cluster 0, alone and with tokens of other clusters between them.
  const std::vector<Index> places = {0, 1, 7, 18, 19, 33};
  const auto members = static_cast<Index>(places.size());
  const Index n = 40;
  const RowMatrix<double> x = 2 * Random(5).matrix<double>(n, 10);
  RowMatrix<double> packed(members, 10);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(2 * n), 1);
  const std::vector<std::int32_t> packed_labels(static_cast<std::size_t>(2 * members), 0);
  for (Index m = 0; m < members; ++m) {
    const Index place = places[static_cast<std::size_t>(m)];
    packed.row(m) = x.row(place);
    labels[static_cast<std::size_t>(place)] = labels[static_cast<std::size_t>(n + place)] = 0;
  }
  for (const PositionKind positions : all_positions)
    for (const bool causal : {true, false})
      for (const bool shared : {true, false}) {
        INFO("positions " << static_cast<int>(positions) << ", causal " << causal << ", shared " << shared);
        const RoutingAttention<double> layer = make_layer<double>(routed(positions, causal, shared));
        RowMatrix<double> y(n, 10), packed_y(members, 10);
        Context context;
        layer.forward({x, {}, {}, {}, 0, labels}, y, context);
        layer.forward({packed, {}, {}, {}, 0, packed_labels}, packed_y, context);
        Oracle oracle{layer.config(), layer.parameters(), {0, n}};
        const std::vector<std::int32_t> one(labels.begin(), labels.begin() + n);
        oracle.query_labels = oracle.key_labels = {one, one};
        double wrong = 0, by_rank = 0;
        for (Index m = 0; m < members; ++m) {
          const Index place = places[static_cast<std::size_t>(m)];
          const std::vector<double> expected = oracle.row(x, place);
          for (Index j = 0; j < 10; ++j) {
            wrong = std::max(wrong, std::abs(expected[static_cast<std::size_t>(j)] - y(place, j)));
            by_rank = std::max(by_rank, std::abs(packed_y(m, j) - y(place, j)));
          }
        }
        REQUIRE(wrong < 1e-12);
        if (positions == PositionKind::none)
          REQUIRE(by_rank == 0);
        else
          REQUIRE(by_rank > 1e-3);
      }
}

TEST_CASE("T19: routers see queries and keys as they were before rotation") {
  const Index n = 300;
  for (const bool causal : {true, false})
    for (const bool shared : {true, false}) {
      INFO("causal " << causal << ", shared " << shared);
      RoutingAttention<double> plain = make_layer<double>(routed(PositionKind::none, causal, shared)),
                               rotary = make_layer<double>(routed(PositionKind::rotary, causal, shared));
      Context context;
      RoutingAttention<double>::Tape plain_tape, rotary_tape;
      RowMatrix<double> y(n, 10), rotary_y(n, 10);
      for (std::uint64_t step = 0; step < 3; ++step) {
        const RowMatrix<double> x = 2 * Random(step).matrix<double>(n, 10);
        plain.forward(x, y, plain_tape, context);
        rotary.forward(x, rotary_y, rotary_tape, context);
        REQUIRE((y - rotary_y).cwiseAbs().maxCoeff() > 1e-3);
        for (Index h = 0; h < 2; ++h) {
          const auto expected = plain_tape.labels(h), got = rotary_tape.labels(h);
          REQUIRE(std::equal(got.begin(), got.end(), expected.begin(), expected.end()));
          const auto expected_keys = plain_tape.key_labels(h), got_keys = rotary_tape.key_labels(h);
          REQUIRE(std::equal(got_keys.begin(), got_keys.end(), expected_keys.begin(), expected_keys.end()));
        }
        plain.update_router(plain_tape, context);
        rotary.update_router(rotary_tape, context);
        for (std::size_t h = 0; h < 2; ++h)
          REQUIRE(same_bits<double>(plain.routers()[h].centroids(), rotary.routers()[h].centroids()));
      }
    }
}

TEST_CASE("T19: rotary turns no value: a token that sees itself alone gives its own, wherever it is") {
  const Index n = 70;
  const RowMatrix<double> x = Random(5).matrix<double>(n, 10);
  for (const bool local : {true, false})
    for (const RotaryLayout layout : {RotaryLayout::halves, RotaryLayout::interleaved}) {
      RoutingAttentionConfig c{.model_dim = 10, .head_dim = 4, .causal = true, .seed = 3};
      const Positions positions{.kind = PositionKind::rotary, .layout = layout};
      if (local)
        c.local = {.heads = 2, .window = 1, .positions = positions};
      else
        c.routed = {
            .heads = 2, .clusters = 3, .window = 1, .matching = {.self = Self::visible}, .positions = positions};
      const RoutingAttention<double> layer(c);
      RowMatrix<double> y(n, 10);
      Context context;
      layer.forward(x, y, context);
      const RowMatrix<double> expected = x * layer.parameters().w_v * layer.parameters().w_o;
      REQUIRE((y - expected).cwiseAbs().maxCoeff() < 1e-12);
    }
}

TEST_CASE("rotary layers of both layouts agree once their columns are permuted") {
  const Index n = 50, d = 6;
  RoutingAttentionConfig c{.model_dim = 12,
                           .causal = true,
                           .seed = 3,
                           .local = {.heads = 1, .window = n},
                           .routed = {.heads = 1,
                                      .clusters = 1,
                                      .window = n,
                                      .matching = {.shared_qk = false},
                                      .positions = {.kind = PositionKind::rotary}}};
  const RoutingAttention<double> halves(c);
  c.local.positions.layout = c.routed.positions.layout = RotaryLayout::interleaved;
  RoutingAttention<double> interleaved(c);
  for (Index h = 0; h < 2; ++h)
    for (Index j = 0; j < d / 2; ++j)
      for (const Index second : {0, 1}) {
        const Index to = h * d + 2 * j + second, from = h * d + j + second * d / 2;
        interleaved.parameters().w_q.col(to) = halves.parameters().w_q.col(from);
        interleaved.parameters().w_k.col(to) = halves.parameters().w_k.col(from);
      }
  const RowMatrix<double> x = 2 * Random(5).matrix<double>(n, 12);
  RowMatrix<double> y(n, 12), other(n, 12);
  Context context;
  halves.forward(x, y, context);
  interleaved.forward(x, other, context);
  REQUIRE((y - other).cwiseAbs().maxCoeff() < 1e-12);
}
