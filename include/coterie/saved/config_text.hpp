// The fields of a layer's config by name, as text and back: one list that writing, reading and comparing share.
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

/// The format of saved layers: of the files that this library writes, and the newest that it reads. A field, tensor or
/// enumerator more is a new format.
inline constexpr int format_version = 1;

/// Calls f(name, field, since) for every field of a config, in the order of its declaration; `since` is the first
/// format that has it. C: RoutingAttentionConfig, const or not. A new field belongs in here (a test counts them).
template <class C, class F>
requires std::same_as<std::remove_const_t<C>, RoutingAttentionConfig>
void visit_fields(C& c, F&& f) {
  f("model_dim", c.model_dim, 1);
  f("heads", c.heads, 1);
  f("kv_heads", c.kv_heads, 1);
  f("head_dim", c.head_dim, 1);
  f("routed_heads", c.routed_heads, 1);
  f("clusters", c.clusters, 1);
  f("window", c.window, 1);
  f("local_window", c.local_window, 1);
  f("lookahead", c.lookahead, 1);
  f("causal", c.causal, 1);
  f("routing", c.routing, 1);
  f("membership", c.membership, 1);
  f("probes", c.probes, 1);
  f("unassigned", c.unassigned, 1);
  f("combine", c.combine, 1);
  f("mean_epsilon", c.mean_epsilon, 1);
  f("query_share", c.query_share, 1);
  f("shared_qk", c.shared_qk, 1);
  f("self", c.self, 1);
  f("induction", c.induction, 1);
  f("local_induction", c.local_induction, 1);
  f("key_taps", c.key_taps, 1);
  f("normalisation", c.normalisation, 1);
  f("logits", c.logits, 1);
  f("gain", c.gain, 1);
  f("learned_gain", c.learned_gain, 1);
  f("memory", c.memory, 1);
  f("soft_cap", c.soft_cap, 1);
  f("dropout", c.dropout, 1);
  f("bias", c.bias, 1);
  f("globals", c.globals, 1);
  f("dense_up_to", c.dense_up_to, 1);
  f("local_positions", c.local_positions, 1);
  f("routed_positions", c.routed_positions, 1);
  f("rotary_layout", c.rotary_layout, 1);
  f("rotary_base", c.rotary_base, 1);
  f("position_buckets", c.position_buckets, 1);
  f("max_distance", c.max_distance, 1);
  f("routed_distances", c.routed_distances, 1);
  f("decay", c.decay, 1);
  f("average", c.average, 1);
  f("renormalise", c.renormalise, 1);
  f("dead_share", c.dead_share, 1);
  f("split_share", c.split_share, 1);
  f("commitment", c.commitment, 1);
  f("seed", c.seed, 1);
}

/// The names of an enumeration's values 0, 1, ...; a new enumerator belongs in here.
template <class E>
inline constexpr std::array<std::string_view, 0> enum_names{};
template <>
inline constexpr std::array<std::string_view, 3> enum_names<Routing>{"learned", "random", "dense"};
template <>
inline constexpr std::array<std::string_view, 2> enum_names<Membership>{"nearest", "balanced"};
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

/// Sets a field from its text; empty, or what would have been right.
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

/// Reads the fields of a config from a file of a format: text_of(name) gives the text of a field, null where the file
/// has none. A field that came with a later format keeps its default. Returns what is wrong with the first field that
/// is, or nothing.
template <class C, class TextOf>
std::string read_fields(C& config, int format, TextOf&& text_of) {
  std::string fault;
  visit_fields(config, [&](std::string_view name, auto& field, int since) {
    if (since > format || !fault.empty()) return;
    const std::string* const text = text_of(name);
    const std::string expected = text ? read_field(std::string_view(*text), field) : "a value";
    if (!expected.empty())
      fault = join(name, ": damaged: expected ", expected, ", got ", text ? in_quotes(*text) : "none");
  });
  return fault;
}

}  // namespace detail
}  // namespace coterie
