// A byte-level language model whose routed heads find earlier occurrences of the last bytes, however far back.
//
// Half of the heads of every layer are local. The others are induction heads: query and key of a position are made of
// the last bytes before it, and a key carries what came next. Routing sorts positions into clusters by that content, so
// each query looks at no more than `window` earlier members of its own cluster, be the text 2048 bytes or 65536.
//
//     language_model --compare                     local heads only, then local and routed: two tables and some text
//     language_model --text FILE --minutes 5       your own text
//     language_model --pattern dense|random        the other two patterns
//     language_model --clusters 1                  a fair control: the same heads, but they see the last bytes only
//     language_model --save FILE                   keeps the model; Ctrl-C saves and stops (exit code 130)
//     language_model --resume FILE                 continues such a training, bit-identically
//     language_model --load FILE --generate 1000 --prompt TEXT    writes; only the text on standard output
//     language_model --load FILE --evaluate FILE                  bits per byte
//
// The default text is the source of the Eigen headers that this program was built with. Expect of 300 steps (a minute
// or two each on two cores; far, near, rest: the 12 bytes before have occurred more than a window back, less, never):
//
//     held-out bits per byte               all    far   near   rest
//     local                               2.60   2.29   2.49   2.73
//     routed                              1.70   0.57   0.92   2.19
//     routed, twice the context           1.58   0.59   0.91   2.13
//     routed, --clusters 1                2.19   1.94   1.07   2.38
//
// So longer context pays where heads are routed, and costs no more per byte: every query sees as few keys as before.
// Most of the gain lies in the far bytes; a text with few long repeats gains less (the Bible: 2.38 against 2.11).
#include "language_model_training.hpp"
#include "model/bits_per_byte.hpp"
#include "model/generate.hpp"
#include "support/printable_text.hpp"

namespace {

using namespace language_model;

constexpr Index text_context = 2048, text_bytes = 200;

/// Writes to standard output as the bytes come, and then how fast that was.
void write_text(const Model& model, const Bytes& prompt, Index count, const std::string& indent,
                const Settings& settings, coterie::Context& context) {
  examples::PrintableText text(indent);
  const auto print = [](const std::string& piece) {
    if (piece.empty()) return;
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  const std::vector<std::int32_t> tokens(prompt.begin(), prompt.end());
  const transformer::SamplingConfig sampling{.temperature = settings.temperature,
                                             .top_k = settings.top_k,
                                             .top_p = settings.top_p,
                                             .seed = static_cast<std::uint64_t>(settings.seed)};
  examples::Stopwatch watch;
  double prompt_seconds = -1;
  transformer::generate(model, tokens, count, sampling, context, [&](std::int32_t byte) {
    if (prompt_seconds < 0) {  // the first byte: the prompt has been read
      prompt_seconds = watch.seconds();
      watch.reset();
    }
    print(text.add(static_cast<std::uint8_t>(byte)));
  });
  const double seconds = watch.seconds();
  print(text.finish() + "\n");
  // Beside the text only where somebody looks on; a file or a program that takes the text gets nothing else.
  std::fprintf(examples::terminal_width(stdout) > 0 ? stdout : stderr,
               "\n%lld bytes in %.2f s: %.0f tokens/s, after a prompt of %zu bytes in %.2f s\n", (long long)count,
               seconds, static_cast<double>(count) / seconds, prompt.size(), prompt_seconds);
}

/// What --evaluate prints.
void print_bits_per_byte(const Model& model, Model::Tape& tape, const Settings& settings, coterie::Context& context) {
  const Bytes text = examples::read_bytes(settings.evaluate);
  if (text.empty()) throw UsageError("--evaluate: expected a file of at least one byte, got an empty one");
  examples::Progress progress("scoring", 4, stderr);
  const double bits = transformer::bits_per_byte(model, text, settings.context, settings.stride, tokens_per_step, tape,
                                                 context, [&](double done) { progress.show(done); });
  std::printf(
      "%s: %.4f bits per byte\n"
      "  %zu bytes, each scored once, in windows of %lld that begin every %lld bytes: each byte is predicted from at\n"
      "  least the %lld before it, at the start of the file from all before it and a newline in front\n",
      settings.evaluate.c_str(), bits, text.size(), (long long)settings.context, (long long)settings.stride,
      (long long)(settings.context - settings.stride + 1));
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

/// A model of the settings, with the weights of --load or --resume.
Model make_model(const std::string& pattern, const Settings& settings, Training& training) {
  const transformer::ModelConfig config = model_config(pattern, settings);
  if (settings.file) check_sizes(*settings.file, config);
  Model model(config);
  if (settings.file) transformer::read_model(*settings.file, model);
  if (!settings.resume.empty()) transformer::read_training(*settings.file, model.parameter_count(), training);
  return model;
}

/// Trains and prints the tables; for --generate leaves the model. Returns the exit code if that is the end.
std::optional<int> make_tables(const Settings& settings, std::optional<Model>& model, Model::Tape& tape,
                               coterie::Context& context) {
  const examples::ResultFile file(settings.json), save_file(settings.save);
  const std::size_t needed = static_cast<std::size_t>(2 * settings.context + 1);
#ifdef COTERIE_EIGEN_INCLUDE_DIR
  const std::string eigen = COTERIE_EIGEN_INCLUDE_DIR;
#else
  const std::string eigen = "/usr/include/eigen3";
#endif
  const examples::Corpus corpus =
      settings.text.empty() ? examples::read_eigen(eigen, needed) : examples::read_text(settings.text, needed);
  if (!settings.resume.empty()) check_text(fingerprint(corpus.training), settings);

  const std::vector<std::string> patterns =
      settings.compare ? std::vector<std::string>{"local", "routed"} : std::vector<std::string>{settings.pattern};
  std::printf("Byte-level language model on %s\n", corpus.description.c_str());
  std::printf("%lld layers of %lld channels, %lld heads, window %lld; %s of %lld sequences of %lld bytes, seed %lld\n",
              (long long)settings.layers, (long long)settings.model_dim, (long long)settings.heads,
              (long long)settings.window,
              !settings.trains       ? "no training"
              : settings.minutes > 0 ? format("%g minutes", settings.minutes).c_str()
                                     : format("%lld steps", (long long)settings.steps).c_str(),
              (long long)settings.sequences(), (long long)settings.context, (long long)settings.seed);

  std::vector<Result> results;
  for (const std::string& pattern : patterns) {
    Training training(static_cast<std::uint64_t>(settings.seed) + 1000);
    model.emplace(make_model(pattern, settings, training));
    const coterie::RoutingAttentionConfig& attention = model->config().attention;
    std::printf("\n%s: %lld parameters; %lld of %lld heads routed", pattern.c_str(),
                (long long)model->parameter_count(), (long long)(attention.routed.heads + attention.dense.heads),
                (long long)heads(model->config()));
    if (pattern == "routed" || pattern == "random")
      std::printf(", %lld clusters", (long long)attention.routed.clusters);
    std::printf("\n");
    if (training.step > 0) std::printf("going on after step %lld\n", (long long)training.step);
    results.emplace_back().pattern = pattern;
    const TrainingEnd end = train(*model, training, tape, corpus.training, settings, results.back(), context);
    if (!end.done) {
      std::printf("\nstopped after step %lld; saved: continue with --resume %s\n", (long long)training.step,
                  settings.save.c_str());
      return end.signal > 0 ? 128 + end.signal : 0;
    }
    evaluate(*model, tape, corpus.held_out, settings, results.back(), context);
  }
  print(results, settings);
  file.write(json(results));
  if (settings.generate > 0 || !settings.evaluate.empty()) return {};

  // A prompt from the middle of the held-out text, up to the end of a line.
  const Index prompt = std::min(settings.context, text_context) * 3 / 4;
  auto end = corpus.held_out.begin() + (static_cast<Index>(corpus.held_out.size()) + prompt) / 2;
  const auto line = std::find(end - std::min<Index>(prompt / 2, 200), end, '\n');
  if (line != end) end = line + 1;
  const Bytes before(end - prompt, end);
  const std::string indent = "    ";
  std::printf(
      "\nHeld-out text that the %s model continues:\n\n%s\n\n%s", patterns.back().c_str(),
      examples::printable(std::span(before).last(static_cast<std::size_t>(std::min<Index>(prompt, 400))), indent)
          .c_str(),
      indent.c_str());
  write_text(*model, before, text_bytes, indent, settings, context);
  return {};
}

int run(int argument_count, char** arguments) {
  const Settings settings = read_settings(argument_count, arguments);
  coterie::ThreadPool pool(settings.threads);
  coterie::Workspace workspace;
  coterie::Context context{pool, workspace};
  std::optional<Model> model;
  Model::Tape tape;
  if (settings.tables()) {
    if (const std::optional<int> code = make_tables(settings, model, tape, context)) return *code;
  } else {
    Training unused(0);
    model.emplace(make_model(settings.pattern, settings, unused));
  }
  if (!settings.evaluate.empty()) print_bits_per_byte(*model, tape, settings, context);
  if (settings.generate > 0) {
    const Bytes prompt(settings.prompt.begin(), settings.prompt.end());
    std::fputs(examples::printable(prompt, "").c_str(), stdout);
    write_text(*model, prompt.empty() ? Bytes{'\n'} : prompt, settings.generate, "", settings, context);
  }
  return 0;
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("language_model", [&] { return run(argument_count, arguments); });
}
