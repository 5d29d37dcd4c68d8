#include "coterie/file/safetensors.hpp"

#include <cmath>
#include <fstream>
#include <limits>

#include "catch.hpp"
#include "errors.hpp"
#include "file_bytes.hpp"
#include "folder.hpp"

using namespace coterie;
using test::contains;
using test::file_bytes;
using test::message_of;

namespace {

// What parse_safetensors says of a file of this header and so many bytes of data; empty if it takes it.
std::string header_fault(std::string_view header, std::size_t data = 0) {
  const std::vector<std::byte> bytes = file_bytes(header, data);
  return message_of<FileError>([&] { parse_safetensors(bytes, "x"); });
}

// The header of one tensor.
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"a\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
}

template <class U>
void append(std::vector<std::byte>& bytes, std::initializer_list<U> values) {
  for (const U value : values) {
    bytes.resize(bytes.size() + sizeof value);
    detail::to_little_endian(value, bytes.data() + bytes.size() - sizeof value);
  }
}

}  // namespace

TEST_CASE("metadata may be null, as if there were none") {
  std::vector<std::byte> bytes =
      file_bytes(R"({"__metadata__": null ,"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})");
  append<float>(bytes, {1, 2});
  const SafetensorsView file = parse_safetensors(bytes);
  REQUIRE(file.metadata().empty());
  REQUIRE(file.numbers<float>("t") == std::vector<float>{1, 2});
}

TEST_CASE("a file as others write it is read") {
  const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> b = file_bytes(
        R"({"__metadata__":{"format":"pt","\u00e9":"\n"},"w":{"shape":[2,3],"data_offsets":[8,32],"dtype":"F32"},)"
        R"("n":{"dtype":"I64","shape":[],"data_offsets":[0,8]} , "none":{"dtype":"F16","shape":[0,4],"data_offsets":[8,8]}}   )"
        "\n");
    append<std::int64_t>(b, {-7});
    append<float>(b, {1, 2, 3, 4, 5.5f, -0.0f});
    return b;
  }();
  const SafetensorsView file = parse_safetensors(bytes);
  REQUIRE(file.metadata().size() == 2);
  REQUIRE(file.metadata().find("format")->second == "pt");
  REQUIRE(file.metadata().find("\xC3\xA9")->second == "\n");
  REQUIRE(file.tensors().size() == 3);
  REQUIRE(file.tensors()[0].name == "n");
  REQUIRE(file.tensors()[2].name == "w");
  REQUIRE(file.find("w") == &file.tensors()[2]);
  REQUIRE(file.find("w")->shape == std::vector<Index>{2, 3});
  REQUIRE(file.find("w")->dtype == Dtype::f32);
  REQUIRE(file.find("w")->bytes.data() == bytes.data() + bytes.size() - 24);
  REQUIRE(file.find("none")->bytes.empty());
  REQUIRE(file.find("v") == nullptr);
  REQUIRE(file.numbers<std::int64_t>("n") == std::vector<std::int64_t>{-7});
  REQUIRE(file.numbers<float>("w") == std::vector<float>{1, 2, 3, 4, 5.5f, 0});
  REQUIRE(file.numbers<float>("none").empty());
  RowMatrix<float> w(2, 3);
  file.read("w", w);
  REQUIRE(w(1, 1) == 5.5f);
  REQUIRE(std::signbit(w(1, 2)));
  RowMatrix<double> wide = RowMatrix<double>::Zero(4, 5);  // into a block, and wider
  file.read("w", wide.block(1, 1, 2, 3));
  REQUIRE(wide.block(1, 1, 2, 3) == w.cast<double>());
  REQUIRE(wide.sum() == 15.5);
}

TEST_CASE("files that end too early, files of other kinds and newer files are told apart") {
  const auto parse = [](const std::vector<std::byte>& bytes) {
    return message_of<FileError>([&] { parse_safetensors(bytes, "model.safetensors"); });
  };
  REQUIRE(parse({}) == "parse_safetensors: 'model.safetensors': truncated: expected at least 8 bytes, got 0");
  const std::string header = tensor("F32", "[2,3]", "[0,24]");
  const std::vector<std::byte> good = file_bytes(header, 24);
  REQUIRE(parse(good).empty());
  for (std::size_t size = 0; size < good.size(); ++size) {
    INFO(size);
    REQUIRE(contains(parse({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}), "truncated: expected"));
  }
  REQUIRE(contains(header_fault(header, 25), "damaged: expected 24 bytes of tensors, got 25"));

  // A zip (what torch.save writes), a pickle, a text, zeros, a number that no header has.
  for (const std::string& text :
       {std::string("PK\3\4\0\0\0\0\0\0\0\0", 12), std::string("\x80\2}q\0(X\1\0\0\0a", 12),
        std::string("#!/bin/sh -e"), std::string(20, '\0'), std::string("\x10\0\0\0\0\0\0\0[1,2]", 13),
        std::string("\1\xe1\xf5\5\0\0\0\0{}", 10), std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)}) {
    std::vector<std::byte> bytes(text.size());
    std::memcpy(bytes.data(), text.data(), text.size());
    INFO(detail::in_quotes(text));
    REQUIRE(contains(parse(bytes), "'model.safetensors': not a safetensors file: expected"));
  }
  REQUIRE(contains(header_fault(tensor("F128", "[1]", "[0,16]"), 16),
                   "x': tensor 'a': newer than this library: expected a dtype that it knows, got 'F128'"));
}

TEST_CASE("every lie of a header is found and named") {
  REQUIRE(header_fault("{}").empty());
  REQUIRE(header_fault(tensor("F32", "[2,3]", "[0,24]"), 24).empty());
  REQUIRE(header_fault(tensor("F4", "[3,2]", "[0,3]"), 3).empty());
  struct Lie {
    const char* names;
    std::string header;
    std::size_t data = 0;
  };
  const std::string a = R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  const std::string most = "9223372036854775807";
  const Lie lies[] = {
      // Syntax.
      {"byte 2: expected '\"', got the end", "{ "},
      {"byte 1: expected '\"', got ','", "{,}"},
      {"byte 2: expected nothing but white space", "{}x"},
      {"expected '{'", R"({"a":1})"},
      {"expected '{'", R"({"a":[]})"},
      {"expected '\"'", R"({"__metadata__":{"a":1}})"},
      {"expected '{'", R"({"__metadata__":"a"})"},
      {"expected '{'", R"({"__metadata__":nul})"},
      {"got '__metadata__' twice", R"({"__metadata__":null,"__metadata__":{}})"},
      {"expected '\"'", R"({"a":{"dtype":32,"shape":[2],"data_offsets":[0,2]}})", 2},
      {"expected a whole number", tensor("U8", "[-2]", "[0,2]"), 2},
      {"expected ']'", tensor("U8", "[2.0]", "[0,2]"), 2},
      {"expected a whole number", tensor("U8", "[[2]]", "[0,2]"), 2},
      {"expected a number of 63 bits", tensor("U8", "[9223372036854775808]", "[0,2]"), 2},
      {"got '\\xff'", "{\"\xff\":{}}"},
      // Fields.
      {"got 'b'", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"b":"c"}})", 2},
      {"got 'shape'", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"shape":[2]}})", 2},
      {"got 'dtype'", R"({"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2},
      {"got fewer", R"({"a":{"dtype":"U8","shape":[2]}})"},
      {"got fewer", R"({"a":{}})"},
      // Names twice, also when one is written with an escape.
      {"got 'a' twice", "{" + a + "," + R"("a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]})" + "}", 4},
      {"got 'a' twice", "{" + a + "," + R"("\u0061":{"dtype":"U8","shape":[0],"data_offsets":[2,2]})" + "}", 2},
      {"got '__metadata__' twice", R"({"__metadata__":{},"__metadata__":{}})"},
      {"got 'a' twice", R"({"__metadata__":{"a":"1","a":"1"}})"},
      // Sizes.
      {"data_offsets: expected a begin and an end 2 apart, for [2] of U8, got [0, 3]", tensor("U8", "[2]", "[0,3]"), 3},
      {"data_offsets", tensor("U8", "[2]", "[2,0]"), 2},
      {"data_offsets", tensor("U8", "[2]", "[0,2,2]"), 2},
      {"data_offsets", tensor("U8", "[2]", "[]"), 2},
      {"shape: expected a whole number of bytes", tensor("F4", "[3]", "[0,2]"), 2},
      {"shape: expected", tensor("F32", "[" + most + "]", "[0," + most + "]")},
      {"shape: expected", tensor("U8", "[4294967296,4294967296]", "[0,0]")},
      {"shape: expected", tensor("U8", "[4294967296,4294967296,4294967296,0]", "[0,0]")},
      {"shape: expected", tensor("U8", "[0,4294967296,4294967296,4294967296]", "[0,0]")},
      {"truncated: expected 1152921504606846975 bytes of tensors, got 0",
       tensor("U8", "[1152921504606846975]", "[0,1152921504606846975]")},
      {"truncated: expected 4 bytes of tensors, got 3", tensor("U8", "[2]", "[2,4]"), 3},
      // Holes and overlaps.
      {"tensor 'a': damaged header: data_offsets: expected to begin at 0, where the one before ends, got 2",
       tensor("U8", "[2]", "[2,4]"), 4},
      {"expected to begin at 2, where the one before ends, got 1",
       "{" + a + "," + R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]})" + "}", 3},
      {"expected to begin at 2, where the one before ends, got 0",
       "{" + a + "," + R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})" + "}", 2},
      {"expected to begin at 2, where the one before ends, got 3",
       "{" + a + "," + R"("b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]})" + "}", 5},
      {"expected to begin at 2, where the one before ends, got 1",
       "{" + a + "," + R"("b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]})" + "}", 2},
  };
  for (const Lie& lie : lies) {
    INFO(lie.header);
    const std::string text = header_fault(lie.header, lie.data);
    INFO(text);
    REQUIRE(contains(text, "parse_safetensors: 'x': "));
    REQUIRE(contains(text, lie.names));
  }
  // Whatever nests, nothing is called more deeply for it.
  const std::string deep = "{\"a\":" + std::string(1000000, '{');
  REQUIRE(contains(header_fault(deep), "expected '\"'"));
  REQUIRE(contains(header_fault("{\"a\":{\"shape\":" + std::string(1000000, '[')), "expected a whole number"));
}

TEST_CASE("every dtype is known by its size") {
  const std::pair<const char*, std::size_t> sizes[] = {
      {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
      {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
      {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
      {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
  for (const auto& [name, bits] : sizes) {
    INFO(name);
    REQUIRE(header_fault(tensor(name, "[8]", "[0," + std::to_string(bits) + "]"), bits).empty());
    REQUIRE(!header_fault(tensor(name, "[8]", "[0," + std::to_string(bits + 1) + "]"), bits + 1).empty());
  }
}

TEST_CASE("numbers are converted where nothing is lost, else refused") {
  std::vector<std::byte> bytes = file_bytes(
      R"({"f64":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},"i64":{"dtype":"I64","shape":[1],"data_offsets":[16,24]},)"
      R"("f16":{"dtype":"F16","shape":[5],"data_offsets":[24,34]},"bf16":{"dtype":"BF16","shape":[3],"data_offsets":[34,40]},)"
      R"("i8":{"dtype":"I8","shape":[2],"data_offsets":[40,42]},"u8":{"dtype":"U8","shape":[1],"data_offsets":[42,43]},)"
      R"("bool":{"dtype":"BOOL","shape":[2],"data_offsets":[43,45]},"u16":{"dtype":"U16","shape":[1],"data_offsets":[45,47]},)"
      R"("i16":{"dtype":"I16","shape":[1],"data_offsets":[47,49]},"i32":{"dtype":"I32","shape":[1],"data_offsets":[49,53]},)"
      R"("u32":{"dtype":"U32","shape":[1],"data_offsets":[53,57]},"u64":{"dtype":"U64","shape":[1],"data_offsets":[57,65]}})");
  append<double>(bytes, {0.1, -1e300});
  append<std::int64_t>(bytes, {std::numeric_limits<std::int64_t>::min()});
  append<std::uint16_t>(bytes, {0x3C00, 0xC000, 0x3555, 0x0001, 0x7C00});  // 1, -2, 1365/4096, 2^-24, infinity
  append<std::uint16_t>(bytes, {0x3F80, 0xC000, 0x3EAB});                  // 1, -2, 0.333984375
  append<std::int8_t>(bytes, {-128, 127});
  append<std::uint8_t>(bytes, {255, 0, 1});
  append<std::uint16_t>(bytes, {65535, 0x8000});
  append<std::uint32_t>(bytes, {0x80000000, 0xFFFFFFFF});
  append<std::uint64_t>(bytes, {1});
  const SafetensorsView file = parse_safetensors(bytes, "x");
  REQUIRE(file.numbers<double>("f64") == std::vector<double>{0.1, -1e300});
  REQUIRE(file.numbers<float>("f16") ==
          std::vector<float>{1, -2, 1365.0f / 4096, 0x1p-24f, std::numeric_limits<float>::infinity()});
  REQUIRE(file.numbers<double>("bf16") == std::vector<double>{1, -2, 0.333984375});
  REQUIRE(file.numbers<std::int64_t>("i64")[0] == std::numeric_limits<std::int64_t>::min());
  REQUIRE(file.numbers<std::int64_t>("i8") == std::vector<std::int64_t>{-128, 127});
  REQUIRE(file.numbers<std::int64_t>("u8") == std::vector<std::int64_t>{255});
  REQUIRE(file.numbers<std::int64_t>("bool") == std::vector<std::int64_t>{0, 1});
  REQUIRE(file.numbers<std::int64_t>("u16") == std::vector<std::int64_t>{65535});
  REQUIRE(file.numbers<std::int64_t>("i16") == std::vector<std::int64_t>{-32768});
  REQUIRE(file.numbers<std::int64_t>("i32") == std::vector<std::int64_t>{-2147483648LL});
  REQUIRE(file.numbers<std::int64_t>("u32") == std::vector<std::int64_t>{4294967295LL});

  REQUIRE(message_of<FileError>([&] { file.numbers<float>("f64"); }) ==
          "SafetensorsView::numbers: 'x': tensor 'f64': dtype: expected one that F32 holds exactly, got F64");
  REQUIRE_THROWS_AS(file.numbers<double>("i8"), FileError);
  REQUIRE_THROWS_AS(file.numbers<std::int64_t>("u64"), FileError);
  REQUIRE_THROWS_AS(file.numbers<std::int64_t>("f64"), FileError);
  REQUIRE(contains(message_of<FileError>([&] { file.numbers<float>("w"); }),
                   "tensor 'w': expected one of this name, got none"));

  // A list is a row, and nothing else.
  RowMatrix<double> row(1, 2), column(2, 1), square(2, 2);
  file.read("f64", row);
  REQUIRE(row(0, 0) == 0.1);
  REQUIRE(contains(message_of<FileError>([&] { file.read("f64", column); }), "shape: expected [2, 1], got [2]"));
  REQUIRE(contains(message_of<FileError>([&] { file.read("f64", square); }), "shape: expected [2, 2], got [2]"));
  REQUIRE(contains(message_of<FileError>([&] { file.read("f16", row); }), "shape: expected [2], got [5]"));
}

TEST_CASE("a file that was read keeps its bytes, and copies of it do") {
  const test::Folder folder;
  const std::vector<std::byte> bytes = file_bytes(tensor("F32", "[1]", "[0,4]"), 4);
  std::ofstream(folder / "a", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  SafetensorsView copy;
  {
    const SafetensorsView file = read_safetensors(folder / "a");
    REQUIRE(file.source() == (folder / "a").string());
    copy = file;
  }
  REQUIRE(copy.numbers<float>("a") == std::vector<float>{0});
  std::filesystem::resize_file(folder / "a", bytes.size() - 1);
  REQUIRE(contains(message_of<FileError>([&] { read_safetensors(folder / "a"); }),
                   (folder / "a").string() + "': truncated: expected 4 bytes of tensors, got 3"));
  REQUIRE_THROWS_AS(read_safetensors(folder / "b"), FileError);
}
