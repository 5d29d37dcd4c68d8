#include "model/generate.hpp"

#include "catch.hpp"
#include "examples/model/small_model.hpp"

using namespace transformer;

TEST_CASE("greedy generation writes the likeliest token after all before it") {
  const Model<float> model(test::byte_model());
  Context context;
  std::vector<std::int32_t> text{'a', 'b', 'c'};
  const std::vector<std::int32_t> prompt = text;
  generate(model, prompt, 30, {.temperature = 0}, context, [&](std::int32_t token) { text.push_back(token); });
  REQUIRE(text.size() == 33);
  Model<float>::Tape tape;
  const std::array<Index, 2> offsets{0, static_cast<Index>(text.size())};
  model.evaluate({text, {}, offsets, 0}, {}, tape, context);
  for (std::size_t t = prompt.size(); t < text.size(); ++t) {
    Index likeliest = 0;
    tape.p.row(static_cast<Index>(t) - 1).maxCoeff(&likeliest);
    REQUIRE(text[t] == likeliest);
  }
  REQUIRE_THROWS_AS(generate(model, {}, 1, {}, context, [](std::int32_t) {}), coterie::ValueError);
}

TEST_CASE("the same seed writes the same text, another one another") {
  const Model<float> model(test::byte_model());
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
