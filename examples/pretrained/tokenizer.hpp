// The tokenizer of a GGUF file: byte pairs merged inside of words, and special tokens.
#pragma once

#include <algorithm>
#include <array>
#include <coterie/core/check.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "byte_pairs.hpp"
#include "gguf_file.hpp"
#include "pre_tokenizer.hpp"

namespace pretrained {

/// Kinds of tokens, by the numbers of tokenizer.ggml.token_type.
enum class TokenKind : std::int32_t { normal = 1, unknown, control, user_defined, unused, byte };

namespace detail {

/// The text that stands for bytes in vocabularies: printable bytes are the character of their number, the others those
/// from U+0100 on.
class ByteLetters {
 public:
  ByteLetters() {
    std::uint32_t next = 256;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 33 && byte < 127) || (byte >= 161 && byte < 256 && byte != 173);
      const std::uint32_t letter = printable ? byte : next++;
      byte_of_[letter] = static_cast<std::int16_t>(byte);
    }
  }

  /// The bytes that a text stands for; nothing if some character stands for none.
  std::optional<std::string> bytes(std::string_view text) const {
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
      std::uint32_t letter = static_cast<std::uint8_t>(text[i]);
      if (letter >= 0x80) {  // all letters have at most two bytes
        const std::uint32_t next = i + 1 < text.size() ? static_cast<std::uint8_t>(text[++i]) : 0u;
        if (letter < 0xC2 || letter >= 0xE0 || (next & 0xC0) != 0x80) return {};
        letter = (letter & 0x1F) << 6 | (next & 0x3F);
      }
      if (letter >= byte_of_.size() || byte_of_[letter] < 0) return {};
      result += static_cast<char>(byte_of_[letter]);
    }
    return result;
  }

 private:
  static constexpr std::array<std::int16_t, 324> none() {
    std::array<std::int16_t, 324> bytes{};
    bytes.fill(-1);
    return bytes;
  }
  std::array<std::int16_t, 324> byte_of_ = none();
};

}  // namespace detail

/// Text to tokens and back, as the file's own tokenizer does it. Immutable: any number of threads can use one.
class Tokenizer {
 public:
  /// Reads the tokenizer of a file; the file is not needed afterwards.
  ///
  /// Requires: tokenizer.ggml.model "gpt2", the byte-level one; tokenizer.ggml.pre "gpt-2" or "smollm"; tokens that
  ///   differ, normal ones made of the letters that stand for bytes; as many token types as tokens, or none; merges of
  ///   two tokens to a third, none twice; ids of tokens that exist (FileError, which names key and element).
  explicit Tokenizer(const GgufFile& file) {
    const auto model = file.get<std::string>("tokenizer.ggml.model");
    if (model != "gpt2")
      file.fail_key("tokenizer.ggml.model", "expected 'gpt2', byte-level merges, got " + detail::quoted(model));
    // "default" is not GPT-2's pattern: it cuts digits by threes and punctuation from words.
    const auto pre = file.get<std::string>("tokenizer.ggml.pre");
    if (pre != "gpt-2" && pre != "smollm")
      file.fail_key("tokenizer.ggml.pre", "expected 'gpt-2' or 'smollm', got " + detail::quoted(pre));
    pattern_ = pre == "smollm" ? PreTokenizer::smollm : PreTokenizer::gpt2;
    const std::unordered_map<std::string, std::int32_t> vocabulary = read_tokens(file);
    read_merges(file, vocabulary);
    bos_ = read_id(file, "tokenizer.ggml.bos_token_id");
    eos_ = read_id(file, "tokenizer.ggml.eos_token_id");
    add_bos_ = file.get_or<bool>("tokenizer.ggml.add_bos_token", false);
  }

  /// The number of tokens.
  std::int32_t size() const { return static_cast<std::int32_t>(kinds_.size()); }
  /// The token that begins texts, and the one that ends answers, if the file has them.
  std::optional<std::int32_t> bos() const { return bos_; }
  std::optional<std::int32_t> eos() const { return eos_; }
  /// Whether the model wants bos() before a text. encode() does not add it.
  bool add_bos() const { return add_bos_; }
  /// Whether the vocabulary has a token for this byte; encode() leaves out those that it has none for.
  bool has_byte(std::uint8_t byte) const { return byte_tokens_[byte] >= 0; }

  /// The token of this text that is not made of merges (of kind unknown, control or user_defined), if there is one.
  std::optional<std::int32_t> special(std::string_view text) const {
    for (const auto& [known, id] : specials_)
      if (known == text) return id;
    return {};
  }

  /// The kind of a token. Requires a token (ValueError).
  TokenKind kind(std::int32_t id) const {
    check("kind", id);
    return kinds_[static_cast<std::size_t>(id)];
  }

  /// The bytes of a token; those of a special one are its text. One token may be a part of a character.
  /// Requires a token (ValueError).
  std::string_view token_bytes(std::int32_t id) const {
    check("token_bytes", id);
    return bytes_of(id);
  }

  /// The tokens of a text. With `parse_special`, texts of control tokens and of the unknown token become these; without
  /// it they are text as any other. Those of kind user_defined always do. Of several the leftmost is taken, then the
  /// longest. The text need not be UTF-8: a malformed byte is a character that is no letter, number or space.
  ///
  /// Requires fewer than 2^31 bytes (ValueError).
  /// Allocates: tokens, and a table of the words seen.
  /// Cost: linear in the text, but n log n in the longest word.
  std::vector<std::int32_t> encode(std::string_view text, bool parse_special) const {
    if (text.size() > static_cast<std::size_t>((std::numeric_limits<std::int32_t>::max)()))
      throw coterie::ValueError("Tokenizer::encode: text: expected fewer than 2147483648 bytes, got " +
                                std::to_string(text.size()));
    Encoder encoder{*this};
    std::size_t plain = 0;  // begin of the text that is not encoded yet
    for (std::size_t at = 0; at < text.size();) {
      const Special* const special = special_at(text.substr(at), parse_special);
      if (!special) {
        ++at;
        continue;
      }
      encoder.add_text(text.substr(plain, at - plain));
      encoder.tokens.push_back(special->second);
      plain = at += special->first.size();
    }
    encoder.add_text(text.substr((std::min)(plain, text.size())));
    return std::move(encoder.tokens);
  }

  /// The bytes of tokens, end to end: of what encode() made, the text, if has_byte() holds for all of its bytes.
  /// Requires tokens (ValueError).
  std::string decode(std::span<const std::int32_t> ids) const {
    std::string text;
    for (const std::int32_t id : ids) {
      check("decode", id);
      text += bytes_of(id);
    }
    return text;
  }

 private:
  using Special = std::pair<std::string, std::int32_t>;

  /// What encode() has made so far, and where tokens of words are that were seen before.
  struct Encoder {
    const Tokenizer& tokenizer;
    std::vector<std::int32_t> tokens{};
    std::unordered_map<std::string_view, std::pair<std::size_t, std::size_t>> words{};
    std::vector<std::int32_t> word_tokens{};
    BytePairs::Scratch scratch{};

    void add_text(std::string_view text) {
      for_each_word(tokenizer.pattern_, text, [&](std::string_view word) { add_word(word); });
    }

    void add_word(std::string_view word) {
      const auto [known, fresh] = words.try_emplace(word, tokens.size(), std::size_t(0));
      auto& [first, count] = known->second;
      if (fresh) {
        word_tokens.clear();
        for (const char c : word)
          if (const std::int32_t token = tokenizer.byte_tokens_[static_cast<std::uint8_t>(c)]; token >= 0)
            word_tokens.push_back(token);
        tokenizer.pairs_.merge(word_tokens, scratch, tokens);
        count = tokens.size() - first;
      } else {
        for (std::size_t i = 0; i < count; ++i) tokens.push_back(tokens[first + i]);
      }
    }
  };

  void check(const char* function, std::int32_t id) const {
    if (id < 0 || id >= size())
      throw coterie::ValueError("Tokenizer::" + std::string(function) + ": token: expected 0 to " +
                                std::to_string(size() - 1) + ", got " + std::to_string(id));
  }

  std::string_view bytes_of(std::int32_t id) const {
    const auto i = static_cast<std::size_t>(id);
    return std::string_view(bytes_).substr(begins_[i], begins_[i + 1] - begins_[i]);
  }

  /// The special token that a text begins with; null if there is none. specials_ has the longest first.
  const Special* special_at(std::string_view text, bool parse_special) const {
    if (!begins_special_[static_cast<std::uint8_t>(text[0])]) return nullptr;
    for (const Special& special : specials_)
      if (text.starts_with(special.first) &&
          (parse_special || kinds_[static_cast<std::size_t>(special.second)] == TokenKind::user_defined))
        return &special;
    return nullptr;
  }

  /// Reads tokens and their kinds. Returns tokens by their text in the file.
  std::unordered_map<std::string, std::int32_t> read_tokens(const GgufFile& file) {
    const char* const key = "tokenizer.ggml.tokens";
    const char* const kind_key = "tokenizer.ggml.token_type";
    const auto tokens = file.list<std::string>(key);
    if (tokens.empty() || tokens.size() > static_cast<std::size_t>((std::numeric_limits<std::int32_t>::max)()))
      file.fail_key(key, "expected 1 to 2147483647 tokens, got " + std::to_string(tokens.size()));
    std::vector<std::int32_t> kinds(tokens.size(), static_cast<std::int32_t>(TokenKind::normal));
    if (file.has(kind_key)) kinds = file.list<std::int32_t>(kind_key);
    if (kinds.size() != tokens.size())
      file.fail_key(kind_key,
                    "expected " + std::to_string(tokens.size()) + " elements, got " + std::to_string(kinds.size()));

    std::unordered_map<std::string, std::int32_t> vocabulary;
    const detail::ByteLetters letters;
    byte_tokens_.fill(-1);
    begins_.push_back(0);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::string element = "element " + std::to_string(i) + ": ";
      const auto id = static_cast<std::int32_t>(i);
      if (kinds[i] < 1 || kinds[i] > 6)
        file.fail_key(kind_key, element + "expected 1 to 6, got " + std::to_string(kinds[i]));
      const auto kind = static_cast<TokenKind>(kinds[i]);
      if (tokens[i].empty() || !vocabulary.emplace(tokens[i], id).second)
        file.fail_key(key, element + "expected a text that no other has, got " + detail::quoted(tokens[i]));
      std::string bytes = tokens[i];
      if (kind == TokenKind::normal) {
        const std::optional<std::string> decoded = letters.bytes(tokens[i]);
        if (!decoded)
          file.fail_key(key, element + "expected letters that stand for bytes, got " + detail::quoted(tokens[i]));
        bytes = *decoded;
        if (bytes.size() == 1) byte_tokens_[static_cast<std::uint8_t>(bytes[0])] = id;
      } else if (kind != TokenKind::unused && kind != TokenKind::byte) {
        begins_special_[static_cast<std::uint8_t>(bytes[0])] = true;
        specials_.emplace_back(bytes, id);
      }
      kinds_.push_back(kind);
      bytes_ += bytes;
      begins_.push_back(bytes_.size());
    }
    std::stable_sort(specials_.begin(), specials_.end(),
                     [](const Special& a, const Special& b) { return a.first.size() > b.first.size(); });
    return vocabulary;
  }

  void read_merges(const GgufFile& file, const std::unordered_map<std::string, std::int32_t>& vocabulary) {
    const char* const key = "tokenizer.ggml.merges";
    const auto merges = file.list<std::string>(key);
    for (std::size_t i = 0; i < merges.size(); ++i) {
      const std::string element = "element " + std::to_string(i) + ": ";
      const std::size_t space = merges[i].find(' ');
      if (space == std::string::npos || merges[i].find(' ', space + 1) != std::string::npos)
        file.fail_key(key, element + "expected two tokens with a space between them, got " + detail::quoted(merges[i]));
      const std::string left = merges[i].substr(0, space), right = merges[i].substr(space + 1);
      const auto token = [&](const std::string& text) {
        const auto at = vocabulary.find(text);
        if (at == vocabulary.end())
          file.fail_key(key, element + "expected tokens of tokenizer.ggml.tokens, got " + detail::quoted(text));
        return at->second;
      };
      if (!pairs_.add(token(left), token(right), token(left + right)))
        file.fail_key(key, element + "expected pairs that differ, got " + detail::quoted(merges[i]) + " twice");
    }
  }

  std::optional<std::int32_t> read_id(const GgufFile& file, std::string_view key) const {
    if (!file.has(key)) return {};
    const auto id = file.get<std::int32_t>(key);
    if (id < 0 || id >= size())
      file.fail_key(key, "expected a token, 0 to " + std::to_string(size() - 1) + ", got " + std::to_string(id));
    return id;
  }

  PreTokenizer pattern_ = PreTokenizer::gpt2;
  std::vector<TokenKind> kinds_;
  std::string bytes_;
  /// Where the bytes of each token begin, and the end of the last.
  std::vector<std::size_t> begins_;
  std::array<std::int32_t, 256> byte_tokens_{};
  BytePairs pairs_;
  /// Tokens that are found in text as they are, the longest first.
  std::vector<Special> specials_;
  std::array<bool, 256> begins_special_{};
  std::optional<std::int32_t> bos_, eos_;
  bool add_bos_ = false;
};

}  // namespace pretrained
