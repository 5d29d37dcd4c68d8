// What a decoder is after a task that was cancelled, or memory that has run out: what it was before.
#include <memory>

#include "allocation.hpp"
#include "cancellable.hpp"
#include "catch.hpp"
#include "coterie/decoder/decoder.hpp"
#include "decoder/causal_layers.hpp"

using namespace test;

namespace {

constexpr Index rollback = 3;

// Requires that a decoder goes on with x from `length` tokens of a sequence, also after as many were taken back as can
//   be.
void require_continues(const Decoder<float>& decoder, Index sequence, Index length, const RowMatrix<float>& x,
                       const RowMatrix<float>& expected, Index most_back = rollback) {
  REQUIRE(decoder.length(sequence) == length);
  Decoder<float> on = decoder;
  Context context;
  RowMatrix<float> y(1, x.cols());
  const std::int32_t number = static_cast<std::int32_t>(sequence);
  const Index back = std::min(length, most_back);
  on.rollback(sequence, back);
  for (Index i = length - back; i < length + 2; ++i) {
    on.step(x.middleRows(i, 1), y, {&number, 1}, context);
    if (!same_bits<float>(y, expected.row(i))) REQUIRE(y == expected.row(i));
  }
}

struct Decoding {
  RoutingAttention<float> layer;
  RowMatrix<float> x, other, expected;
  explicit Decoding(const RoutingAttentionConfig& config, Index tokens = 110)
      : layer(moved_layer<float>(config)),
        x(2 * Random(5).matrix<float>(tokens, config.model_dim)),
        other(2 * Random(6).matrix<float>(tokens, config.model_dim)),
        expected(forward_rows(layer, x)) {}
};

}  // namespace

TEST_CASE("a step that is cancelled at any of its tasks has not been") {
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const Decoding d(kind.config);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace);
    Decoder<float> decoder(d.layer, {.max_rollback = rollback});
    RowMatrix<float> y(1, 10);
    for (Index i = 0; i < 105; ++i) {
      if (i < 2 || i % 13 == 5) {
        INFO("token " << i);
        // Another token than the one that will come: what it would have displaced has to be there.
        const long cancelled = cancel_each_task(
            host, [] {}, [&] { decoder.step(d.other.middleRows(i, 1), y, context); },
            [&] { require_continues(decoder, 0, i, d.x, d.expected); });
        REQUIRE(cancelled > 3);
        decoder.rollback(0, 1);
      }
      decoder.step(d.x.middleRows(i, 1), y, context);
      REQUIRE(same_bits<float>(y, d.expected.row(i)));
    }
  }
}

TEST_CASE("a step of several sequences that is cancelled has not been for any of them") {
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const Decoding d(kind.config);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace);
    Decoder<float> decoder(d.layer, {.sequences = 2, .max_rollback = rollback});
    RowMatrix<float> y(10, 10);
    decoder.prefill(d.x.topRows(9), y.topRows(9), 1, context);
    const long cancelled = cancel_each_task(
        host, [] {}, [&] { decoder.step(d.other.topRows(2), y.topRows(2), context); },
        [&] {
          require_continues(decoder, 0, 0, d.x, d.expected);
          require_continues(decoder, 1, 9, d.x, d.expected);
        });
    REQUIRE(cancelled > 3);
  }
}

TEST_CASE("a step in which any one allocation fails has not been") {
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const Decoding d(kind.config);
    Context usual;
    Decoder<float> decoder(d.layer, {.max_rollback = rollback});
    RowMatrix<float> y(1, 10);
    long failed = 0;
    for (Index i = 0; i < 50; ++i) {
      if (i == 0 || i == 5 || i == 16 || i == 33 || i == 48) {
        INFO("token " << i);
        std::unique_ptr<Context> context;
        std::unique_ptr<Decoder<float>> tried;
        const RowMatrix<float> row = d.other.row(i);
        failed += fail_each_allocation(
            [&] {
              context = std::make_unique<Context>();
              tried = std::make_unique<Decoder<float>>(decoder);
            },
            [&] { tried->step(row, y, *context); },
            [&](bool threw) {
              if (!threw) tried->rollback(0, 1);
              require_continues(*tried, 0, i, d.x, d.expected, threw ? rollback : rollback - 1);
              tried->step(d.x.middleRows(i, 1), y, *context);  // the same context still works
              REQUIRE(same_bits<float>(y, d.expected.row(i)));
            });
      }
      decoder.step(d.x.middleRows(i, 1), y, usual);
    }
    REQUIRE(failed > 5);
  }
}

TEST_CASE("a prefill that fails leaves an empty sequence empty, and another one with the tokens that it says") {
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const Decoding d(kind.config, 60);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace);
    Decoder<float> decoder(d.layer, {.sequences = 2, .max_rollback = rollback});
    RowMatrix<float> y(60, 10);
    const auto prompt = d.x.topRows(40);
    REQUIRE(cancel_each_task(
                host, [&] { decoder.clear(0); }, [&] { decoder.prefill(prompt, y.topRows(40), 0, context); },
                [&] { require_continues(decoder, 0, 0, d.x, d.expected); }) > 3);
    require_continues(decoder, 0, 40, d.x, d.expected);
    REQUIRE(cancel_each_task(
                host,
                [&] {
                  decoder.clear(1);
                  decoder.prefill(d.x.topRows(10), y.topRows(10), 1, context);
                },
                [&] { decoder.prefill(d.x.middleRows(10, 3), y.topRows(3), 1, context); },
                [&] {
                  const Index length = decoder.length(1);
                  REQUIRE((length >= 10 && length < 13));
                  require_continues(decoder, 1, length, d.x, d.expected);
                }) > 3);

    std::unique_ptr<Decoder<float>> tried;
    std::unique_ptr<Context> fresh;
    REQUIRE(fail_each_allocation(
                [&] {
                  tried = std::make_unique<Decoder<float>>(d.layer, DecoderConfig{.max_rollback = rollback});
                  fresh = std::make_unique<Context>();
                },
                [&] { tried->prefill(prompt, y.topRows(40), 0, *fresh); },
                [&](bool threw) { require_continues(*tried, 0, threw ? 0 : 40, d.x, d.expected); }) > 10);
  }
}

TEST_CASE("a copy for which memory runs out changes nothing") {
  long failed = 0;
  for (const Kind& kind : causal_kinds()) {
    INFO(kind.name);
    const Decoding d(kind.config, 60);
    Context context;
    Decoder<float> decoder(d.layer, {.sequences = 2, .max_rollback = rollback});
    RowMatrix<float> y(60, 10);
    decoder.prefill(d.x.topRows(50), y.topRows(50), 0, context);
    decoder.prefill(d.x.topRows(20), y.topRows(20), 1, context);
    std::unique_ptr<Decoder<float>> tried;
    const auto prepare = [&] { tried = std::make_unique<Decoder<float>>(decoder); };
    failed += fail_each_allocation(
        prepare, [&] { tried->copy_sequence(0, 1); },
        [&](bool threw) {
          require_continues(*tried, 0, 50, d.x, d.expected);
          require_continues(*tried, 1, threw ? 20 : 50, d.x, d.expected);
        });
    require_continues(*tried, 0, 50, d.x, d.expected);
    require_continues(*tried, 1, 50, d.x, d.expected);
    // The other way round: pages are given back.
    tried = std::make_unique<Decoder<float>>(decoder);
    tried->copy_sequence(1, 0);
    require_continues(*tried, 0, 20, d.x, d.expected);
    require_continues(*tried, 1, 20, d.x, d.expected);
    // Whole decoders.
    const Decoder<float> empty(d.layer, {.sequences = 2, .max_rollback = rollback});
    REQUIRE(fail_each_allocation(
                prepare, [&] { *tried = empty; },
                [&](bool) {
                  require_continues(*tried, 0, 50, d.x, d.expected);
                  require_continues(*tried, 1, 20, d.x, d.expected);
                }) > 5);
  }
  REQUIRE(failed > 5);
}

TEST_CASE("a window without a limit grows as a long one does") {
  RoutingAttentionConfig c{.model_dim = 8,
                           .causal = true,
                           .local = {.heads = 1, .window = 1 << 20},
                           .routed = {.heads = 1, .clusters = 2, .window = 1 << 20}};
  const auto count = [&] {
    const RoutingAttention<float> layer(c);
    const RowMatrix<float> x = Random(1).matrix<float>(700, 8);
    Context context;
    Decoder<float> decoder(layer);
    RowMatrix<float> y(1, 8);
    const long before = allocations();
    for (Index i = 0; i < 700; ++i) {
      const RowMatrix<float> row = x.row(i);
      decoder.step(row, y, context);
    }
    return allocations() - before;
  };
  const long usual = count();
  for (const Index window : {std::numeric_limits<Index>::max(), std::numeric_limits<Index>::max() - 16}) {
    c.local.window = c.routed.window = window;
    REQUIRE(count() == usual);
  }
}
