// A pretrained language model on a CPU: dense, and through an index that looks at a few percent of its keys.
//
// The model is a GGUF file of the llama architecture. The attention of each of its blocks is a RoutingAttention with a
// dense block of heads; the index is a KeyIndex over the keys and values of each block. Nothing is trained.
//
//     cmake/run pretrained                                    fetches SmolLM2-135M-Instruct (93 MB), builds, runs this
//     pretrained --model FILE                                 text dense and with the index at 5 and 10 %, and speed
//     pretrained --model FILE --chat                          a conversation; --attention index --budget 0.05
//     pretrained --model FILE --evaluate TEXT                 perplexity at 2, 5 and 10 % of the keys
//     ... --prompt-budget 0.2                                 and with the prompt read through the index as well
//     pretrained --model FILE --needles --cluster-size 16     facts planted in a long text
//     pretrained --model FILE --time 131072                   speed of long caches
#include <iostream>
#include <map>
#include <optional>

#include "pretrained/chat.hpp"
#include "pretrained/gguf.hpp"
#include "pretrained/llama_file.hpp"
#include "pretrained/needles.hpp"
#include "pretrained/perplexity.hpp"
#include "pretrained/settings.hpp"
#include "pretrained/speed.hpp"
#include "pretrained/tokenizer.hpp"
#include "support/printable_text.hpp"

namespace {

using namespace pretrained;
using examples::format;

/// All that a run holds.
struct Run {
  const Settings& settings;
  const LlamaFile& file;
  const Tokenizer& tokenizer;
  Context& context;

  std::vector<std::int32_t> encode(const std::string& text) const {
    std::vector<std::int32_t> ids = tokenizer.encode(text, false);
    if (tokenizer.add_bos() && tokenizer.bos()) ids.insert(ids.begin(), *tokenizer.bos());
    return ids;
  }
};

/// Results by name, for the tables and the file of --json.
struct Results {
  std::map<std::string, Score> evaluate;
  std::map<std::string, Found> needles;
  std::map<std::string, std::map<Index, double>> tokens_per_second;
};

std::string label(const Settings::Named& named) {
  if (!named.choice.index) return "dense";
  const double budget = named.choice.budget;
  return budget <= 1 ? format("index, %g %% of the keys", 100 * budget) : format("index, %g keys", budget);
}

/// Writes a continuation or an answer as it comes. Returns tokens per second of writing.
double write(const Run& run, Session& session, const std::vector<std::int32_t>& prompt, std::optional<std::int32_t> end,
             const std::string& indent) {
  examples::PrintableText text(indent);
  TokenSampler sampler({.temperature = run.settings.temperature, .seed = std::uint64_t(run.settings.seed)});
  examples::Stopwatch watch;
  double prompt_seconds = -1;
  const auto print = [](const std::string& piece) {
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  const Index written =
      generate(session, prompt, run.settings.generate, end, sampler, run.context, [&](std::int32_t token) {
        if (prompt_seconds < 0) prompt_seconds = watch.seconds();
        for (const char c : run.tokenizer.token_bytes(token)) print(text.add(static_cast<std::uint8_t>(c)));
      });
  print(text.finish() + "\n");
  const double seconds = watch.seconds() - prompt_seconds;
  return written > 0 && seconds > 0 ? double(written) / seconds : 0;
}

/// Reads tokens with progress.
void read(Session& session, std::span<const std::int32_t> ids, const char* title, Context& context) {
  examples::Progress progress(title, 4, stderr);
  constexpr std::size_t block = 256;
  for (std::size_t at = 0; at < ids.size(); at += block) {
    const std::size_t count = std::min(block, ids.size() - at);
    session.read(ids.subspan(at, count), context);
    progress.show(double(at + count) / double(ids.size()));
  }
}

/// Shares of short texts are too few keys for a good text.
AttentionChoice for_text(AttentionChoice choice, const Settings& settings) {
  choice.least_keys = 256;
  if (choice.index) choice.prompt_budget = settings.prompt_budget;
  return choice;
}

/// Writes after --prompt, or after a long text with a fact in it and a question; the text is read once, densely.
void write_texts(const Run& run) {
  std::string text = run.settings.prompt, end;
  if (text.empty()) {
    const Haystack haystack = plant_facts(filler_text(8000, 7), 7500, 1, 7);
    const std::string& name = haystack.facts[0].name;
    text = haystack.text;
    end = "\nQuestion: What is the secret number of " + name + "?\nAnswer: The secret number of " + name + " is";
  }
  std::vector<std::int32_t> ids = run.encode(text);
  if (end.empty())
    std::printf("\n%s\n", text.c_str());
  else
    std::printf("\n(%zu tokens of filler with 'The secret number of NAME is NNNNN.' somewhere)\n%s\n", ids.size(),
                end.c_str());
  const std::vector<std::int32_t> asked = run.tokenizer.encode(end, false);
  ids.insert(ids.end(), asked.begin(), asked.end());
  const std::size_t last = asked.empty() ? 1 : asked.size();  // read by every way of attending by itself
  if (ids.empty()) throw examples::UsageError("--prompt: expected a text of at least one token, got none");
  const std::vector<std::int32_t> prompt(ids.end() - static_cast<Index>(last), ids.end());
  Session session(run.file.model);
  read(session, std::span(ids).first(ids.size() - last), "reading", run.context);
  const Index before = session.tokens();
  for (const Settings::Named& named : run.settings.choices({0.05, 0.10})) {
    session.choose(AttentionChoice::dense(), run.context);
    session.rollback(before, run.context);
    session.choose(for_text(named.choice, run.settings), run.context);
    std::printf("\n  %s:\n    ", label(named).c_str());
    write(run, session, prompt, run.tokenizer.eos(), "    ");
  }
}

/// Answers --prompt, or every line of standard input.
void chat(const Run& run, const GgufFile& file) {
  const ChatTemplate form(file, run.tokenizer);
  Session session(run.file.model);
  session.choose(for_text(run.settings.choices({}).front().choice, run.settings), run.context);
  const bool asks = run.settings.prompt.empty(), watched = examples::terminal_width(stdout) > 0;
  std::string message = run.settings.prompt;
  for (bool first = true;; first = false) {
    if (asks) {
      if (watched) std::printf("> ");
      std::fflush(stdout);
      if (!std::getline(std::cin, message)) break;
    }
    const std::string text = (first ? "" : ChatTemplate::after_answer()) + form.question(message, first);
    const double speed = write(run, session, run.tokenizer.encode(text, true), form.end(), "");
    if (watched && asks) std::printf("  (%lld tokens so far, %.1f tokens/s)\n", (long long)session.tokens(), speed);
    if (!asks) break;
  }
}

std::string read_file(const std::string& name) {
  std::ifstream stream(name, std::ios::binary);
  if (!stream) throw examples::UsageError("--evaluate: cannot read the file '" + name + "'");
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// Reads the prefix in blocks through the index, then scores the rest token by token through it. Returns a table row.
std::vector<std::string> evaluate_prompt(const Run& run, std::span<const std::int32_t> all, std::size_t prefix,
                                         const std::vector<double>& dense, Results& results) {
  Session session(run.file.model);
  session.choose(run.settings.prompt_index(), run.context);
  session.count_use(true);
  read(session, all.first(prefix), "reading through the index", run.context);
  AttentionChoice single = run.settings.prompt_index();
  single.prompt_budget = 0;
  session.choose(single, run.context);
  examples::Progress progress("scoring", 4, stderr);
  const std::vector<double> nats = read_and_score(session, all[prefix], all.subspan(prefix + 1), run.context,
                                                  [&](double done) { progress.show(done); });
  const double share = run.settings.prompt_budget;
  const std::string name = "prompt_" + (share <= 1 ? format("%.2f", share) : format("%.0f", share));
  Score& result = results.evaluate[name] = score(nats, dense);
  const IndexUse& use = session.use();
  result.keys_seen = use.keys_seen / use.queries;
  result.estimated_mass = use.estimated_mass / use.queries;
  return {"prompt too, " + (share <= 1 ? format("%g %%", 100 * share) : format("%g keys", share)),
          format("%.3f", result.perplexity),
          format("%+.2f %%", 100 * result.change),
          format("%.2f %%", 100 * result.change_error),
          format("%.1f %%", 100 * result.keys_seen),
          format("%.1f %%", 100 * result.estimated_mass)};
}

void evaluate(const Run& run, Session& session, const std::string& text, Results& results) {
  std::vector<std::int32_t> ids = run.encode(text);
  const auto context_tokens = static_cast<std::size_t>(run.settings.context);
  if (ids.size() > context_tokens) ids.resize(context_tokens);
  const auto scored = static_cast<std::size_t>(run.settings.scored);
  if (ids.size() < scored + 2)
    throw examples::UsageError("--evaluate: expected a text of more than " + std::to_string(scored + 1) +
                               " tokens, got " + std::to_string(ids.size()) + "; or give a smaller --scored");
  const std::span<const std::int32_t> all(ids), last = all.last(scored);
  const std::size_t prefix = ids.size() - scored - 1;
  std::printf("\nPerplexity of the last %zu of %zu tokens of %s; the %zu before them are read densely:\n\n", scored,
              ids.size(), run.settings.evaluate.c_str(), prefix + 1);
  read(session, all.first(prefix), "reading", run.context);
  std::vector<double> dense, budgets;
  const std::vector<Settings::Named> choices = run.settings.compared({0.02, 0.05, 0.10});
  for (const Settings::Named& named : choices)
    if (named.choice.index) budgets.push_back(named.choice.budget);
  std::vector<HeadErrors> errors;
  std::vector<std::vector<std::string>> table{
      {"last " + std::to_string(scored) + " tokens", "perplexity", "change", "+-", "keys seen", "estimated"}};
  for (const Settings::Named& named : choices) {
    session.choose(AttentionChoice::dense(), run.context);
    session.rollback(static_cast<Index>(prefix), run.context);
    session.choose(named.choice, run.context);
    // The dense run compares outputs as well.
    if (!named.choice.index && !budgets.empty()) session.compare_heads(choices.back().choice, budgets, run.context);
    session.count_use(named.choice.index);
    examples::Progress progress(label(named), 4, stderr);
    const std::vector<double> nats =
        read_and_score(session, all[prefix], last, run.context, [&](double done) { progress.show(done); });
    if (dense.empty()) {
      dense = nats;
      errors = session.head_errors();
    }
    Score& result = results.evaluate[named.name] = score(nats, dense);
    if (const IndexUse& use = session.use(); use.queries > 0) {
      result.keys_seen = use.keys_seen / use.queries;
      result.estimated_mass = use.estimated_mass / use.queries;
    }
    table.push_back({label(named), format("%.3f", result.perplexity),
                     named.choice.index ? format("%+.2f %%", 100 * result.change) : "",
                     named.choice.index ? format("%.2f %%", 100 * result.change_error) : "",
                     format("%.1f %%", 100 * result.keys_seen), format("%.1f %%", 100 * result.estimated_mass)});
  }
  if (run.settings.prompt_budget > 0) table.push_back(evaluate_prompt(run, all, prefix, dense, results));
  examples::print_table(table);
  std::printf(
      "\n  +-: standard error of the change over tokens. keys seen: by their own keys and values, the first and the\n"
      "  recent ones included. estimated: share of the weight of keys that only a mean key stands for.\n");
  if (errors.empty()) return;

  table = {{"error of the outputs, by heads", "mean", "worst head", "", "worst layer", ""}};
  std::size_t b = 0;
  for (const Settings::Named& named : choices) {
    if (!named.choice.index) continue;
    const HeadErrors::Worst head = errors[b].worst_head(), layer = errors[b].worst_layer();
    table.push_back({label(named), format("%.4f", errors[b].mean()), format("%.3f", head.error),
                     format("block %lld head %lld", (long long)head.layer, (long long)head.head),
                     format("%.3f", layer.error), format("block %lld", (long long)layer.layer)});
    ++b;
  }
  std::printf("\n");
  examples::print_table(table);
  std::printf(
      "\n  Root mean square over the same queries of |out - dense| / |dense|, on the dense run's keys and values.\n");
}

void find_needles(const Run& run, const std::string& text, Results& results) {
  const std::size_t facts = static_cast<std::size_t>(run.settings.facts);
  // English has 3 to 5 bytes a token; the tokens say how many are enough.
  const auto tokens = static_cast<std::size_t>(run.settings.needle_tokens);
  const std::uint64_t seed = static_cast<std::uint64_t>(run.settings.seed) + 1;
  const std::string source = text.empty() ? filler_text(8 * tokens, seed) : text;
  const std::string sample = source.substr(0, 4 * tokens);
  const double bytes_per_token = double(sample.size()) / double(std::max<std::size_t>(1, run.encode(sample).size()));
  const std::size_t planted = 14 * facts;  // tokens of the facts, about
  const std::size_t rest = std::max<std::size_t>(32, tokens > planted ? tokens - planted : 0);
  const Haystack haystack = plant_facts(source, static_cast<std::size_t>(double(rest) * bytes_per_token), facts, seed);
  const std::vector<std::int32_t> ids = run.encode(haystack.text);
  std::printf(
      "\n%zu facts, 'The secret number of NAME is NNNNN.', planted in %zu tokens of %s, which are read densely:\n\n",
      facts, ids.size(), text.empty() ? "filler" : run.settings.evaluate.c_str());
  Session session(run.file.model);
  read(session, ids, "reading", run.context);
  std::vector<std::vector<std::string>> table{{"facts", "all digits right", "digits right", "log-probability"}};
  for (const Settings::Named& named : run.settings.compared({0.05, 0.10})) {
    session.choose(named.choice, run.context);
    examples::Progress progress(label(named), 4, stderr);
    const Found found = results.needles[named.name] =
        find_facts(session, run.tokenizer, haystack.facts, run.context, [&](double done) { progress.show(done); });
    table.push_back({label(named), format("%.0f of %zu", found.all_right * double(facts), facts),
                     format("%.0f %%", 100 * found.digits_right), format("%.2f", found.log_probability)});
  }
  examples::print_table(table);
}

/// Times writing after caches of a text, repeated.
void time(const Run& run, Results& results) {
  std::vector<Index> lengths;
  for (const Index length : {1024, 4096, 8192, 32768, 131072})
    if (length <= run.settings.time) lengths.push_back(length);
  if (lengths.empty()) lengths.push_back(run.settings.time);
  std::vector<std::int32_t> ids = run.encode(filler_text(static_cast<std::size_t>(8 * lengths.front()), 1));
  ids.resize(static_cast<std::size_t>(lengths.front()), ids.front());
  Session session(run.file.model);
  read(session, ids, "reading", run.context);
  const std::vector<Settings::Named> choices = run.settings.choices({0.05, 0.10});
  std::vector<std::vector<std::string>> table{{"tokens/s after"}};
  for (const Settings::Named& named : choices) table.push_back({label(named)});
  table.push_back({"index beside the cache"});
  examples::Progress progress("timing", 4, stderr);
  double done = 0;
  for (const Index length : lengths) {
    table[0].push_back(std::to_string(length));
    std::string share = "-";
    for (std::size_t c = 0; c < choices.size(); ++c) {
      if (c == 0) {
        session.choose(AttentionChoice::dense(), run.context);
        session.repeat_to(length, run.context);
      }
      if (choices[c].choice.index && session.choice().index)
        session.set_budget(choices[c].choice.budget);
      else
        session.choose(choices[c].choice, run.context);
      const double speed = tokens_per_second(session, 16, run.context);
      results.tokens_per_second[choices[c].name][length] = speed;
      table[c + 1].push_back(format("%.1f", speed));
      if (choices[c].choice.index)
        share = format("%.0f %%", 100 * double(session.index_bytes()) / double(session.cache_bytes()));
      progress.show(++done / double(lengths.size() * choices.size()));
    }
    table.back().push_back(share);
  }
  std::printf("\nSpeed of writing with %lld threads; caches are %lld tokens of a text, repeated:\n\n",
              (long long)run.settings.threads, (long long)lengths.front());
  examples::print_table(table);
}

std::string json(const Settings& settings, const Results& results) {
  const auto object = [](const auto& map, const auto& value) {
    std::string text = "{";
    for (const auto& [key, item] : map) {
      if (text.size() > 1) text += ", ";
      text += '"';
      if constexpr (std::is_integral_v<std::decay_t<decltype(key)>>)
        text += std::to_string(key);
      else
        text += key;
      text += "\": ";
      text += value(item);
    }
    return text + "}";
  };
  const auto number = [](double x) { return format("%.6g", x); };
  std::string text = "{\"cluster_size\": " + std::to_string(settings.cluster_size);
  if (!results.evaluate.empty())
    text += ", \"evaluate\": " + object(results.evaluate, [&](const Score& s) {
              return "{\"perplexity\": " + format("%.8g", s.perplexity) + ", \"keys_seen\": " + number(s.keys_seen) +
                     ", \"estimated_mass\": " + number(s.estimated_mass) + "}";
            });
  if (!results.needles.empty())
    text += ", \"needles\": " + object(results.needles, [&](const Found& f) { return number(f.all_right); });
  if (!results.tokens_per_second.empty())
    text += ", \"tokens_per_second\": " + object(results.tokens_per_second, [&](const std::map<Index, double>& speeds) {
              return object(speeds, number);
            });
  return text + "}\n";
}

void run(int argument_count, char** arguments) {
  const Settings settings = read_settings(argument_count, arguments);
  const examples::ResultFile json_file(settings.json);
  const std::string text = settings.evaluate.empty() ? "" : read_file(settings.evaluate);

  const GgufFile gguf = read_gguf(settings.model);
  const Tokenizer tokenizer(gguf);
  const LlamaFile file = read_llama(gguf);
  const LlamaConfig& c = file.model.config;
  if (tokenizer.size() != c.vocabulary)
    gguf.fail_key("tokenizer.ggml.tokens", "expected as many tokens as token_embd.weight has rows, " +
                                               std::to_string(c.vocabulary) + ", got " +
                                               std::to_string(tokenizer.size()));
  coterie::ThreadPool pool(settings.threads);
  coterie::Workspace workspace;
  Context context{pool, workspace};
  const Run run{settings, file, tokenizer, context};
  if (settings.chat) {
    chat(run, gguf);
    return;
  }
  std::printf(
      "%s: %.1f million parameters (%s, as float), %lld blocks, %lld heads on %lld of width %lld, context %lld\n",
      file.name.c_str(), double(file.model.parameter_count(file.tied)) / 1e6, file.weight_types.c_str(),
      (long long)c.layers, (long long)c.heads, (long long)c.kv_heads, (long long)c.head_dim, (long long)c.context);
  std::printf(
      "index: clusters of %lld keys; a query sees its share of the keys, the rest by means (when writing, at "
      "least 256 keys)\n",
      (long long)settings.cluster_size);
  Results results;
  if (settings.generate > 0) write_texts(run);
  if (settings.time > 0) time(run, results);
  if (!settings.evaluate.empty()) {
    Session session(file.model);
    evaluate(run, session, text, results);
  }
  if (settings.needles) find_needles(run, text, results);
  json_file.write(json(settings, results));
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("pretrained", [&] { run(argument_count, arguments); });
}
