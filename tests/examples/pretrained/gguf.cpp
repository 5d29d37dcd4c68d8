#include "pretrained/gguf.hpp"

#include <fstream>

#include "catch.hpp"
#include "errors.hpp"
#include "file/folder.hpp"
#include "fuzz/read_gguf_bytes.hpp"
#include "tiny_llama.hpp"

using pretrained::FileError;
using pretrained::GgufFile;
using pretrained::GgufType;
using pretrained::parse_gguf;
using test::contains;
using test::GgufBytes;
using test::GgufWriter;
using test::message_of;

namespace {

using coterie::Index;

// A file of every type of value, scalar and array, and of tensors of several types.
GgufWriter small_writer() {
  GgufWriter writer;
  writer.set("u8", std::uint8_t(255)).set("i8", std::int8_t(-128)).set("u16", std::uint16_t(65535));
  writer.set("i16", std::int16_t(-7)).set("u32", std::uint32_t(0xFFFFFFFF)).set("i32", std::int32_t(-1));
  writer.set("u64", ~std::uint64_t(0)).set("i64", std::int64_t(-5)).set("f32", 0.5f).set("f64", 0.1);
  writer.set("yes", true).set("no", false).set("text", "a\0b").set("empty", "");
  writer.set_list("list", std::vector<std::uint16_t>{1, 2, 300}).set_list("none", std::vector<float>{});
  writer.set_list("texts", std::vector<std::string>{"x", "", "yz"}).set_list("flags", std::vector<std::uint8_t>{0, 1});
  writer.set_list("reals", std::vector<float>{0.5f, -1});
  writer.add("a", {3}, GgufType::f32, std::vector<std::byte>(12, std::byte{1}));
  writer.add("b", {32, 2, 3}, GgufType::q4_0, std::vector<std::byte>(108, std::byte{2}));
  writer.add("c", {1, 1, 1, 1}, GgufType::f16, std::vector<std::byte>(2, std::byte{3}));
  return writer;
}

std::string fault_of(const std::vector<std::byte>& bytes) {
  return message_of<FileError>([&] { parse_gguf(bytes, "x"); });
}
std::string fault_of(const GgufBytes& bytes) { return fault_of(bytes.bytes()); }

// The beginning of a file, with these counts.
GgufBytes header(std::uint64_t tensors, std::uint64_t keys) {
  return GgufBytes().text("GGUF").number(std::uint32_t(3)).number(tensors).number(keys);
}
constexpr std::uint64_t huge = std::uint64_t(1) << 63;

// A file of one tensor "t" of these sizes, type and offset, with `data` bytes of numbers.
std::string tensor_fault(const std::vector<std::uint64_t>& sizes, std::uint32_t type, std::uint64_t offset,
                         std::size_t data) {
  GgufBytes file = header(1, 0).string("t").number(static_cast<std::uint32_t>(sizes.size()));
  for (const std::uint64_t size : sizes) file.number(size);
  return fault_of(file.number(type).number(offset).pad(32).append(std::vector<std::byte>(data)));
}

}  // namespace

TEST_CASE("pretrained: a GGUF file is read") {
  for (const std::uint32_t version : {2u, 3u}) {
    const std::vector<std::byte> bytes = small_writer().set_version(version).bytes();
    const GgufFile file = parse_gguf(bytes, "x");
    REQUIRE(file.version() == version);
    REQUIRE(file.source() == "x");
    REQUIRE(file.tensors().size() == 3);
    REQUIRE(file.values().size() == 19);
    const pretrained::GgufTensor& b = file.tensor("b");
    REQUIRE(&b == file.find("b"));
    REQUIRE(b.type == GgufType::q4_0);
    REQUIRE(b.shape == std::vector<Index>{32, 2, 3});
    REQUIRE(b.cols() == 32);
    REQUIRE(b.rows() == 6);
    REQUIRE(b.bytes.size() == 108);
    REQUIRE(std::all_of(b.bytes.begin(), b.bytes.end(), [](std::byte byte) { return byte == std::byte{2}; }));
    REQUIRE(file.tensor("a").rows() == 1);
    REQUIRE(file.tensor("c").bytes[1] == std::byte{3});
    REQUIRE(!file.find("d"));
  }
}

TEST_CASE("pretrained: metadata is read as any type that holds it") {
  const std::vector<std::byte> bytes = small_writer().bytes();
  const GgufFile file = parse_gguf(bytes, "x");
  REQUIRE(file.get<int>("u8") == 255);
  REQUIRE(file.get<std::int64_t>("i8") == -128);
  REQUIRE(file.get<std::uint16_t>("u16") == 65535);
  REQUIRE(file.get<std::int16_t>("i16") == -7);
  REQUIRE(file.get<Index>("u32") == 0xFFFFFFFF);
  REQUIRE(file.get<std::int8_t>("i32") == -1);
  REQUIRE(file.get<std::uint64_t>("u64") == ~std::uint64_t(0));
  REQUIRE(file.get<int>("i64") == -5);
  REQUIRE(file.get<float>("f32") == 0.5f);
  REQUIRE(file.get<double>("f32") == 0.5);
  REQUIRE(file.get<double>("f64") == 0.1);
  REQUIRE(file.get<bool>("yes"));
  REQUIRE(!file.get<bool>("no"));
  REQUIRE(file.get<std::string>("text") == "a");
  REQUIRE(file.get<std::string>("empty").empty());
  REQUIRE(file.list<int>("list") == std::vector<int>{1, 2, 300});
  REQUIRE(file.list<float>("none").empty());
  REQUIRE(file.list<std::string>("texts") == std::vector<std::string>{"x", "", "yz"});
  REQUIRE(file.list<double>("reals") == std::vector<double>{0.5, -1});
  REQUIRE(file.has("u8"));
  REQUIRE(!file.has("u"));
  REQUIRE(file.get_or<int>("u8", 3) == 255);
  REQUIRE(file.get_or<int>("u", 3) == 3);
  REQUIRE(file.get_or<std::string>("u", "z") == "z");
}

TEST_CASE("pretrained: metadata of another type is refused, by key") {
  const std::vector<std::byte> bytes = small_writer().bytes();
  const GgufFile file = parse_gguf(bytes, "x");
  const auto fault = [](auto&& f) { return message_of<FileError>(f); };
  const auto is = [](const std::string& got, const std::string& expected) { REQUIRE(got == "'x': key " + expected); };
  is(fault([&] { file.get<int>("missing"); }), "'missing': expected one of this name, got none");
  is(fault([&] { file.get<std::int32_t>("u32"); }),
     "'u32': expected an integer from -2147483648 to 2147483647, got UINT32 4294967295");
  is(fault([&] { file.get<std::int64_t>("u64"); }),
     "'u64': expected an integer from -9223372036854775808 to 9223372036854775807, got UINT64 18446744073709551615");
  is(fault([&] { file.get<std::uint32_t>("i64"); }), "'i64': expected an integer from 0 to 4294967295, got INT64 -5");
  is(fault([&] { file.get<std::uint8_t>("f32"); }), "'f32': expected an integer from 0 to 255, got FLOAT32");
  is(fault([&] { file.get<std::uint8_t>("yes"); }), "'yes': expected an integer from 0 to 255, got BOOL");
  is(fault([&] { file.get<std::uint8_t>("list"); }), "'list': expected an integer from 0 to 255, got an array of 3");
  is(fault([&] { file.get<float>("f64"); }), "'f64': expected FLOAT32, got FLOAT64");
  is(fault([&] { file.get<double>("i8"); }), "'i8': expected FLOAT32 or FLOAT64, got INT8 -128");
  is(fault([&] { file.get<bool>("u8"); }), "'u8': expected BOOL, got UINT8 255");
  is(fault([&] { file.get<std::string>("u8"); }), "'u8': expected STRING, got UINT8 255");
  is(fault([&] { file.get_or<std::string>("u8", ""); }), "'u8': expected STRING, got UINT8 255");
  is(fault([&] { file.list<int>("text"); }),
     "'text': expected an array, each an integer from -2147483648 to 2147483647, got STRING");
  is(fault([&] { file.list<std::uint8_t>("list"); }),
     "'list': element 2: expected an integer from 0 to 255, got UINT16 300");
  is(fault([&] { file.list<std::string>("list"); }), "'list': element 0: expected STRING, got UINT16 1");
  is(fault([&] { file.list<int>("texts"); }),
     "'texts': element 0: expected an integer from -2147483648 to 2147483647, got STRING");
  REQUIRE(fault([&] { file.tensor("d"); }) == "'x': tensor 'd': expected one of this name, got none");
}

TEST_CASE("pretrained: a file cut anywhere is refused") {
  const std::vector<std::byte> bytes = small_writer().bytes();
  REQUIRE(fault_of(bytes).empty());
  // 30 bytes of padding follow the last tensor; a file may also end before all of them.
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    // A buffer of this size, so that a sanitizer sees what is read beyond it.
    const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    INFO(size);
    const std::string fault = fault_of(cut);
    if (size == bytes.size() - 30)
      REQUIRE(fault.empty());
    else
      REQUIRE(contains(fault, "parse_gguf: 'x': "));
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back(std::byte{0});
  REQUIRE(contains(fault_of(longer), "size: expected a file of " + std::to_string(bytes.size() - 30) + " bytes, or " +
                                         std::to_string(bytes.size()) + " with padding, got " +
                                         std::to_string(bytes.size() + 1)));
}

TEST_CASE("pretrained: a file with one byte changed is a file or refused") {
  const std::vector<std::byte> bytes = small_writer().bytes();
  int accepted = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i)
    for (const int flip : {1, 2, 16, 128, 255}) {
      std::vector<std::byte> changed = bytes;
      changed[i] ^= static_cast<std::byte>(flip);
      accepted += fuzz::read_gguf_bytes(changed);
    }
  // Those of the numbers and of padding, at least.
  REQUIRE(accepted >= 5 * (12 + 108 + 2));
}

TEST_CASE("pretrained: the beginning of a file that is none is refused") {
  REQUIRE(contains(fault_of(GgufBytes()), "magic: truncated: expected 4 bytes, got 0"));
  REQUIRE(contains(fault_of(GgufBytes().text("GGML\1\0\0\0")),
                   "not a GGUF file: expected to begin with 'GGUF', got 'GGML'"));
  for (const std::uint32_t version : {0u, 1u, 4u, 0xFFFFFFFFu})
    REQUIRE(contains(fault_of(GgufWriter().set_version(version).bytes()),
                     "version: expected 2 or 3, got " + std::to_string(version)));
  REQUIRE(contains(fault_of(GgufWriter().set_version(0x03000000).bytes()), "expected a little-endian file"));
}

TEST_CASE("pretrained: counts and lengths beyond the file are refused without the memory that they claim") {
  const auto key = [](std::uint32_t type) { return header(0, 1).string("k").number(type); };
  const std::vector<std::pair<GgufBytes, std::string>> cases{
      {header(huge, 0),
       "number of tensors: truncated: expected at least 33 bytes for each of 9223372036854775808, got 0"},
      {header(~std::uint64_t(0), 1).string("k").number(8u).string("long enough"), "number of tensors: truncated"},
      {header(0, huge), "number of keys: truncated: expected at least 14 bytes for each of 9223372036854775808, got 0"},
      {header(0, 1).number(huge).text("12345678"), "key: truncated: expected 9223372036854775808 bytes, got 8"},
      {key(8).number(huge).text("a"), "key 'k': truncated: expected 9223372036854775808 bytes, got 1"},
      {key(9).number(4u).number(huge).text("a"), "key 'k': elements: truncated: expected at least 4 bytes for each of"},
      {key(9).number(10u).number(std::uint64_t(1) << 61).text("a"), "key 'k': elements: truncated"},
      {key(9).number(8u).number(std::uint64_t(1)).number(huge), "key 'k': truncated: expected 9223372036854775808"},
      {key(9).number(8u).number(~std::uint64_t(0)).text("a"), "key 'k': elements: truncated"},
      {key(10).number(1u), "key 'k': truncated: expected 8 bytes, got 4"}};
  for (const auto& [file, expected] : cases) {
    INFO(expected);
    REQUIRE(contains(fault_of(file), expected));
  }
}

TEST_CASE("pretrained: damaged metadata is refused") {
  const auto key = [](std::string_view name, std::uint32_t type) { return header(0, 1).string(name).number(type); };
  REQUIRE(contains(fault_of(key("k", 13).text("....")),
                   "key 'k': type: expected 0 to 12, the types of the format, got 13"));
  REQUIRE(contains(fault_of(key("k", 9).number(13u).number(huge)), "key 'k': elements: type: expected 0 to 12"));
  REQUIRE(contains(fault_of(key("k", 9).number(9u).number(huge)),
                   "key 'k': elements: expected no array inside of an array"));
  REQUIRE(contains(fault_of(key("k", 7).number(std::uint8_t(2))), "key 'k': damaged: BOOL: expected 0 or 1, got 2"));
  REQUIRE(contains(
      fault_of(key("k", 9).number(7u).number(std::uint64_t(2)).number(std::uint8_t(1)).number(std::uint8_t(9))),
      "key 'k': damaged: BOOL: expected 0 or 1, got 9"));
  REQUIRE(contains(fault_of(key("", 4).number(1u)), "key '': expected 1 to 65535 bytes, got 0"));
  REQUIRE(contains(fault_of(key(std::string(65536, 'k'), 4).number(1u)), "expected 1 to 65535 bytes, got 65536"));
  REQUIRE(contains(fault_of(GgufWriter().set("k", 1).set("k", "x").bytes()),
                   "key 'k': damaged: expected keys that differ, got this one twice"));
  // Whatever bytes a name has, an error is a line of text.
  REQUIRE(contains(fault_of(key("a\n\x1b\xffz", 13).text("....")), "key 'a???z': type"));
}

TEST_CASE("pretrained: tensors are aligned as the file says") {
  for (const std::uint32_t alignment : {1u, 8u, 64u, 4096u}) {
    GgufWriter writer;
    writer.set_alignment(alignment);
    for (const char* name : {"a", "b"}) writer.add(name, {3}, GgufType::f32, std::vector<std::byte>(12, std::byte{7}));
    const std::vector<std::byte> bytes = writer.bytes();
    const GgufFile file = parse_gguf(bytes);
    for (const auto& tensor : file.tensors()) {
      REQUIRE((tensor.bytes.data() - bytes.data()) % alignment == 0);
      REQUIRE(tensor.bytes[11] == std::byte{7});
    }
  }
  for (const std::uint32_t alignment : {0u, 3u, 48u, 0xFFFFFFFFu})
    REQUIRE(contains(fault_of(GgufWriter().set("general.alignment", alignment).bytes()),
                     "key 'general.alignment': expected a power of two, got " + std::to_string(alignment)));
  REQUIRE(contains(fault_of(GgufWriter().set("general.alignment", std::uint64_t(32)).bytes()),
                   "key 'general.alignment': expected UINT32, got UINT64"));
  // The largest alignment leads beyond the end of any file here, and overflows nothing.
  REQUIRE(contains(fault_of(GgufWriter()
                                .set("general.alignment", 0x80000000u)
                                .add("t", {1}, GgufType::f32, std::vector<std::byte>(4))
                                .bytes()),
                   "tensor 't': truncated: expected 4 bytes from 2147483648 on"));
}

TEST_CASE("pretrained: damaged descriptions of tensors are refused") {
  const std::uint64_t most = ~std::uint64_t(0);
  REQUIRE(tensor_fault({32, 2}, 8, 0, 68).empty());
  REQUIRE(contains(tensor_fault({}, 0, 0, 4), "tensor 't': expected 1 to 4 sizes, got 0"));
  REQUIRE(contains(tensor_fault({1, 1, 1, 1, 1}, 0, 0, 4), "tensor 't': expected 1 to 4 sizes, got 5"));
  for (const std::uint32_t type : {4u, 5u, 31u, 1000u, 0xFFFFFFFFu})
    REQUIRE(contains(tensor_fault({32}, type, 0, 64),
                     "tensor 't': type: expected one whose size is known, got number " + std::to_string(type)));
  for (const std::uint64_t cols : {std::uint64_t(0), std::uint64_t(31), std::uint64_t(33), most})
    REQUIRE(contains(tensor_fault({cols, 2}, 8, 0, 68),
                     "tensor 't': sizes: expected rows of whole blocks of 32 numbers "
                     "of Q8_0, got [" +
                         std::to_string(cols) + ", 2]"));
  for (const std::vector<std::uint64_t>& sizes : std::vector<std::vector<std::uint64_t>>{{32, 0},
                                                                                         {32, 0, most},
                                                                                         {huge},
                                                                                         {huge, 2},
                                                                                         {most - 31, most},
                                                                                         {32, most, most, most},
                                                                                         {64, huge},
                                                                                         {32, huge / 34, 2}})
    REQUIRE(
        contains(tensor_fault(sizes, 8, 0, 68), "tensor 't': sizes: expected at least 1 each, and Q8_0 that fit in"));
  REQUIRE(contains(tensor_fault({32, 2}, 8, 0, 67),
                   "tensor 't': truncated: expected 68 bytes from 96 on, got a file of 163"));
  for (const std::uint64_t offset : {std::uint64_t(1), std::uint64_t(32), huge, most - 31, most})
    REQUIRE(contains(tensor_fault({32, 2}, 8, offset, 128),
                     "tensor 't': offset: expected 0, aligned to 32 after the tensor "
                     "before it, got " +
                         std::to_string(offset)));
  const auto two = [](const std::string& a, const std::string& b) {
    const std::vector<std::byte> zeros(4);
    return fault_of(GgufWriter().add(a, {1}, GgufType::f32, zeros).add(b, {1}, GgufType::f32, zeros).bytes());
  };
  REQUIRE(two("a", "b").empty());
  REQUIRE(contains(two("a", "a"), "tensor 'a': damaged: expected names that differ, got this one twice"));
  REQUIRE(contains(two("", "a"), "tensor '': name: expected 1 to 64 bytes, got 0"));
  REQUIRE(two(std::string(64, 'n'), "a").empty());
  REQUIRE(contains(two(std::string(65, 'n'), "a"), "name: expected 1 to 64 bytes, got 65"));
  // Tensors that lie on each other, and a hole between them.
  for (const std::uint64_t offset : {std::uint64_t(0), std::uint64_t(64)}) {
    GgufBytes file = header(2, 0);
    for (const auto& [name, at] : {std::pair("a", std::uint64_t(0)), std::pair("b", offset)})
      file.string(name).number(1u).number(std::uint64_t(1)).number(0u).number(at);
    REQUIRE(contains(
        fault_of(file.pad(32).append(std::vector<std::byte>(96))),
        "tensor 'b': offset: expected 32, aligned to 32 after the tensor before it, got " + std::to_string(offset)));
  }
}

TEST_CASE("pretrained: a file on disk is kept as long as what was read from it") {
  const test::Folder folder;
  const std::filesystem::path path = folder / "tiny.gguf";
  const std::vector<std::byte> bytes = test::TinyLlama().bytes();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  GgufFile copy;
  {
    const GgufFile file = pretrained::read_gguf(path);
    copy = file;
  }
  std::filesystem::remove(path);
  REQUIRE(copy.source() == path.string());
  REQUIRE(copy.get<std::string>("general.architecture") == "llama");
  REQUIRE(copy.list<std::string>("tokenizer.ggml.tokens").size() == 265);
  REQUIRE(copy.tensor("blk.1.attn_k.weight").shape == std::vector<Index>{24, 8});
  REQUIRE(copy.tensors().size() == 2 + 2 * 9);
  REQUIRE(std::equal(copy.tensors().back().bytes.begin(), copy.tensors().back().bytes.end(), bytes.end() - 96));
}

TEST_CASE("pretrained: what is no readable file is refused, by path") {
  const test::Folder folder;
  const auto fault = [](const std::filesystem::path& path) {
    return message_of<FileError>([&] { pretrained::read_gguf(path); });
  };
  REQUIRE(fault(folder / "no") ==
          "read_gguf: '" + (folder / "no").string() + "': expected a file, got none of this name");
  REQUIRE(contains(fault(folder / ""), "expected a regular file, got another kind"));
  std::ofstream(folder / "empty");
  REQUIRE(fault(folder / "empty") ==
          "parse_gguf: '" + (folder / "empty").string() + "': magic: truncated: expected 4 bytes, got 0");
}
