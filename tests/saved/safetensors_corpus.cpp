#include "coterie/file/safetensors.hpp"

#include <filesystem>
#include <fstream>

#include "catch.hpp"
#include "file/file_bytes.hpp"
#include "file/folder.hpp"
#include "fuzz/read_bytes.hpp"
#include "random.hpp"

using namespace coterie;
using test::file_bytes;
using test::Random;

namespace {

const std::filesystem::path corpus = COTERIE_FUZZ_CORPUS;

std::vector<std::byte> bytes_of(const std::string& text) {
  std::vector<std::byte> bytes(text.size());
  std::transform(text.begin(), text.end(), bytes.begin(), [](char c) { return static_cast<std::byte>(c); });
  return bytes;
}

// A file of every kind of thing that the writer writes.
std::vector<std::byte> small_file() {
  const RowMatrix<float> w = Random(1).matrix<float>(2, 1);
  SafetensorsWriter writer;
  writer.add("w", w);
  writer.add_number("n", 7);
  writer.set_metadata("k", "v");
  return writer.bytes();
}

template <class T>
std::vector<std::byte> layer_file(std::string_view prefix, const RoutingAttentionConfig& config) {
  const RoutingAttention<T> layer(config);
  SafetensorsWriter writer;
  add_layer(writer, prefix, layer);
  return writer.bytes();
}

std::vector<std::byte> index_file() {
  const RowMatrix<float> k = Random(2).matrix<float>(12, 2);
  KeyIndex<float> index({.keys_per_cluster = 2, .page = 1, .segment = 4, .sinks = 1, .recent = 1});
  Context context;
  index.build(k, k, context);
  SafetensorsWriter writer;
  add_index(writer, {}, index, k, k);
  return writer.bytes();
}

const RoutingAttentionConfig routed{
    .model_dim = 1, .head_dim = 3, .causal = true, .routed = {.heads = 1, .clusters = 1, .window = 2}};
const RoutingAttentionConfig local{.model_dim = 1, .bias = true, .local = {.heads = 1, .window = 2}};

}  // namespace

TEST_CASE("the fuzzer's corpus: good files are read, bad ones refused") {
  int good = 0, bad = 0;
  for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
    INFO(entry.path().filename().string());
    const bool accepted = fuzz::read_bytes(bytes_of(test::text_of(entry.path())));
    REQUIRE(accepted == (entry.path().filename().string().rfind("good_", 0) == 0));
    ++(accepted ? good : bad);
  }
  REQUIRE(good >= 5);
  REQUIRE(bad >= 8);
}

TEST_CASE("every truncation and every other byte of a file is answered with FileError or taken as a file") {
  const std::vector<std::byte> file = small_file();
  REQUIRE(fuzz::read_bytes(file));
  for (std::size_t size = 0; size < file.size(); ++size) REQUIRE(!fuzz::read_bytes(std::span(file).first(size)));
  int accepted = 0;
  for (std::size_t i = 0; i < file.size(); ++i)
    for (int value = 0; value < 256; ++value) {
      std::vector<std::byte> changed = file;
      changed[i] = static_cast<std::byte>(value);
      accepted += fuzz::read_bytes(changed);
    }
  // Those of the numbers, at least; and few of the header.
  REQUIRE(accepted >= 16 * 256);
  REQUIRE(accepted <= 24 * 256);
}

TEST_CASE("a layer's file with one byte changed is a layer or FileError") {
  const std::vector<std::byte> file = layer_file<float>({}, routed);
  int layers = 0;
  for (std::size_t i = 0; i < file.size(); ++i)
    for (const int flip : {1, 2, 16, 128}) {
      std::vector<std::byte> changed = file;
      changed[i] ^= static_cast<std::byte>(flip);
      fuzz::read_bytes(changed);
      layers += fuzz::accepts([&] { static_cast<void>(read_layer<float>(parse_safetensors(changed))); });
    }
  REQUIRE(layers > 100);
}

TEST_CASE("an index's file with one byte changed is an index or FileError") {
  const std::vector<std::byte> file = index_file();
  int indexes = 0;
  for (std::size_t i = 0; i < file.size(); ++i)
    for (const int flip : {1, 2, 16, 128}) {
      std::vector<std::byte> changed = file;
      changed[i] ^= static_cast<std::byte>(flip);
      fuzz::read_bytes(changed);
      indexes += fuzz::accepts([&] { static_cast<void>(read_index<float>(parse_safetensors(changed))); });
    }
  REQUIRE(indexes > 100);
}

// Hidden: makes the corpus anew, where the format of layers has changed.  test_saved "[write-corpus]"
TEST_CASE("write the fuzzer's corpus", "[.][write-corpus]") {
  const auto write = [&](const std::string& name, const std::vector<std::byte>& bytes) {
    std::ofstream(corpus / name, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  };
  const std::string a = R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  write("good_small", small_file());
  write("good_empty", file_bytes("{}"));
  write("good_layer_float", layer_file<float>({}, routed));
  write("good_layer_double", layer_file<double>("a.", local));
  write("good_index", index_file());
  write(
      "good_dtypes",
      file_bytes(
          R"({"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"BF16","shape":[],"data_offsets":[4,6]},)"
          R"("\ud83d\ude00":{"dtype":"BOOL","shape":[1,0],"data_offsets":[6,6]},"i":{"dtype":"I32","shape":[1],"data_offsets":[6,10]},)"
          R"("q":{"dtype":"F4","shape":[2],"data_offsets":[10,11]}} )",
          11));
  std::vector<std::byte> cut = small_file();
  cut.pop_back();
  write("bad_truncated", cut);
  write("bad_zip", bytes_of(std::string("PK\3\4\0\0\0\0\0\0\0\0\0\0\0\0", 16)));
  write("bad_header_length", bytes_of(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)));
  write("bad_newer_dtype", file_bytes(R"({"a":{"dtype":"F2","shape":[4],"data_offsets":[0,1]}})", 1));
  write("bad_overlap", file_bytes("{" + a + R"(,"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3));
  write("bad_hole", file_bytes("{" + a + R"(,"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", 5));
  write("bad_twice", file_bytes("{" + a + R"(,"\u0061":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})", 2));
  write("bad_shape", file_bytes(R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})"));
  write("bad_surrogate", file_bytes(R"({"\ud83d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"));
  write("bad_deep", file_bytes("{\"a\":" + std::string(64, '[')));
}
