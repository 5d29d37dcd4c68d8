// The JSON of safetensors headers: objects, lists, strings and whole numbers; no recursion, whatever a file holds.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie::detail {

/// Bytes of the UTF-8 character at text[at]; 0 where there is none: cut off, overlong, a surrogate, beyond U+10FFFF.
inline std::size_t utf8_length(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u;
  };
  const auto within = [&](std::size_t i, unsigned low, unsigned high) { return byte(i) >= low && byte(i) <= high; };
  if (at >= text.size()) return 0;
  if (within(0, 0, 0x7F)) return 1;
  if (within(0, 0xC2, 0xDF)) return within(1, 0x80, 0xBF) ? 2 : 0;
  if (within(0, 0xE0, 0xEF))
    return within(1, byte(0) == 0xE0 ? 0xA0 : 0x80, byte(0) == 0xED ? 0x9F : 0xBF) && within(2, 0x80, 0xBF) ? 3 : 0;
  if (within(0, 0xF0, 0xF4))
    return within(1, byte(0) == 0xF0 ? 0x90 : 0x80, byte(0) == 0xF4 ? 0x8F : 0xBF) && within(2, 0x80, 0xBF) &&
                   within(3, 0x80, 0xBF)
               ? 4
               : 0;
  return 0;
}

inline bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = utf8_length(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

/// Text of a file as an error quotes it: short, and nothing in it that a terminal would obey.
inline std::string in_quotes(std::string_view text) {
  constexpr std::size_t most = 80;
  constexpr char digits[] = "0123456789abcdef";
  std::string result = "'";
  for (const char c : text.substr(0, most)) {
    if (c >= ' ' && c <= '~') {
      result += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      result += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    }
  }
  return result + (text.size() > most ? "...'" : "'");
}

/// Appends `text` as a JSON string. Requires UTF-8.
inline void append_json_string(std::string& out, std::string_view text) {
  constexpr char digits[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (static_cast<unsigned char>(c) < 0x20)
      out += {'\\', 'u', '0', '0', digits[c >> 4], digits[c & 15]};
    else
      out += c;
  }
  out += '"';
}

/// Reads JSON from the front. Every fault is a FileError "where: damaged header: byte n: expected ..., got ...".
class JsonReader {
 public:
  /// Refers to both.
  JsonReader(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  /// Reads an object; member(key) has to read the value.
  template <class F>
  void object(F&& member) {
    expect('{');
    if (take('}')) return;
    do {
      std::string key = string();
      expect(':');
      member(std::move(key));
    } while (take(','));
    expect('}');
  }

  /// Reads a list; element() has to read one of its values.
  template <class F>
  void list(F&& element) {
    expect('[');
    if (take(']')) return;
    do {
      element();
    } while (take(','));
    expect(']');
  }

  /// A string, escapes resolved, as UTF-8.
  std::string string() {
    expect('"');
    std::string result;
    while (true) {
      if (at_ == text_.size()) fail("the end of a string");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return result;
      }
      if (c == '\\') {
        escape(result);
        continue;
      }
      const std::size_t length = utf8_length(text_, at_);
      if (length == 0 || static_cast<unsigned char>(c) < 0x20) fail("a character of a string");
      result.append(text_.substr(at_, length));
      at_ += length;
    }
  }

  /// Reads a null where there is one; whether there was.
  bool null() {
    skip_space();
    if (text_.substr(at_, 4) != "null") return false;
    at_ += 4;
    return true;
  }

  /// A whole number of at least 0 that fits in Index. Fractions and exponents are not numbers here.
  Index whole_number() {
    skip_space();
    const std::size_t begin = at_;
    Index value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const Index digit = text_[at_] - '0';
      if (at_ > begin && value == 0) fail("a number without leading zeros");
      if (value > ((std::numeric_limits<Index>::max)() - digit) / 10) fail("a number of 63 bits");
      value = 10 * value + digit;
    }
    if (at_ == begin) fail("a whole number");
    return value;
  }

  /// Requires that nothing but white space is left.
  void end() {
    skip_space();
    if (at_ < text_.size()) fail("nothing but white space");
  }

  /// Throws for what was expected where the reader stands.
  [[noreturn]] void fail(std::string_view expected) const {
    throw FileError(join(where_, ": damaged header: byte ", at_, ": expected ", expected, ", got ",
                         at_ < text_.size() ? in_quotes(text_.substr(at_, 1)) : "the end of the header"));
  }

 private:
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(in_quotes({&c, 1}));
  }

  // At a backslash.
  void escape(std::string& out) {
    constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    if (++at_ == text_.size()) fail("an escape");
    if (text_[at_] == 'u') return unicode_escape(out);
    const std::size_t letter = letters.find(text_[at_]);
    if (letter == letters.npos) fail("an escape");
    out += meanings[letter];
    ++at_;
  }

  // At the u of \uXXXX; characters beyond U+FFFF are written as two of them, a high and a low surrogate.
  void unicode_escape(std::string& out) {
    std::uint32_t code = four_digits();
    if (code >= 0xDC00 && code <= 0xDFFF) fail("a high surrogate before a low one");
    if (code >= 0xD800 && code <= 0xDBFF) {
      if (text_.substr(at_, 2) != "\\u") fail("a low surrogate after a high one");
      ++at_;
      const std::uint32_t low = four_digits();
      if (low < 0xDC00 || low > 0xDFFF) fail("a low surrogate after a high one");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xC0 | (code >> 6));
      tail(0);
    } else if (code < 0x10000) {
      out += static_cast<char>(0xE0 | (code >> 12));
      tail(6);
      tail(0);
    } else {
      out += static_cast<char>(0xF0 | (code >> 18));
      tail(12);
      tail(6);
      tail(0);
    }
  }

  std::uint32_t four_digits() {
    std::uint32_t code = 0;
    ++at_;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (at_ == text_.size()) fail("a hexadecimal digit");
      const char c = text_[at_];
      if (c >= '0' && c <= '9')
        code = code * 16 + static_cast<std::uint32_t>(c - '0');
      else if (c >= 'a' && c <= 'f')
        code = code * 16 + static_cast<std::uint32_t>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F')
        code = code * 16 + static_cast<std::uint32_t>(c - 'A' + 10);
      else
        fail("a hexadecimal digit");
    }
    return code;
  }

  std::string_view text_;
  const std::string& where_;
  std::size_t at_ = 0;
};

}  // namespace coterie::detail
