#pragma once

// What the fuzzer, and the test that replays its corpus, do with bytes that may be a file.

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "coterie/saved/saved_index.hpp"
#include "coterie/saved/saved_layer.hpp"

namespace fuzz {

using namespace coterie;

inline void require(bool good, const char* what) {
  if (!good) throw std::logic_error(what);
}

/// Calls f; FileError is what bad files are answered with, any other exception passes. Whether f came to its end.
template <class F>
bool accepts(F&& f) {
  try {
    f();
    return true;
  } catch (const FileError&) {
    return false;
  }
}

/// A layer that was read is written and read again: the same bytes.
template <class T>
void read_as_layer(const SafetensorsView& file, std::string_view prefix) {
  accepts([&] {
    const RoutingAttention<T> layer = read_layer<T>(file, prefix);
    SafetensorsWriter writer, again;
    add_layer(writer, prefix, layer);
    const std::vector<std::byte> bytes = writer.bytes();
    const RoutingAttention<T> same = read_layer<T>(parse_safetensors(bytes), prefix);
    add_layer(again, prefix, same);
    require(again.bytes() == bytes, "a layer that was read is not the one that was written");
  });
}

/// An index that was read is written and read again, the same bytes; and answers a query.
template <class T>
void read_as_index(const SafetensorsView& file, std::string_view prefix) {
  accepts([&] {
    const SavedIndex<T> read = read_index<T>(file, prefix);
    SafetensorsWriter writer, again;
    add_index(writer, prefix, read.index, read.k, read.v);
    const std::vector<std::byte> bytes = writer.bytes();
    const SavedIndex<T> same = read_index<T>(parse_safetensors(bytes), prefix);
    add_index(again, prefix, same.index, same.k, same.v);
    require(again.bytes() == bytes, "an index that was read is not the one that was written");
    if (read.k.cols() + read.v.cols() > 1000 || read.k.rows() > 1000) return;
    RowMatrix<T> q = RowMatrix<T>::Ones(1, read.k.cols()), out(1, read.v.cols());
    Context context;
    read.index.attend(q, read.k, read.v, out, {.budget = 0.5}, context);
  });
}

/// Reads bytes as a file, and a file as a layer and as an index. Throws std::logic_error where what was accepted makes
/// no sense. Returns whether they are a file.
inline bool read_bytes(std::span<const std::byte> bytes) {
  SafetensorsView file;
  if (!accepts([&] { file = parse_safetensors(bytes); })) return false;

  // The tensors tile the end of the file.
  std::size_t total = 0;
  const std::string* last = nullptr;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    total += tensor.bytes.size();
    require(total <= bytes.size() && tensor.bytes.data() >= bytes.data() &&
                tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size(),
            "a tensor outside of the file");
    require(file.find(tensor.name) == &tensor && (!last || *last < tensor.name), "names in disorder");
    last = &tensor.name;
  }

  // Whatever can be read can be written, and is the same then.
  std::map<std::string, std::vector<double>> numbers;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    accepts([&] { numbers.emplace(tensor.name, file.numbers<double>(tensor.name)); });
    accepts([&] { static_cast<void>(file.numbers<float>(tensor.name)); });
    accepts([&] { static_cast<void>(file.numbers<std::int64_t>(tensor.name)); });
  }
  SafetensorsWriter writer;
  for (const auto& [key, value] : file.metadata()) writer.set_metadata(key, value);
  for (const auto& [name, row] : numbers)
    writer.add(name, ConstView<double>(row.data(), 1, static_cast<Index>(row.size())));
  const std::vector<std::byte> written = writer.bytes();
  const SafetensorsView copy = parse_safetensors(written);
  require(copy.metadata() == file.metadata() && copy.tensors().size() == numbers.size(), "another file after writing");
  for (const auto& [name, row] : numbers) {
    const std::vector<double> again = copy.numbers<double>(name);
    require(again.size() == row.size() &&
                (row.empty() || std::memcmp(again.data(), row.data(), row.size() * sizeof(double)) == 0),
            "other numbers after writing");
  }

  for (const std::string_view prefix : {"", "a."}) {
    read_as_layer<float>(file, prefix);
    read_as_layer<double>(file, prefix);
    read_as_index<float>(file, prefix);
    read_as_index<double>(file, prefix);
  }
  return true;
}

}  // namespace fuzz
