// The reader of GGUF files, with every check that a hostile file needs.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "gguf_file.hpp"

namespace pretrained {

namespace detail {

/// The position in a file; whatever is taken is checked to be there.
class GgufCursor {
 public:
  GgufCursor(std::span<const std::byte> bytes, const std::string& source) : bytes_(bytes), source_(source) {}

  std::size_t position() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

  [[noreturn]] void fail(const std::string& what, const std::string& text) const {
    throw FileError("parse_gguf: '" + source_ + "': " + what + ": " + text);
  }

  std::span<const std::byte> take(std::uint64_t count, const std::string& what) {
    if (count > left())
      fail(what, "truncated: expected " + std::to_string(count) + " bytes, got " + std::to_string(left()));
    const std::span<const std::byte> taken = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += taken.size();
    return taken;
  }

  template <class T>
  T number(const std::string& what) {
    return little_endian<T>(take(sizeof(T), what).data());
  }

  std::string_view string(const std::string& what) {
    const std::span<const std::byte> text = take(number<std::uint64_t>(what + ": length"), what);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

  /// A count of things that take at least `least` bytes each in the rest of the file.
  std::uint64_t count(std::size_t least, const std::string& what) {
    const auto count = number<std::uint64_t>(what);
    if (count > left() / least)
      fail(what, "truncated: expected at least " + std::to_string(least) + " bytes for each of " +
                     std::to_string(count) + ", got " + std::to_string(left()));
    return count;
  }

  /// The type of a value.
  GgufValueType value_type(const std::string& what) {
    const auto number = this->number<std::uint32_t>(what + ": type");
    if (number >= gguf_value_names.size())
      fail(what, "type: expected 0 to 12, the types of the format, got " + std::to_string(number));
    return static_cast<GgufValueType>(number);
  }

  GgufValue value(const std::string& what) {
    GgufValue value;
    value.type = value.element = value_type(what);
    const bool array = value.type == GgufValueType::array;
    if (array) {
      value.element = value_type(what + ": elements");
      if (value.element == GgufValueType::array) fail(what, "elements: expected no array inside of an array, got one");
    }
    const std::size_t size = gguf_value_bytes[static_cast<std::size_t>(value.element)];
    if (array) value.count = count(size == 0 ? 8 : size, what + ": elements");
    if (size > 0) {
      value.bytes = take(value.count * size, what);
    } else if (!array) {
      value.bytes = take(number<std::uint64_t>(what + ": length"), what);
    } else {
      const std::size_t begin = at_;
      for (std::uint64_t i = 0; i < value.count; ++i) string(what);
      value.bytes = bytes_.subspan(begin, at_ - begin);
    }
    if (value.element == GgufValueType::boolean)
      for (const std::byte byte : value.bytes)
        if (byte > std::byte{1})
          fail(what, "damaged: BOOL: expected 0 or 1, got " + std::to_string(std::to_integer<int>(byte)));
    return value;
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& source_;
  std::size_t at_ = 0;
};

/// The smallest multiple of `alignment`, a power of two, from `offset` on. Offsets are at most half of what 64 bits
/// count and alignments at most 2^31, so nothing overflows.
inline std::uint64_t align(std::uint64_t offset, std::uint64_t alignment) {
  return (offset + alignment - 1) & ~(alignment - 1);
}

/// The description of a tensor, and where its bytes begin in the data.
struct GgufDescription {
  GgufTensor tensor;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
};

/// The longest name of a tensor and the largest number of its sizes, as in ggml.
inline constexpr std::size_t most_gguf_name = 64, most_gguf_sizes = 4, most_gguf_key = 65535;

/// Reads the description of a tensor. Requires at most as many bytes of numbers as the file has (FileError).
inline GgufDescription read_description(GgufCursor& cursor, std::size_t file_size) {
  GgufDescription result;
  const std::string_view name = cursor.string("name of a tensor");
  const std::string what = "tensor " + quoted(name);
  if (name.empty() || name.size() > most_gguf_name)
    cursor.fail(what, "name: expected 1 to 64 bytes, got " + std::to_string(name.size()));
  result.tensor.name = name;
  const auto sizes = cursor.number<std::uint32_t>(what + ": number of sizes");
  if (sizes < 1 || sizes > most_gguf_sizes) cursor.fail(what, "expected 1 to 4 sizes, got " + std::to_string(sizes));
  std::string shape;
  std::uint64_t size[most_gguf_sizes];
  for (std::uint32_t i = 0; i < sizes; ++i) {
    size[i] = cursor.number<std::uint64_t>(what + ": sizes");
    shape += (i > 0 ? ", " : "") + std::to_string(size[i]);
  }
  const auto type = cursor.number<std::uint32_t>(what + ": type");
  result.offset = cursor.number<std::uint64_t>(what + ": offset");

  const GgufTypeInfo* const info = gguf_type_info(type);
  if (!info) cursor.fail(what, "type: expected one whose size is known, got number " + std::to_string(type));
  const auto block = static_cast<std::uint64_t>(info->block);
  if (size[0] == 0 || size[0] % block != 0)
    cursor.fail(what, "sizes: expected rows of whole blocks of " + std::to_string(block) + " numbers of " +
                          std::string(info->name) + ", got [" + shape + "]");
  // A division for each product, so that none overflows.
  std::uint64_t bytes = static_cast<std::uint64_t>(info->bytes);
  for (std::uint32_t i = 0; i < sizes; ++i) {
    const std::uint64_t factor = i == 0 ? size[0] / block : size[i];
    if (factor == 0 || bytes > file_size / factor)
      cursor.fail(what, "sizes: expected at least 1 each, and " + std::string(info->name) + " that fit in " +
                            std::to_string(file_size) + " bytes, got [" + shape + "]");
    bytes *= factor;
    result.tensor.shape.push_back(static_cast<Index>(size[i]));
  }
  result.bytes = bytes;
  result.tensor.type = static_cast<GgufType>(type);
  return result;
}

/// The number that aligns tensors: general.alignment, else 32.
inline std::uint64_t alignment_of(const GgufCursor& cursor, const std::map<std::string_view, GgufValue>& values) {
  const auto at = values.find("general.alignment");
  if (at == values.end()) return 32;
  const GgufValue& value = at->second;
  const std::string what = "key 'general.alignment'";
  if (value.type != GgufValueType::u32) cursor.fail(what, "expected UINT32, got " + std::string(name_of(value.type)));
  const auto alignment = little_endian<std::uint32_t>(value.bytes.data());
  if (!std::has_single_bit(alignment)) cursor.fail(what, "expected a power of two, got " + std::to_string(alignment));
  return alignment;
}

}  // namespace detail

/// Reads a file that is in memory. The result refers to `bytes`; `source` is its name in errors.
///
/// Requires: version 2 or 3, little-endian; keys of 1 to 65535 bytes, tensor names of 1 to 64, none twice; known types;
///   no array of arrays; BOOL of 0 or 1; general.alignment UINT32, a power of two; tensors of 1 to 4 sizes of at least
///   1, in rows of whole blocks; their bytes in the order of their descriptions, each aligned right after the last
///   one; nothing after them but padding. Otherwise FileError, which names the key or tensor, expected and got.
/// Allocates: a description for each key and tensor, nothing for what their lengths and counts only claim.
/// Cost: the header's; the numbers are not touched.
/// Source: github.com/ggml-org/ggml, docs/gguf.md. The order of tensors is that of its own reader.
inline GgufFile parse_gguf(std::span<const std::byte> bytes, std::string source = "memory") {
  GgufFile file;
  file.source_ = std::move(source);
  detail::GgufCursor cursor(bytes, file.source_);
  const std::string_view magic(reinterpret_cast<const char*>(cursor.take(4, "magic").data()), 4);
  if (magic != "GGUF") cursor.fail("not a GGUF file", "expected to begin with 'GGUF', got " + detail::quoted(magic));
  file.version_ = cursor.number<std::uint32_t>("version");
  if (file.version_ == 0x02000000 || file.version_ == 0x03000000)
    cursor.fail("version", "expected a little-endian file, got a big-endian one");
  if (file.version_ != 2 && file.version_ != 3)
    cursor.fail("version", "expected 2 or 3, got " + std::to_string(file.version_));
  // The least bytes: a tensor has its name's length, a letter, a number of sizes, a size, a type and an offset; a value
  // its key's length, a letter, a type and a byte.
  const auto tensors = cursor.number<std::uint64_t>("number of tensors");
  const std::uint64_t values = cursor.count(8 + 1 + 4 + 1, "number of keys");
  if (tensors > cursor.left() / (8 + 1 + 4 + 8 + 4 + 8))
    cursor.fail("number of tensors", "truncated: expected at least 33 bytes for each of " + std::to_string(tensors) +
                                         ", got " + std::to_string(cursor.left()));
  for (std::uint64_t i = 0; i < values; ++i) {
    const std::string_view key = cursor.string("key");
    const std::string what = "key " + detail::quoted(key);
    if (key.empty() || key.size() > detail::most_gguf_key)
      cursor.fail(what, "expected 1 to 65535 bytes, got " + std::to_string(key.size()));
    if (!file.values_.emplace(key, cursor.value(what)).second)
      cursor.fail(what, "damaged: expected keys that differ, got this one twice");
  }
  const std::uint64_t alignment = detail::alignment_of(cursor, file.values_);

  std::vector<detail::GgufDescription> descriptions;
  for (std::uint64_t i = 0; i < tensors; ++i) {
    detail::GgufDescription& d = descriptions.emplace_back(detail::read_description(cursor, bytes.size()));
    if (!file.numbers_.emplace(d.tensor.name, static_cast<std::size_t>(i)).second)
      cursor.fail("tensor " + detail::quoted(d.tensor.name), "damaged: expected names that differ, got this one twice");
  }

  const std::uint64_t size = bytes.size();
  const std::uint64_t data = detail::align(cursor.position(), alignment);
  std::uint64_t end = cursor.position();
  for (detail::GgufDescription& d : descriptions) {
    const std::string what = "tensor " + detail::quoted(d.tensor.name);
    const std::uint64_t begin = detail::align(end, alignment);
    if (d.offset != begin - data)
      cursor.fail(what, "offset: expected " + std::to_string(begin - data) + ", aligned to " +
                            std::to_string(alignment) + " after the tensor before it, got " + std::to_string(d.offset));
    if (begin > size || d.bytes > size - begin)
      cursor.fail(what, "truncated: expected " + std::to_string(d.bytes) + " bytes from " + std::to_string(begin) +
                            " on, got a file of " + std::to_string(size));
    d.tensor.bytes = bytes.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(d.bytes));
    end = begin + d.bytes;
    file.tensors_.push_back(std::move(d.tensor));
  }
  if (size != end && size != detail::align(end, alignment))
    cursor.fail("size", "expected a file of " + std::to_string(end) + " bytes, or " +
                            std::to_string(detail::align(end, alignment)) + " with padding, got " +
                            std::to_string(size));
  return file;
}

/// Reads a file; the result keeps its bytes.
/// Requires: a regular file that can be read and fits in memory; and what parse_gguf requires (FileError).
inline GgufFile read_gguf(const std::filesystem::path& path) {
  const auto fail = [&](const std::string& expected, const std::string& got) {
    throw FileError("read_gguf: '" + path.string() + "': expected " + expected + ", got " + got);
  };
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) fail("a file", "none of this name");
  if (error) fail("a file", error.message());
  if (status.type() != std::filesystem::file_type::regular) fail("a regular file", "another kind");
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail("a file with a size", error.message());
  std::ifstream stream(path, std::ios::binary);
  if (!stream) fail("a readable file", "one that cannot be opened");
  std::shared_ptr<std::byte[]> bytes;
  try {
    if (size > static_cast<std::uintmax_t>((std::numeric_limits<std::streamsize>::max)())) throw std::bad_alloc();
    bytes = std::shared_ptr<std::byte[]>(new std::byte[static_cast<std::size_t>(size)]);
  } catch (const std::bad_alloc&) {
    fail("a file that fits in memory", std::to_string(size) + " bytes");
  }
  stream.read(reinterpret_cast<char*>(bytes.get()), static_cast<std::streamsize>(size));
  if (static_cast<std::uintmax_t>(stream.gcount()) != size)
    fail(std::to_string(size) + " bytes", std::to_string(stream.gcount()));
  GgufFile file = parse_gguf({bytes.get(), static_cast<std::size_t>(size)}, path.string());
  file.owner_ = std::move(bytes);
  return file;
}

}  // namespace pretrained
