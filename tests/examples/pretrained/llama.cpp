#include "pretrained/llama.hpp"

#include <cmath>
#include <cstring>
#include <map>

#include "catch.hpp"
#include "errors.hpp"
#include "pretrained/gguf.hpp"
#include "pretrained/llama_file.hpp"
#include "pretrained/session.hpp"
#include "tiny_llama.hpp"

namespace {

using pretrained::AttentionChoice;
using pretrained::FileError;
using pretrained::LlamaFile;
using pretrained::Session;
using test::contains;
using test::message_of;
using test::TinyLlama;
using Logits = coterie::RowMatrix<float>;
using Numbers = std::vector<double>;
using Index = coterie::Index;

LlamaFile llama_of(const TinyLlama& tiny) {
  const std::vector<std::byte> bytes = tiny.bytes();
  return pretrained::read_llama(pretrained::parse_gguf(bytes));
}

std::vector<std::int32_t> some_tokens(const TinyLlama& tiny, std::size_t count) {
  std::vector<std::int32_t> tokens;
  for (std::size_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>((i * i * 31 + 7 * i + 5) % tiny.tokenizer.tokens.size()));
  return tokens;
}

/// All logits of a session that reads tokens in pieces of `block`.
Logits read(Session& session, std::span<const std::int32_t> tokens, std::size_t block, coterie::Context& context) {
  Logits all(static_cast<Index>(tokens.size()), session.model().config.vocabulary);
  for (std::size_t at = 0; at < tokens.size(); at += block) {
    const std::size_t count = std::min(block, tokens.size() - at);
    session.read(tokens.subspan(at, count), coterie::view(all).rows(static_cast<Index>(at), static_cast<Index>(count)),
                 context);
  }
  return all;
}

bool same_bits(const Logits& a, const Logits& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), sizeof(float) * static_cast<std::size_t>(a.size())) == 0;
}

/// The same model in plain loops and double, from the file's own rows: logits of every token.
class PlainLlama {
 public:
  PlainLlama(const TinyLlama& tiny, const pretrained::GgufFile& file) : tiny_(tiny), file_(file) {}

  std::vector<Numbers> logits(const std::vector<std::int32_t>& tokens) const {
    const std::size_t n = tokens.size(), heads = tiny_.heads, group = heads / tiny_.kv_heads, d = tiny_.head_dim();
    std::vector<Numbers> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = row("token_embd.weight", tokens[i]);
    for (std::uint32_t l = 0; l < tiny_.layers; ++l) {
      const std::string block = "blk." + std::to_string(l) + ".";
      std::vector<Numbers> q(n), k(n), v(n);
      for (std::size_t i = 0; i < n; ++i) {
        const Numbers normed = norm(x[i], block + "attn_norm.weight");
        q[i] = turned(times(block + "attn_q.weight", normed), i);
        k[i] = turned(times(block + "attn_k.weight", normed), i);
        v[i] = times(block + "attn_v.weight", normed);
      }
      for (std::size_t i = 0; i < n; ++i) {
        Numbers out(heads * d, 0.0);
        for (std::size_t h = 0; h < heads; ++h) {
          double sum = 0;
          for (std::size_t j = 0; j <= i; ++j) {
            double dot = 0;
            for (std::size_t c = 0; c < d; ++c) dot += q[i][h * d + c] * k[j][h / group * d + c];
            const double weight = std::exp(dot / std::sqrt(double(d)));
            sum += weight;
            for (std::size_t c = 0; c < d; ++c) out[h * d + c] += weight * v[j][h / group * d + c];
          }
          for (std::size_t c = 0; c < d; ++c) out[h * d + c] /= sum;
        }
        add(x[i], times(block + "attn_output.weight", out));
        const Numbers normed = norm(x[i], block + "ffn_norm.weight");
        Numbers gate = times(block + "ffn_gate.weight", normed);
        const Numbers up = times(block + "ffn_up.weight", normed);
        for (std::size_t c = 0; c < gate.size(); ++c) gate[c] *= up[c] / (1 + std::exp(-gate[c]));
        add(x[i], times(block + "ffn_down.weight", gate));
      }
    }
    for (Numbers& one : x)
      one = times(tiny_.tied ? "token_embd.weight" : "output.weight", norm(one, "output_norm.weight"));
    return x;
  }

 private:
  const Logits& tensor(const std::string& name) const {
    const auto at = known_.find(name);
    if (at != known_.end()) return at->second;
    const pretrained::GgufTensor& t = file_.tensor(name);
    return known_.emplace(name, pretrained::dequantise(file_, name, t.rows(), t.cols())).first->second;
  }
  Numbers row(const std::string& name, Index i) const {
    const Logits& m = tensor(name);
    return {m.row(i).begin(), m.row(i).end()};
  }
  Numbers times(const std::string& name, const Numbers& x) const {
    const Logits& m = tensor(name);
    Numbers y(static_cast<std::size_t>(m.rows()), 0.0);
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j) y[static_cast<std::size_t>(i)] += double(m(i, j)) * x[std::size_t(j)];
    return y;
  }
  Numbers norm(const Numbers& x, const std::string& name) const {
    double squares = 0;
    for (const double value : x) squares += value * value;
    Numbers y = x;
    for (std::size_t j = 0; j < x.size(); ++j)
      y[j] *= double(tensor(name)(0, Index(j))) / std::sqrt(squares / double(x.size()) + double(tiny_.epsilon));
    return y;
  }
  // Neighbouring columns of a head turn by position * base^(-2 j / d).
  Numbers turned(Numbers x, std::size_t position) const {
    const std::size_t d = tiny_.head_dim();
    for (std::size_t c = 0; c + 1 < x.size(); c += 2) {
      const double angle = double(position) * std::pow(double(tiny_.rope_base), -double(c % d) / double(d));
      const double even = x[c], odd = x[c + 1];
      x[c] = even * std::cos(angle) - odd * std::sin(angle);
      x[c + 1] = even * std::sin(angle) + odd * std::cos(angle);
    }
    return x;
  }
  static void add(Numbers& x, const Numbers& y) {
    for (std::size_t j = 0; j < x.size(); ++j) x[j] += y[j];
  }

  const TinyLlama& tiny_;
  const pretrained::GgufFile& file_;
  mutable std::map<std::string, Logits> known_;
};

std::string fault(const TinyLlama& tiny, const std::function<void(test::GgufWriter&)>& change,
                  const std::string& without = "") {
  test::GgufWriter writer;
  tiny.write_config(writer);
  change(writer);
  coterie::RowMatrix<float> m;
  tiny.visit_tensors([&](const std::string& name, Index rows, Index cols) {
    m.setOnes(rows, cols);
    if (name != without) writer.add(name, m);
  });
  const std::vector<std::byte> bytes = writer.bytes();
  return message_of<FileError>([&] { pretrained::read_llama(pretrained::parse_gguf(bytes)); });
}

}  // namespace

TEST_CASE("a llama model gives the logits of a plain one in double") {
  coterie::Context context;
  for (const TinyLlama& tiny : {TinyLlama{},
                                TinyLlama{.layers = 1,
                                .model_dim = 16,
                                .heads = 2,
                                .kv_heads = 2,
                                .rope_base = 100000,
                                .epsilon = 0.01f,
                                .tied = false,
                                .seed = 2},
                                TinyLlama{.layers = 3, .heads = 4, .kv_heads = 1, .feed_forward = 17, .seed = 3}}) {
    const std::vector<std::byte> bytes = tiny.bytes();
    const pretrained::GgufFile file = pretrained::parse_gguf(bytes);
    const LlamaFile llama = pretrained::read_llama(file);
    REQUIRE(llama.tied == tiny.tied);
    REQUIRE(llama.name == "tiny");
    const std::vector<std::int32_t> tokens = some_tokens(tiny, 41);
    const std::vector<Numbers> expected = PlainLlama(tiny, file).logits(tokens);
    Session session(llama.model);
    const Logits logits = read(session, tokens, 41, context);
    double largest = 0, scale = 0;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      for (std::size_t j = 0; j < expected[i].size(); ++j) {
        largest = std::max(largest, std::abs(double(logits(Index(i), Index(j))) - expected[i][j]));
        scale = std::max(scale, std::abs(expected[i][j]));
      }
    INFO("largest difference " << largest << ", largest logit " << scale);
    REQUIRE(scale > 1);
    REQUIRE(largest < 3e-6 * scale);
  }
}

TEST_CASE("a session gives the same bits however tokens are cut, dense and through the index, with any workers") {
  const TinyLlama tiny;
  const LlamaFile llama = llama_of(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(tiny, 333);
  AttentionChoice index = AttentionChoice::with_index(0.2, 4);
  index.keys.page = 4;
  index.keys.segment = 32;
  index.keys.recent = 8;
  for (const AttentionChoice& choice : {AttentionChoice::dense(), index}) {
    coterie::Context context;
    Session one(llama.model);
    one.choose(choice, context);
    const Logits expected = read(one, tokens, 1, context);
    for (const std::size_t block : {2, 5, 16, 100, 333}) {
      Session session(llama.model);
      session.choose(choice, context);
      REQUIRE(same_bits(read(session, tokens, block, context), expected));
    }
    coterie::ThreadPool pool(3);
    coterie::Workspace workspace;
    coterie::Context three{pool, workspace};
    Session session(llama.model);
    session.choose(choice, three);
    REQUIRE(same_bits(read(session, tokens, 50, three), expected));

    // The last tokens again after a rollback, and after other tokens in their place.
    for (const Index kept : {300, 129, 8, 0}) {
      session.rollback(kept, three);
      session.read(std::span(tokens).first(20), three);
      session.rollback(kept, three);
      REQUIRE(session.tokens() == kept);
      const Logits again = read(session, std::span(tokens).subspan(std::size_t(kept)), 64, three);
      REQUIRE(same_bits(again, expected.bottomRows(333 - kept)));
    }
    // Logits of the last tokens alone.
    Session last(llama.model);
    last.choose(choice, context);
    Logits two(2, expected.cols());
    last.read(tokens, two, context);
    REQUIRE(same_bits(two, expected.bottomRows(2)));
  }
}

TEST_CASE("an index with the whole cache as its budget is dense attention; with less it is near") {
  const TinyLlama tiny;
  const LlamaFile llama = llama_of(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(tiny, 256);
  coterie::Context context;
  Session session(llama.model);
  session.read(std::span(tokens).first(200), context);
  const Logits dense = read(session, std::span(tokens).subspan(200), 8, context);
  double before = -1;
  for (const double budget : {1.0, 0.5, 0.2}) {
    session.choose(AttentionChoice::dense(), context);
    session.rollback(200, context);
    AttentionChoice choice = AttentionChoice::with_index(budget, 4);
    choice.keys.page = 4;
    choice.keys.segment = 32;
    choice.keys.recent = 4;
    choice.keys.sinks = 1;
    session.choose(choice, context);
    session.count_use(true);
    const Logits logits = read(session, std::span(tokens).subspan(200), 8, context);
    const double difference = double((logits - dense).cwiseAbs().maxCoeff());
    REQUIRE(difference < (budget == 1 ? 1e-5 : 5.0));  // the weights are random: small changes grow
    REQUIRE(difference > before);
    before = difference;
    REQUIRE(session.use().queries == 56 * 6 * 2);
    REQUIRE(session.use().keys_seen / session.use().queries <= budget + 1e-9);
    REQUIRE((session.use().estimated_mass > 0) == (budget < 0.25));  // at 0.5 all others are ranked
  }
}

TEST_CASE("outputs through the index are compared with dense ones, head by head") {
  const TinyLlama tiny;
  const LlamaFile llama = llama_of(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(tiny, 256);
  coterie::Context context;
  Session plain(llama.model), session(llama.model);
  const Logits expected = read(plain, tokens, 64, context);
  session.read(std::span(tokens).first(200), context);
  AttentionChoice choice = AttentionChoice::with_index(0.2, 4);
  choice.keys.page = 4;
  choice.keys.segment = 32;
  choice.keys.recent = 4;
  session.compare_heads(choice, {1.0, 0.2}, context);
  // The dense run is what it was.
  REQUIRE(same_bits(read(session, std::span(tokens).subspan(200), 8, context), expected.bottomRows(56)));
  const std::vector<pretrained::HeadErrors> errors = session.head_errors();
  REQUIRE(errors.size() == 2);
  REQUIRE(errors[0].mean() < 1e-5);
  REQUIRE(errors[1].mean() > 1e-3);
  for (const pretrained::HeadErrors& e : errors) {
    const auto head = e.worst_head(), layer = e.worst_layer();
    REQUIRE(head.error == e.head(head.layer, head.head));
    REQUIRE(layer.error == e.layer(layer.layer));
    REQUIRE(head.error >= layer.error);
    REQUIRE(layer.error >= e.mean());
  }
  session.choose(AttentionChoice::dense(), context);
  REQUIRE(session.head_errors().empty());

  pretrained::HeadErrors by_hand(1, 2);
  Logits dense(2, 4), out(2, 4);
  dense << 3, 4, 1, 0, 0, 5, 0, 0;  // the second head of the second query is zero: it does not count
  out << 3, 9, 1, 0, 0, 5, 1, 0;
  by_hand.add(0, out, dense);
  REQUIRE(by_hand.head(0, 0) == std::sqrt(0.5));
  REQUIRE(by_hand.head(0, 1) == 0);
}

TEST_CASE("a session refuses wrong tokens, logits and rollbacks, and has then read nothing") {
  const TinyLlama tiny;
  const LlamaFile llama = llama_of(tiny);
  coterie::Context context;
  Session session(llama.model);
  const std::vector<std::int32_t> tokens = some_tokens(tiny, 3);
  session.read(tokens, context);
  const Index vocabulary = llama.model.config.vocabulary;
  for (const std::int32_t wrong : {-1, static_cast<std::int32_t>(vocabulary)}) {
    const std::vector<std::int32_t> bad{tokens[0], wrong};
    REQUIRE_THROWS_AS(session.read(bad, context), coterie::ValueError);
  }
  Logits four(4, vocabulary), narrow(1, vocabulary - 1);
  REQUIRE_THROWS_AS(session.read(tokens, four, context), coterie::ShapeError);
  REQUIRE_THROWS_AS(session.read(tokens, narrow, context), coterie::ShapeError);
  REQUIRE_THROWS_AS(session.rollback(4, context), coterie::ValueError);
  REQUIRE_THROWS_AS(session.rollback(-1, context), coterie::ValueError);
  REQUIRE(session.tokens() == 3);
}

TEST_CASE("a llama file with settings or tensors that are not computed is refused by their names") {
  const auto set = [](const char* key, auto value) {
    return [=](test::GgufWriter& writer) { writer.set(key, value); };
  };
  const auto nothing = [](test::GgufWriter&) {};
  const TinyLlama tiny;
  const auto expect = [](const std::string& fault, const std::string& text) {
    INFO(fault);
    REQUIRE(contains(fault, text));
  };
  REQUIRE(fault(tiny, nothing).empty());
  expect(fault(tiny, set("llama.rope.scaling.type", "linear")), "llama.rope.scaling.type");
  REQUIRE(fault(tiny, set("llama.rope.scaling.type", "none")).empty());
  expect(fault(tiny, set("llama.rope.scaling.factor", 4.0f)), "llama.rope.scaling.factor");
  expect(fault(tiny, set("llama.rope.scale_linear", 4.0f)), "llama.rope.scale_linear");
  expect(fault(tiny, set("llama.expert_count", 8u)), "llama.expert_count");
  expect(fault(tiny, set("llama.attention.sliding_window", 64u)), "llama.attention.sliding_window");
  expect(fault(tiny, set("llama.attention.key_length", 6u)), "llama.rope.dimension_count");
  expect(fault(tiny, set("llama.attention.value_length", 6u)), "llama.attention.value_length");
  expect(fault(tiny, set("llama.vocab_size", 6u)), "llama.vocab_size");
  expect(fault(TinyLlama{.layers = 0}, nothing), "llama.block_count");
  expect(fault(TinyLlama{.kv_heads = 4}, nothing), "llama.attention.head_count_kv");
  expect(fault(TinyLlama{.rope_base = -1}, nothing), "llama.rope.freq_base");
  expect(fault(TinyLlama{.epsilon = std::numeric_limits<float>::quiet_NaN()}, nothing),
         "llama.attention.layer_norm_rms_epsilon");
  for (const char* name : {"token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "output_norm.weight"})
    expect(fault(tiny, nothing, name), name);
  const coterie::RowMatrix<float> one = coterie::RowMatrix<float>::Ones(1, 4);
  expect(fault(tiny, [&](test::GgufWriter& w) { w.add("rope_freqs.weight", one); }), "rope_freqs.weight");
  expect(fault(tiny, [&](test::GgufWriter& w) { w.add("blk.0.attn_q.bias", one); }), "blk.0.attn_q.bias");
  // More layers than there are tensors for, and another architecture.
  const auto fault_of = [](const test::GgufWriter& writer) {
    const std::vector<std::byte> bytes = writer.bytes();
    return message_of<FileError>([&] { pretrained::read_llama(pretrained::parse_gguf(bytes)); });
  };
  for (const std::uint32_t layers : {3u, 1u << 24, 1u << 30}) {
    test::GgufWriter writer;
    TinyLlama{.layers = layers}.write_config(writer);
    tiny.write_weights(writer);
    expect(fault_of(writer), layers > (1u << 24) ? "llama.block_count" : "blk.2.attn_q.weight");
  }
  expect(fault_of(test::GgufWriter().set("general.architecture", "gpt2")), "general.architecture");
}
