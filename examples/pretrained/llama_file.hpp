// A model of the llama architecture from a GGUF file: every setting and tensor is used, or refused by name.
#pragma once

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dequantise.hpp"
#include "gguf_file.hpp"
#include "llama.hpp"

namespace pretrained {

/// A model from a file, and what the file says about itself.
struct LlamaFile {
  Llama model;
  std::string name;          ///< general.name, or none
  bool tied = false;         ///< the read-out is the embedding
  std::string weight_types;  ///< of the tensors' numbers, as "Q4_1, Q8_0"
};

namespace detail {

/// Reads sizes and settings. Requires: those of a llama model that Llama can compute (FileError, which names the key).
inline LlamaConfig read_config(const GgufFile& file) {
  const auto architecture = file.get<std::string>("general.architecture");
  if (architecture != "llama")
    file.fail_key("general.architecture", "expected 'llama', got " + detail::quoted(architecture));
  const auto size = [&](const std::string& key, Index otherwise = 0) {
    const Index value = otherwise > 0 ? file.get_or<Index>(key, otherwise) : file.get<Index>(key);
    if (value < 1 || value > (Index(1) << 24))
      file.fail_key(key, "expected 1 to 16777216, got " + std::to_string(value));
    return value;
  };
  LlamaConfig c;
  c.layers = size("llama.block_count");
  c.model_dim = size("llama.embedding_length");
  c.feed_forward = size("llama.feed_forward_length");
  c.context = size("llama.context_length");
  c.heads = size("llama.attention.head_count");
  c.kv_heads = size("llama.attention.head_count_kv", c.heads);
  c.vocabulary = file.tensor("token_embd.weight").rows();
  if (const Index named = size("llama.vocab_size", c.vocabulary); named != c.vocabulary)
    file.fail_key("llama.vocab_size", "expected the rows of token_embd.weight, " + std::to_string(c.vocabulary) +
                                          ", got " + std::to_string(named));
  const auto divides = [&](const char* key, Index divisor, Index number) {
    if (number % divisor != 0)
      file.fail_key(key, "expected a divisor of " + std::to_string(number) + ", got " + std::to_string(divisor));
  };
  divides("llama.attention.head_count_kv", c.kv_heads, c.heads);
  if (!file.has("llama.attention.key_length")) divides("llama.attention.head_count", c.heads, c.model_dim);
  c.head_dim = size("llama.attention.key_length", std::max<Index>(1, c.model_dim / c.heads));
  for (const char* key : {"llama.attention.value_length", "llama.rope.dimension_count"})
    if (const Index width = size(key, c.head_dim); width != c.head_dim)
      file.fail_key(key,
                    "expected the width of a head, " + std::to_string(c.head_dim) + ", got " + std::to_string(width));
  const auto number = [&](const char* key, double lowest, double highest, std::optional<double> otherwise) {
    const double value = otherwise ? file.get_or<double>(key, *otherwise) : file.get<double>(key);
    if (!(value >= lowest && value <= highest))
      file.fail_key(key, "expected " + std::to_string(lowest) + " to " + std::to_string(highest) + ", got " +
                             std::to_string(value));
    return value;
  };
  c.rope_base = number("llama.rope.freq_base", 1, 1e12, 10000.0);
  c.epsilon = number("llama.attention.layer_norm_rms_epsilon", 0, 1, {});

  // Settings that change what the model computes, and that are not computed here.
  for (const auto& [key, value] : file.values()) {
    if (key.starts_with("llama.rope.scal") &&
        !(key == "llama.rope.scaling.type" && file.get<std::string>(key) == "none"))
      file.fail_key(key, "expected none, for scaled rotary positions are not supported, got one");
    if (key.starts_with("llama.expert") && file.get<Index>(key) > 0)
      file.fail_key(key, "expected none, for experts are not supported, got one");
    if (key == "llama.attention.sliding_window" && file.get<Index>(key) > 0)
      file.fail_key(key, "expected none, for sliding windows are not supported, got one");
  }
  return c;
}

/// Takes tensors of a file, and says at the end which were left over.
class TensorReader {
 public:
  explicit TensorReader(const GgufFile& file) : file_(file) {}

  RowMatrix<float> rows(const std::string& name, Index rows, Index cols) {
    taken_.insert(name);
    RowMatrix<float> m = dequantise(file_, name, rows, cols);
    if (!m.array().isFinite().all()) file_.fail("tensor '" + name + "': expected finite numbers, got NaN or infinity");
    return m;
  }
  /// Writes the weights of a product y = x w: the file has a row for each column of y.
  template <class Block>
  void weights(const std::string& name, Block&& w) {
    w = rows(name, w.cols(), w.rows()).transpose();
  }
  bool has(const std::string& name) const { return file_.find(name) != nullptr; }

  /// Requires that every tensor has been taken (FileError).
  void finish() const {
    for (const GgufTensor& tensor : file_.tensors())
      if (!taken_.contains(tensor.name))
        file_.fail("tensor " + detail::quoted(tensor.name) + ": expected none of this name in a llama model, got one");
  }

 private:
  const GgufFile& file_;
  std::set<std::string, std::less<>> taken_;
};

}  // namespace detail

/// The model of a file; weights become float once.
/// Requires: a llama model, all of whose settings and tensors are known here, with tensors of the sizes that its
///   settings say and finite numbers (FileError, which names the key or tensor).
inline LlamaFile read_llama(const GgufFile& file) {
  LlamaFile result;
  Llama& model = result.model;
  const LlamaConfig c = model.config = detail::read_config(file);
  // Sizes are those of tensors of the file before memory of these sizes is taken.
  detail::TensorReader reader(file);
  const Index q = c.q_dim(), kv = c.kv_dim(), d = c.model_dim, f = c.feed_forward;
  const auto name_of_block = [](Index l, const char* name) {
    return "blk." + std::to_string(l) + "." + name + ".weight";
  };
  const auto check = [&](const std::string& name, Index rows, Index cols) {
    const GgufTensor& tensor = file.tensor(name);
    if (tensor.rows() != rows || tensor.cols() != cols)
      file.fail("tensor '" + name + "': expected " + std::to_string(rows) + " rows of " + std::to_string(cols) +
                ", got " + std::to_string(tensor.rows()) + " of " + std::to_string(tensor.cols()));
  };
  for (Index l = 0; l < c.layers; ++l) {
    check(name_of_block(l, "attn_q"), q, d);
    check(name_of_block(l, "attn_k"), kv, d);
    check(name_of_block(l, "attn_v"), kv, d);
    check(name_of_block(l, "attn_output"), d, q);
    check(name_of_block(l, "ffn_gate"), f, d);
    check(name_of_block(l, "ffn_up"), f, d);
    check(name_of_block(l, "ffn_down"), d, f);
  }
  model.embedding = reader.rows("token_embd.weight", c.vocabulary, d);
  for (Index l = 0; l < c.layers; ++l) {
    LlamaBlock& block = model.blocks.emplace_back(c);
    const auto name = [&](const char* part) { return name_of_block(l, part); };
    block.attention_norm = reader.rows(name("attn_norm"), 1, d);
    block.feed_norm = reader.rows(name("ffn_norm"), 1, d);
    coterie::Parameters<float>& p = block.attention.parameters();
    reader.weights(name("attn_q"), p.w_q);
    reader.weights(name("attn_k"), p.w_k);
    reader.weights(name("attn_v"), p.w_v);
    reader.weights(name("attn_output"), p.w_o);
    reader.weights(name("ffn_gate"), block.gate_up.leftCols(f));
    reader.weights(name("ffn_up"), block.gate_up.rightCols(f));
    reader.weights(name("ffn_down"), block.down);
  }
  model.output_norm = reader.rows("output_norm.weight", 1, d);
  result.tied = !reader.has("output.weight");
  model.output.resize(d, c.vocabulary);
  if (result.tied)
    model.output = model.embedding.transpose();
  else
    reader.weights("output.weight", model.output);
  reader.finish();

  result.name = file.get_or<std::string>("general.name", "");
  std::set<std::string> types;
  for (const GgufTensor& tensor : file.tensors())
    if (tensor.rows() > 1)
      types.insert(std::string(detail::gguf_type_info(static_cast<std::uint32_t>(tensor.type))->name));
  for (const std::string& type : types) result.weight_types += (result.weight_types.empty() ? "" : ", ") + type;
  return result;
}

}  // namespace pretrained
