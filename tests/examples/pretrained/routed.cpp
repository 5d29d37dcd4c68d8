#include "pretrained/routed.hpp"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "catch.hpp"
#include "errors.hpp"
#include "pretrained/distill.hpp"
#include "pretrained/gguf.hpp"
#include "pretrained/llama_file.hpp"
#include "tiny_llama.hpp"

namespace {

using coterie::Index;
using coterie::RowMatrix;
using pretrained::Llama;
using pretrained::RoutedChoice;
using pretrained::RoutedLlama;

pretrained::LlamaFile small_llama() {
  const std::vector<std::byte> bytes = test::TinyLlama{}.bytes();
  return pretrained::read_llama(pretrained::parse_gguf(bytes));
}

std::vector<std::int32_t> mixed_tokens(const Llama& model, std::size_t count) {
  std::vector<std::int32_t> tokens;
  for (std::size_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>((i * i * 17 + 3 * i + 1) % std::size_t(model.config.vocabulary)));
  return tokens;
}

bool equal_bits(const RowMatrix<float>& a, const RowMatrix<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(float) * std::size_t(a.size())) == 0;
}

/// The logits of every token of a sequence, token by token.
RowMatrix<float> logits_of(const RoutedLlama& model, std::span<const std::int32_t> tokens, coterie::Context& context) {
  pretrained::RoutedSession session(model);
  RowMatrix<float> all(static_cast<Index>(tokens.size()), model.dense.config.vocabulary);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    session.read(tokens.subspan(i, 1), coterie::view(all).rows(static_cast<Index>(i), 1), context);
  return all;
}

constexpr RoutedChoice few{.clusters = 4, .probes = 1, .window = 8, .sinks = 1, .recent = 3};

}  // namespace

TEST_CASE("a routed copy of a model that sees every key is the dense model") {
  const pretrained::LlamaFile file = small_llama();
  const std::vector<std::int32_t> tokens = mixed_tokens(file.model, 40);
  coterie::Context context;
  const RoutedLlama model(file.model, {.clusters = 4, .probes = 4, .window = 64, .sinks = 1, .recent = 2}, tokens,
                          context);
  const RoutedLlama* const models[] = {&model};
  const auto scores = pretrained::score_routed(file.model, models, tokens, 20, context);
  REQUIRE(scores.size() == 2);
  REQUIRE(scores[1].keys_seen == Approx(1));
  for (std::size_t i = 0; i < 20; ++i) REQUIRE(scores[1].nats[i] == Approx(scores[0].nats[i]).epsilon(1e-5));
}

TEST_CASE("a routed model decodes as its layers' forward does, bit for bit, and is saved and read") {
  const pretrained::LlamaFile file = small_llama();
  const std::vector<std::int32_t> tokens = mixed_tokens(file.model, 60);
  coterie::Context context;
  const RoutedLlama model(file.model, few, tokens, context);
  const RowMatrix<float> steps = logits_of(model, tokens, context);
  RowMatrix<float> x(60, file.model.config.model_dim), logits(60, file.model.config.vocabulary);
  pretrained::embed(file.model, tokens, x);
  pretrained::run_blocks(file.model, x, context,
                         [&](std::size_t l, const RowMatrix<float>& normed, RowMatrix<float>& y) {
                           model.attention[l].forward(normed, y, context);
                         });
  pretrained::read_out(file.model, x, logits, context);
  REQUIRE(equal_bits(steps, logits));

  const std::filesystem::path path = std::filesystem::temp_directory_path() / "coterie_test_routed.st";
  model.save(path);
  const RoutedLlama again(file.model, path);
  REQUIRE(equal_bits(logits_of(again, tokens, context), steps));
  // Other numbers of clusters seen, with the same weights and centroids.
  const RoutedLlama more(model, {.clusters = 4, .probes = 2, .window = 8, .sinks = 1, .recent = 3});
  REQUIRE(!equal_bits(logits_of(more, tokens, context), steps));
  const RoutedLlama back(more, few);
  REQUIRE(equal_bits(logits_of(back, tokens, context), steps));
  std::ofstream(path, std::ios::trunc) << "no layer";
  REQUIRE_THROWS_AS(RoutedLlama(file.model, path), coterie::FileError);
  std::filesystem::remove(path);
}

TEST_CASE("distillation brings a routed model's outputs closer to the dense ones") {
  const pretrained::LlamaFile file = small_llama();
  const std::vector<std::int32_t> tokens = mixed_tokens(file.model, 80);
  coterie::Context context;
  RoutedLlama model(file.model, few, tokens, context);
  pretrained::Distillation distillation(model);
  const double before = distillation.step(tokens, 0, context);
  REQUIRE(before > 0);
  REQUIRE(distillation.step(tokens, 1e-3, context) == Approx(before));  // a rate of 0 changes nothing
  double after = before;
  for (int i = 0; i < 40; ++i) after = distillation.step(tokens, 1e-3, context);
  REQUIRE(after < 0.8 * before);
}
