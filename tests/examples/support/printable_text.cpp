#include "support/printable_text.hpp"

#include "catch.hpp"

namespace {

std::string printed(const std::string& bytes, const std::string& indent = "") {
  examples::PrintableText text(indent);
  std::string result;
  for (const char c : bytes) result += text.add(static_cast<std::uint8_t>(c));
  return result + text.finish();
}

}  // namespace

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
