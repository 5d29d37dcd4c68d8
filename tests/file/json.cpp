#include "coterie/file/json.hpp"

#include <vector>

#include "catch.hpp"
#include "errors.hpp"

using namespace coterie;
using test::contains;
using test::message_of;

namespace {

const std::string where = "here";

std::string read_string(std::string_view text) {
  detail::JsonReader json(text, where);
  std::string result = json.string();
  json.end();
  return result;
}

std::string string_fault(std::string_view text) {
  return message_of<FileError>([&] { read_string(text); });
}

Index read_number(std::string_view text) {
  detail::JsonReader json(text, where);
  const Index result = json.whole_number();
  json.end();
  return result;
}

}  // namespace

TEST_CASE("JSON strings: escapes become UTF-8") {
  REQUIRE(read_string(R"("")").empty());
  REQUIRE(read_string(R"( "a b" )") == "a b");
  REQUIRE(read_string(R"("\"\\\/\b\f\n\r\t")") == "\"\\/\b\f\n\r\t");
  REQUIRE(read_string(R"("\u0041\u00e9\u20AC")") == "A\xC3\xA9\xE2\x82\xAC");
  REQUIRE(read_string(R"("\ud83d\ude00")") == "\xF0\x9F\x98\x80");
  REQUIRE(read_string(R"("\u0000")") == std::string(1, '\0'));
  REQUIRE(read_string("\"\xE2\x82\xAC\"") == "\xE2\x82\xAC");
}

TEST_CASE("JSON strings: what is none is refused, and where it stops being one is named") {
  REQUIRE(string_fault("\"abc") ==
          "here: damaged header: byte 4: expected the end of a string, got the end of the header");
  REQUIRE(contains(string_fault("\"a\nb\""), "byte 2: expected a character of a string, got '\\x0a'"));
  for (const char* const bad : {"",
                                "abc",
                                "\"\\",
                                "\"\\x41\"",
                                "\"\\u12\"",
                                "\"\\u12G4\"",
                                "\"\\u",
                                "\"\\ud800\"",
                                "\"\\ud800a\"",
                                "\"\\ud800\\n\"",
                                "\"\\ud800\\u0041\"",
                                "\"\\udc00\"",
                                "\"\\ud800\\ud800\"",
                                "\"\x80\"",
                                "\"\xC0\x80\"",
                                "\"\xE0\x80\x80\"",
                                "\"\xED\xA0\x80\"",
                                "\"\xF0\x80\x80\x80\"",
                                "\"\xF4\x90\x80\x80\"",
                                "\"\xF5\x80\x80\x80\"",
                                "\"\xE2\x82\"",
                                "\"\xE2\x82",
                                "\"\x7F\xFF\"",
                                "\"a\" b"}) {
    INFO(detail::in_quotes(bad));
    REQUIRE(!string_fault(bad).empty());
  }
}

TEST_CASE("JSON numbers: whole ones that Index counts, and no others") {
  REQUIRE(read_number("0") == 0);
  REQUIRE(read_number(" 90210 ") == 90210);
  REQUIRE(read_number("9223372036854775807") == std::numeric_limits<Index>::max());
  for (const char* const bad : {"", "-1", "+1", "01", "00", "1.0", "1e3", "9223372036854775808", "92233720368547758070",
                                "99999999999999999999999999", "0x10", "a", "1 2"}) {
    INFO(bad);
    REQUIRE_THROWS_AS(read_number(bad), FileError);
  }
}

TEST_CASE("JSON objects and lists") {
  const std::string text = R"( { "a" : [1 , 2], "b":[], "c" : [3] } )";
  detail::JsonReader json(text, where);
  std::vector<std::string> keys;
  std::vector<Index> numbers;
  json.object([&](std::string key) {
    keys.push_back(key);
    json.list([&] { numbers.push_back(json.whole_number()); });
  });
  json.end();
  REQUIRE(keys == std::vector<std::string>{"a", "b", "c"});
  REQUIRE(numbers == std::vector<Index>{1, 2, 3});
  for (const char* const bad : {"", "{", "{,}", "{\"a\":[1],}", "{\"a\"}", "{\"a\":[1]", "{\"a\":[1}}", "{\"a\":[1,]}",
                                "{\"a\":[,1]}", "{\"a\":[1 2]}", "{\"a\":[1]}}", "{a:[1]}", "[1]"}) {
    INFO(bad);
    detail::JsonReader reader(bad, where);
    REQUIRE_THROWS_AS(
        [&] {
          reader.object([&](const std::string&) { reader.list([&] { reader.whole_number(); }); });
          reader.end();
        }(),
        FileError);
  }
}

TEST_CASE("written JSON strings read back") {
  std::string every;
  for (int c = 0; c < 128; ++c) every += static_cast<char>(c);
  every += "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  std::string text;
  detail::append_json_string(text, every);
  REQUIRE(read_string(text) == every);
}

TEST_CASE("what an error quotes is short and printable") {
  REQUIRE(detail::in_quotes("a b") == "'a b'");
  REQUIRE(detail::in_quotes("\x1b[2J\xff") == "'\\x1b[2J\\xff'");
  REQUIRE(detail::in_quotes(std::string(100, 'x')) == "'" + std::string(80, 'x') + "...'");
}
