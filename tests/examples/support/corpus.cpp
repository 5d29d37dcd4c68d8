#include "support/corpus.hpp"

#include <filesystem>
#include <fstream>
#include <string>

#include "catch.hpp"

using namespace examples;

namespace {

Bytes bytes(const std::string& text) { return Bytes(text.begin(), text.end()); }

// The same by looking at every earlier position.
std::vector<ByteClass> classify_slowly(const Bytes& text, std::size_t window) {
  std::vector<ByteClass> classes(text.size() - 1, ByteClass::rest);
  for (std::size_t t = 11; t < classes.size(); ++t)
    for (std::size_t s = t - 1; s >= 11; --s)
      if (std::equal(&text[s - 11], &text[s] + 1, &text[t - 11])) {
        classes[t] = t - s > window ? ByteClass::far : ByteClass::near;
        break;
      }
  return classes;
}

}  // namespace

TEST_CASE("bytes are classed by the last occurrence of the 12 bytes before them") {
  const std::string phrase = "twelve bytes";  // 12 bytes
  const Bytes text = bytes(phrase + "A" + phrase + "B" + std::string(20, '-') + phrase + "C");
  const auto classes = classify_bytes(text, 13);
  REQUIRE(classes.size() == text.size() - 1);
  REQUIRE(classes[11] == ByteClass::rest);           // A
  REQUIRE(classes[11 + 13] == ByteClass::near);      // B: 13 back
  REQUIRE(classes[11 + 13 + 33] == ByteClass::far);  // C: 33 back
  REQUIRE(classify_bytes(text, 12)[11 + 13] == ByteClass::far);
  REQUIRE(classify_bytes(text, 33)[11 + 13 + 33] == ByteClass::near);
}

TEST_CASE("byte classes agree with a search of all earlier positions") {
  std::mt19937_64 random(1);
  Bytes text;
  while (text.size() < 3000) {
    const std::size_t length = 5 + random() % 40, from = text.size() < 100 ? 0 : random() % (text.size() - 50);
    for (std::size_t i = 0; i < length; ++i)
      text.push_back(text.size() < 100 ? static_cast<std::uint8_t>(random() % 3) : text[from + i]);
  }
  REQUIRE(classify_bytes(text, 64) == classify_slowly(text, 64));
}

TEST_CASE("texts too short for a context have no classes but rest") {
  REQUIRE(classify_bytes({}, 64).empty());
  REQUIRE(classify_bytes(bytes("a"), 64).empty());
  REQUIRE(classify_bytes(bytes("aaaaaaaaaaaa"), 64) == std::vector<ByteClass>(11, ByteClass::rest));
}

TEST_CASE("a text is split into bytes to train on and bytes held out") {
  const std::filesystem::path path = std::filesystem::temp_directory_path() / "coterie_corpus_test.txt";
  const auto write = [&](std::size_t size) {
    std::ofstream file(path, std::ios::binary);
    for (std::size_t i = 0; i < size; ++i) file.put(static_cast<char>(i * i % 251));
  };
  write(1000000);
  const Corpus corpus = read_text(path.string(), 4097);
  REQUIRE(corpus.training.size() + corpus.held_out.size() == 1000000);
  REQUIRE(corpus.held_out.size() == 80000);
  REQUIRE(read_text(path.string(), 4097).held_out == corpus.held_out);
  REQUIRE(read_text(path.string(), 200000).held_out.size() == 200000);
  REQUIRE_THROWS_AS(read_text(path.string(), 300000), UsageError);
  write(100);
  REQUIRE_THROWS_AS(read_text(path.string(), 4097), UsageError);
  write(0);
  REQUIRE_THROWS_AS(read_text(path.string(), 33), UsageError);
  std::filesystem::remove(path);
  REQUIRE_THROWS_AS(read_text(path.string(), 33), UsageError);
}
