#include <cmath>
#include <limits>

#include "catch.hpp"
#include "errors.hpp"
#include "pretrained/chat.hpp"
#include "pretrained/gguf.hpp"
#include "pretrained/llama_file.hpp"
#include "pretrained/needles.hpp"
#include "pretrained/perplexity.hpp"
#include "tiny_llama.hpp"

// Chat, generation, perplexity and planted facts of the pretrained example.

namespace {

using pretrained::ChatTemplate;
using pretrained::Session;
using pretrained::Tokenizer;

/// A tiny file with a template for conversations.
struct TinyFile {
  std::vector<std::byte> bytes;
  pretrained::GgufFile file;
  Tokenizer tokenizer;
  pretrained::LlamaFile llama;

  explicit TinyFile(const std::string& chat = "")
      : bytes(write(chat)), file(pretrained::parse_gguf(bytes)), tokenizer(file), llama(pretrained::read_llama(file)) {}

  static std::vector<std::byte> write(const std::string& chat) {
    test::GgufWriter writer;
    const test::TinyLlama tiny;
    tiny.write_config(writer);
    if (!chat.empty()) writer.set("tokenizer.chat_template", chat);
    tiny.write_weights(writer);
    return writer.bytes();
  }
};

const char* const chatml =
    "{% if loop.first %}{{ '<|im_start|>system\nYou are small<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}";

}  // namespace

TEST_CASE("a chat template gives the system line of the file, then questions; others are refused") {
  const TinyFile tiny(chatml);
  const ChatTemplate form(tiny.file, tiny.tokenizer);
  REQUIRE(form.end() == test::TinyTokenizer::end_turn);
  const std::string turn = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
  REQUIRE(form.question("hello", true) == "<|im_start|>system\nYou are small<|im_end|>\n" + turn);
  REQUIRE(form.question("hello", false) == turn);
  const TinyFile bare("<|im_start|>{{ role }}<|im_end|>");
  REQUIRE(ChatTemplate(bare.file, bare.tokenizer).question("hello", true) == turn);
  for (const char* other : {"", "[INST] {{ content }} [/INST]"}) {
    const TinyFile none(other);
    const std::string fault = test::message_of<pretrained::FileError>([&] { ChatTemplate(none.file, none.tokenizer); });
    REQUIRE(test::contains(fault, "tokenizer.chat_template"));
  }
}

TEST_CASE("generation is greedy at temperature 0, a function of the seed above, and stops at its end token") {
  const TinyFile tiny;
  coterie::Context context;
  const std::vector<std::int32_t> prompt{5, 60, 99};
  const auto written = [&](double temperature, std::uint64_t seed, std::optional<std::int32_t> end = {}) {
    Session session(tiny.llama.model);
    pretrained::TokenSampler sampler({.temperature = temperature, .seed = seed});
    std::vector<std::int32_t> tokens;
    const coterie::Index count = pretrained::generate(session, prompt, 12, end, sampler, context,
                                                      [&](std::int32_t token) { tokens.push_back(token); });
    REQUIRE(count == static_cast<coterie::Index>(tokens.size()));
    REQUIRE(session.tokens() == static_cast<coterie::Index>(3 + tokens.size() + (end && count < 12 ? 1 : 0)));
    return tokens;
  };
  const std::vector<std::int32_t> greedy = written(0, 1);
  REQUIRE(greedy.size() == 12);
  REQUIRE(greedy == written(0, 2));
  REQUIRE(written(1, 3) == written(1, 3));
  REQUIRE(written(1, 3) != written(1, 4));
  // Read at once, the tokens before it make each token the likeliest.
  std::vector<std::int32_t> all = prompt;
  all.insert(all.end(), greedy.begin(), greedy.end());
  Session session(tiny.llama.model);
  coterie::RowMatrix<float> logits(static_cast<coterie::Index>(all.size()), tiny.llama.model.config.vocabulary);
  session.read(all, logits, context);
  for (std::size_t i = 0; i < greedy.size(); ++i)
    REQUIRE(pretrained::likeliest(coterie::view(logits).rows(static_cast<coterie::Index>(i + 2), 1)) == greedy[i]);
  const auto first = std::find(greedy.begin(), greedy.end(), greedy[5]);
  REQUIRE(written(0, 1, greedy[5]) == std::vector<std::int32_t>(greedy.begin(), first));
}

TEST_CASE("nats are those of the softmax of the logits before each token; scores compare them in pairs") {
  const TinyFile tiny;
  coterie::Context context;
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 300; ++i) tokens.push_back((i * i * 13 + i) % 260);
  Session whole(tiny.llama.model), session(tiny.llama.model);
  coterie::RowMatrix<float> logits(300, tiny.llama.model.config.vocabulary);
  whole.read(tokens, logits, context);
  session.read(std::span(tokens).first(20), context);
  const std::vector<double> nats =
      pretrained::read_and_score(session, tokens[20], std::span(tokens).subspan(21), context, [](double) {});
  REQUIRE(session.tokens() == 299);
  REQUIRE(nats.size() == 279);
  for (std::size_t i = 0; i < nats.size(); ++i) {
    const Eigen::ArrayXd row = logits.row(static_cast<coterie::Index>(20 + i)).cast<double>().array();
    const double expected = std::log(row.exp().sum()) - row(tokens[21 + i]);
    REQUIRE(std::abs(nats[i] - expected) < 1e-5);
  }
  const pretrained::Score score = pretrained::score({1.5, 2.0, 2.5, 2.0}, {1.0, 2.0, 2.0, 2.0});
  REQUIRE(score.perplexity == std::exp(2.0));
  REQUIRE(score.change == std::expm1(0.25));
  REQUIRE(score.change_error == Approx(std::exp(0.25) * 0.125));
}

TEST_CASE("facts are planted in order, one in every part of a text, and asked for with the text as it was") {
  const std::string source = pretrained::filler_text(9000, 3);
  REQUIRE(source == pretrained::filler_text(9000, 3));
  const pretrained::Haystack haystack = pretrained::plant_facts(source, 8000, 8, 1);
  REQUIRE(haystack.facts.size() == 8);
  std::size_t before = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    const pretrained::Fact& fact = haystack.facts[i];
    REQUIRE(fact.number.size() == 5);
    const std::size_t at = haystack.text.find("The secret number of " + fact.name + " is " + fact.number + ".\n");
    REQUIRE(at != std::string::npos);
    REQUIRE((i == 0 || at > before));
    REQUIRE(at >= i * 900);
    REQUIRE(at <= (i + 1) * 1100 + 400);
    before = at;
  }
  REQUIRE(pretrained::plant_facts(source, 8000, 8, 2).text != haystack.text);
  REQUIRE_THROWS_AS(pretrained::plant_facts(source, 20000, 8, 1), coterie::ValueError);

  const TinyFile tiny;
  coterie::Context context;
  Session session(tiny.llama.model);
  session.read(tiny.tokenizer.encode(haystack.text.substr(0, 200), false), context);
  const coterie::Index tokens = session.tokens();
  const pretrained::Found found =
      pretrained::find_facts(session, tiny.tokenizer, haystack.facts, context, [](double) {});
  REQUIRE(session.tokens() == tokens);
  REQUIRE(found.all_right == 0);  // the weights are random
  REQUIRE(found.log_probability < 5 * std::log(0.2));
  // One fact by hand.
  const pretrained::Fact& fact = haystack.facts[0];
  const std::string question = "\nQuestion: What is the secret number of " + fact.name +
                               "?\nAnswer: The secret number of " + fact.name + " is " + fact.number;
  const std::vector<std::int32_t> ids = tiny.tokenizer.encode(question, false);
  const auto count = static_cast<coterie::Index>(ids.size());
  coterie::RowMatrix<float> logits(count, tiny.llama.model.config.vocabulary);
  session.read(ids, logits, context);
  double expected = 0;
  for (coterie::Index i = count - 6; i < count - 1; ++i) {
    const Eigen::ArrayXd row = logits.row(i).cast<double>().array();
    expected += row(ids[static_cast<std::size_t>(i + 1)]) - std::log(row.exp().sum());
  }
  session.rollback(tokens, context);
  const pretrained::Found one = pretrained::find_facts(session, tiny.tokenizer, {fact}, context, [](double) {});
  REQUIRE(one.log_probability == Approx(expected));
}
