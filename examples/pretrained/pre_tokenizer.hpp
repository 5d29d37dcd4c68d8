// The cutting of text into words, before byte pairs are merged inside of each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "unicode_classes.hpp"

namespace pretrained {

/// Patterns by the names that tokenizer.ggml.pre has for them.
enum class PreTokenizer {
  /// The pattern of GPT-2:
  /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
  gpt2,
  /// Every \p{N} is a word; what is between them is cut by the pattern of GPT-2.
  smollm
};

namespace detail {

/// The character that a text begins with, and its bytes; of malformed UTF-8 a byte of no class.
struct Character {
  CharacterClass kind = CharacterClass::other;
  std::size_t bytes = 1;
};

/// Requires a text that is not empty.
inline Character first_character(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {character_class(lead), 1};
  const std::size_t bytes = lead >= 0xC2 && lead < 0xE0 ? 2 : lead >= 0xE0 && lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
  if (lead < 0xC2 || bytes == 1 || bytes > text.size()) return {};
  // No overlong forms, no surrogates, nothing beyond U+10FFFF.
  const std::uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const std::uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return {};
  char32_t value = lead & (0x7Fu >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {};
    value = value << 6 | (byte(i) & 0x3Fu);
  }
  return {character_class(value), bytes};
}

/// The end of the run of characters of a class from `at` on.
inline std::size_t end_of_run(std::string_view text, std::size_t at, CharacterClass kind) {
  while (at < text.size()) {
    const Character next = first_character(text.substr(at));
    if (next.kind != kind) break;
    at += next.bytes;
  }
  return at;
}

/// The length of the first word of a text that is not empty, by the pattern of GPT-2.
inline std::size_t gpt2_word(std::string_view text) {
  if (text[0] == '\'')
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (text.starts_with(ending)) return ending.size();
  const std::size_t space = text[0] == ' ' ? 1 : 0;
  if (space < text.size()) {
    const CharacterClass kind = first_character(text.substr(space)).kind;
    if (kind != CharacterClass::space) return end_of_run(text, space, kind);
  }
  // White space up to the end of the text, or but its last character, which goes with what follows, or alone.
  std::size_t end = 0, last = 0;
  while (end < text.size()) {
    const Character next = first_character(text.substr(end));
    if (next.kind != CharacterClass::space) return last > 0 ? last : end;
    last = end;
    end += next.bytes;
  }
  return end;
}

/// The length of the first piece of a text that is not empty: a number, or everything before the next one.
inline std::size_t piece_between_numbers(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Character next = first_character(text.substr(at));
    if (next.kind == CharacterClass::number) return at > 0 ? at : next.bytes;
    at += next.bytes;
  }
  return at;
}

}  // namespace detail

/// Calls visit(std::string_view word) for every word of a text, in order; end to end they are the text.
/// Cost: linear in the text.
template <class Visit>
void for_each_word(PreTokenizer pattern, std::string_view text, Visit&& visit) {
  while (!text.empty()) {
    std::string_view piece = text;
    if (pattern == PreTokenizer::smollm) piece = text.substr(0, detail::piece_between_numbers(text));
    text.remove_prefix(piece.size());
    while (!piece.empty()) {
      const std::size_t length = detail::gpt2_word(piece);
      visit(piece.substr(0, length));
      piece.remove_prefix(length);
    }
  }
}

}  // namespace pretrained
