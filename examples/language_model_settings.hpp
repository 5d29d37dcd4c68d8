// Settings of language_model, from its command line or from a saved model.
#pragma once

#include <coterie/file/safetensors.hpp>
#include <coterie/file/safetensors_writer.hpp>
#include <optional>
#include <thread>

#include "model/model.hpp"
#include "support/corpus.hpp"
#include "support/options.hpp"

namespace language_model {

using examples::Bytes;
using examples::UsageError;
using transformer::Index;
using Model = transformer::Model<float>;

inline constexpr Index tokens_per_step = 8192;  // sequences of --context bytes, one at least

struct Settings {
  std::int64_t context = 2048, layers = 2, model_dim = 96, heads = 4, routed_heads = 2, clusters = 0, window = 64;
  std::int64_t steps = 300, stop_at = 0, seed = 0, model_seed = 0, threads = 1;
  std::int64_t generate = 0, top_k = 0, stride = 0;
  double minutes = 0, checkpoint_minutes = 3, temperature = 0.6, top_p = 1;
  bool compare = false, trains = true;
  std::string pattern = "routed", text, json, save, load, resume, prompt, evaluate;
  std::optional<coterie::SafetensorsView> file;                 // of --load or --resume
  std::vector<std::pair<std::string, std::string>> file_texts;  // what a saved model says of its settings

  Index sequences() const { return std::max<Index>(1, tokens_per_step / context); }
  /// Whether the tables of the held-out text are wanted, for which the text has to be read.
  bool tables() const { return trains || (generate == 0 && evaluate.empty()); }
};

namespace detail {

inline constexpr char prefix[] = "language_model.";

/// Takes settings from the file that the command line does not name, and refuses those that it names otherwise.
inline void read_file_settings(Settings& s, examples::Options& options) {
  const bool resume = !s.resume.empty();
  s.file = coterie::read_safetensors(resume ? s.resume : s.load);
  const coterie::SafetensorsView& file = *s.file;
  const auto find = [&](const std::string& name) -> const std::string* {
    const auto at = file.metadata().find(prefix + name);
    return at == file.metadata().end() ? nullptr : &at->second;
  };
  const auto assign = [&](const std::string& name, const std::string& text) {
    try {
      options.assign("--" + name, text);
    } catch (const UsageError& error) {
      file.fail("language_model", std::string("damaged: ") + error.what());
    }
  };
  std::string differences;
  const auto take = [&](const std::string& name, bool may_differ) {
    const std::string* const there = find(name);
    if (!there)
      file.fail("language_model",
                "expected a model that this program has saved, with " + (prefix + name) + " in its metadata, got none");
    const std::string here = options.value("--" + name);
    if (!options.given("--" + name))
      assign(name, *there);
    else if (!may_differ && here != *there)
      differences += (differences.empty() ? "--" : "; --") + name + ": expected " + *there + ", got " + here;
  };
  for (const char* name : {"pattern", "layers", "model-dim", "heads", "routed-heads", "clusters", "window"})
    take(name, false);
  take("context", !resume);
  const std::int64_t seed = s.seed;  // of new draws; weights keep the seed of the file
  take("seed", !resume);
  const std::string* const model_seed = find("seed");
  assign("seed", *model_seed);
  s.model_seed = s.seed;
  if (!resume) s.seed = seed;
  if (!differences.empty())
    throw UsageError((resume ? "--resume " : "--load ") + file.source() + ": made with other settings: " + differences);
  s.trains = resume || options.given("--steps") || options.given("--minutes");
  if (resume && !options.given("--steps") && !options.given("--minutes")) {
    if (find("minutes"))
      take("minutes", true);
    else
      take("steps", true);
  }
}

}  // namespace detail

/// Throws UsageError, and FileError where a file is at fault.
inline Settings read_settings(int argument_count, char** arguments) {
  Settings s;
  s.threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  constexpr std::int64_t most = std::int64_t(1) << 40;
  examples::Options options("language_model",
                            "Trains a byte-level language model with local and routed heads; saves it, and lets it "
                            "write text or score files.");
  options.add("--compare", s.compare, "train local heads only, then local and routed heads");
  options.add("--pattern", s.pattern, {"dense", "local", "random", "routed"}, "what the routed heads see");
  options.add("--text", s.text, "text to train on, instead of the source text of Eigen");
  options.add("--context", s.context, 16, 1 << 20, "bytes of a sequence");
  options.add("--layers", s.layers, 1, 1000, "blocks of attention and feed-forward");
  options.add("--model-dim", s.model_dim, 1, 1 << 16, "channels");
  options.add("--heads", s.heads, 1, 1 << 12, "heads of a layer");
  options.add("--routed-heads", s.routed_heads, 0, 1 << 12, "those of them that are no local heads");
  options.add("--clusters", s.clusters, 1, 1 << 20, "clusters of a routed head (default: 2 * context / window)");
  options.add("--window", s.window, 1, 1 << 20, "keys that a query sees at most");
  options.add("--steps", s.steps, 1, most, "training steps of a pattern");
  options.add("--minutes", s.minutes, 1e6, "training time of a pattern, instead of --steps");
  options.add("--seed", s.seed, 0, std::int64_t(1) << 53, "of weights, batches and written text");
  options.add("--threads", s.threads, 1, 1024, "worker threads; results do not depend on them");
  options.add("--json", s.json, "write the results of the tables to this file");
  options.add("--save", s.save, "write model and training here: every few minutes, at the end, and on Ctrl-C");
  options.add("--load", s.load,
              "take the model of this file, and its settings; train it only with --steps or --minutes");
  options.add("--resume", s.resume, "continue the training of this file, bit-identically; saves there too");
  options.add("--checkpoint-minutes", s.checkpoint_minutes, 1e6, "time between savings (default: 3)");
  options.add("--stop-at", s.stop_at, 1, most, "save and stop after so many of the steps, as Ctrl-C does");
  options.add("--generate", s.generate, 1, most, "bytes to write after --prompt");
  options.add_text("--prompt", s.prompt, "text to continue (default: a newline)");
  options.add_from_zero("--temperature", s.temperature, 100, "of written text; 0: always the likeliest (default: 0.6)");
  options.add("--top-k", s.top_k, 1, 256, "draw from so many of the likeliest bytes only (default: all)");
  options.add("--top-p", s.top_p, 1, "draw from the likeliest bytes of this mass only (default: 1, all)");
  options.add("--evaluate", s.evaluate, "print the bits per byte of this file");
  options.add("--stride", s.stride, 1, 1 << 20,
              "of --evaluate: bytes between its windows (default: half of --context)");
  options.parse(argument_count, arguments);

  const auto require = [](bool good, const std::string& message) {
    if (!good) throw UsageError(message);
  };
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  require(!(options.given("--steps") && options.given("--minutes")), "--steps and --minutes: give one of them");
  require(!(s.compare && options.given("--pattern")), "--compare and --pattern: give one of them");
  require(s.load.empty() || s.resume.empty(), "--load and --resume: give one of them");
  for (const char* name : {"--save", "--load", "--resume"})
    require(!(s.compare && options.given(name)), std::string("--compare and ") + name + ": give one of them");
  for (const char* name : {"--prompt", "--temperature", "--top-k", "--top-p"})
    require(!options.given(name) || s.generate > 0, std::string(name) + ": give --generate too");
  require(!options.given("--stride") || !s.evaluate.empty(), "--stride: give --evaluate too");
  if (!s.load.empty() || !s.resume.empty()) detail::read_file_settings(s, options);
  if (!s.resume.empty() && s.save.empty()) s.save = s.resume;
  require(s.trains || s.save.empty(), "--save: give --steps or --minutes too: there is no training to save");
  for (const char* name : {"--checkpoint-minutes", "--stop-at"})
    require(!options.given(name) || !s.save.empty(), std::string(name) + ": give --save too");
  require(s.tables() || (s.json.empty() && s.text.empty()),
          "--json and --text: not with --load and --generate or --evaluate, which make no tables");
  if (!s.file) {
    s.model_seed = s.seed;
    if (!options.given("--window")) s.window = std::min(s.window, s.context);
    require(s.window <= s.context,
            "--window: expected at most --context = " + number(s.context) + ", got " + number(s.window));
    require(s.clusters <= s.context,
            "--clusters: expected at most --context = " + number(s.context) + ", got " + number(s.clusters));
    // Routed clusters average half a window, so that the window seldom cuts one off; random groups average one.
    if (s.clusters == 0) s.clusters = std::max<Index>(1, (s.pattern == "random" ? 1 : 2) * s.context / s.window);
  }
  require(s.model_dim % s.heads == 0,
          "--model-dim: expected a multiple of --heads = " + number(s.heads) + ", got " + number(s.model_dim));
  require(s.routed_heads <= s.heads,
          "--routed-heads: expected at most --heads = " + number(s.heads) + ", got " + number(s.routed_heads));
  if (s.pattern != "local") {
    require(s.routed_heads > 0, "--routed-heads: expected at least 1 for this pattern, got 0");
    require(s.model_dim / s.heads >= 3,
            "--model-dim: expected at least 3 channels per head, got " + number(s.model_dim / s.heads));
  }
  if (s.stride == 0) s.stride = s.context / 2;
  require(s.stride <= s.context,
          "--stride: expected at most --context = " + number(s.context) + ", got " + number(s.stride));
  for (const char* name : {"pattern", "layers", "model-dim", "heads", "routed-heads", "clusters", "window", "context"})
    s.file_texts.emplace_back(name, options.value(std::string("--") + name));
  s.file_texts.emplace_back("seed", number(s.model_seed));
  const char* const length = s.minutes > 0 ? "minutes" : "steps";
  s.file_texts.emplace_back(length, options.value(std::string("--") + length));
  return s;
}

/// Puts the settings into the metadata of what will be written.
inline void add_settings(coterie::SafetensorsWriter& writer, const Settings& s) {
  for (const auto& [name, text] : s.file_texts) writer.set_metadata(detail::prefix + name, text);
}

/// All heads of a layer.
inline Index heads(const transformer::ModelConfig& config) {
  return config.attention.local.heads + config.attention.routed.heads + config.attention.dense.heads;
}

/// Whether a layer has heads of learned routing.
inline bool has_routers(const transformer::ModelConfig& config) {
  return config.attention.routed.heads > 0 && config.attention.routed.routing == coterie::Routing::learned;
}

/// Requires that the file of --load or --resume is large enough for a model of its settings (FileError): before memory
/// is taken for it.
inline void check_sizes(const coterie::SafetensorsView& file, const transformer::ModelConfig& config) {
  const char* const function = "language_model";
  const Index d = config.attention.model_dim;
  file.require_shape(function, file.required(function, "embedding"), std::array<Index, 2>{config.vocabulary, d});
  for (Index layer = 0; layer < config.layers; ++layer) {
    const std::string number = std::to_string(layer);
    file.require_shape(function, file.required(function, "blocks." + number + ".feed_forward.expand"),
                       std::array<Index, 2>{d, config.feed_forward});
    if (has_routers(config))
      file.require_shape(function, file.required(function, "blocks." + number + ".attention.routers.0.centroids"),
                         std::array<Index, 2>{config.attention.routed.clusters, d / heads(config)});
  }
}

inline transformer::ModelConfig model_config(const std::string& pattern, const Settings& s) {
  transformer::ModelConfig config{
      .vocabulary = 256, .layers = s.layers, .feed_forward = 4 * s.model_dim, .embedding_deviation = 0.3};
  coterie::RoutingAttentionConfig& attention = config.attention;
  attention.model_dim = s.model_dim;
  attention.causal = true;
  const Index others = pattern == "local" ? 0 : s.routed_heads;  // beside local heads
  if (others < s.heads)
    attention.local = {
        .heads = s.heads - others, .window = s.window, .positions = {.kind = coterie::PositionKind::bias}};
  const coterie::Matching matching{.induction = true, .key_taps = 8};
  if (pattern == "dense")
    attention.dense = {.heads = others, .matching = matching};
  else if (pattern == "random")
    attention.routed = {.heads = others,
                        .clusters = s.clusters,
                        .window = s.window,
                        .routing = coterie::Routing::random,
                        .matching = matching};
  else if (pattern == "routed")
    attention.routed = {
        .heads = others, .clusters = s.clusters, .window = s.window, .router = {.decay = 0.99}, .matching = matching};
  attention.seed = static_cast<std::uint64_t>(s.model_seed);
  return config;
}

}  // namespace language_model
