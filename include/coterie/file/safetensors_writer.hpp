// The writer of safetensors files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "coterie/file/safetensors.hpp"

namespace coterie {

/// Collects named tensors and metadata, and writes them as one file.
///
///     SafetensorsWriter writer;
///     writer.add("embedding", embedding);   // float or double, rows x cols
///     writer.add_number("step", step);
///     writer.set_metadata("model", "bytes");
///     writer.write("model.safetensors");
///
/// Matrices are referred to, not copied: they must outlive the writing.
/// Threads and determinism: the bytes are a function of what was added, in which order.
class SafetensorsWriter {
 public:
  /// Adds a matrix of float or double; temporaries that own their numbers do not compile.
  /// Requires: a name that is new, UTF-8, and not "__metadata__" (ValueError).
  template <class T>
  void add(std::string name, ConstView<T> matrix) {
    static_assert(detail::Storable<T>, "the writer takes matrices of float or double");
    add_tensor({std::move(name), detail::dtype_of<T>, matrix.rows(), matrix.cols(),
                [matrix](const Sink& sink) { put(matrix, sink); }});
  }
  template <class M>
  requires detail::ReadableRows<M, typename detail::RowMajorStorage<std::remove_cvref_t<M>>::Scalar>
  void add(std::string name, M&& matrix) {
    static_assert(!detail::RowMajorStorage<std::remove_cvref_t<M>>::owning || std::is_lvalue_reference_v<M>,
                  "the writer refers to its matrices: keep them alive");
    add(std::move(name), view(std::as_const(matrix)));
  }

  /// Adds a whole number, as a 1 x 1 tensor of I64.
  /// Requires: as add().
  void add_number(std::string name, std::int64_t value) {
    add_tensor({std::move(name), Dtype::i64, 1, 1,
                [value](const Sink& sink) { put(ConstView<std::int64_t>(&value, 1, 1), sink); }});
  }

  /// Adds whole numbers, as a 1 x n tensor of I32; they are kept.
  /// Requires: as add().
  void add_numbers(std::string name, std::vector<std::int32_t> values) {
    const auto kept = std::make_shared<const std::vector<std::int32_t>>(std::move(values));
    const Index count = static_cast<Index>(kept->size());
    add_tensor({std::move(name), Dtype::i32, 1, count,
                [kept, count](const Sink& sink) { put(ConstView<std::int32_t>(kept->data(), 1, count), sink); }});
  }

  /// Sets a string of the metadata, also one that has been set before.
  /// Requires: UTF-8 (ValueError).
  void set_metadata(std::string key, std::string value) {
    if (!detail::is_utf8(key) || !detail::is_utf8(value))
      detail::fail<ValueError>("SafetensorsWriter::set_metadata", "text", "UTF-8",
                               detail::in_quotes(key + ": " + value));
    metadata_.insert_or_assign(std::move(key), std::move(value));
  }

  /// The bytes of the file.
  /// Requires: a header of at most 100 MB (ValueError).
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> result;
    send_to([&](const std::byte* data, std::size_t size) { result.insert(result.end(), data, data + size); });
    return result;
  }

  /// Writes the file, all or nothing: to a temporary file beside it, flushed to the disk, then renamed.
  ///
  /// An error or a crash leaves the old file as it was; an error leaves no temporary file either, a crash may
  /// ("name.tmp").
  /// Requires: a header of at most 100 MB (ValueError); a name of a regular file or of none, in a directory that can be
  ///   written to (FileError).
  void write(const std::filesystem::path& path) const {
    detail::ReplacedFile file("SafetensorsWriter::write", path);
    send_to([&](const std::byte* data, std::size_t size) { file.write(data, size); });
    file.commit();
  }

 private:
  using Sink = std::function<void(const std::byte*, std::size_t)>;
  struct Tensor {
    std::string name;
    Dtype dtype;
    Index rows, cols;
    std::function<void(const Sink&)> put;
  };

  // An error leaves the writer as it was.
  void add_tensor(Tensor tensor) {
    const char* const function = "SafetensorsWriter::add";
    const std::string& name = tensor.name;
    if (!detail::is_utf8(name) || name == "__metadata__")
      detail::fail<ValueError>(function, "name", "UTF-8, and not __metadata__", detail::in_quotes(name));
    const auto [at, fresh] = names_.insert(name);
    if (!fresh)
      detail::fail<ValueError>(function, "name", "one that is new", detail::join(detail::in_quotes(name), " twice"));
    try {
      tensors_.push_back(std::move(tensor));
    } catch (...) {
      names_.erase(at);
      throw;
    }
  }

  template <class T>
  static void put(ConstView<T> matrix, const Sink& sink) {
    std::array<std::byte, 4096> buffer;
    std::size_t filled = 0;
    for (Index i = 0; i < matrix.rows(); ++i)
      for (Index j = 0; j < matrix.cols(); ++j) {
        detail::to_little_endian(matrix(i, j), buffer.data() + filled);
        filled += sizeof(T);
        if (filled == buffer.size()) sink(buffer.data(), std::exchange(filled, 0));
      }
    sink(buffer.data(), filled);
  }

  void send_to(const Sink& sink) const {
    // Wide elements come first: with the header's padding, every tensor begins at a multiple of its elements' size.
    std::vector<const Tensor*> order;
    for (const Tensor& tensor : tensors_) order.push_back(&tensor);
    const auto bits = [](const Tensor* t) { return detail::dtype_info(t->dtype).bits; };
    std::stable_sort(order.begin(), order.end(), [&](const Tensor* a, const Tensor* b) { return bits(a) > bits(b); });

    std::string header = "{";
    if (!metadata_.empty()) {
      header += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata_) {
        if (header.back() != '{') header += ',';
        detail::append_json_string(header, key);
        header += ':';
        detail::append_json_string(header, value);
      }
      header += '}';
    }
    Index end = 0;
    for (const Tensor* t : order) {
      const Index begin = end;
      end += t->rows * t->cols * bits(t) / 8;
      if (header.size() > 1) header += ',';
      detail::append_json_string(header, t->name);
      header += detail::join(":{\"dtype\":\"", detail::dtype_info(t->dtype).name, "\",\"shape\":[", t->rows, ',',
                             t->cols, "],\"data_offsets\":[", begin, ',', end, "]}");
    }
    header += '}';
    header.append((8 - header.size() % 8) % 8, ' ');
    if (header.size() > detail::most_header_bytes)
      detail::fail<ValueError>("SafetensorsWriter::write", "header",
                               detail::join("at most ", detail::most_header_bytes, " bytes"), header.size());

    std::array<std::byte, 8> length;
    detail::to_little_endian(static_cast<std::uint64_t>(header.size()), length.data());
    sink(length.data(), length.size());
    sink(reinterpret_cast<const std::byte*>(header.data()), header.size());
    for (const Tensor* t : order) t->put(sink);
  }

  std::vector<Tensor> tensors_;
  std::set<std::string, std::less<>> names_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

}  // namespace coterie
