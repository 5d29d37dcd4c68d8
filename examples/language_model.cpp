// A byte-level language model whose routed heads find earlier occurrences of what stands here, however far back.
//
// Half of the heads of every layer are local. The others are induction heads: query and key of a position are made of
// the last bytes before it, and a key carries what came next. Routing sorts positions into clusters by that content, so
// each query looks at no more than `window` earlier members of its own cluster, be the text 2048 bytes or 65536.
//
//     language_model --compare                     local heads only, then local and routed: two tables and some text
//     language_model --text FILE --minutes 5       your own text
//     language_model --pattern dense|random        the other two patterns
//     language_model --clusters 1                  a fair control: the same heads, but they see the last bytes only
//
// The default text is the source of the Eigen headers that this program was built with. Expect of 300 steps (a minute
// or two each on two cores; far, near, rest: the 12 bytes before have occurred more than a window back, less, never):
//
//     held-out bits per byte               all    far   near   rest
//     local                               2.60   2.29   2.49   2.73
//     routed                              1.70   0.57   0.91   2.19
//     routed, twice the context           1.58   0.59   0.91   2.13
//     routed, --clusters 1                2.19   1.94   1.07   2.38
//
// So longer context pays where heads are routed, and costs no more per byte: every query sees as few keys as before.
// Most of the gain lies in the far bytes; a text with few long repeats gains less (the Bible: 2.38 against 2.11).
#include <array>
#include <optional>

#include "console.hpp"
#include "corpus.hpp"
#include "options.hpp"
#include "transformer.hpp"

namespace {

using examples::Bytes;
using examples::format;
using examples::UsageError;
using transformer::Index;
using Model = transformer::Model<float>;

constexpr Index tokens_per_step = 8192;   // sequences of --context bytes, one at least
constexpr Index test_bytes = 128 * 1024;  // of the held-out text, spread evenly, at most
constexpr Index text_context = 2048, text_bytes = 200;
constexpr double bits_per_nat = 1.4426950408889634;

struct Settings {
  std::int64_t context = 2048, layers = 2, model_dim = 96, heads = 4, routed_heads = 2, clusters = 0, window = 64;
  std::int64_t steps = 300, seed = 0, threads = 1;
  double minutes = 0;
  bool compare = false;
  std::string pattern = "routed", text, json;

  Index sequences() const { return std::max<Index>(1, tokens_per_step / context); }
};

Settings read_settings(int argument_count, char** arguments) {
  Settings s;
  s.threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  examples::Options options("language_model", "Trains a byte-level language model with local and routed heads.");
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
  options.add("--steps", s.steps, 1, std::int64_t(1) << 40, "training steps of a pattern");
  options.add("--minutes", s.minutes, 1e6, "training time of a pattern, instead of --steps");
  options.add("--seed", s.seed, 0, std::int64_t(1) << 53, "of weights and batches");
  options.add("--threads", s.threads, 1, 1024, "worker threads; results do not depend on them");
  options.add("--json", s.json, "write the results to this file");
  options.parse(argument_count, arguments);

  const auto require = [](bool good, const std::string& message) {
    if (!good) throw UsageError(message);
  };
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  require(!(options.given("--steps") && options.given("--minutes")), "--steps and --minutes: give one of them");
  require(!(s.compare && options.given("--pattern")), "--compare and --pattern: give one of them");
  if (!options.given("--window")) s.window = std::min(s.window, s.context);
  require(s.window <= s.context,
          "--window: expected at most --context = " + number(s.context) + ", got " + number(s.window));
  require(s.model_dim % s.heads == 0,
          "--model-dim: expected a multiple of --heads = " + number(s.heads) + ", got " + number(s.model_dim));
  require(s.routed_heads <= s.heads,
          "--routed-heads: expected at most --heads = " + number(s.heads) + ", got " + number(s.routed_heads));
  require(s.clusters <= s.context,
          "--clusters: expected at most --context = " + number(s.context) + ", got " + number(s.clusters));
  if (s.pattern != "local") {
    require(s.routed_heads > 0, "--routed-heads: expected at least 1 for this pattern, got 0");
    require(s.model_dim / s.heads >= 3,
            "--model-dim: expected at least 3 channels per head, got " + number(s.model_dim / s.heads));
  }
  return s;
}

transformer::ModelConfig model_config(const std::string& pattern, const Settings& s) {
  const bool local = pattern == "local", random = pattern == "random";
  transformer::ModelConfig config{
      .vocabulary = 256, .layers = s.layers, .feed_forward = 4 * s.model_dim, .embedding_deviation = 0.3};
  coterie::RoutingAttentionConfig& attention = config.attention;
  attention.model_dim = s.model_dim;
  attention.heads = s.heads;
  attention.routed_heads = local ? 0 : s.routed_heads;
  // Routed clusters average half a window, so that the window seldom cuts one off; random groups average one.
  attention.clusters = s.clusters > 0 ? s.clusters : std::max<Index>(1, (random ? 1 : 2) * s.context / s.window);
  attention.window = s.window;
  attention.causal = true;
  attention.routing = pattern == "dense" ? coterie::Routing::dense
                      : random           ? coterie::Routing::random
                                         : coterie::Routing::learned;
  attention.induction = !local;
  attention.key_taps = local ? 0 : 8;
  attention.local_positions = coterie::LocalPositions::bias;
  attention.decay = 0.99;
  attention.seed = static_cast<std::uint64_t>(s.seed);
  return config;
}

/// Sequences of bytes with the byte after each as its target.
struct Sequences {
  std::vector<std::int32_t> tokens, targets;
  std::vector<Index> offsets{0};

  void clear() {
    tokens.clear();
    targets.clear();
    offsets.resize(1);
  }
  /// Appends text[begin, begin + length) and what follows each byte.
  void append(const Bytes& text, Index begin, Index length) {
    const auto first = text.begin() + begin;
    tokens.insert(tokens.end(), first, first + length);
    targets.insert(targets.end(), first + 1, first + length + 1);
    offsets.push_back(static_cast<Index>(tokens.size()));
  }
  transformer::Batch batch(std::uint64_t step) const { return {tokens, targets, offsets, step}; }
};

/// Bits per byte, of all bytes and by class.
struct Score {
  double all = 0;
  std::array<double, 3> by_class{}, share{};
  Index bytes = 0;
};

struct Result {
  std::string pattern;
  Score score;                  // in sequences of the training's length, and classes within those
  Score score_by_twice, twice;  // in such sequences and in twice longer ones; classes within the longer ones
  double tokens_per_second = 0, keys_per_query = 0;
};

/// How evenly the clusters of the routed heads are used: exp(entropy) / clusters, 1 if all are of one size.
double cluster_load(const Model& model, const Model::Tape& tape) {
  double sum = 0, heads = 0;
  for (std::size_t layer = 0; layer < model.attention().size(); ++layer)
    for (Index head = 0; head < model.config().attention.routed_heads; ++head) {
      const std::vector<double> sizes = tape.blocks[layer].attention.cluster_sizes(head);
      double tokens = 0, entropy = 0;
      for (const double size : sizes) tokens += size;
      for (const double size : sizes)
        if (size > 0) entropy -= size / tokens * std::log(size / tokens);
      sum += std::exp(entropy) / static_cast<double>(sizes.size());
      heads += 1;
    }
  return sum / heads;
}

/// Keys that a query sees, over the heads of all layers.
double keys_per_query(const Model& model, const Model::Tape& tape) {
  double sum = 0, count = 0;
  const Index heads = model.config().attention.heads, routed = model.config().attention.routed_heads;
  for (const auto& block : tape.blocks) {
    const auto add = [&](std::span<const coterie::AttentionPlan> plans, Index of_heads) {
      for (const coterie::AttentionPlan& plan : plans) {
        const double weight = static_cast<double>(of_heads) / static_cast<double>(plans.size());
        sum += weight * coterie::statistics(plan).keys_per_query.mean;
        count += weight;
      }
    };
    add(block.attention.local_plans(), heads - routed);
    add(block.attention.plans(), routed);
  }
  return sum / count;
}

/// Trains; fills in the tokens per second and keys per query of the result.
void train(Model& model, Model::Tape& tape, const Bytes& text, const Settings& settings, Result& result,
           coterie::Context& context) {
  Model::Gradients gradients = model.zero_gradients();
  transformer::AdamW<float> optimizer;
  transformer::Random random(static_cast<std::uint64_t>(settings.seed) + 1000);
  Sequences sequences;
  std::vector<float> losses(static_cast<std::size_t>(settings.sequences() * settings.context));
  const bool learned =
      model.config().attention.routed_heads > 0 && model.config().attention.routing == coterie::Routing::learned;

  examples::Progress progress(format("%-6s", result.pattern.c_str()));
  examples::Stopwatch watch;
  const auto done_at = [&](std::int64_t step) {
    return settings.minutes > 0 ? watch.seconds() / (60 * settings.minutes)
                                : static_cast<double>(step) / static_cast<double>(settings.steps);
  };
  const Index warm_up = settings.minutes > 0 ? 50 : std::min<Index>(50, settings.steps / 6);
  double average = 0;
  std::int64_t step = 0;
  for (double done = 0; done < 1;) {
    sequences.clear();
    for (Index s = 0; s < settings.sequences(); ++s)
      sequences.append(text, random.below(static_cast<Index>(text.size()) - settings.context), settings.context);
    const transformer::Batch batch = sequences.batch(static_cast<std::uint64_t>(step));

    Model::set_zero(gradients);
    model.forward(batch, losses, tape, context);
    model.backward(batch, tape, gradients, context);
    model.update_router(tape, context);
    optimizer.step(model, gradients, 4e-3 * transformer::learning_rate_factor(step, warm_up, done, 0.05));

    double loss = 0;
    for (const float one : losses) loss += static_cast<double>(one) / static_cast<double>(losses.size());
    if (!std::isfinite(loss)) throw std::runtime_error(format("the loss is not finite at step %lld", (long long)step));
    average = step == 0 ? loss : 0.95 * average + 0.05 * loss;
    done = done_at(++step);
    result.tokens_per_second = static_cast<double>(step) * static_cast<double>(losses.size()) / watch.seconds();
    progress.show(done, [&] {
      return format("loss %.3f  %.3f bits per byte  %.0f tokens/s", average, average * bits_per_nat,
                    result.tokens_per_second) +
             (learned ? format("  load %.0f %%", 100 * cluster_load(model, tape)) : "");
    });
  }
  result.keys_per_query = keys_per_query(model, tape);
}

/// Sums up losses by class.
class Tally {
 public:
  void add(const std::vector<float>& losses, const std::vector<examples::ByteClass>& classes) {
    for (std::size_t t = 0; t < losses.size(); ++t) {
      const std::size_t c = static_cast<std::size_t>(classes[t]);
      bits_[c] += bits_per_nat * static_cast<double>(losses[t]);
      count_[c] += 1;
    }
  }
  Score score() const {
    Score score;
    const double all = count_[0] + count_[1] + count_[2];
    score.bytes = static_cast<Index>(all);
    score.all = (bits_[0] + bits_[1] + bits_[2]) / all;
    for (std::size_t c = 0; c < 3; ++c) {
      score.by_class[c] = bits_[c] / count_[c];  // not a number where there are none
      score.share[c] = count_[c] / all;
    }
    return score;
  }

 private:
  std::array<double, 3> bits_{}, count_{};
};

/// Scores held-out bytes in sequences of the training's length, and the same bytes in sequences twice as long.
void evaluate(const Model& model, Model::Tape& tape, const Bytes& text, const Settings& settings, Result& result,
              coterie::Context& context) {
  const Index piece = 2 * settings.context, room = static_cast<Index>(text.size()) - 1 - piece;
  const Index pieces = std::clamp<Index>(test_bytes / piece, 1, room / piece + 1);
  const auto classify = [&](Index begin, Index length, std::vector<examples::ByteClass>& classes) {
    const auto more = examples::classify_bytes({text.data() + begin, static_cast<std::size_t>(length + 1)},
                                               static_cast<std::size_t>(settings.window));
    classes.insert(classes.end(), more.begin(), more.end());
  };
  Tally once, once_by_twice, twice;
  Sequences sequences, longer;
  std::vector<examples::ByteClass> classes, longer_classes;
  std::vector<float> losses;
  for (Index i = 0; i < pieces; ++i) {
    const Index begin = pieces > 1 ? room * i / (pieces - 1) : room / 2;
    for (Index part = begin; part < begin + piece; part += settings.context) {
      sequences.append(text, part, settings.context);
      classify(part, settings.context, classes);
    }
    longer.append(text, begin, piece);
    classify(begin, piece, longer_classes);
    if (i + 1 < pieces && static_cast<Index>(classes.size()) + piece <= tokens_per_step) continue;

    losses.resize(classes.size());
    const std::uint64_t step = ~static_cast<std::uint64_t>(i);  // random routing draws groups new to training
    model.evaluate(sequences.batch(step), losses, tape, context);
    once.add(losses, classes);
    once_by_twice.add(losses, longer_classes);
    model.evaluate(longer.batch(step), losses, tape, context);
    twice.add(losses, longer_classes);
    for (Sequences* used : {&sequences, &longer}) used->clear();
    for (auto* used : {&classes, &longer_classes}) used->clear();
  }
  result.score = once.score();
  result.score_by_twice = once_by_twice.score();
  result.twice = twice.score();
}

/// `count` bytes that the model writes after `prompt`: every byte by a forward pass over all that stands there.
Bytes generate(const Model& model, Model::Tape& tape, Bytes prompt, Index count, const Settings& settings,
               coterie::Context& context) {
  constexpr double temperature = 0.6;
  transformer::Random random(static_cast<std::uint64_t>(settings.seed) + 2000);
  examples::Progress progress("writing", 1);
  for (Index i = 0; i < count; ++i) {
    const Index length = std::min({static_cast<Index>(prompt.size()), settings.context, text_context});
    const std::vector<std::int32_t> tokens(prompt.end() - length, prompt.end());
    const std::array<Index, 2> offsets{0, length};
    model.evaluate({tokens, {}, offsets, static_cast<std::uint64_t>(i)}, {}, tape, context);

    std::array<double, 256> weights{};
    double sum = 0;
    for (Index byte = 0; byte < 256; ++byte)
      sum += weights[static_cast<std::size_t>(byte)] =
          std::pow(static_cast<double>(tape.p(length - 1, byte)), 1 / temperature);
    double draw = random.uniform() * sum;
    std::size_t byte = 0;
    while (byte < 255 && (draw -= weights[byte]) >= 0) ++byte;
    prompt.push_back(static_cast<std::uint8_t>(byte));
    progress.show(static_cast<double>(i + 1) / static_cast<double>(count), [] { return ""; });
  }
  return Bytes(prompt.end() - count, prompt.end());
}

/// Text to print: what is no UTF-8, and control characters but tab and newline, become '?'; every line is indented.
std::string printable(std::span<const std::uint8_t> bytes) {
  std::string text = "    ";
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const std::uint8_t byte = bytes[i];
    const std::size_t more = byte >= 0xc2 && byte < 0xe0 ? 1 : byte >= 0xe1 && byte < 0xf0 && byte != 0xed ? 2 : 0;
    const bool whole = more > 0 && i + more < bytes.size() &&
                       std::all_of(&bytes[i + 1], &bytes[i + 1] + more, [](std::uint8_t b) { return b >> 6 == 2; });
    if (whole) {
      text.append(&bytes[i], &bytes[i] + more + 1);
      i += more;
    } else if (byte == '\n') {
      text += "\n    ";
    } else {
      text += byte == '\t' || (byte >= 32 && byte < 127) ? static_cast<char>(byte) : '?';
    }
  }
  return text;
}

std::string number_or_dash(double value) { return std::isfinite(value) ? format("%.3f", value) : "-"; }

std::string json(const Score& score) {
  const auto number = [](double value) { return std::isfinite(value) ? format("%.6f", value) : std::string("null"); };
  std::string text = "\"all\": " + number(score.all);
  for (std::size_t c = 0; c < 3; ++c)
    text += format(", \"%s\": ", examples::byte_class_names[c]) + number(score.by_class[c]);
  return text;
}

std::string json(const std::vector<Result>& results) {
  std::string text = "{\"patterns\": {";
  for (const Result& r : results)
    text += (&r == results.data() ? "\"" : ", \"") + r.pattern + "\": {" + json(r.score) +
            format(", \"tokens_per_second\": %.1f, \"keys_per_query\": %.3f, \"twice_the_context\": {",
                   r.tokens_per_second, r.keys_per_query) +
            json(r.twice) + "}}";
  return text + "}}\n";
}

void print(const std::vector<Result>& results, const Settings& settings) {
  const auto row = [](const std::string& name, const Score& score, const std::vector<std::string>& more) {
    std::vector<std::string> cells{name, number_or_dash(score.all)};
    for (const double bits : score.by_class) cells.push_back(number_or_dash(bits));
    cells.insert(cells.end(), more.begin(), more.end());
    return cells;
  };
  std::vector<std::vector<std::string>> table{
      {"held-out bits per byte", "all", "far", "near", "rest", "tokens/s", "keys per query"}};
  for (const Result& r : results)
    table.push_back(row(r.pattern, r.score, {format("%.0f", r.tokens_per_second), format("%.1f", r.keys_per_query)}));
  std::printf("\n");
  examples::print_table(table);
  const Score& score = results.back().score;
  std::printf(
      "\n  %lld held-out bytes, in sequences of %lld. By the 12 bytes before a byte: far, they occurred earlier\n"
      "  in the sequence, last more than %lld bytes back (%.1f %%); near, within %lld (%.1f %%); rest (%.1f %%).\n\n",
      (long long)score.bytes, (long long)settings.context, (long long)settings.window, 100 * score.share[0],
      (long long)settings.window, 100 * score.share[1], 100 * score.share[2]);

  table.resize(1);
  table[0].resize(5);
  table[0][0] = "the same weights and bytes";
  for (const Result& r : results) {
    const std::string name = r.pattern + ", sequences of ";
    table.push_back(row(name + std::to_string(settings.context), r.score_by_twice, {}));
    table.push_back(row(name + std::to_string(2 * settings.context), r.twice, {}));
  }
  examples::print_table(table);
  std::printf("\n  Here far, near and rest are those of sequences of %lld in all rows.\n",
              (long long)(2 * settings.context));
}

void run(int argument_count, char** arguments) {
  const Settings settings = read_settings(argument_count, arguments);
  const examples::ResultFile file(settings.json);
  const std::size_t needed = static_cast<std::size_t>(2 * settings.context + 1);
#ifdef COTERIE_EIGEN_INCLUDE_DIR
  const std::string eigen = COTERIE_EIGEN_INCLUDE_DIR;
#else
  const std::string eigen = "/usr/include/eigen3";
#endif
  const examples::Corpus corpus =
      settings.text.empty() ? examples::read_eigen(eigen, needed) : examples::read_text(settings.text, needed);

  coterie::ThreadPool pool(settings.threads);
  coterie::Workspace workspace;
  coterie::Context context{pool, workspace};
  const std::vector<std::string> patterns =
      settings.compare ? std::vector<std::string>{"local", "routed"} : std::vector<std::string>{settings.pattern};
  std::printf("Byte-level language model on %s\n", corpus.description.c_str());
  std::printf("%lld layers of %lld channels, %lld heads, window %lld; %s of %lld sequences of %lld bytes, seed %lld\n",
              (long long)settings.layers, (long long)settings.model_dim, (long long)settings.heads,
              (long long)settings.window,
              settings.minutes > 0 ? format("%g minutes", settings.minutes).c_str()
                                   : format("%lld steps", (long long)settings.steps).c_str(),
              (long long)settings.sequences(), (long long)settings.context, (long long)settings.seed);

  std::vector<Result> results;
  std::optional<Model> model;
  Model::Tape tape;
  for (const std::string& pattern : patterns) {
    model.emplace(model_config(pattern, settings));
    const coterie::RoutingAttentionConfig& attention = model->config().attention;
    std::printf("\n%s: %lld parameters; %lld of %lld heads routed", pattern.c_str(),
                (long long)model->parameter_count(), (long long)attention.routed_heads, (long long)attention.heads);
    if (pattern == "routed" || pattern == "random") std::printf(", %lld clusters", (long long)attention.clusters);
    std::printf("\n");
    results.emplace_back().pattern = pattern;
    train(*model, tape, corpus.training, settings, results.back(), context);
    evaluate(*model, tape, corpus.held_out, settings, results.back(), context);
  }
  print(results, settings);

  // A prompt from the middle of the held-out text, up to the end of a line.
  const Index prompt = std::min(settings.context, text_context) * 3 / 4;
  auto end = corpus.held_out.begin() + (static_cast<Index>(corpus.held_out.size()) + prompt) / 2;
  const auto line = std::find(end - std::min<Index>(prompt / 2, 200), end, '\n');
  if (line != end) end = line + 1;
  const Bytes before(end - prompt, end);
  std::printf("\nHeld-out text that the %s model continues:\n\n%s\n", patterns.back().c_str(),
              printable(std::span(before).last(static_cast<std::size_t>(std::min<Index>(prompt, 400)))).c_str());
  const Bytes written = generate(*model, tape, before, text_bytes, settings, context);
  std::printf("\n%s\n", printable(written).c_str());
  file.write(json(results));
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("language_model", [&] { run(argument_count, arguments); });
}
