// Bytes as text that a terminal can show, one by one.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace examples {

/// UTF-8 is passed on in whole characters; other bytes, and control characters but tab and newline, become '?'.
class PrintableText {
 public:
  /// `indent` follows every newline.
  explicit PrintableText(std::string indent = "") : indent_(std::move(indent)) {}

  /// The text to print after this byte.
  std::string add(std::uint8_t byte) {
    std::string text;
    if (!begun_.empty()) {
      if (byte >= low_ && byte <= high_) {
        begun_ += static_cast<char>(byte);
        low_ = 0x80;
        high_ = 0xbf;
        return begun_.size() == length_ ? std::exchange(begun_, {}) : text;
      }
      text = finish();
    }
    length_ = byte >= 0xc2 && byte < 0xe0 ? 2 : byte >= 0xe0 && byte < 0xf0 ? 3 : byte >= 0xf0 && byte < 0xf5 ? 4 : 1;
    if (length_ > 1) {
      // No overlong forms, no surrogates, nothing beyond U+10FFFF; of two bytes no control characters, U+0080 to
      // U+009F.
      low_ = byte == 0xe0 || byte == 0xc2 ? 0xa0 : byte == 0xf0 ? 0x90 : 0x80;
      high_ = byte == 0xed ? 0x9f : byte == 0xf4 ? 0x8f : 0xbf;
      begun_ = static_cast<char>(byte);
    } else if (byte == '\n') {
      text += '\n' + indent_;
    } else {
      text += byte == '\t' || (byte >= 32 && byte < 127) ? static_cast<char>(byte) : '?';
    }
    return text;
  }

  /// The text to print at the end: a '?' for each byte of a character that was not finished.
  std::string finish() { return std::string(std::exchange(begun_, {}).size(), '?'); }

 private:
  std::string indent_, begun_;
  std::size_t length_ = 1;
  std::uint8_t low_ = 0x80, high_ = 0xbf;  // of the next byte of a character that has begun
};

/// The same for a whole text, with every line indented.
inline std::string printable(std::span<const std::uint8_t> bytes, const std::string& indent) {
  PrintableText printable(indent);
  std::string text = indent;
  for (const std::uint8_t byte : bytes) text += printable.add(byte);
  return text + printable.finish();
}

}  // namespace examples
