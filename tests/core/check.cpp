#include "coterie/core/check.hpp"

#include <type_traits>

#include "allocation.hpp"
#include "catch.hpp"
#include "errors.hpp"

using namespace coterie;
using namespace test;

TEST_CASE("errors are what the standard's handlers expect") {
  STATIC_REQUIRE(std::is_base_of_v<std::invalid_argument, ShapeError>);
  STATIC_REQUIRE(std::is_base_of_v<std::invalid_argument, ValueError>);
  STATIC_REQUIRE(std::is_base_of_v<std::runtime_error, FileError>);
  STATIC_REQUIRE(!std::is_base_of_v<ShapeError, ValueError>);
}

TEST_CASE("fail names function, argument, what was expected and what was there") {
  REQUIRE(message_of<ShapeError>([] { detail::fail<ShapeError>("f", "q", "4 x 2", detail::join(3, " x ", 2)); }) ==
          "f: q: expected 4 x 2, got 3 x 2");
  REQUIRE_THROWS_AS(detail::fail<ValueError>("f", "heads", 1, 0), ValueError);
}

TEST_CASE("faults come together, or not at all") {
  detail::Faults none("f");
  none.expect(true, "a", 1, 2);
  none.raise();
  detail::Faults two("f");
  two.expect(false, "a", 1, 2);
  two.expect(true, "b", 1, 2);
  two.expect(false, "c", "at least 1", -1.5);
  REQUIRE(message_of<ValueError>([&] { two.raise(); }) == "f: a: expected 1, got 2; c: expected at least 1, got -1.5");
}

TEST_CASE("a text is whole, or memory has ended") {
  std::string text;
  const auto attempt = [&] { text = detail::join("a text that is too long for short strings: ", 12345678, ' ', 2.5); };
  const auto check = [&](bool threw) { REQUIRE(threw); };
  REQUIRE(fail_each_allocation([&] { text.clear(); }, attempt, check) >= 2);
  REQUIRE(text == "a text that is too long for short strings: 12345678 2.5");
}

TEST_CASE("texts do not depend on the program's locale") {
  struct Grouped : std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouped));
  const std::string text = detail::join(1234567);
  std::locale::global(before);
  REQUIRE(text == "1234567");
}
