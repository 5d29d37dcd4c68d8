#include "coterie/decoder/decoder.hpp"

#include "allocation.hpp"
#include "catch.hpp"
#include "decoder/causal_layers.hpp"
#include "errors.hpp"

using namespace test;

namespace {

template <class T>
RowMatrix<T> step(Decoder<T>& decoder, const RowMatrix<T>& x, Index row, Context& context) {
  RowMatrix<T> y(1, x.cols());
  decoder.step(x.middleRows(row, 1), y, context);
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("T21: step by step gives forward's rows, bit for bit, of every causal kind", "", float, double) {
  const Index n = 270;
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const RoutingAttention<TestType> layer = moved_layer<TestType>(kind.config);
    const RowMatrix<TestType> x = 2 * Random(5).matrix<TestType>(n, 10);
    const RowMatrix<TestType> expected = forward_rows(layer, x);
    Context context;
    for (const Index prompt : {0, 1, 100, 269}) {
      Decoder<TestType> decoder(layer);
      RowMatrix<TestType> y(n, 10);
      decoder.prefill(x.topRows(prompt), y.topRows(prompt), 0, context);
      for (Index i = prompt; i < n; ++i) y.row(i) = step(decoder, x, i, context);
      REQUIRE(decoder.length(0) == n);
      for (Index i = 0; i < n; ++i) {
        INFO("prompt " << prompt << ", row " << i);
        if (!same_bits<TestType>(y.row(i), expected.row(i))) REQUIRE(y.row(i) == expected.row(i));
      }
    }
  }
}

TEST_CASE("sequences of different lengths step together, and as alone") {
  const Index n = 90;
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const RoutingAttention<float> layer = moved_layer<float>(kind.config);
    std::vector<RowMatrix<float>> x, expected;
    for (std::uint64_t s = 0; s < 3; ++s) {
      x.push_back(2 * Random(s).matrix<float>(n, 10));
      expected.push_back(forward_rows(layer, x.back()));
    }
    ThreadPool pool(3);
    Workspace workspace;
    Context context(pool, workspace);
    Decoder<float> decoder(layer, {.sequences = 3});
    RowMatrix<float> y(n, 10);
    decoder.prefill(x[1].topRows(20), y.topRows(20), 1, context);
    for (Index i = 0; i < n; ++i) {
      // The second one is ahead, the third one lags.
      std::vector<std::int32_t> now = {2, 0};
      if (i % 3 == 1) now = {0};
      if (decoder.length(1) < n) now.push_back(1);
      RowMatrix<float> rows(static_cast<Index>(now.size()), 10), out = rows;
      std::vector<Index> positions;
      for (std::size_t j = 0; j < now.size(); ++j) {
        positions.push_back(decoder.length(now[j]));
        rows.row(static_cast<Index>(j)) = x[static_cast<std::size_t>(now[j])].row(positions.back());
      }
      decoder.step(rows, out, now, context);
      for (std::size_t j = 0; j < now.size(); ++j)
        REQUIRE(same_bits<float>(out.row(static_cast<Index>(j)),
                                 expected[static_cast<std::size_t>(now[j])].row(positions[j])));
    }
  }
}

TEST_CASE("tokens taken back have never been; copies and branches go their own ways") {
  const Index n = 120;
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const RoutingAttention<float> layer = moved_layer<float>(kind.config);
    const RowMatrix<float> x = 2 * Random(5).matrix<float>(n, 10), other = 2 * Random(6).matrix<float>(n, 10);
    const RowMatrix<float> expected = forward_rows(layer, x);
    Context context;
    Decoder<float> decoder(layer, {.sequences = 2, .max_rollback = 7});
    const std::vector<std::int32_t> first = {0}, second = {1};
    RowMatrix<float> y(1, 10);
    Random random(3);
    for (Index i = 0; i < n; ++i) {
      // A detour of up to seven tokens, in steps back of several sizes.
      const Index detour = random.below(8);
      for (Index j = 0; j < detour; ++j) decoder.step(other.middleRows(i, 1), y, first, context);
      const Index some = detour / 2;
      decoder.rollback(0, some);
      decoder.rollback(0, detour - some);
      decoder.step(x.middleRows(i, 1), y, first, context);
      REQUIRE(same_bits<float>(y, expected.row(i)));
      if (i == 60) {
        Decoder<float> clone = decoder;
        decoder.copy_sequence(0, 1);
        for (Index j = 0; j < 20; ++j) clone.step(other.middleRows(j, 1), y, first, context);
        for (Index j = 0; j < 7; ++j) clone.rollback(0, 1);
        REQUIRE(clone.length(0) == 74);
        REQUIRE(decoder.length(0) == 61);
        for (Index j = 61; j < n; ++j) {
          decoder.step(x.middleRows(j, 1), y, second, context);
          REQUIRE(same_bits<float>(y, expected.row(j)));
        }
        decoder.clear(1);
        for (Index j = 0; j < 10; ++j) {
          decoder.step(x.middleRows(j, 1), y, second, context);
          REQUIRE(same_bits<float>(y, expected.row(j)));
        }
      }
    }
  }
}

TEST_CASE("a step allocates nothing within the tokens reserved") {
  const Index n = 200;
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const RoutingAttention<float> layer = moved_layer<float>(kind.config);
    const RowMatrix<float> x = 2 * Random(5).matrix<float>(n, 10);
    RowMatrix<float> y(2, 10);
    Context context;
    Decoder<float> decoder(layer, {.sequences = 2, .max_rollback = 2, .reserve = n});
    const std::size_t bytes = decoder.bytes();
    // By another decoder: the context's memory.
    {
      Decoder<float> warm(layer, {.sequences = 2});
      for (Index i = 0; i < n; ++i) warm.step(RowMatrix<float>(x.row(i).replicate(2, 1)), y, context);
    }
    RowMatrix<float> rows(2, 10);
    const long before = allocations();
    for (Index i = 0; i < n; ++i) {
      // Detours that are taken back leave pages behind.
      for (Index detour = 0; detour < 2 && i + 2 < n; ++detour) {
        rows.rowwise() = x.row(n - 1 - i);
        decoder.step(rows, y, context);
      }
      for (Index s = 0; s < 2 && i + 2 < n; ++s) decoder.rollback(s, 2);
      rows.rowwise() = x.row(i);
      decoder.step(rows, y, context);
    }
    REQUIRE(allocations() == before);
    REQUIRE(decoder.bytes() <= bytes + 1024);
  }
}

TEST_CASE("memory stays what windows and clusters need, however long a sequence gets") {
  const RoutingAttentionConfig c{.model_dim = 16,
                                 .causal = true,
                                 .seed = 2,
                                 .local = {.heads = 2, .window = 32},
                                 .routed = {.heads = 2, .clusters = 9, .window = 32}};
  const RoutingAttention<float> layer(c);
  Context context;
  Decoder<float> decoder(layer);
  const Index n = 6000;
  const RowMatrix<float> x = Random(5).matrix<float>(n, 16);
  RowMatrix<float> y(n, 16);
  decoder.prefill(x, y, 0, context);
  for (Index i = 0; i < 100; ++i) decoder.step(x.middleRows(i, 1), y.topRows(1), context);
  const std::size_t once = decoder.bytes();
  for (Index i = 0; i < 1000; ++i) decoder.step(x.middleRows(i, 1), y.topRows(1), context);
  REQUIRE(decoder.bytes() == once);
  const std::size_t numbers = 2 * 4 * (9 + 1) * 32 * 4;
  REQUIRE(once <= numbers * sizeof(float) * 5 / 4);
}

TEST_CASE("windows without a limit, and numbers that float cannot hold") {
  RoutingAttentionConfig c{.model_dim = 8,
                           .causal = true,
                           .local = {.heads = 1, .window = std::numeric_limits<Index>::max()},
                           .routed = {.heads = 1, .clusters = 2, .window = std::numeric_limits<Index>::max()}};
  const RoutingAttention<float> layer(c);
  const RowMatrix<float> x = Random(1).matrix<float>(20, 8), expected = forward_rows(layer, x);
  Context context;
  Decoder<float> decoder(layer, {.max_rollback = 3});
  for (Index i = 0; i < 20; ++i) REQUIRE(same_bits<float>(step(decoder, x, i, context), expected.row(i)));
  c.local.window = c.routed.window = 4;
  c.soft_cap = 1e60;
  c.routed.matching.gain = 1e300;
  for (const char* word : {"soft_cap", "gain", "RoutingAttentionConfig"})
    CHECK(contains(message_of<ValueError>([&] { RoutingAttention<float> bad(c); }), word));
  const RoutingAttention<double> good(c);
}

TEST_CASE("decoders refuse what they cannot continue, and say why") {
  const RoutingAttentionConfig causal{.model_dim = 8,
                                      .causal = true,
                                      .local = {.heads = 1, .window = 4},
                                      .routed = {.heads = 1, .clusters = 3, .window = 4}};
  const auto refused = [](auto&& call, std::initializer_list<const char*> words) {
    const std::string message = message_of<ValueError>(call);
    INFO(message);
    for (const char* word : words) CHECK(contains(message, word));
  };
  RoutingAttentionConfig c = causal;
  c.causal = false;
  const RoutingAttention<float> two_sided(c);
  refused([&] { Decoder<float> decoder(two_sided); }, {"Decoder", "layer", "causal"});
  c = causal;
  c.routed.membership.kind = MembershipKind::balanced;
  const RoutingAttention<float> balanced(c);
  refused([&] { Decoder<float> decoder(balanced); }, {"Decoder", "layer", "balanced", "later token"});

  RoutingAttention<float> layer(causal);
  refused([&] { Decoder<float> decoder(layer, {.sequences = 0, .max_rollback = -1}); }, {"sequences", "max_rollback"});
  refused([&] { Decoder<float> decoder(layer, {.reserve = -1}); }, {"reserve"});

  Decoder<float> decoder(layer, {.sequences = 2, .max_rollback = 2});
  const RowMatrix<float> x = Random(1).matrix<float>(2, 8);
  RowMatrix<float> y(2, 8), kept = y;
  Context context;
  decoder.step(x, y, context);
  const std::vector<std::int32_t> twice = {1, 1}, outside = {0, 2};
  refused([&] { decoder.step(x, y, twice, context); }, {"Decoder::step", "sequences", "1 twice"});
  refused([&] { decoder.step(x, y, outside, context); }, {"Decoder::step", "sequence", "0 to 1", "got 2"});
  refused([&] { decoder.rollback(0, 2); }, {"Decoder::rollback", "tokens", "0 to 1"});
  refused([&] { decoder.rollback(2, 0); }, {"Decoder::rollback", "sequence"});
  refused([&] { decoder.prefill(x, y, -1, context); }, {"Decoder::prefill", "sequence"});
  refused([&] { decoder.copy_sequence(0, 5); }, {"Decoder::copy_sequence", "sequence"});
  RowMatrix<float> narrow(2, 7);
  CHECK(contains(message_of<ShapeError>([&] { decoder.step(x, narrow, context); }), "y: expected 2 x 8, got 2 x 7"));
  CHECK(contains(message_of<ShapeError>([&] { decoder.step(x.topRows(1), y, context); }), "x: expected 2 x 8"));
  CHECK(contains(message_of<ShapeError>([&] { decoder.step(y, y, context); }), "y: expected storage of its own"));
  REQUIRE(decoder.length(0) == 1);

  // Taken back, and as many forward again: two more may be taken back.
  decoder.step(x, y, context);
  decoder.step(x, y, context);
  decoder.rollback(0, 2);
  refused([&] { decoder.rollback(0, 1); }, {"tokens", "0 to 0"});
  const std::vector<std::int32_t> first = {0};
  decoder.step(x.topRows(1), y.topRows(1), first, context);
  decoder.rollback(0, 1);

  // Centroids that have moved: by an update, or set; those of a copy have not.
  RoutingAttention<float>::Tape tape;
  RoutingAttention<float> copy = layer;
  Decoder<float> of_copy(copy);
  layer.forward(x, y, tape, context);
  layer.update_router(tape, context);
  kept = y;
  refused([&] { decoder.step(x, y, context); }, {"Decoder::step", "centroids"});
  refused([&] { decoder.prefill(x, y, 0, context); }, {"Decoder::prefill", "centroids"});
  REQUIRE(same_bits<float>(y, kept));
  of_copy.step(x.topRows(1), y.topRows(1), context);
  layer.freeze_router(true);
  Decoder<float> frozen(layer);
  layer.update_router(tape, context);
  frozen.step(x.topRows(1), y.topRows(1), context);
}
