#pragma once

// What the fuzzer, and the test that replays its corpus, do with bytes that may be a GGUF file.

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pretrained/dequantise.hpp"
#include "pretrained/gguf.hpp"
#include "pretrained/tokenizer.hpp"

namespace fuzz {

inline void require_gguf(bool good, const char* what) {
  if (!good) throw std::logic_error(what);
}

/// Calls f; FileError is what bad files are answered with, any other exception passes. Whether f came to its end.
template <class F>
bool accepts_gguf(F&& f) {
  try {
    f();
    return true;
  } catch (const coterie::FileError&) {
    return false;
  }
}

/// A text whose bytes all have tokens comes back from its tokens, and no token lies beyond the vocabulary.
inline void use_tokenizer(const pretrained::Tokenizer& tokenizer, std::string_view text) {
  bool all = true;
  for (const char byte : text) all = all && tokenizer.has_byte(static_cast<std::uint8_t>(byte));
  for (const bool special : {false, true}) {
    const std::vector<std::int32_t> tokens = tokenizer.encode(text, special);
    std::string pieces;
    for (const std::int32_t token : tokens) pieces += tokenizer.token_bytes(token);
    require_gguf(pieces == tokenizer.decode(tokens), "decode is not the bytes of tokens");
    require_gguf(!all || pieces == text, "a text does not come back from its tokens");
  }
}

/// Reads bytes as a file, with all that it holds. Throws std::logic_error where what was accepted makes no sense.
/// Returns whether they are a file.
inline bool read_gguf_bytes(std::span<const std::byte> bytes) {
  using namespace pretrained;
  GgufFile file;
  if (!accepts_gguf([&] { file = parse_gguf(bytes); })) return false;

  // Tensors lie in the file one after the other, and whatever can be decoded is.
  const std::byte* end = bytes.data();
  for (const GgufTensor& tensor : file.tensors()) {
    require_gguf(tensor.bytes.data() >= end && !tensor.bytes.empty(), "tensors overlap");
    end = tensor.bytes.data() + tensor.bytes.size();
    require_gguf(end <= bytes.data() + bytes.size(), "a tensor outside of the file");
    require_gguf(file.find(tensor.name) == &tensor, "a name leads to another tensor");
    accepts_gguf([&] { static_cast<void>(dequantise(file, tensor.name, tensor.rows(), tensor.cols())); });
  }

  // A value is of one kind at most: a number can be an integer or not, and a list has as many elements as it says.
  for (const auto& entry : file.values()) {
    const std::string_view name = entry.first;
    const GgufValue& value = entry.second;
    int kinds = 0;
    kinds += accepts_gguf([&] { static_cast<void>(file.get<bool>(name)); });
    kinds += accepts_gguf([&] { static_cast<void>(file.get<double>(name)); });
    kinds += accepts_gguf([&] { static_cast<void>(file.get<std::string>(name)); });
    kinds += accepts_gguf([&] { static_cast<void>(file.get<std::int64_t>(name)); }) ||
             accepts_gguf([&] { static_cast<void>(file.get<std::uint64_t>(name)); });
    require_gguf(kinds == (value.type == GgufValueType::array ? 0 : 1), "a value of no or several kinds");
    const auto list = [&]<class T>(T) {
      return accepts_gguf([&] { require_gguf(file.list<T>(name).size() == value.count, "a list of another length"); });
    };
    const int lists = list(false) + list(0.0) + list(std::string()) + list(std::int64_t(0)) + list(std::uint64_t(0));
    const bool mixed = value.element == GgufValueType::u64;  // may hold what no signed and no other type does
    require_gguf(mixed || (lists > 0) == (value.type == GgufValueType::array),
                 "a list that is none, or none that is one");
  }

  std::optional<Tokenizer> tokenizer;
  if (accepts_gguf([&] { tokenizer.emplace(file); })) {
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()),
                                (std::min)(bytes.size(), std::size_t(256)));
    use_tokenizer(*tokenizer, text);
    use_tokenizer(*tokenizer, "hello  world's 12 <|im_end|>\n");
  }
  return true;
}

}  // namespace fuzz
