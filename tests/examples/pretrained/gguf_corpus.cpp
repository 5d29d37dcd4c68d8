#include <filesystem>
#include <fstream>

#include "catch.hpp"
#include "file/folder.hpp"
#include "fuzz/read_gguf_bytes.hpp"
#include "tiny_llama.hpp"

using pretrained::GgufType;
using test::GgufBytes;
using test::GgufWriter;

namespace {

const std::filesystem::path gguf_corpus = COTERIE_FUZZ_CORPUS;

// A tokenizer of few tokens, so that the fuzzer has few bytes to change.
void write_small_tokenizer(GgufWriter& writer, const char* pre) {
  writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", pre);
  writer.set_list("tokenizer.ggml.tokens",
                  std::vector<std::string>{"<|im_end|>", "h", "e", "l", "o", "he", "ll", "hell"});
  writer.set_list("tokenizer.ggml.token_type", std::vector<std::int32_t>{3, 1, 1, 1, 1, 1, 1, 1});
  writer.set_list("tokenizer.ggml.merges", std::vector<std::string>{"h e", "l l", "he ll"});
  writer.set("tokenizer.ggml.eos_token_id", std::uint32_t(0));
}

}  // namespace

TEST_CASE("pretrained: the fuzzer's corpus of GGUF files: good ones are read, bad ones refused") {
  int good = 0, bad = 0;
  for (const auto& entry : std::filesystem::directory_iterator(gguf_corpus)) {
    INFO(entry.path().filename().string());
    const std::vector<std::byte> bytes = GgufBytes().text(test::text_of(entry.path())).bytes();
    const bool accepted = fuzz::read_gguf_bytes(bytes);
    REQUIRE(accepted == entry.path().filename().string().starts_with("good_"));
    ++(accepted ? good : bad);
  }
  REQUIRE(good >= 5);
  REQUIRE(bad >= 10);
}

// Hidden: makes the corpus anew.  test_examples "[write-gguf-corpus]"
TEST_CASE("pretrained: write the fuzzer's corpus of GGUF files", "[.][write-gguf-corpus]") {
  const auto write = [&](const std::string& name, const std::vector<std::byte>& bytes) {
    std::ofstream(gguf_corpus / name, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  };
  const auto zeros = [](std::size_t count) { return std::vector<std::byte>(count); };
  write("good_empty", GgufWriter().bytes());
  GgufWriter values;
  values.set("u8", std::uint8_t(1)).set("i64", std::int64_t(-1)).set("u64", ~std::uint64_t(0)).set("f32", 0.5f);
  values.set("f64", 0.5).set("bool", true).set("string", "text").set("general.alignment", std::uint32_t(8));
  values.set_list("strings", std::vector<std::string>{"a", "", "b"}).set_list("u16", std::vector<std::uint16_t>{1, 2});
  write("good_values", values.set_version(2).bytes());
  GgufWriter tensors;
  for (const std::uint32_t type : {0u, 1u, 2u, 3u, 6u, 7u, 8u, 10u, 11u, 12u, 13u, 14u, 20u, 30u}) {
    const auto* const info = pretrained::detail::gguf_type_info(type);
    tensors.add(std::string(info->name), {static_cast<std::uint64_t>(info->block), 2}, static_cast<GgufType>(type),
                zeros(2 * static_cast<std::size_t>(info->bytes)));
  }
  write("good_tensors", tensors.bytes());
  for (const char* pre : {"smollm", "gpt-2"}) {
    GgufWriter tokenizer;
    write_small_tokenizer(tokenizer, pre);
    write(std::string("good_tokenizer_") + pre, tokenizer.bytes());
  }

  const auto header = [](std::uint64_t count, std::uint64_t keys) {
    return GgufBytes().text("GGUF").number(3u).number(count).number(keys);
  };
  const std::uint64_t huge = std::uint64_t(1) << 63;
  write("bad_magic", GgufBytes().text("GGML").number(3u).number(huge).bytes());
  write("bad_version", GgufWriter().set_version(1).bytes());
  write("bad_big_endian", GgufWriter().set_version(0x03000000).bytes());
  write("bad_tensor_count", header(huge, 0).bytes());
  write("bad_key_count", header(0, huge).bytes());
  write("bad_key_length", header(0, 1).number(huge).text("key").bytes());
  write("bad_list_count", header(0, 1).string("k").number(9u).number(10u).number(huge / 4).bytes());
  write("bad_nested_list", header(0, 1).string("k").number(9u).number(9u).number(std::uint64_t(0)).bytes());
  write("bad_bool", header(0, 1).string("k").number(7u).number(std::uint8_t(2)).bytes());
  write("bad_key_twice", GgufWriter().set("k", 1).set("k", 2).bytes());
  write("bad_alignment", GgufWriter().set("general.alignment", std::uint32_t(48)).bytes());
  write("bad_block", GgufWriter().add("t", {33}, GgufType::q8_0, zeros(64)).bytes());
  write("bad_size", GgufWriter().add("t", {32, huge, 4}, GgufType::q8_0, zeros(64)).bytes());
  write("bad_type", GgufWriter().add("t", {32}, static_cast<GgufType>(99), zeros(64)).bytes());
  write("bad_name_twice",
        GgufWriter().add("t", {1}, GgufType::f32, zeros(4)).add("t", {1}, GgufType::f32, zeros(4)).bytes());
  write("bad_offset",
        header(1, 0).string("t").number(1u).number(std::uint64_t(1)).number(0u).number(huge).pad(64).bytes());
  std::vector<std::byte> cut = tensors.bytes();
  cut.resize(cut.size() - 64);
  write("bad_truncated", cut);
}
