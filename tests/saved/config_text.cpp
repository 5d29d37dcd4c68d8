#include "coterie/saved/config_text.hpp"

#include <limits>
#include <map>
#include <set>

#include "catch.hpp"
#include "errors.hpp"
#include "layer/kinds.hpp"

using namespace test;

namespace {

std::vector<std::string> texts(const RoutingAttentionConfig& config) {
  std::vector<std::string> all;
  visit(config, [&](std::string_view name, const auto& field) {
    all.push_back(std::string(name) + '=' + detail::field_text(field));
  });
  return all;
}

RoutingAttentionConfig copy_by_text(const RoutingAttentionConfig& config) {
  RoutingAttentionConfig copy;
  std::vector<std::string> values;
  visit(config, [&](std::string_view, const auto& field) { values.push_back(detail::field_text(field)); });
  std::size_t i = 0;
  visit(copy, [&](std::string_view name, auto& field) {
    INFO(name << " " << values[i]);
    REQUIRE(detail::read_field(values[i++], field).empty());
  });
  return copy;
}

// A value that differs from the default.
template <class V>
void change(V& value) {
  if constexpr (detail::IsOptional<V>::value)
    change(value.emplace());
  else if constexpr (std::is_enum_v<V>)
    value = static_cast<V>((static_cast<std::size_t>(value) + 1) % detail::enum_names<V>.size());
  else if constexpr (std::is_same_v<V, bool>)
    value = !value;
  else
    value = value / 3 + 7;
}

template <class V>
std::string field_fault(const char* text, V value) {
  return detail::read_field(text, value);
}

// A config that has grown.
struct Grown {
  int old = 3;
  double fresh = 0.5;
};
template <class F>
void visit(Grown& c, F&& f) {
  f("old", c.old);
  f("fresh", c.fresh);
}

}  // namespace

TEST_CASE("every setting is in the formats that this library writes and reads") {
  REQUIRE(detail::oldest_format <= detail::format_version);
  const RoutingAttentionConfig config;
  visit(config, [&](std::string_view path, const auto&) {
    INFO(path);
    REQUIRE(detail::first_format(path) >= detail::oldest_format);
    REQUIRE(detail::first_format(path) <= detail::format_version);
  });
}

TEST_CASE("configs come back from their texts: of every kind, resolved or not") {
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    REQUIRE(copy_by_text(kind.config) == kind.config);
    const RoutingAttentionConfig resolved = detail::resolve(kind.config);
    REQUIRE(copy_by_text(resolved) == resolved);
  }
  // And with any one field changed, which another config does not have.
  const RoutingAttentionConfig usual;
  int fields = 0;
  visit(usual, [&](std::string_view, const auto&) { ++fields; });
  for (int changed = 0; changed < fields; ++changed) {
    RoutingAttentionConfig config;
    int i = 0;
    visit(config, [&](std::string_view, auto& field) {
      if (i++ == changed) change(field);
    });
    REQUIRE(!(config == usual));
    REQUIRE(texts(config) != texts(usual));
    REQUIRE(copy_by_text(config) == config);
  }
}

TEST_CASE("fields are written as a reader of the file would expect") {
  const std::vector<std::string> all = texts(detail::resolve(kinds()[0].config));
  for (const char* const expected :
       {"model_dim=10", "causal=true", "bias=false", "routed.routing=learned", "routed.matching.self=only_if_alone",
        "routed.matching.shared_qk=true", "local.positions.kind=rotary", "routed.router.decay=0.999",
        "routed.matching.gain=3", "dense.matching.gain=automatic", "local.positions.base=10000",
        "routed.router.dead_share=0.1", "seed=3"}) {
    INFO(expected);
    REQUIRE(std::find(all.begin(), all.end(), expected) != all.end());
  }
  REQUIRE(detail::field_text(std::optional<Self>()) == "automatic");
  REQUIRE(detail::field_text(std::numeric_limits<std::uint64_t>::max()) == "18446744073709551615");
  REQUIRE_THROWS_AS(detail::field_text(static_cast<Routing>(7)), ValueError);
}

TEST_CASE("doubles come back exactly, in any locale") {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale usual = std::locale::global(std::locale(std::locale::classic(), new Comma));
  std::vector<double> values = {0.0,
                                -0.0,
                                0.1,
                                1.0 / 3,
                                1e300,
                                5e-324,
                                123456789.125,
                                0.1 + 0.2,
                                2.2250738585072014e-308,
                                1e-4,
                                std::numeric_limits<double>::max()};
  Random random(1);
  for (int i = 0; i < 1000; ++i) values.push_back(random.uniform() * std::pow(10, random.uniform(-20, 20)));
  bool same = true;
  for (const double value : values) {
    double back = 7;
    same = same && detail::read_field(detail::number_text(value), back).empty() &&
           std::memcmp(&back, &value, sizeof value) == 0;
  }
  const std::string thousand = detail::field_text(Index(1234567));
  std::locale::global(usual);
  REQUIRE(same);
  REQUIRE(thousand == "1234567");
}

TEST_CASE("texts that are no value of a field are refused, with what would have been right") {
  for (const char* const bad : {"", " 1", "1 ", "1.5", "+1", "x", "9223372036854775808", "0x10"})
    REQUIRE(field_fault(bad, Index()) == "a whole number in range");
  REQUIRE(field_fault("-1", Index()).empty());
  REQUIRE(!field_fault("-1", std::uint64_t()).empty());
  for (const char* const bad : {"", " 1", "1 ", "1,5", "x", "nan", "inf", "1e999", "0.5abc"}) {
    INFO(bad);
    REQUIRE(field_fault(bad, 0.0) == "a number");
  }
  for (const char* const bad : {"", "1", "True", "automatic"}) REQUIRE(field_fault(bad, false) == "true or false");
  for (const char* const bad : {"", "0", "Learned", "learned "})
    REQUIRE(field_fault(bad, Routing()) == "one of learned, random");
  REQUIRE(field_fault("x", std::optional<bool>()) == "automatic, or true or false");
}

TEST_CASE("every enumerator has a name: a value beyond the names is refused as a setting, too") {
  RoutingAttentionConfig good = kinds()[0].config;
  good.dense.heads = 1;
  int enumerations = 0;
  visit(good, [&](std::string_view wanted, const auto&) {
    RoutingAttentionConfig config = good;
    bool changed = false;
    visit(config, [&](std::string_view name, auto& field) {
      using V = std::decay_t<decltype(field)>;
      if (name != wanted) return;
      if constexpr (std::is_enum_v<V>) {
        field = static_cast<V>(detail::enum_names<V>.size());
        changed = true;
      } else if constexpr (detail::IsOptional<V>::value) {
        if constexpr (std::is_enum_v<typename V::value_type>) {
          field = static_cast<typename V::value_type>(detail::enum_names<typename V::value_type>.size());
          changed = true;
        }
      }
    });
    if (!changed) return;
    ++enumerations;
    INFO(wanted);
    REQUIRE(contains(message_of<ValueError>([&] { detail::resolve(config); }), std::string(wanted) + ": expected"));
  });
  REQUIRE(enumerations == 20);
}

TEST_CASE("a field that came with a later format keeps its default in older files, and is required in others") {
  std::map<std::string, std::string, std::less<>> file{{"old", "7"}};
  Grown config;
  const auto read = [&](int format) {
    config = {};
    return detail::read_settings(
        config, format,
        [&](std::string_view name) {
          const auto text = file.find(name);
          return text == file.end() ? nullptr : &text->second;
        },
        [](std::string_view name) { return name == "fresh" ? 2 : 1; });
  };
  REQUIRE(read(1).empty());
  REQUIRE(config.old == 7);
  REQUIRE(config.fresh == 0.5);
  REQUIRE(read(2) == "fresh: damaged: expected a value, got none");
  file["fresh"] = "0.25";
  REQUIRE(read(2).empty());
  REQUIRE(config.fresh == 0.25);
  REQUIRE(read(1).empty());
  REQUIRE(config.fresh == 0.5);
  file["old"] = "x";
  REQUIRE(read(2) == "old: damaged: expected a whole number in range, got 'x'");
  file.erase("old");
  REQUIRE(read(1) == "old: damaged: expected a value, got none");
}
