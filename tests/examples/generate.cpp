#include "generate.hpp"

#include "bits_per_byte.hpp"
#include "catch.hpp"
#include "examples/small_model.hpp"
#include "interrupt.hpp"

using namespace transformer;

namespace {

ModelConfig byte_model() {
  ModelConfig config = test::small_model(256);
  config.attention.seed = 0;
  return config;
}

std::string printed(const std::string& bytes, const std::string& indent = "") {
  examples::PrintableText text(indent);
  std::string result;
  for (const char c : bytes) result += text.add(static_cast<std::uint8_t>(c));
  return result + text.finish();
}

}  // namespace

TEST_CASE("greedy generation writes the likeliest token after all before it") {
  const Model<float> model(byte_model());
  Context context;
  std::vector<std::int32_t> text{'a', 'b', 'c'};
  const std::vector<std::int32_t> prompt = text;
  generate(model, prompt, 30, {.temperature = 0}, context, [&](std::int32_t token) { text.push_back(token); });
  REQUIRE(text.size() == 33);
  Model<float>::Tape tape;
  const std::array<Index, 2> offsets{0, static_cast<Index>(text.size())};
  model.evaluate({text, {}, offsets, 0}, {}, tape, context);
  for (std::size_t t = prompt.size(); t < text.size(); ++t) {
    const auto p = tape.p.row(static_cast<Index>(t) - 1);
    REQUIRE(p(text[t]) > p.maxCoeff() - 1e-5f);
  }
  REQUIRE_THROWS_AS(generate(model, {}, 1, {}, context, [](std::int32_t) {}), coterie::ValueError);
}

TEST_CASE("the same seed writes the same text, another one another") {
  const Model<float> model(byte_model());
  Context context;
  const auto write = [&](std::uint64_t seed) {
    std::vector<std::int32_t> text;
    const std::vector<std::int32_t> prompt{'\n'};
    generate(model, prompt, 40, {.seed = seed}, context, [&](std::int32_t token) { text.push_back(token); });
    return text;
  };
  REQUIRE(write(1) == write(1));
  REQUIRE(write(1) != write(2));
}

TEST_CASE("text is printed in whole characters, and what a terminal would obey is not") {
  for (const std::string good :
       {"plain\ttext\n", "\u00e9", "\u20ac", "\u0800", "\xed\x9f\xbf", "\U0001f600", "\U0010ffff"})
    REQUIRE(printed(good) == good);
  REQUIRE(printed("\x1b[2J\r\x07\x7f") == "?[2J???");
  REQUIRE(printed("\xc2\x9b") == "??");            // a control character of two bytes
  REQUIRE(printed("\xc0\xaf") == "??");            // overlong
  REQUIRE(printed("\xe0\x80\xaf") == "???");       // overlong
  REQUIRE(printed("\xed\xa0\x80") == "???");       // a surrogate
  REQUIRE(printed("\xf4\x90\x80\x80") == "????");  // beyond the last
  REQUIRE(printed("\xe2\x82") == "??");            // not finished
  REQUIRE(printed("\xe2\x82\xc3\xa9x") == "??\u00e9x");
  REQUIRE(printed("\xe2\nx", "  ") == "?\n  x");
  // Nothing of a character leaves before its last byte.
  examples::PrintableText text;
  REQUIRE(text.add(0xe2).empty());
  REQUIRE(text.add(0x82).empty());
  REQUIRE(text.add(0xac) == "\u20ac");
}

TEST_CASE("windows of an evaluation score every byte once, with enough before it") {
  for (const Index bytes : {1, 2, 15, 16, 17, 40, 100})
    for (const Index window : {1, 2, 16})
      for (Index stride = 1; stride <= window; ++stride) {
        Index next = 0;
        for (const ScoredWindow& w : scored_windows(bytes, window, stride)) {
          REQUIRE(w.length <= window);
          REQUIRE(w.begin + w.unscored == next);
          REQUIRE(w.unscored < w.length);
          for (Index t = w.begin + w.unscored; t < w.begin + w.length; ++t)
            REQUIRE(t + 1 - w.begin >= std::min(t + 1, window - stride + 1));
          next = w.begin + w.length;
        }
        REQUIRE(next == bytes);
      }
  REQUIRE(scored_windows(0, 4, 2).empty());
  REQUIRE_THROWS_AS(scored_windows(10, 4, 5), coterie::ValueError);
  REQUIRE_THROWS_AS(scored_windows(10, 4, 0), coterie::ValueError);
}

TEST_CASE("bits per byte are those of the probabilities, window by window, in batches of any size") {
  const Model<float> model(byte_model());
  Context context;
  Model<float>::Tape tape;
  const std::string text = "to be or not to be, that is the question";
  const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  // Stride 1, each byte from the 12 before it (fewer at the start), by a decoder.
  double expected = 0;
  const std::string all = "\n" + text;
  RowMatrix<float> p(1, 256);
  for (std::size_t t = 0; t < text.size(); ++t) {
    const std::size_t begin = t + 1 < 12 ? 0 : t + 1 - 12;
    const std::vector<std::int32_t> seen(all.begin() + static_cast<std::ptrdiff_t>(begin),
                                         all.begin() + static_cast<std::ptrdiff_t>(t + 1));
    ModelDecoder<float>(model).prefill(seen, p, 0, context);
    expected -= std::log2(static_cast<double>(p(0, bytes[t]))) / static_cast<double>(text.size());
  }
  double done = 0;
  const auto progress = [&](double share) { done = share; };
  for (const Index at_once : {1, 30, 1000})
    REQUIRE(bits_per_byte(model, bytes, 12, 1, at_once, tape, context, progress) == Approx(expected).epsilon(1e-5));
  REQUIRE(done == 1);
  REQUIRE(bits_per_byte(model, bytes, 12, 12, 30, tape, context, progress) != Approx(expected).epsilon(1e-3));
  REQUIRE_THROWS_AS(bits_per_byte(model, {}, 12, 1, 30, tape, context, progress), coterie::ValueError);
}

TEST_CASE("the first interrupt is noted, the second one is the system's again") {
  REQUIRE(std::signal(SIGINT, SIG_DFL) != SIG_ERR);
  {
    const examples::InterruptGuard guard;
    REQUIRE(guard.signal() == 0);
    std::raise(SIGINT);
    REQUIRE(guard.signal() == SIGINT);
    REQUIRE(std::signal(SIGINT, SIG_DFL) == SIG_DFL);
    REQUIRE(std::signal(SIGTERM, SIG_DFL) == SIG_DFL);
  }
  {
    std::signal(SIGINT, SIG_IGN);
    const examples::InterruptGuard guard;
    std::raise(SIGINT);
    REQUIRE(guard.signal() == 0);
  }
  REQUIRE(std::signal(SIGINT, SIG_DFL) == SIG_IGN);  // as it was before the guard
}
