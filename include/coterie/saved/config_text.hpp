// Settings of a layer as text and back, by their paths.
#pragma once

#include <array>
#include <charconv>
#include <concepts>
#include <cstdint>
#include <iomanip>
#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include "coterie/file/json.hpp"
#include "coterie/layer/config.hpp"

namespace coterie {

namespace detail {

/// The format of saved layers that this library writes, and the newest that it reads. A new setting, tensor or
/// enumerator makes a new format.
inline constexpr int format_version = 3;

/// The oldest format that this library reads. Format 1, of coterie 0.1, has other names of settings.
inline constexpr int oldest_format = 2;

/// The first format that has a setting. List settings that came after format 2 here, by their paths.
inline int first_format(std::string_view path) { return path == "routed.sinks" || path == "routed.recent" ? 3 : 2; }

/// The names of the values 0, 1, ... of an enumeration. Add new enumerators here.
template <class E>
inline constexpr std::array<std::string_view, 0> enum_names{};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<Routing>{"learned", "random"};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<MembershipKind>{"nearest", "balanced"};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<Unassigned>{"left_out", "nearest"};
template <>
inline constexpr std::array<std::string_view, 3> enum_names<Combine>{"single", "mean", "lse"};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<Normalisation>{"layer_norm", "unit_length"};
template <>
inline constexpr std::array<std::string_view, 3> enum_names<Logits>{"raw", "normalised", "normalised_keys"};
template <>
inline constexpr std::array<std::string_view, 3> enum_names<Self>{"visible", "only_if_alone", "never"};
template <>
inline constexpr std::array<std::string_view, 6> enum_names<PositionKind>{"rotary", "bias",       "none",
                                                                          "alibi",  "t5_buckets", "shaw"};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<RotaryLayout>{"halves", "interleaved"};
template <>
inline constexpr std::array<std::string_view, 3> enum_names<Average>{"counts_and_sums", "batch_mean",
                                                                     "batch_direction"};

/// A finite number as the shortest decimal of 15 to 17 digits that reads back as the same one, in any locale. (Not
/// std::to_chars: the library of clang has no std::from_chars of floating point to go with it.)
inline std::string number_text(double value) {
  for (int digits = 15;; ++digits) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << std::setprecision(digits) << value;
    std::istringstream back(text.str());
    back.imbue(std::locale::classic());
    double read = 0;
    if (digits == 17 || (back >> read && read == value)) return text.str();
  }
}

template <class V>
struct IsOptional : std::false_type {};
template <class V>
struct IsOptional<std::optional<V>> : std::true_type {};

/// The text of a field: numbers, true or false, names of enumerators, "automatic" for an optional without a value.
template <class V>
std::string field_text(const V& value) {
  if constexpr (IsOptional<V>::value) {
    return value ? field_text(*value) : "automatic";
  } else if constexpr (std::is_enum_v<V>) {
    static_assert(enum_names<V>.size() > 0, "an enumeration without names");
    const auto number = static_cast<std::size_t>(value);
    if (number >= enum_names<V>.size()) fail<ValueError>("field_text", "value", "an enumerator", number);
    return std::string(enum_names<V>[number]);
  } else if constexpr (std::same_as<V, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::integral<V>) {
    return std::to_string(value);
  } else {
    return number_text(value);
  }
}

/// Sets a field from its text. Returns nothing or, where the text is wrong, what was expected.
template <class V>
std::string read_field(std::string_view text, V& value) {
  if constexpr (IsOptional<V>::value) {
    value.reset();
    if (text == "automatic") return {};
    const std::string expected = read_field(text, value.emplace());
    return expected.empty() ? expected : "automatic, or " + expected;
  } else if constexpr (std::is_enum_v<V>) {
    std::string expected = "one of";
    for (std::size_t i = 0; i < enum_names<V>.size(); ++i) {
      if (text == enum_names<V>[i]) {
        value = static_cast<V>(i);
        return {};
      }
      expected += join(i == 0 ? " " : ", ", enum_names<V>[i]);
    }
    return expected;
  } else if constexpr (std::same_as<V, bool>) {
    value = text == "true";
    return text == "true" || text == "false" ? "" : "true or false";
  } else if constexpr (std::integral<V>) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size() ? "" : "a whole number in range";
  } else {
    std::istringstream stream{std::string(text)};
    stream.imbue(std::locale::classic());
    stream >> std::noskipws >> value;
    return stream && stream.peek() == std::istringstream::traits_type::eof() ? "" : "a number";
  }
}

/// Reads the settings of a config from a file of a format: text_of(path) gives the text of one, null where the file
/// has none. A setting whose format first(path) is later than the file's keeps its default. Returns the fault of the
/// first wrong setting, or nothing.
template <class C, class TextOf, class First>
std::string read_settings(C& config, int format, TextOf&& text_of, First&& first) {
  std::string fault;
  visit(config, [&](std::string_view path, auto& field) {
    if (first(path) > format || !fault.empty()) return;
    const std::string* const text = text_of(path);
    const std::string expected = text ? read_field(std::string_view(*text), field) : "a value";
    if (!expected.empty())
      fault = join(path, ": damaged: expected ", expected, ", got ", text ? in_quotes(*text) : "none");
  });
  return fault;
}

}  // namespace detail
}  // namespace coterie
