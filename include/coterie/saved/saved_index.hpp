// Indexes as files, each with its cache: keys, values and clusters by name, config and format in the metadata.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "coterie/file/safetensors.hpp"
#include "coterie/file/safetensors_writer.hpp"
#include "coterie/retrieval/key_index.hpp"
#include "coterie/saved/config_text.hpp"
#include "coterie/version.hpp"

namespace coterie {

namespace detail {

inline constexpr char index_format_key[] = "coterie.index_format";

/// The format of saved indexes that this library writes and reads. A new setting or tensor makes a new format.
inline constexpr int index_format = 1;

/// The first format that has a setting of KeyIndexConfig. List settings that came after format 1 here.
inline int first_index_format(std::string_view) { return 1; }

inline std::string clusters_name(std::string_view prefix, Index kv_head, std::string_view what) {
  return join(prefix, "clusters.", kv_head, ".", what);
}

/// Reads the config of the index under `prefix`.
inline KeyIndexConfig read_index_config(const char* function, const SafetensorsView& file, std::string_view prefix) {
  const auto& metadata = file.metadata();
  const auto format_text = metadata.find(std::string_view(index_format_key));
  if (format_text == metadata.end())
    file.fail(function, join("no saved index: expected ", in_quotes(index_format_key), " in the metadata, got none"));
  int format = 0;
  const std::string expected = read_field(std::string_view(format_text->second), format);
  if (!expected.empty() || format < 1)
    file.fail(function, join(index_format_key, ": damaged: expected a whole number of at least 1, got ",
                             in_quotes(format_text->second)));
  if (format > index_format)
    file.fail(function,
              join(index_format_key, ": newer than this library: expected at most ", index_format, ", got ", format));
  const std::string first = join(prefix, "config.");
  auto at = metadata.lower_bound(first);
  if (at == metadata.end() || !at->first.starts_with(first))
    file.fail(function, join("no saved index: expected a config under the prefix ", in_quotes(prefix), ", got none"));
  KeyIndexConfig config;
  const auto text_of = [&](std::string_view name) {
    const auto text = metadata.find(join(first, name));
    return text == metadata.end() ? nullptr : &text->second;
  };
  const std::string fault = read_settings(config, format, text_of, first_index_format);
  if (!fault.empty()) file.fail(function, join(first, fault));
  std::set<std::string> known;
  visit(config, [&](std::string_view name, const auto&) {
    if (first_index_format(name) <= format) known.insert(join(first, name));
  });
  for (; at != metadata.end() && at->first.starts_with(first); ++at)
    if (!known.contains(at->first))
      file.fail(function,
                join(in_quotes(at->first), ": newer than this library: expected fields that it knows, got this one"));
  return config;
}

/// A tensor of this dtype with two sizes; FileError otherwise.
inline const SafetensorsTensor& required_matrix(const char* function, const SafetensorsView& file,
                                                const std::string& name, Dtype dtype) {
  const SafetensorsTensor& tensor = file.required(function, name);
  if (tensor.shape.size() != 2)
    file.fail(function,
              join("tensor ", in_quotes(name), ": shape: expected rows and columns, got ", shape_text(tensor.shape)));
  if (tensor.dtype != dtype)
    file.fail(function, join("tensor ", in_quotes(name), ": dtype: expected ", dtype_info(dtype).name, ", got ",
                             dtype_info(tensor.dtype).name));
  return tensor;
}

/// The whole numbers of a 1 x n tensor of I32.
inline std::vector<std::int32_t> read_list(const char* function, const SafetensorsView& file, const std::string& name) {
  const SafetensorsTensor& tensor = required_matrix(function, file, name, Dtype::i32);
  file.require_shape(function, tensor, std::array<Index, 2>{1, tensor.shape[1]});
  std::vector<std::int32_t> result;
  result.reserve(tensor.bytes.size() / sizeof(std::int32_t));
  for (std::size_t i = 0; i < tensor.bytes.size(); i += sizeof(std::int32_t))
    result.push_back(from_little_endian<std::int32_t>(tensor.bytes.data() + i));
  return result;
}

}  // namespace detail

/// An index and the cache that it is of.
template <class T>
struct SavedIndex {
  KeyIndex<T> index;
  RowMatrix<T> k, v;  ///< rows x kv_heads*d, rows x kv_heads*dv; at least index.tokens() rows
};

/// Adds an index and its cache to a writer: all that a loaded one needs to go on bit-identically, without k-means.
///
/// Tensors are "<prefix>k", "<prefix>v", "<prefix>tokens" and, for key/value head h, "<prefix>clusters.<h>.sizes" and
/// "<prefix>clusters.<h>.rows". Settings are metadata "<prefix>config.<name>"; the format is metadata too. Pages,
/// means and the int8 copy follow from those.
///
///     SafetensorsWriter writer;
///     for (std::size_t i = 0; i < indexes.size(); ++i)
///       add_index<float>(writer, "layers." + std::to_string(i) + ".", indexes[i], k[i], v[i]);
///     writer.write("document.safetensors");
///
/// Shapes: k rows x kv_heads*d, v rows x kv_heads*dv, at least index.tokens() rows; those that the index was made of.
/// Requires: that (ShapeError); names that are new (ValueError); the writer may have taken some of them by then. The
///   writer refers to k and v, which must outlive the writing, and not change before it.
template <class T>
void add_index(SafetensorsWriter& writer, std::string_view prefix, const KeyIndex<T>& index,
               std::type_identity_t<ConstView<T>> k, std::type_identity_t<ConstView<T>> v) {
  const char* const function = "add_index";
  const Index kv_heads = index.config().kv_heads;
  const auto require_fit = [&](const char* name, ConstView<T> m, Index width) {
    const bool fits = width > 0 ? m.cols() == kv_heads * width : m.cols() > 0 && m.cols() % kv_heads == 0;
    if (m.rows() < index.tokens() || m.rows() != k.rows() || !fits)
      detail::fail<ShapeError>(function, name,
                               detail::join("at least ", index.tokens(), " rows, as k, of ", kv_heads, " heads",
                                            width > 0 ? detail::join(" of ", width, " columns") : ""),
                               detail::join(m.rows(), " x ", m.cols()));
  };
  require_fit("k", k, index.dim());
  require_fit("v", v, index.value_dim());
  writer.set_metadata(detail::index_format_key, std::to_string(detail::index_format));
  writer.set_metadata("coterie.version", version);
  visit(index.config(), [&](std::string_view name, const auto& field) {
    writer.set_metadata(detail::join(prefix, "config.", name), detail::field_text(field));
  });
  writer.add(detail::join(prefix, "k"), k);
  writer.add(detail::join(prefix, "v"), v);
  writer.add_number(detail::join(prefix, "tokens"), index.tokens());
  for (Index h = 0; h < kv_heads; ++h) {
    KeyClusters clusters = index.clusters(h);
    writer.add_numbers(detail::clusters_name(prefix, h, "sizes"), std::move(clusters.sizes));
    writer.add_numbers(detail::clusters_name(prefix, h, "rows"), std::move(clusters.rows));
  }
}

/// Makes the index that add_index wrote under this prefix, and its cache. Attention, append and rollback go on
/// bit-identically to those of the index that was saved, on the same instruction set.
///
/// Requires: a format that is not newer than this library; all settings of that format and no others, with valid
///   values; under the prefix all tensors of the index and no others, of the scalar type T, with shapes that fit each
///   other; clusters that hold every finite key of whole segments once (FileError).
/// Allocates: the cache and the index, and only after the file was found to hold them.
/// Cost: linear in the cache.
template <class T>
SavedIndex<T> read_index(const SafetensorsView& file, std::string_view prefix = {}) {
  const char* const function = "read_index";
  const KeyIndexConfig config = detail::read_index_config(function, file, prefix);
  const std::string k_name = detail::join(prefix, "k"), v_name = detail::join(prefix, "v");
  const std::string tokens_name = detail::join(prefix, "tokens");
  const auto damaged = [&](const std::string& name, const std::string& expected, const auto& got) {
    file.fail(function,
              detail::join("tensor ", detail::in_quotes(name), ": damaged: expected ", expected, ", got ", got));
  };
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  const auto sizes_of = [&](const std::string& name, Index rows) {
    const SafetensorsTensor& tensor = detail::required_matrix(function, file, name, detail::dtype_of<T>);
    const std::vector<Index>& shape = tensor.shape;
    if (rows >= 0) file.require_shape(function, tensor, std::array<Index, 2>{rows, shape[1]});
    if (shape[0] > most || shape[1] < 1 || config.kv_heads < 1 || shape[1] % config.kv_heads != 0)
      damaged(name, detail::join("at most ", most, " rows of columns for ", config.kv_heads, " heads"),
              detail::shape_text(shape));
    return std::pair{shape[0], shape[1]};
  };
  const auto [rows, k_cols] = sizes_of(k_name, -1);
  const Index v_cols = sizes_of(v_name, rows).second;
  const SafetensorsTensor& count = detail::required_matrix(function, file, tokens_name, Dtype::i64);
  file.require_shape(function, count, std::array<Index, 2>{1, 1});
  const std::int64_t tokens = file.template numbers<std::int64_t>(tokens_name)[0];
  if (tokens < 0 || tokens > rows) damaged(tokens_name, detail::join("0 to ", rows, ", the rows of k"), tokens);
  std::set<std::string> known{k_name, v_name, tokens_name};
  std::vector<KeyClusters> clusters;
  for (Index h = 0; h < config.kv_heads; ++h) {
    const std::string sizes_name = detail::clusters_name(prefix, h, "sizes");
    const std::string rows_name = detail::clusters_name(prefix, h, "rows");
    clusters.push_back({detail::read_list(function, file, sizes_name), detail::read_list(function, file, rows_name)});
    known.insert({sizes_name, rows_name});
  }
  file.require_no_others(function, prefix, known, "index");
  try {
    SavedIndex<T> result{KeyIndex<T>(config), RowMatrix<T>(rows, k_cols), RowMatrix<T>(rows, v_cols)};
    file.read(k_name, result.k);
    file.read(v_name, result.v);
    Context context;
    result.index.restore(static_cast<Index>(tokens), view(std::as_const(result.k)), view(std::as_const(result.v)),
                         clusters, context);
    return result;
  } catch (const ValueError& error) {
    file.fail(function, detail::join("under the prefix ", detail::in_quotes(prefix), ": damaged: ", error.what()));
  }
}

/// Writes an index and its cache to a file of their own; see add_index and SafetensorsWriter::write. On error an old
/// file of that name stays.
///
///     save_index("document.safetensors", index, k, v);
///     SavedIndex<float> same = load_index<float>("document.safetensors");
template <class T>
void save_index(const std::filesystem::path& path, const KeyIndex<T>& index, std::type_identity_t<ConstView<T>> k,
                std::type_identity_t<ConstView<T>> v) {
  SafetensorsWriter writer;
  add_index(writer, {}, index, k, v);
  writer.write(path);
}

/// Reads a file that save_index() wrote; see read_safetensors and read_index.
template <class T>
SavedIndex<T> load_index(const std::filesystem::path& path) {
  return read_index<T>(read_safetensors(path));
}

}  // namespace coterie
