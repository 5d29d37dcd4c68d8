// Streaming: a signal arrives in chunks of a few samples, a prediction of the next sample leaves after each of them.
//
// The signal has four channels of noise in which six motifs come again and again, some hundred samples apart. What a
// motif will do next can be known from its last occurrence alone: routed heads find it by content (they are induction
// heads: the last samples are the query, and a key carries what came next), local heads see the last samples only. One
// layer of two local and two routed heads is trained for some seconds by its backward pass, beside one of four local
// heads; then a new signal streams through a decoder, which gives the numbers of the forward pass at a cost that does
// not depend on how long the stream has been running. Nothing is allocated while it runs: this program counts.
//
//     stream                            both models, then 20 000 chunks; under half a minute on one core
//     stream --svg latency.svg          and a picture of the latencies
#include <atomic>
#include <coterie/coterie.hpp>
#include <cstdlib>
#include <new>
#include <thread>

#include "model/adamw.hpp"
#include "model/random.hpp"
#include "support/console.hpp"
#include "support/options.hpp"

namespace {

std::atomic<long> allocations{0};

}  // namespace

// Every allocation of this program by new, the library's included, is counted. Not inlined: g++ takes a free() of what
// an operator new made, seen in one function, for a mismatch (-Wmismatched-new-delete).
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* const p = std::malloc(size > 0 ? size : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const std::size_t a = static_cast<std::size_t>(alignment);
  if (void* const p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using coterie::ConstView;
using coterie::Index;
using coterie::view;
using coterie::View;
using examples::format;
using Matrix = transformer::RowMatrix<float>;

constexpr Index channels = 4, motifs = 6, motif_length = 32;
constexpr Index model_dim = 32, heads = 4, window = 64, taps = 8;
constexpr Index sequences = 8, sequence_length = 768;  // of a training step
constexpr double rate = 1000;                          // samples a second of the sensor that this could be

struct Settings {
  std::int64_t seed = 0, steps = 120, chunks = 20000, threads = 1;
  std::string svg;
};

/// A signal: motifs in random order with noise between them; and which samples belong to a motif that was heard before.
struct Signal {
  Matrix samples;
  std::vector<bool> foretold;

  Signal(Index length, transformer::Random& random) : samples(length, channels), foretold(std::size_t(length), false) {
    std::vector<Matrix> shapes;
    for (Index m = 0; m < motifs; ++m)
      shapes.push_back(transformer::random_matrix<float>(motif_length, channels, [&] { return random.normal(); }));
    std::vector<bool> heard(std::size_t(motifs), false);
    for (Index i = 0; i < length;) {
      for (Index gap = random.below(16); gap > 0 && i < length; --gap, ++i)
        for (Index c = 0; c < channels; ++c) samples(i, c) = static_cast<float>(random.normal());
      const std::size_t m = static_cast<std::size_t>(random.below(motifs));
      for (Index j = 0; j < motif_length && i < length; ++j, ++i) {
        for (Index c = 0; c < channels; ++c)
          samples(i, c) = shapes[m](j, c) + static_cast<float>(0.05 * random.normal());
        foretold[static_cast<std::size_t>(i)] = heard[m] && j >= taps;
      }
      heard[m] = true;
    }
  }
};

/// prediction = (x + layer(x)) out, x = samples in.
class Predictor {
 public:
  struct Gradients {
    Matrix in, out;
    coterie::Parameters<float> layer;
  };
  struct Tape {
    Matrix x, y, sum, prediction, d_prediction, d_sum, d_x;
    coterie::RoutingAttention<float>::Tape layer;
  };

  Predictor(const coterie::RoutingAttentionConfig& config, transformer::Random random)
      : in_(transformer::linear_weights<float>(channels, model_dim, random)),
        out_(transformer::linear_weights<float>(model_dim, channels, random)),
        layer_(config) {}

  coterie::RoutingAttention<float>& layer() { return layer_; }
  Gradients zero_gradients() const {
    return {Matrix::Zero(channels, model_dim), Matrix::Zero(model_dim, channels), layer_.zero_gradients()};
  }
  template <class F>
  void visit(const Gradients& gradients, F&& f) {
    f("in", View<float>(in_), ConstView<float>(gradients.in));
    f("out", View<float>(out_), ConstView<float>(gradients.out));
    coterie::visit(layer_.parameters(), gradients.layer, f);
  }

  /// One sample through a decoder: x and y are scratch of a row, and y is the layer's row.
  void step(ConstView<float> sample, coterie::Decoder<float>& decoder, Matrix& x, Matrix& y, View<float> prediction,
            coterie::Context& context) const {
    coterie::product<float>(sample, in_, x, context);
    decoder.step(x, y, context);
    x += y;
    coterie::product<float>(x, out_, prediction, context);
  }

  void forward(const Matrix& samples, std::span<const Index> offsets, Tape& tape, coterie::Context& context) const {
    const Index n = samples.rows();
    for (Matrix* m : {&tape.x, &tape.y}) m->resize(n, model_dim);
    tape.prediction.resize(n, channels);
    coterie::product<float>(samples, in_, tape.x, context);
    layer_.forward({tape.x, offsets}, tape.y, tape.layer, context);
    tape.sum = tape.x + tape.y;
    coterie::product<float>(tape.sum, out_, tape.prediction, context);
  }

  /// Undoes forward for tape.d_prediction. Adds into the gradients.
  void backward(const Matrix& samples, std::span<const Index> offsets, Tape& tape, Gradients& gradients,
                coterie::Context& context) const {
    // prediction = (x + y) out
    coterie::product_weight_gradient<float>(tape.sum, tape.d_prediction, gradients.out, context);
    tape.d_sum.resize(samples.rows(), model_dim);
    coterie::product_input_gradient<float>(tape.d_prediction, out_, tape.d_sum, context);
    tape.d_x = tape.d_sum;
    layer_.backward({tape.x, offsets}, tape.layer, tape.d_sum, tape.d_x, gradients.layer, context);
    // x = samples in
    coterie::product_weight_gradient<float>(samples, tape.d_x, gradients.in, context);
  }

 private:
  Matrix in_, out_;
  coterie::RoutingAttention<float> layer_;
};

/// The mean square error of predictions of the next sample, where it is foretold, as a share of the signal's variance
/// of 1.
double error(const Signal& signal, const Matrix& prediction) {
  double sum = 0, count = 0;
  for (Index i = 0; i + 1 < signal.samples.rows(); ++i) {
    if (!signal.foretold[static_cast<std::size_t>(i + 1)]) continue;
    sum += static_cast<double>((prediction.row(i) - signal.samples.row(i + 1)).squaredNorm()) / channels;
    count += 1;
  }
  return sum / count;
}

Predictor train(const char* pattern, const Settings& settings, coterie::Context& context) {
  const bool routed = std::string(pattern) == "routed";
  coterie::RoutingAttentionConfig config{
      .model_dim = model_dim, .causal = true, .seed = static_cast<std::uint64_t>(settings.seed)};
  config.local = {.heads = routed ? heads / 2 : heads, .window = window};
  if (routed)
    config.routed = {.heads = heads / 2,
                     .clusters = 12,
                     .window = window,
                     .router = {.decay = 0.99},
                     .matching = {.induction = true, .key_taps = taps}};
  Predictor model(config, transformer::Random(static_cast<std::uint64_t>(settings.seed)));
  transformer::Random random(static_cast<std::uint64_t>(settings.seed) + 1000);
  transformer::AdamW<float> optimizer;
  Predictor::Gradients gradients = model.zero_gradients();
  Predictor::Tape tape;
  std::vector<Index> offsets;
  for (Index s = 0; s <= sequences; ++s) offsets.push_back(s * sequence_length);
  Matrix samples(sequences * sequence_length, channels);
  examples::Progress progress(format("%-6s", pattern));
  examples::Stopwatch watch;
  double average = 1;
  for (std::int64_t step = 0; step < settings.steps; ++step) {
    for (Index s = 0; s < sequences; ++s)
      samples.middleRows(s * sequence_length, sequence_length) = Signal(sequence_length, random).samples;
    model.forward(samples, offsets, tape, context);
    // The loss is the mean square error of all samples but the first of a sequence, which has nothing before it.
    tape.d_prediction.setZero(samples.rows(), channels);
    double loss = 0;
    const float scale = 2.0f / static_cast<float>(samples.size());
    for (Index i = 0; i + 1 < samples.rows(); ++i) {
      if ((i + 1) % sequence_length == 0) continue;
      tape.d_prediction.row(i) = scale * (tape.prediction.row(i) - samples.row(i + 1));
      loss += static_cast<double>((tape.prediction.row(i) - samples.row(i + 1)).squaredNorm()) /
              static_cast<double>(samples.size());
    }
    gradients.in.setZero();
    gradients.out.setZero();
    gradients.layer.fill(0);
    model.backward(samples, offsets, tape, gradients, context);
    model.layer().update_router(tape.layer, context);
    if (!std::isfinite(loss)) throw std::runtime_error(format("the loss is not finite at step %lld", (long long)step));
    const double done = static_cast<double>(step) / static_cast<double>(settings.steps);
    optimizer.step(model, gradients, 1e-2 * transformer::learning_rate_factor(step, 20, done, 0.05));
    average = step == 0 ? loss : 0.95 * average + 0.05 * loss;
    progress.show(static_cast<double>(step + 1) / static_cast<double>(settings.steps), [&] {
      return format("error %.3f  %.0f samples/s", average,
                    static_cast<double>((step + 1) * samples.rows()) / watch.seconds());
    });
  }
  return model;
}

/// What a stream gave.
struct Stream {
  std::vector<double> seconds;  // from a chunk's arrival to its predictions, per chunk; sorted
  double error = 0, all_seconds = 0;
  Index samples = 0;
  long allocated = 0;
  std::size_t bytes = 0;
  bool same = true;  // rows of the layer as forward's, where that was looked at
};

Stream run_stream(Predictor& model, const Settings& settings, coterie::Context& context) {
  transformer::Random random(77);
  std::vector<Index> chunks;
  Index length = 0;
  for (std::int64_t i = 0; i < settings.chunks; ++i) length += chunks.emplace_back(1 + random.below(8));
  const Signal signal(length, random);
  Matrix prediction(length, channels), x(1, model_dim), y(1, model_dim);
  const Index checked = std::min<Index>(length, 4096);
  Matrix rows(checked, model_dim);

  Stream stream;
  stream.samples = length;
  stream.seconds.reserve(chunks.size());
  coterie::Decoder<float> decoder(model.layer(), {.reserve = length});
  {  // The context's memory grows in the first calls.
    coterie::Decoder<float> warm(model.layer());
    for (int i = 0; i < 200; ++i)
      model.step(view(signal.samples).rows(0, 1), warm, x, y, view(prediction).rows(0, 1), context);
  }
  examples::Stopwatch all;
  const long before = allocations;
  Index next = 0;
  for (const Index chunk : chunks) {
    examples::Stopwatch watch;
    for (Index i = next; i < next + chunk; ++i) {
      model.step(view(signal.samples).rows(i, 1), decoder, x, y, view(prediction).rows(i, 1), context);
      if (i < checked) rows.row(i) = y.row(0);
    }
    stream.seconds.push_back(watch.seconds());
    next += chunk;
  }
  stream.allocated = allocations - before;
  stream.all_seconds = all.seconds();
  stream.error = error(signal, prediction);
  stream.bytes = decoder.bytes();
  Predictor::Tape tape;
  model.forward(signal.samples.topRows(checked), {}, tape, context);
  stream.same = tape.y == rows;
  std::sort(stream.seconds.begin(), stream.seconds.end());
  return stream;
}

double percentile(const std::vector<double>& sorted, double percent) {
  const double at = percent / 100 * static_cast<double>(sorted.size() - 1);
  return sorted[static_cast<std::size_t>(std::llround(at))];
}

/// Latencies over their rank, from the half that is fastest to the slowest of all; both axes by powers of ten.
std::string picture(const std::vector<double>& sorted) {
  constexpr double width = 640, height = 360, left = 70, bottom = 50, top = 30, right = 20;
  const double low = std::floor(std::log10(1e6 * sorted.front())),
               high = std::ceil(std::log10(1e6 * sorted.back()) + 1e-9);
  const double ranks = std::log10(static_cast<double>(sorted.size()));
  const auto x_of = [&](double beyond) { return left + (width - left - right) * -std::log10(beyond) / ranks; };
  const auto y_of = [&](double seconds) {
    return height - bottom - (height - bottom - top) * (std::log10(1e6 * seconds) - low) / std::max(1.0, high - low);
  };
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
      width, height);
  for (double power = low; power <= high; ++power)
    svg += format(
        "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#ddd\"/><text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g us</text>\n",
        left, y_of(1e-6 * std::pow(10, power)), width - right, left - 6, y_of(1e-6 * std::pow(10, power)) + 4,
        std::pow(10, power));
  for (double beyond = 1; - std::log10(beyond) <= ranks; beyond /= 10)
    svg += format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g %%</text>\n", x_of(beyond),
                  height - bottom + 18, 100 * (1 - beyond));
  svg += "<polyline fill=\"none\" stroke=\"#1f77b4\" stroke-width=\"2\" points=\"";
  const std::size_t n = sorted.size();
  for (std::size_t i = 0; i < n; i += std::max<std::size_t>(1, std::min(n / 400, n - 1 - i))) {
    const double beyond = static_cast<double>(n - i) / static_cast<double>(n);
    svg += format("%.1f,%.1f ", x_of(beyond), y_of(sorted[i]));
  }
  return svg + format(
                   "\"/>\n<text x=\"%.1f\" y=\"18\">time from a chunk to its predictions, by the share of chunks "
                   "below</text>\n</svg>\n",
                   left);
}

void run(int argument_count, char** arguments) {
  Settings settings;
  examples::Options options("stream", "Trains a small predictor of a signal, and lets a stream run through it.");
  options.add("--steps", settings.steps, 1, 1000000, "training steps");
  options.add("--chunks", settings.chunks, 2, 10000000, "chunks of the stream, of 1 to 8 samples");
  options.add("--seed", settings.seed, 0, std::int64_t(1) << 53, "of weights and data");
  options.add("--threads", settings.threads, 1, 1024, "worker threads of the training; results do not depend on them");
  options.add("--svg", settings.svg, "write a picture of the latencies to this file");
  options.parse(argument_count, arguments);
  const examples::ResultFile file(settings.svg);

  coterie::ThreadPool pool(settings.threads);
  coterie::Workspace workspace;
  coterie::Context training{pool, workspace}, context;  // a stream of single samples is best served by one thread
  std::printf("A signal of %d channels, %d motifs of %d samples; window %d; %lld steps of %d samples, seed %lld\n\n",
              int(channels), int(motifs), int(motif_length), int(window), (long long)settings.steps,
              int(sequences * sequence_length), (long long)settings.seed);
  std::vector<std::vector<std::string>> table{
      {"pattern", "error of what is foretold", "p50", "p90", "p99", "p99.9", "longest", "cache"}};
  std::vector<Stream> streams;
  for (const char* pattern : {"local", "routed"}) {
    Predictor model = train(pattern, settings, training);
    const Stream& s = streams.emplace_back(run_stream(model, settings, context));
    const auto microseconds = [&](double percent) { return format("%.0f us", 1e6 * percentile(s.seconds, percent)); };
    table.push_back({pattern, format("%.3f", s.error), microseconds(50), microseconds(90), microseconds(99),
                     microseconds(99.9), microseconds(100), format("%.0f KB", static_cast<double>(s.bytes) / 1024)});
  }
  std::printf("\n");
  examples::print_table(table);
  const Stream& s = streams.back();
  std::printf(
      "\n  latency: from a chunk of 1 to 8 samples to the prediction after each; %lld chunks, %lld samples, in %.1f "
      "s:\n"
      "  %.0f times as fast as a sensor of %.0f samples a second. The error is 1 where nothing is known.\n",
      (long long)settings.chunks, (long long)s.samples, s.all_seconds,
      static_cast<double>(s.samples) / s.all_seconds / rate, rate);
  for (const Stream& one : streams) {
    if (!one.same) throw std::runtime_error("the stream's rows are not those of the forward pass");
    if (one.allocated > 0) throw std::runtime_error(format("the stream allocated %ld times", one.allocated));
  }
  std::printf(
      "  its rows are bit-identical to the forward pass (the first %d were compared), and it allocated nothing\n",
      int(std::min<Index>(s.samples, 4096)));
  file.write(picture(s.seconds));
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("stream", [&] { run(argument_count, arguments); });
}
