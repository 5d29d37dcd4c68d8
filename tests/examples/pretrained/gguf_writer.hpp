#pragma once

// A writer of GGUF files, for tests.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"
#include "pretrained/gguf_file.hpp"

namespace test {

/// Bytes that grow at their end, little-endian.
class GgufBytes {
 public:
  template <class T>
  GgufBytes& number(T value) {
    static_assert(std::is_arithmetic_v<T>);
    std::uint64_t bits = 0;
    if constexpr (std::is_same_v<T, float>)
      bits = Eigen::numext::bit_cast<std::uint32_t>(value);
    else if constexpr (std::is_same_v<T, double>)
      bits = Eigen::numext::bit_cast<std::uint64_t>(value);
    else
      bits = static_cast<std::uint64_t>(value);
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes_.push_back(static_cast<std::byte>(bits >> (8 * i) & 0xFF));
    return *this;
  }
  GgufBytes& text(std::string_view text) {
    for (const char c : text) bytes_.push_back(static_cast<std::byte>(c));
    return *this;
  }
  /// A text after its length.
  GgufBytes& string(std::string_view text) { return number(std::uint64_t(text.size())).text(text); }
  GgufBytes& append(const std::vector<std::byte>& bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  /// Zeros up to a multiple of `alignment`.
  GgufBytes& pad(std::size_t alignment) {
    while (bytes_.size() % alignment != 0) bytes_.push_back(std::byte{0});
    return *this;
  }

  std::size_t size() const { return bytes_.size(); }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Collects metadata and tensors, and writes a file of them. It checks nothing, so that tests can write wrong files.
class GgufWriter {
 public:
  using Type = pretrained::GgufType;
  using ValueType = pretrained::GgufValueType;

  /// Adds a value: bool, any integer, float, double, or text.
  template <class T>
  GgufWriter& set(const std::string& key, const T& value) {
    put_key(key, type_of<T>());
    return put(value);
  }

  /// Adds an array.
  template <class T>
  GgufWriter& set_list(const std::string& key, const std::vector<T>& values) {
    put_key(key, ValueType::array);
    values_.number(static_cast<std::uint32_t>(type_of<T>())).number(std::uint64_t(values.size()));
    for (const T& value : values) put(value);
    return *this;
  }

  /// Adds a tensor of any type. `shape` as the format has it: the length of rows first.
  GgufWriter& add(const std::string& name, std::vector<std::uint64_t> shape, Type type, std::vector<std::byte> bytes) {
    tensors_.push_back({name, std::move(shape), static_cast<std::uint32_t>(type), std::move(bytes)});
    return *this;
  }
  /// Adds an F32 tensor of two sizes, rows of numbers.
  GgufWriter& add(const std::string& name, coterie::ConstView<float> m) {
    return add(name, {static_cast<std::uint64_t>(m.cols()), static_cast<std::uint64_t>(m.rows())}, Type::f32,
               f32_bytes(m));
  }
  /// Adds an F32 tensor of one size.
  GgufWriter& add_vector(const std::string& name, const std::vector<float>& numbers) {
    const auto n = static_cast<coterie::Index>(numbers.size());
    return add(name, {numbers.size()}, Type::f32, f32_bytes({numbers.data(), 1, n}));
  }

  GgufWriter& set_version(std::uint32_t version) {
    version_ = version;
    return *this;
  }
  /// The alignment of tensors; writes general.alignment.
  GgufWriter& set_alignment(std::uint32_t alignment) {
    alignment_ = alignment;
    return set("general.alignment", alignment);
  }

  /// The file: header, metadata, descriptions, tensors with padding.
  std::vector<std::byte> bytes() const {
    GgufBytes file;
    file.text("GGUF").number(version_).number(std::uint64_t(tensors_.size())).number(keys_).append(values_.bytes());
    std::uint64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
      file.string(tensor.name).number(static_cast<std::uint32_t>(tensor.shape.size()));
      for (const std::uint64_t size : tensor.shape) file.number(size);
      file.number(tensor.type).number(offset);
      offset += (tensor.bytes.size() + alignment_ - 1) / alignment_ * alignment_;
    }
    if (!tensors_.empty()) file.pad(alignment_);
    for (const Tensor& tensor : tensors_) file.append(tensor.bytes).pad(alignment_);
    return file.bytes();
  }

  /// Numbers as the bytes of an F32 tensor.
  static std::vector<std::byte> f32_bytes(coterie::ConstView<float> m) {
    GgufBytes bytes;
    for (coterie::Index i = 0; i < m.rows(); ++i)
      for (coterie::Index j = 0; j < m.cols(); ++j) bytes.number(m(i, j));
    return bytes.bytes();
  }

 private:
  struct Tensor {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::uint32_t type;
    std::vector<std::byte> bytes;
  };

  template <class T>
  static constexpr ValueType type_of() {
    using enum pretrained::GgufValueType;
    if constexpr (std::is_same_v<T, bool>)
      return boolean;
    else if constexpr (std::is_same_v<T, float>)
      return f32;
    else if constexpr (std::is_same_v<T, double>)
      return f64;
    else if constexpr (!std::is_arithmetic_v<T>)
      return string;
    else if constexpr (sizeof(T) == 1)
      return std::is_signed_v<T> ? i8 : u8;
    else if constexpr (sizeof(T) == 2)
      return std::is_signed_v<T> ? i16 : u16;
    else if constexpr (sizeof(T) == 4)
      return std::is_signed_v<T> ? i32 : u32;
    else
      return std::is_signed_v<T> ? i64 : u64;
  }

  void put_key(const std::string& key, ValueType type) {
    ++keys_;
    values_.string(key).number(static_cast<std::uint32_t>(type));
  }
  template <class T>
  GgufWriter& put(const T& value) {
    if constexpr (std::is_same_v<T, bool>)
      values_.number(static_cast<std::uint8_t>(value));
    else if constexpr (std::is_arithmetic_v<T>)
      values_.number(value);
    else
      values_.string(value);
    return *this;
  }

  std::uint32_t version_ = 3, alignment_ = 32;
  std::uint64_t keys_ = 0;
  GgufBytes values_;
  std::vector<Tensor> tensors_;
};

}  // namespace test
