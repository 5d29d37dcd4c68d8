#include "model/bits_per_byte.hpp"

#include "catch.hpp"
#include "examples/model/small_model.hpp"
#include "model/model_decoder.hpp"

using namespace transformer;

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
  const Model<float> model(test::byte_model());
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
