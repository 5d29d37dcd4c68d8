// The reader of safetensors files: named tensors, with every check that a hostile file needs.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"
#include "coterie/file/json.hpp"
#include "coterie/file/whole_file.hpp"

namespace coterie {

/// Element types of the format: its names, in lower case.
enum class Dtype {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64
};

namespace detail {

struct DtypeInfo {
  std::string_view name;
  Index bits;
};

/// Names and sizes, in the order of Dtype.
inline constexpr std::array<DtypeInfo, 22> dtypes{
    {{"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
     {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
     {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
     {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}}};
static_assert(dtypes[static_cast<std::size_t>(Dtype::u64)].name == "U64");

inline const DtypeInfo& dtype_info(Dtype dtype) { return dtypes[static_cast<std::size_t>(dtype)]; }

/// The element type that T is written as.
template <class T>
inline constexpr Dtype dtype_of = Dtype::f32;
template <>
inline constexpr Dtype dtype_of<double> = Dtype::f64;
template <>
inline constexpr Dtype dtype_of<std::int64_t> = Dtype::i64;

template <class T>
concept Storable = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, std::int64_t>;

/// The unsigned integer of 1, 2, 4 or 8 bytes.
template <std::size_t bytes>
using Bits = std::conditional_t<
    bytes == 1, std::uint8_t,
    std::conditional_t<bytes == 2, std::uint16_t, std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;

// Numbers of files are little-endian on every machine; on little-endian ones compilers make one move of these loops.
template <class T>
T from_little_endian(const std::byte* bytes) {
  Bits<sizeof(T)> bits = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    bits = static_cast<Bits<sizeof(T)>>(bits | (static_cast<Bits<sizeof(T)>>(bytes[i]) << (8 * i)));
  return Eigen::numext::bit_cast<T>(bits);
}
template <class T>
void to_little_endian(T value, std::byte* bytes) {
  const auto bits = Eigen::numext::bit_cast<Bits<sizeof(T)>>(value);
  for (std::size_t i = 0; i < sizeof(T); ++i) bytes[i] = static_cast<std::byte>((bits >> (8 * i)) & 0xFF);
}

/// A shape as errors quote it: "[2, 3]".
inline std::string shape_text(std::span<const Index> shape) {
  std::string text = "[";
  for (const Index size : shape) text += join(text.size() > 1 ? ", " : "", size);
  return text + "]";
}

/// Bytes of a tensor; nothing if they are more than Index counts, or not whole bytes.
inline std::optional<Index> tensor_bytes(Dtype dtype, std::span<const Index> shape) {
  constexpr Index most = (std::numeric_limits<Index>::max)();
  const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  Index bits = dtype_info(dtype).bits;
  for (const Index size : shape) {
    if (size == 0) continue;  // the product of the others has to fit as well
    if (bits > most / size) return {};
    bits *= size;
  }
  if (empty) return 0;
  if (bits % 8 != 0) return {};
  return bits / 8;
}

/// The largest header, as in the original.
inline constexpr std::uint64_t most_header_bytes = 100'000'000;

}  // namespace detail

/// A tensor of a file.
struct SafetensorsTensor {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<Index> shape;  ///< outermost first; empty: one number
  std::span<const std::byte> bytes;
};

/// The tensors and metadata of a file, checked; made by parse_safetensors or read_safetensors.
///
/// A view of read_safetensors keeps the bytes of its file as long as it or a copy of it lives; one of parse_safetensors
/// refers to its caller's bytes. What tensors(), metadata() and find() return lives as long as the view: calling them
/// on a temporary does not compile.
class SafetensorsView {
 public:
  /// All tensors, sorted by name.
  std::span<const SafetensorsTensor> tensors() const& { return tensors_; }
  /// The strings of the header.
  const std::map<std::string, std::string, std::less<>>& metadata() const& { return metadata_; }
  /// The name of the file in errors.
  const std::string& source() const { return source_; }

  /// The tensor of a name; null if there is none.
  const SafetensorsTensor* find(std::string_view name) const& {
    const auto at = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                     [](const SafetensorsTensor& t, std::string_view n) { return t.name < n; });
    return at != tensors_.end() && at->name == name ? &*at : nullptr;
  }

  void tensors() const&& = delete;
  void metadata() const&& = delete;
  void find(std::string_view) const&& = delete;

  /// The numbers of a tensor of any shape, row-major.
  /// Requires: a tensor of this name whose dtype T holds exactly: F16, BF16 and F32 for float, those and F64 for
  ///   double, BOOL and integers that fit for std::int64_t (FileError).
  template <class T>
  std::vector<T> numbers(std::string_view name) const {
    const SafetensorsTensor& tensor = required("SafetensorsView::numbers", name);
    std::vector<T> result(static_cast<std::size_t>(count(tensor)));
    decode("SafetensorsView::numbers", tensor, View<T>(result.data(), 1, static_cast<Index>(result.size())));
    return result;
  }

  /// Copies a tensor's numbers into `out`.
  /// Requires: a tensor of this name and of the shape rows x cols, or cols where rows is 1; a dtype as numbers() has it
  ///   (FileError).
  /// Overwrites out.
  template <class T>
  void read(std::string_view name, View<T> out) const {
    const char* const function = "SafetensorsView::read";
    const SafetensorsTensor& tensor = required(function, name);
    const std::array<Index, 2> shape{out.rows(), out.cols()};
    const std::span<const Index> expected = std::span(shape).last(out.rows() == 1 && tensor.shape.size() == 1 ? 1 : 2);
    require_shape(function, tensor, expected);
    decode(function, tensor, out);
  }
  /// The same for whatever converts to a view.
  template <class M>
  requires detail::WritableRows<M&&, typename detail::RowMajorStorage<std::remove_cvref_t<M>>::Scalar>
  void read(std::string_view name, M&& out) const { read(name, view(std::forward<M>(out))); }

  /// Throws FileError "function: 'source': text".
  [[noreturn]] void fail(const char* function, const std::string& text) const {
    throw FileError(detail::join(function, ": '", source_, "': ", text));
  }

  /// The tensor of a name; FileError if there is none.
  const SafetensorsTensor& required(const char* function, std::string_view name) const {
    const SafetensorsTensor* const tensor = find(name);
    if (!tensor)
      fail(function, detail::join("tensor ", detail::in_quotes(name), ": expected one of this name, got none"));
    return *tensor;
  }

  /// Requires a tensor of this shape (FileError).
  void require_shape(const char* function, const SafetensorsTensor& tensor, std::span<const Index> shape) const {
    if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end()))
      fail(function, detail::join("tensor ", detail::in_quotes(tensor.name), ": shape: expected ",
                                  detail::shape_text(shape), ", got ", detail::shape_text(tensor.shape)));
  }

  /// Requires that a file has no tensors under a prefix but the known ones (FileError).
  void require_no_others(const char* function, std::string_view prefix, const std::set<std::string>& known,
                         std::string_view of = "layer") const {
    for (const SafetensorsTensor& tensor : tensors_)
      if (tensor.name.starts_with(prefix) && !known.contains(tensor.name))
        fail(function, detail::join("under the prefix ", detail::in_quotes(prefix), ": expected the tensors of the ",
                                    of, ", got ", detail::in_quotes(tensor.name), " beside them"));
  }

 private:
  friend SafetensorsView parse_safetensors(std::span<const std::byte>, std::string);
  friend SafetensorsView read_safetensors(const std::filesystem::path&);

  static Index count(const SafetensorsTensor& tensor) {
    return static_cast<Index>(tensor.bytes.size()) * 8 / detail::dtype_info(tensor.dtype).bits;
  }

  template <class Stored, class T>
  static void copy(const std::byte* bytes, View<T> out) {
    for (Index i = 0; i < out.rows(); ++i)
      for (Index j = 0; j < out.cols(); ++j, bytes += sizeof(Stored))
        out(i, j) = static_cast<T>(detail::from_little_endian<Stored>(bytes));
  }

  template <class T>
  void decode(const char* function, const SafetensorsTensor& tensor, View<T> out) const {
    static_assert(detail::Storable<T>, "numbers are read as float, double or std::int64_t");
    const std::byte* const bytes = tensor.bytes.data();
    if constexpr (std::is_floating_point_v<T>) {
      switch (tensor.dtype) {
        case Dtype::f16:
          return copy<Eigen::half>(bytes, out);
        case Dtype::bf16:
          return copy<Eigen::bfloat16>(bytes, out);
        case Dtype::f32:
          return copy<float>(bytes, out);
        case Dtype::f64:
          if constexpr (sizeof(T) == sizeof(double)) return copy<double>(bytes, out);
          break;
        default:
          break;
      }
    } else {
      switch (tensor.dtype) {
        case Dtype::boolean:
        case Dtype::u8:
          return copy<std::uint8_t>(bytes, out);
        case Dtype::i8:
          return copy<std::int8_t>(bytes, out);
        case Dtype::i16:
          return copy<std::int16_t>(bytes, out);
        case Dtype::u16:
          return copy<std::uint16_t>(bytes, out);
        case Dtype::i32:
          return copy<std::int32_t>(bytes, out);
        case Dtype::u32:
          return copy<std::uint32_t>(bytes, out);
        case Dtype::i64:
          return copy<std::int64_t>(bytes, out);
        default:
          break;
      }
    }
    fail(function, detail::join("tensor ", detail::in_quotes(tensor.name), ": dtype: expected one that ",
                                detail::dtype_info(detail::dtype_of<T>).name, " holds exactly, got ",
                                detail::dtype_info(tensor.dtype).name));
  }

  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::string, std::less<>> metadata_;
  std::string source_;
  std::shared_ptr<const std::byte[]> owner_;
};

namespace detail {

/// A tensor of the header, and the range of its bytes.
struct HeaderTensor {
  SafetensorsTensor tensor;
  Index begin = 0, end = 0;
};

/// Reads the description of a tensor: {"dtype": .., "shape": [..], "data_offsets": [.., ..]}, in any order.
inline HeaderTensor read_description(JsonReader& json, const std::string& where, std::string name) {
  HeaderTensor result;
  const std::string tensor = join(where, ": tensor ", in_quotes(name));
  std::optional<std::string> dtype;
  std::optional<std::vector<Index>> shape, offsets;
  json.object([&](const std::string& key) {
    if (key == "dtype" && !dtype) {
      dtype = json.string();
    } else if ((key == "shape" && !shape) || (key == "data_offsets" && !offsets)) {
      std::vector<Index>& numbers = (key == "shape" ? shape : offsets).emplace();
      json.list([&] { numbers.push_back(json.whole_number()); });
    } else {
      throw FileError(
          join(tensor, ": damaged header: expected dtype, shape and data_offsets, once each, got ", in_quotes(key)));
    }
  });
  if (!dtype || !shape || !offsets)
    throw FileError(join(tensor, ": damaged header: expected dtype, shape and data_offsets, got fewer"));
  const auto known = std::find_if(dtypes.begin(), dtypes.end(), [&](const DtypeInfo& d) { return d.name == *dtype; });
  if (known == dtypes.end())
    throw FileError(join(tensor, ": newer than this library: expected a dtype that it knows, got ", in_quotes(*dtype)));
  result.tensor = {std::move(name), static_cast<Dtype>(known - dtypes.begin()), std::move(*shape), {}};
  const std::optional<Index> bytes = tensor_bytes(result.tensor.dtype, result.tensor.shape);
  if (!bytes)
    throw FileError(join(tensor, ": damaged header: shape: expected a whole number of bytes that can be counted, got ",
                         shape_text(result.tensor.shape), " of ", *dtype));
  if (offsets->size() != 2 || (*offsets)[0] > (*offsets)[1] || (*offsets)[1] - (*offsets)[0] != *bytes)
    throw FileError(join(tensor, ": damaged header: data_offsets: expected a begin and an end ", *bytes, " apart, for ",
                         shape_text(result.tensor.shape), " of ", *dtype, ", got ", shape_text(*offsets)));
  result.begin = (*offsets)[0];
  result.end = (*offsets)[1];
  return result;
}

/// The header of a file, after its length: text that begins with '{'.
inline std::string_view header_text(std::span<const std::byte> bytes, const std::string& where) {
  if (bytes.size() < 8) throw FileError(join(where, ": truncated: expected at least 8 bytes, got ", bytes.size()));
  const auto length = from_little_endian<std::uint64_t>(bytes.data());
  const char* const text = reinterpret_cast<const char*>(bytes.data()) + 8;
  const std::size_t rest = bytes.size() - 8;
  if (length > most_header_bytes || length < 2 || (rest > 0 && text[0] != '{'))
    throw FileError(join(where, ": not a safetensors file: expected the length of a header, 2 to ", most_header_bytes,
                         ", and '{', got ", length, " and ", rest > 0 ? in_quotes({text, 1}) : "nothing"));
  if (length > rest) throw FileError(join(where, ": truncated: expected a header of ", length, " bytes, got ", rest));
  return {text, static_cast<std::size_t>(length)};
}

/// Requires that the tensors' bytes follow each other without holes and overlaps from the first to the last of `size`.
inline void check_ranges(const std::vector<HeaderTensor>& tensors, Index size, const std::string& where) {
  std::vector<const HeaderTensor*> order;
  Index end = 0;
  for (const HeaderTensor& t : tensors) {
    order.push_back(&t);
    end = (std::max)(end, t.end);
  }
  if (end > size) throw FileError(join(where, ": truncated: expected ", end, " bytes of tensors, got ", size));
  std::sort(order.begin(), order.end(), [](const HeaderTensor* a, const HeaderTensor* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  end = 0;
  for (const HeaderTensor* t : order) {
    if (t->begin != end)
      throw FileError(join(where, ": tensor ", in_quotes(t->tensor.name),
                           ": damaged header: data_offsets: expected to begin at ", end,
                           ", where the one before ends, got ", t->begin));
    end = t->end;
  }
  if (end != size) throw FileError(join(where, ": damaged: expected ", end, " bytes of tensors, got ", size));
}

}  // namespace detail

/// Reads a file that is in memory. The result refers to `bytes`; `source` is its name in errors.
///
/// Requires: a header of at most 100 MB that ends in the file; in it UTF-8 JSON, one object of tensors and, as
///   "__metadata__", strings or null; no name twice; known dtypes; shapes that can be counted; data_offsets of the size
///   of shape and dtype, in the file, without overlaps and holes, to its end. Otherwise FileError, which says
///   "truncated", "not a safetensors file", "newer than this library" (an unknown dtype) or "damaged".
/// Cost: the header's; the numbers are not touched.
/// Source: the format of github.com/huggingface/safetensors; unlike its own reader this one refuses names, keys and
///   fields that occur twice, unknown fields, and a header that does not begin with '{'.
inline SafetensorsView parse_safetensors(std::span<const std::byte> bytes, std::string source = "memory") {
  const std::string where = detail::join("parse_safetensors: '", source, "'");
  const std::string_view header = detail::header_text(bytes, where);
  const std::span<const std::byte> data = bytes.subspan(8 + header.size());
  SafetensorsView view;
  std::vector<detail::HeaderTensor> tensors;
  const auto twice = [&](std::string_view name) {
    throw FileError(
        detail::join(where, ": damaged header: expected names that differ, got ", detail::in_quotes(name), " twice"));
  };
  bool has_metadata = false;
  detail::JsonReader json(header, where);
  json.object([&](std::string name) {
    if (name != "__metadata__") {
      tensors.push_back(detail::read_description(json, where, std::move(name)));
      return;
    }
    if (std::exchange(has_metadata, true)) twice(name);
    if (json.null()) return;
    json.object([&](std::string key) {
      const auto [at, fresh] = view.metadata_.try_emplace(std::move(key), json.string());
      if (!fresh) twice(at->first);
    });
  });
  json.end();
  detail::check_ranges(tensors, static_cast<Index>(data.size()), where);
  for (detail::HeaderTensor& t : tensors) {
    t.tensor.bytes = data.subspan(static_cast<std::size_t>(t.begin), static_cast<std::size_t>(t.end - t.begin));
    view.tensors_.push_back(std::move(t.tensor));
  }
  std::sort(view.tensors_.begin(), view.tensors_.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) { return a.name < b.name; });
  const auto same =
      std::adjacent_find(view.tensors_.begin(), view.tensors_.end(),
                         [](const SafetensorsTensor& a, const SafetensorsTensor& b) { return a.name == b.name; });
  if (same != view.tensors_.end()) twice(same->name);
  view.source_ = std::move(source);
  return view;
}

/// Reads a file; the result keeps its bytes.
/// Requires: a regular file that can be read and fits in memory; and what parse_safetensors requires (FileError).
inline SafetensorsView read_safetensors(const std::filesystem::path& path) {
  const detail::FileBytes file = detail::read_file("read_safetensors", path);
  SafetensorsView view = parse_safetensors({file.data.get(), file.size}, path.string());
  view.owner_ = file.data;
  return view;
}

}  // namespace coterie
