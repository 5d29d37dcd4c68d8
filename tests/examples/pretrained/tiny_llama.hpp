#pragma once

// A llama model of random weights with a small tokenizer, as a GGUF file.

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "random.hpp"

namespace test {

/// The letter that stands for a byte in vocabularies, as UTF-8.
inline std::string byte_letter(int byte) {
  int letter = byte;
  const auto printable = [](int b) { return (b >= 33 && b < 127) || (b >= 161 && b < 256 && b != 173); };
  if (!printable(byte)) {
    letter = 256;
    for (int b = 0; b < byte; ++b) letter += !printable(b);
  }
  if (letter < 128) return {static_cast<char>(letter)};
  return {static_cast<char>(0xC0 | letter >> 6), static_cast<char>(0x80 | (letter & 0x3F))};
}

/// Bytes as vocabularies write them.
inline std::string byte_letters(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += byte_letter(static_cast<unsigned char>(byte));
  return text;
}

/// A tokenizer of three special tokens (0 ends a text, 1 begins and 2 ends a turn of a chat), all bytes from 3 on, and
/// the merges "h e", "l l", "he ll", "hell o", " w", " hello" from 259 on.
struct TinyTokenizer {
  static constexpr std::int32_t end = 0, begin_turn = 1, end_turn = 2, first_byte = 3, first_merged = 259;

  std::string pre = "smollm";
  std::vector<std::string> tokens{"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  std::vector<std::int32_t> kinds{3, 3, 3};
  std::vector<std::string> merges;

  TinyTokenizer() {
    for (int byte = 0; byte < 256; ++byte) add(byte_letter(byte));
    const std::string space = byte_letter(' ');
    for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{
             {"h", "e"}, {"l", "l"}, {"he", "ll"}, {"hell", "o"}, {space, "w"}, {space, "hello"}}) {
      add(left + right);
      merges.push_back(left + " " + right);
    }
  }

  void add(const std::string& token, std::int32_t kind = 1) {
    tokens.push_back(token);
    kinds.push_back(kind);
  }

  void write(GgufWriter& writer) const {
    writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", pre);
    writer.set_list("tokenizer.ggml.tokens", tokens).set_list("tokenizer.ggml.token_type", kinds);
    writer.set_list("tokenizer.ggml.merges", merges);
    writer.set("tokenizer.ggml.bos_token_id", std::uint32_t(begin_turn));
    writer.set("tokenizer.ggml.eos_token_id", std::uint32_t(end_turn));
  }
};

/// Sizes of a model. The vocabulary is that of its tokenizer.
struct TinyLlama {
  std::uint32_t layers = 2, model_dim = 24, heads = 6, kv_heads = 2, feed_forward = 40, context = 256;
  float rope_base = 10000, epsilon = 1e-5f;
  /// The read-out is the embedding; otherwise there is a tensor output.weight.
  bool tied = true;
  std::uint64_t seed = 1;
  TinyTokenizer tokenizer = {};

  std::uint32_t head_dim() const { return model_dim / heads; }

  void write_config(GgufWriter& writer) const {
    writer.set("general.architecture", "llama").set("general.name", "tiny");
    writer.set("llama.block_count", layers).set("llama.context_length", context);
    writer.set("llama.embedding_length", model_dim).set("llama.feed_forward_length", feed_forward);
    writer.set("llama.attention.head_count", heads).set("llama.attention.head_count_kv", kv_heads);
    writer.set("llama.rope.freq_base", rope_base).set("llama.rope.dimension_count", head_dim());
    writer.set("llama.attention.layer_norm_rms_epsilon", epsilon);
    tokenizer.write(writer);
  }

  /// Calls add(name, rows, columns) for every matrix, in the order of files; vectors have one row.
  template <class Add>
  void visit_tensors(Add&& add) const {
    const coterie::Index d = model_dim, f = feed_forward, kv = coterie::Index(kv_heads) * head_dim();
    const auto vocabulary = static_cast<coterie::Index>(tokenizer.tokens.size());
    add(std::string("token_embd.weight"), vocabulary, d);
    for (std::uint32_t l = 0; l < layers; ++l) {
      const std::string block = "blk." + std::to_string(l) + ".";
      add(block + "attn_norm.weight", 1, d);
      add(block + "ffn_down.weight", d, f);
      add(block + "ffn_gate.weight", f, d);
      add(block + "ffn_up.weight", f, d);
      add(block + "ffn_norm.weight", 1, d);
      add(block + "attn_k.weight", kv, d);
      add(block + "attn_output.weight", d, d);
      add(block + "attn_q.weight", d, d);
      add(block + "attn_v.weight", kv, d);
    }
    add(std::string("output_norm.weight"), 1, d);
    if (!tied) add(std::string("output.weight"), vocabulary, d);
  }

  /// Adds all weights as F32: matrices uniform with variance 1 / columns, gains from 1/2 to 3/2.
  void write_weights(GgufWriter& writer) const {
    Random random(seed);
    visit_tensors([&](const std::string& name, coterie::Index rows, coterie::Index cols) {
      coterie::RowMatrix<float> w = random.matrix<float>(rows, cols);
      if (rows == 1) {
        w = (w.array() * 0.5f + 1).matrix();
        writer.add_vector(name, {w.data(), w.data() + cols});
      } else {
        w *= std::sqrt(3.0f / static_cast<float>(cols));
        writer.add(name, w);
      }
    });
  }

  std::vector<std::byte> bytes() const {
    GgufWriter writer;
    write_config(writer);
    write_weights(writer);
    return writer.bytes();
  }
};

}  // namespace test
