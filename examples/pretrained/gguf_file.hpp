// A GGUF file in memory: tensors by name and metadata by key, as the reader of gguf.hpp has checked them.
#pragma once

#include <algorithm>
#include <array>
#include <coterie/core/check.hpp>
#include <coterie/core/matrix.hpp>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace pretrained {

using coterie::FileError;
using coterie::Index;

/// Element types of tensors, by the format's numbers.
enum class GgufType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30
};

/// Types of metadata, by the format's numbers.
enum class GgufValueType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

namespace detail {

struct GgufTypeInfo {
  std::uint32_t number;
  std::string_view name;
  /// Numbers in a block; rows consist of whole blocks.
  Index block;
  /// Bytes of a block.
  Index bytes;
};

/// All types whose size is known, so that a file with tensors that nobody reads is accepted.
inline constexpr std::array gguf_types{
    GgufTypeInfo{0, "F32", 1, 4},         GgufTypeInfo{1, "F16", 1, 2},         GgufTypeInfo{2, "Q4_0", 32, 18},
    GgufTypeInfo{3, "Q4_1", 32, 20},      GgufTypeInfo{6, "Q5_0", 32, 22},      GgufTypeInfo{7, "Q5_1", 32, 24},
    GgufTypeInfo{8, "Q8_0", 32, 34},      GgufTypeInfo{9, "Q8_1", 32, 40},      GgufTypeInfo{10, "Q2_K", 256, 84},
    GgufTypeInfo{11, "Q3_K", 256, 110},   GgufTypeInfo{12, "Q4_K", 256, 144},   GgufTypeInfo{13, "Q5_K", 256, 176},
    GgufTypeInfo{14, "Q6_K", 256, 210},   GgufTypeInfo{15, "Q8_K", 256, 292},   GgufTypeInfo{16, "IQ2_XXS", 256, 66},
    GgufTypeInfo{17, "IQ2_XS", 256, 74},  GgufTypeInfo{18, "IQ3_XXS", 256, 98}, GgufTypeInfo{19, "IQ1_S", 256, 50},
    GgufTypeInfo{20, "IQ4_NL", 32, 18},   GgufTypeInfo{21, "IQ3_S", 256, 110},  GgufTypeInfo{22, "IQ2_S", 256, 82},
    GgufTypeInfo{23, "IQ4_XS", 256, 136}, GgufTypeInfo{24, "I8", 1, 1},         GgufTypeInfo{25, "I16", 1, 2},
    GgufTypeInfo{26, "I32", 1, 4},        GgufTypeInfo{27, "I64", 1, 8},        GgufTypeInfo{28, "F64", 1, 8},
    GgufTypeInfo{29, "IQ1_M", 256, 56},   GgufTypeInfo{30, "BF16", 1, 2},       GgufTypeInfo{34, "TQ1_0", 256, 54},
    GgufTypeInfo{35, "TQ2_0", 256, 66},   GgufTypeInfo{39, "MXFP4", 32, 17}};

inline const GgufTypeInfo* gguf_type_info(std::uint32_t number) {
  const auto at = std::find_if(gguf_types.begin(), gguf_types.end(),
                               [&](const GgufTypeInfo& info) { return info.number == number; });
  return at == gguf_types.end() ? nullptr : &*at;
}

inline constexpr std::array<std::string_view, 13> gguf_value_names{"UINT8",  "INT8",    "UINT16", "INT16",  "UINT32",
                                                                   "INT32",  "FLOAT32", "BOOL",   "STRING", "ARRAY",
                                                                   "UINT64", "INT64",   "FLOAT64"};
/// Bytes of a value; 0 where the type does not say.
inline constexpr std::array<std::size_t, 13> gguf_value_bytes{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

inline std::string_view name_of(GgufValueType type) { return gguf_value_names[static_cast<std::size_t>(type)]; }

/// Text of a file as errors quote it: printable ASCII, at most 80 characters.
inline std::string quoted(std::string_view text) {
  std::string result = "'";
  for (const char letter : text.substr(0, 80)) result += letter >= 32 && letter < 127 ? letter : '?';
  return result + (text.size() > 80 ? "...'" : "'");
}

/// A number of the file: little-endian on every machine.
template <class T>
T little_endian(const std::byte* bytes) {
  using Bits = std::conditional_t<sizeof(T) == 1, std::uint8_t,
                                  std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                                     std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>>;
  Bits bits = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) bits = static_cast<Bits>(bits | (static_cast<Bits>(bytes[i]) << (8 * i)));
  return Eigen::numext::bit_cast<T>(bits);
}

}  // namespace detail

/// A tensor of a file.
struct GgufTensor {
  std::string name;
  GgufType type = GgufType::f32;
  /// Sizes as the format has them, innermost first: the length of a row, the number of rows, and so on.
  std::vector<Index> shape;
  std::span<const std::byte> bytes;

  Index cols() const { return shape[0]; }
  /// All rows: the product of the outer sizes.
  Index rows() const {
    Index rows = 1;
    for (std::size_t i = 1; i < shape.size(); ++i) rows *= shape[i];
    return rows;
  }
};

/// A value of the metadata, checked, in the file's bytes.
struct GgufValue {
  GgufValueType type = GgufValueType::u8;
  /// The type of an array's elements; of other values, their own.
  GgufValueType element = GgufValueType::u8;
  std::uint64_t count = 1;
  /// Numbers end to end; the text of a string; strings of an array as the file has them, each after its length.
  std::span<const std::byte> bytes;
};

/// The tensors and metadata of a file, checked; made by parse_gguf or read_gguf.
///
/// A GgufFile of read_gguf keeps the bytes of its file as long as it or a copy of it lives; one of parse_gguf refers to
/// its caller's bytes. What tensors(), values() and tensor() return lives as long as the GgufFile.
class GgufFile {
 public:
  /// All tensors, in the file's order.
  std::span<const GgufTensor> tensors() const& { return tensors_; }
  /// All metadata, by key.
  const std::map<std::string_view, GgufValue>& values() const& { return values_; }
  /// The name of the file in errors.
  const std::string& source() const { return source_; }
  std::uint32_t version() const { return version_; }

  /// The tensor of a name; null if there is none.
  const GgufTensor* find(std::string_view name) const& {
    const auto at = numbers_.find(name);
    return at == numbers_.end() ? nullptr : &tensors_[at->second];
  }
  /// The tensor of a name. Requires that there is one (FileError).
  const GgufTensor& tensor(std::string_view name) const& {
    const GgufTensor* const found = find(name);
    if (!found) fail("tensor " + detail::quoted(name) + ": expected one of this name, got none");
    return *found;
  }
  void tensors() const&& = delete;
  void values() const&& = delete;
  void find(std::string_view) const&& = delete;
  void tensor(std::string_view) const&& = delete;

  bool has(std::string_view key) const { return values_.contains(key); }

  /// The value of a key.
  /// Requires: the key, and a value that T holds exactly (FileError): for bool BOOL; for an integer any integer in its
  ///   range; for float FLOAT32, for double that and FLOAT64; for std::string STRING.
  template <class T>
  T get(std::string_view key) const {
    const GgufValue& value = required(key);
    if (value.type == GgufValueType::array)
      fail_key(key, "expected " + kind<T>() + ", got an array of " + std::to_string(value.count));
    if constexpr (std::is_same_v<T, std::string>) {
      if (value.type == GgufValueType::string) return text(value.bytes);
    } else if (const std::optional<T> number = convert<T>(value.type, value.bytes.data())) {
      return *number;
    }
    fail_key(key, "expected " + kind<T>() + ", got " + describe(value.type, value.bytes.data()));
  }

  /// The value of a key, or `otherwise` if there is no such key; one of another type is an error as in get().
  template <class T>
  T get_or(std::string_view key, T otherwise) const {
    return has(key) ? get<T>(key) : std::move(otherwise);
  }

  /// The elements of an array. Requires: the key, and an array of what get() requires (FileError).
  template <class T>
  std::vector<T> list(std::string_view key) const {
    const GgufValue& value = required(key);
    if (value.type != GgufValueType::array)
      fail_key(key, "expected an array, each " + kind<T>() + ", got " + describe(value.type, value.bytes.data()));
    std::vector<T> result;
    result.reserve(static_cast<std::size_t>(value.count));
    const std::byte* at = value.bytes.data();
    for (std::uint64_t i = 0; i < value.count; ++i) {
      const auto refuse = [&] {
        fail_key(key,
                 "element " + std::to_string(i) + ": expected " + kind<T>() + ", got " + describe(value.element, at));
      };
      if constexpr (std::is_same_v<T, std::string>) {
        if (value.element != GgufValueType::string) refuse();
        const std::size_t length = static_cast<std::size_t>(detail::little_endian<std::uint64_t>(at));
        result.push_back(text({at + 8, length}));
        at += 8 + length;
      } else {
        const std::optional<T> number = convert<T>(value.element, at);
        if (!number) refuse();
        result.push_back(*number);
        at += detail::gguf_value_bytes[static_cast<std::size_t>(value.element)];
      }
    }
    return result;
  }

  /// Throws FileError "'source': text".
  [[noreturn]] void fail(const std::string& text) const { throw FileError("'" + source_ + "': " + text); }
  /// Throws FileError "'source': key 'key': text".
  [[noreturn]] void fail_key(std::string_view key, const std::string& text) const {
    fail("key " + detail::quoted(key) + ": " + text);
  }

 private:
  friend GgufFile parse_gguf(std::span<const std::byte>, std::string);
  friend GgufFile read_gguf(const std::filesystem::path&);

  const GgufValue& required(std::string_view key) const {
    const auto at = values_.find(key);
    if (at == values_.end()) fail_key(key, "expected one of this name, got none");
    return at->second;
  }

  static std::string text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  template <class T>
  static std::string kind() {
    if constexpr (std::is_same_v<T, bool>)
      return "BOOL";
    else if constexpr (std::is_same_v<T, std::string>)
      return "STRING";
    else if constexpr (std::is_same_v<T, float>)
      return "FLOAT32";
    else if constexpr (std::is_same_v<T, double>)
      return "FLOAT32 or FLOAT64";
    else
      return "an integer from " + std::to_string((std::numeric_limits<T>::min)()) + " to " +
             std::to_string((std::numeric_limits<T>::max)());
  }

  static std::string describe(GgufValueType type, const std::byte* bytes) {
    std::string result(detail::name_of(type));
    if (const auto whole = convert<std::int64_t>(type, bytes))
      result += " " + std::to_string(*whole);
    else if (const auto large = convert<std::uint64_t>(type, bytes))
      result += " " + std::to_string(*large);
    return result;
  }

  /// A number as T; nothing where T does not hold it.
  template <class T>
  static std::optional<T> convert(GgufValueType type, const std::byte* bytes) {
    using enum GgufValueType;
    if constexpr (std::is_same_v<T, bool>) {
      if (type == boolean) return bytes[0] != std::byte{0};
    } else if constexpr (std::is_floating_point_v<T>) {
      if (type == f32) return static_cast<T>(detail::little_endian<float>(bytes));
      if constexpr (std::is_same_v<T, double>)
        if (type == f64) return detail::little_endian<double>(bytes);
    } else {
      static_assert(std::is_integral_v<T>, "metadata is read as bool, integers, float, double or std::string");
      const auto exact = [](auto number) {
        return std::in_range<T>(number) ? std::optional<T>(static_cast<T>(number)) : std::nullopt;
      };
      switch (type) {
        case u8:
          return exact(detail::little_endian<std::uint8_t>(bytes));
        case i8:
          return exact(detail::little_endian<std::int8_t>(bytes));
        case u16:
          return exact(detail::little_endian<std::uint16_t>(bytes));
        case i16:
          return exact(detail::little_endian<std::int16_t>(bytes));
        case u32:
          return exact(detail::little_endian<std::uint32_t>(bytes));
        case i32:
          return exact(detail::little_endian<std::int32_t>(bytes));
        case u64:
          return exact(detail::little_endian<std::uint64_t>(bytes));
        case i64:
          return exact(detail::little_endian<std::int64_t>(bytes));
        default:
          break;
      }
    }
    return {};
  }

  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> numbers_;
  std::map<std::string_view, GgufValue> values_;
  std::string source_;
  std::uint32_t version_ = 0;
  std::shared_ptr<const std::byte[]> owner_;
};

}  // namespace pretrained
