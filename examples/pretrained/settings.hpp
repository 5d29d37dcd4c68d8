// Settings of pretrained, from its command line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "../support/console.hpp"
#include "../support/options.hpp"
#include "session.hpp"

namespace pretrained {

struct Settings {
  std::string model, prompt, attention = "all", evaluate, json, convert, train_text, save, load;
  std::int64_t generate = 64, time = 8192, context = 8192, scored = 1024, needle_tokens = 4096, facts = 16;
  std::int64_t cluster_size = 64, seed = 0, threads = 1;
  double temperature = 0, budget = 0.05, prompt_budget = 0, train_minutes = 0;
  bool chat = false, needles = false;

  /// A way of attending by its name in results.
  struct Named {
    std::string name;
    AttentionChoice choice;
  };
  Named dense() const { return {"dense", AttentionChoice::dense()}; }
  Named index(double share) const {
    return {"index_" + (share <= 1 ? examples::format("%.2f", share) : examples::format("%.0f", share)),
            AttentionChoice::with_index(share, cluster_size)};
  }
  /// Prompt and text through the index.
  AttentionChoice prompt_index() const {
    AttentionChoice choice = AttentionChoice::with_index(budget, cluster_size);
    choice.prompt_budget = prompt_budget;
    return choice;
  }
  /// Those that are compared; with --attention or --budget those that were asked for.
  std::vector<Named> choices(std::vector<double> shares) const {
    if (attention == "dense") return {dense()};
    if (attention == "index") return {index(budget)};
    std::vector<Named> all{dense()};
    for (const double share : shares) all.push_back(index(share));
    return all;
  }
  /// The same, with dense attention as what the others are compared with.
  std::vector<Named> compared(std::vector<double> shares) const {
    std::vector<Named> all = choices(std::move(shares));
    if (all.front().choice.index) all.insert(all.begin(), dense());
    return all;
  }
};

/// Throws UsageError.
inline Settings read_settings(int argument_count, char** arguments) {
  Settings s;
  s.threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  constexpr std::int64_t most = std::int64_t(1) << 21;
  examples::Options options("pretrained",
                            "Runs a llama model from a GGUF file, densely and with an index over its keys and values: "
                            "the text that it writes, how fast,\nand with --evaluate and --needles how well.");
  options.add("--model", s.model, "the GGUF file (cmake/run pretrained gives one)");
  options.add_text("--prompt", s.prompt, "text to continue; with --chat the one message to answer");
  options.add("--generate", s.generate, 0, most, "tokens to write; 0: none; with --chat at most, 512");
  options.add_from_zero("--temperature", s.temperature, 100, "of written tokens; 0: always the likeliest (default: 0)");
  options.add("--seed", s.seed, 0, std::int64_t(1) << 53, "of written tokens and of planted facts");
  options.add("--chat", s.chat, "answer --prompt, or else every line of standard input, by the model's template");
  options.add("--attention", s.attention, {"all", "dense", "index"}, "dense, through the index, or both side by side");
  options.add("--budget", s.budget, 1e6,
              "of --attention index: share, or number above 1, of keys seen (default: 0.05)");
  options.add("--cluster-size", s.cluster_size, 1, 1 << 16, "keys of a cluster of the index");
  options.add_from_zero("--prompt-budget", s.prompt_budget, 1e6,
                        "read prompts, and the text of --evaluate once more, through the index in blocks that see this "
                        "share or number of keys; 0: densely (default: 0)");
  options.add("--evaluate", s.evaluate, "perplexity of the last tokens of this text, everything else before them");
  options.add("--context", s.context, 4, most, "tokens of --evaluate");
  options.add("--scored", s.scored, 1, most, "the last of them, which are scored");
  options.add("--convert", s.convert, {"routed"}, "make the dense heads routed ones with the same weights");
  options.add("--train-text", s.train_text, "text for the clusters of --convert and for --train-minutes");
  options.add_from_zero("--train-minutes", s.train_minutes, 1e6,
                        "train the routed heads to give what the dense ones give (default: 0)");
  options.add("--save", s.save, "write the routed attention to this file");
  options.add("--load", s.load, "read it from this file instead of --convert");
  options.add("--needles", s.needles, "facts planted in a long text (of --evaluate, if given) that are found again");
  options.add("--facts", s.facts, 1, 16, "how many");
  options.add("--needle-tokens", s.needle_tokens, 64, most, "tokens of that text, about");
  options.add("--time", s.time, 0, most, "longest cache after which writing is timed; 0: none");
  options.add("--threads", s.threads, 1, 1024, "worker threads; results do not depend on them");
  options.add("--json", s.json, "write the results to this file");
  options.parse(argument_count, arguments);

  const auto require = [](bool good, const std::string& message) {
    if (!good) throw examples::UsageError(message);
  };
  require(!s.model.empty(), "--model: expected a GGUF file, got none; cmake/run pretrained fetches one");
  require(!options.given("--budget") || s.attention == "index", "--budget: give --attention index too");
  require(s.convert.empty() || s.load.empty(), "--convert and --load: give one of them");
  require(s.convert.empty() == s.train_text.empty(), "--convert and --train-text: give both");
  require(!s.convert.empty() || (s.save.empty() && !options.given("--train-minutes")),
          "--save and --train-minutes: give --convert too");
  for (const char* name : {"--needles", "--chat", "--attention", "--prompt-budget"})
    require((s.convert.empty() && s.load.empty()) || !options.given(name),
            std::string(name) + ": not with --convert or --load");
  require(s.load.empty() || s.evaluate.empty(), "--evaluate: not with --load");
  require(!options.given("--prompt-budget") || s.attention != "dense", "--prompt-budget: not with --attention dense");
  require(!options.given("--scored") || !s.evaluate.empty(), "--scored: give --evaluate too");
  require(s.scored < s.context, "--scored: expected less than --context");
  for (const char* name : {"--facts", "--needle-tokens"})
    require(!options.given(name) || s.needles, std::string(name) + ": give --needles too");
  for (const char* name : {"--evaluate", "--needles", "--json", "--time"})
    require(!s.chat || !options.given(name), "--chat and " + std::string(name) + ": give one of them");
  if (s.chat && !options.given("--attention")) s.attention = "dense";
  if (s.chat && !options.given("--generate")) s.generate = 512;
  if (!s.chat && s.prompt.empty() && !options.given("--generate")) s.generate = 12;  // an answer of a few digits
  return s;
}

}  // namespace pretrained
