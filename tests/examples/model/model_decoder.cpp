#include "model/model_decoder.hpp"

#include <cstring>

#include "allocation.hpp"
#include "catch.hpp"
#include "examples/model/small_model.hpp"

using namespace transformer;

namespace {

enum class Pattern { routed, random, dense };

ModelConfig small_model(Pattern pattern, bool induction, Index feed_forward) {
  ModelConfig config = test::small_model(40, feed_forward);
  coterie::RoutingAttentionConfig& attention = config.attention;
  if (!induction) attention.routed.matching = {};
  if (pattern == Pattern::random) attention.routed.routing = coterie::Routing::random;
  if (pattern == Pattern::dense) {
    attention.dense = {.heads = 2, .matching = attention.routed.matching};
    attention.routed = {};
  }
  return config;
}

std::vector<std::int32_t> random_tokens(Index count, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>(random.below(40)));
  return tokens;
}

/// The probabilities of evaluate() after every token.
RowMatrix<float> evaluated(const Model<float>& model, const std::vector<std::int32_t>& tokens) {
  Context context;
  Model<float>::Tape tape;
  const std::array<Index, 2> offsets{0, static_cast<Index>(tokens.size())};
  model.evaluate({tokens, {}, offsets, 0}, {}, tape, context);
  return tape.p;
}

/// Whether both rows have the same bits.
bool same_bits(const RowMatrix<float>& p, Index row, const RowMatrix<float>& expected, Index expected_row) {
  const std::size_t bytes = static_cast<std::size_t>(p.cols()) * sizeof(float);
  return p.cols() == expected.cols() && std::memcmp(&p(row, 0), &expected(expected_row, 0), bytes) == 0;
}

}  // namespace

TEST_CASE("a model token by token gives evaluate's rows bit for bit, at every position, with and without prefill") {
  const ModelConfig config = GENERATE(small_model(Pattern::routed, true, 50), small_model(Pattern::routed, false, 0),
                                      small_model(Pattern::dense, true, 50), small_model(Pattern::random, true, 50));
  const Model<float> model(config);
  const std::vector<std::int32_t> tokens = random_tokens(150, 8);
  const RowMatrix<float> expected = evaluated(model, tokens);
  Context context;
  RowMatrix<float> p(1, config.vocabulary);
  for (const std::size_t prompt : {0, 1, 2, 17, 149, 150}) {
    ModelDecoder<float> decoder(model);
    if (prompt > 0) {
      decoder.prefill(std::span(tokens).first(prompt), p, 0, context);
      REQUIRE(same_bits(p, 0, expected, static_cast<Index>(prompt) - 1));
    }
    for (std::size_t t = prompt; t < tokens.size(); ++t) {
      decoder.step({&tokens[t], 1}, p, context);
      INFO("prompt of " << prompt << ", position " << t);
      REQUIRE(same_bits(p, 0, expected, static_cast<Index>(t)));
    }
    REQUIRE(decoder.length(0) == 150);
  }
}

TEST_CASE("a prefill after tokens continues them") {
  const Model<float> model(small_model(Pattern::routed, true, 50));
  const std::vector<std::int32_t> tokens = random_tokens(60, 9);
  const RowMatrix<float> expected = evaluated(model, tokens);
  Context context;
  RowMatrix<float> p(1, 40);
  ModelDecoder<float> decoder(model);
  decoder.prefill(std::span(tokens).first(20), p, 0, context);
  decoder.prefill(std::span(tokens).subspan(20), p, 0, context);
  REQUIRE(same_bits(p, 0, expected, 59));
}

TEST_CASE("sequences side by side, copies and rollbacks give what each sequence gives alone") {
  const Model<float> model(small_model(Pattern::routed, true, 50));
  const std::vector<std::int32_t> a = random_tokens(70, 10), b = random_tokens(70, 11);
  const RowMatrix<float> of_a = evaluated(model, a), of_b = evaluated(model, b);
  Context context;
  ModelDecoder<float> decoder(model, {.sequences = 3, .max_rollback = 5});
  RowMatrix<float> p(1, 40), both(2, 40);
  decoder.prefill(std::span(a).first(30), p, 0, context);
  const std::array<std::int32_t, 2> pair{2, 0};
  for (std::size_t t = 0; t < 30; ++t) {
    const std::array<std::int32_t, 2> tokens{b[t], a[30 + t]};
    decoder.step(tokens, both, pair, context);
    REQUIRE(same_bits(both, 0, of_b, static_cast<Index>(t)));
    REQUIRE(same_bits(both, 1, of_a, static_cast<Index>(30 + t)));
  }
  decoder.copy_sequence(2, 1);
  const std::int32_t one = 1;
  for (std::size_t t = 0; t < 5; ++t) decoder.step({&a[t], 1}, p, {&one, 1}, context);  // astray, and back
  decoder.rollback(1, 5);
  for (std::size_t t = 30; t < 70; ++t) {
    decoder.step({&b[t], 1}, p, {&one, 1}, context);
    REQUIRE(same_bits(p, 0, of_b, static_cast<Index>(t)));
  }
  REQUIRE(decoder.length(2) == 30);
  decoder.clear(1);
  decoder.step({&a[0], 1}, p, {&one, 1}, context);
  REQUIRE(same_bits(p, 0, of_a, 0));
}

TEST_CASE("a model's decoder: nothing allocates after warm-up, and threads change no bits") {
  const Model<float> model(small_model(Pattern::routed, true, 50));
  const std::vector<std::int32_t> tokens = random_tokens(100, 12);
  RowMatrix<float> last(1, 40), p(1, 40);
  for (const Index threads : {1, 3}) {
    coterie::ThreadPool pool(threads);
    coterie::Workspace workspace;
    Context context{pool, workspace};
    ModelDecoder<float> decoder(model, {.reserve = 100});
    for (std::size_t t = 0; t < 40; ++t) decoder.step({&tokens[t], 1}, p, context);
    const long before = test::allocations();
    for (std::size_t t = 40; t < 100; ++t) decoder.step({&tokens[t], 1}, p, context);
    REQUIRE(test::allocations() == before);
    if (threads > 1) REQUIRE(p == last);
    last = p;
  }
}

TEST_CASE("a model's decoder refuses what does not fit, and stays as it was") {
  const Model<float> model(small_model(Pattern::routed, true, 50));
  const std::vector<std::int32_t> tokens = random_tokens(10, 13);
  Context context;
  RowMatrix<float> p(1, 40), narrow(1, 39);
  ModelDecoder<float> decoder(model);
  decoder.prefill(std::span(tokens).first(9), p, 0, context);
  const std::array<std::int32_t, 2> two{0, 1}, twice{0, 0};
  const std::int32_t outside = 40, negative = -1;
  REQUIRE_THROWS_AS(decoder.step({&outside, 1}, p, context), coterie::ValueError);
  REQUIRE_THROWS_AS(decoder.step({&negative, 1}, p, context), coterie::ValueError);
  REQUIRE_THROWS_AS(decoder.step(two, p, context), coterie::ShapeError);
  RowMatrix<float> rows(2, 40);
  REQUIRE_THROWS_AS(decoder.step(two, rows, twice, context), coterie::ValueError);
  REQUIRE_THROWS_AS(decoder.step({&tokens[0], 1}, narrow, context), coterie::ShapeError);
  REQUIRE_THROWS_AS(decoder.prefill({}, p, 0, context), coterie::ValueError);
  REQUIRE_THROWS_AS(decoder.prefill(tokens, p, 1, context), coterie::ValueError);
  REQUIRE_THROWS_AS(decoder.rollback(0, 1), coterie::ValueError);
  REQUIRE(decoder.length(0) == 9);
  decoder.step({&tokens[9], 1}, p, context);
  REQUIRE(same_bits(p, 0, evaluated(model, tokens), 9));
}
