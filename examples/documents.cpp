// Documents: an encoder classifies documents of different lengths, which lie end to end without padding.
//
// A document is a run of filler words. Six marked names are in its first quarter, and six in its last: the same ones
// in another order (class 1), or others (class 0). Every name is as frequent in both classes: a token has to find out
// whether its own name occurs again, at least half a document away. The same encoder is trained twice on the same
// documents: a two-sided layer, mean pooling over each document, a linear head. Only two of its four heads differ: they
// see the 33 tokens around like the other two (local), or up to 16 members of the token's own cluster (routed).
//
//     documents                      both, in a quarter of a minute on one core
//     documents --seed 7 --threads 2
//
// Expect (250 steps, 512 new documents, seeds 0 to 2; chance is 0.5):
//
//                              local   routed
//     accuracy          0.50 to 0.51     1.00
//     keys per query              30        7
//
// Local heads cannot reach the other half by construction: that row is a property of the task.
#include <thread>

#include "model/adamw.hpp"
#include "model/block.hpp"
#include "support/console.hpp"
#include "support/options.hpp"

namespace {

using coterie::ConstView;
using coterie::View;
using examples::format;
using transformer::Index;
using Matrix = transformer::RowMatrix<float>;

constexpr Index names = 32, fillers = 32, mark = names + fillers, vocabulary = mark + 1;
constexpr Index shortest = 64, longest = 128, middle = (shortest + longest) / 2;
constexpr Index names_each = 6;  // in the first quarter, and as many in the last
constexpr Index model_dim = 64, hidden = 128, heads = 4, window = 16, clusters = 16;
constexpr Index batch_documents = 32, test_documents = 512;

struct Settings {
  std::int64_t seed = 0, steps = 250, threads = 1;
};

/// Documents end to end, and their classes. Tokens: names, then fillers.
class Documents {
 public:
  Documents(Index count, std::uint64_t seed) : random_(seed), count_(count), order_(names) {
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<std::int32_t>(i);
    draw();
  }

  /// Draws all documents anew.
  void draw() {
    tokens_.clear();
    classes_.clear();
    offsets_.assign(1, 0);
    for (Index i = 0; i < count_; ++i) {
      const Index length = shortest + random_.below(longest - shortest + 1), start = offsets_.back();
      for (Index t = 0; t < length; ++t) tokens_.push_back(static_cast<std::int32_t>(names + random_.below(fillers)));
      const bool again = random_.below(2) == 1;
      random_.shuffle(order_);
      std::vector<std::int32_t> first(order_.begin(), order_.begin() + names_each);
      std::vector<std::int32_t> last(order_.begin() + names_each, order_.begin() + 2 * names_each);
      if (again) random_.shuffle(last = first);
      scatter(first, start, length / 4);
      scatter(last, start + length - length / 4, length / 4);
      classes_.push_back(again);
      offsets_.push_back(start + length);
    }
  }

  const std::vector<std::int32_t>& tokens() const { return tokens_; }
  const std::vector<Index>& offsets() const { return offsets_; }
  const std::vector<int>& classes() const { return classes_; }

 private:
  // Puts the words, each after a mark, at different positions of [begin, begin + length).
  void scatter(const std::vector<std::int32_t>& words, Index begin, Index length) {
    for (const std::int32_t word : words) {
      std::size_t position = 0;
      do position = static_cast<std::size_t>(begin + 2 * random_.below(length / 2));
      while (tokens_[position] == mark);
      tokens_[position] = mark;
      tokens_[position + 1] = word;
    }
  }

  transformer::Random random_;
  Index count_;
  std::vector<std::int32_t> order_, tokens_;
  std::vector<Index> offsets_;
  std::vector<int> classes_;
};

/// The rows of one document.
template <class M>
auto rows_of(M& m, const std::vector<Index>& offsets, Index document) {
  const std::size_t i = static_cast<std::size_t>(document);
  return m.middleRows(offsets[i], offsets[i + 1] - offsets[i]);
}

/// Embedding, one block, mean pooling per document, and a linear head for the logit of class 1.
class Classifier {
 public:
  using Block = transformer::Block<float>;

  struct Gradients {
    Matrix embedding, head, head_bias;
    Block::Gradients block;
  };
  struct Tape {
    Matrix x, y, pooled, logits, d_x, d_y, d_logits, d_pooled;
    Block::Tape block;
  };

  Classifier(const coterie::RoutingAttentionConfig& attention, transformer::Random random)
      : embedding_(transformer::random_matrix<float>(vocabulary, model_dim, [&] { return random.normal(); })),
        head_(transformer::linear_weights<float>(model_dim, 1, random)),
        head_bias_(Matrix::Zero(1, 1)),
        block_(attention, hidden, random) {}

  Gradients zero_gradients() const {
    Gradients gradients{embedding_, head_, head_bias_, block_.zero_gradients()};
    set_zero(gradients);
    return gradients;
  }
  static void set_zero(Gradients& gradients) {
    for (Matrix* m : {&gradients.embedding, &gradients.head, &gradients.head_bias}) m->setZero();
    Block::set_zero(gradients.block);
  }

  template <class F>
  void visit(const Gradients& gradients, F&& f) {
    f("embedding", View<float>(embedding_), ConstView<float>(gradients.embedding));
    f("head", View<float>(head_), ConstView<float>(gradients.head));
    f("head_bias", View<float>(head_bias_), ConstView<float>(gradients.head_bias));
    block_.visit("block", gradients.block, f);
  }

  /// Leaves tape.logits, one per document.
  void forward(const Documents& documents, Tape& tape, coterie::Context& context) const {
    const std::vector<Index>& offsets = documents.offsets();
    tape.x.resize(offsets.back(), model_dim);
    transformer::embed<float>(documents.tokens(), offsets, embedding_, tape.x);
    block_.forward({tape.x, offsets}, tape.y, tape.block, context);
    tape.pooled.resize(static_cast<Index>(offsets.size()) - 1, model_dim);
    for (Index i = 0; i < tape.pooled.rows(); ++i) tape.pooled.row(i) = rows_of(tape.y, offsets, i).colwise().mean();
    // logits = pooled head + head_bias
    tape.logits.resize(tape.pooled.rows(), 1);
    coterie::product<float>(tape.pooled, head_, tape.logits, context);
    tape.logits.array() += head_bias_(0);
  }

  /// Undoes forward for the mean of -log p[class], which it returns. Adds into the gradients.
  double backward(const Documents& documents, Tape& tape, Gradients& gradients, coterie::Context& context) const {
    const std::vector<Index>& offsets = documents.offsets();
    const Index count = tape.logits.rows();
    tape.d_logits.resize(count, 1);
    double loss = 0;
    for (Index i = 0; i < count; ++i) {
      // loss = log(1 + exp(-s)), s = +-logit by the class
      const double sign = documents.classes()[static_cast<std::size_t>(i)] == 1 ? 1 : -1, s = sign * tape.logits(i);
      loss += (s > 0 ? std::log1p(std::exp(-s)) : std::log1p(std::exp(s)) - s) / static_cast<double>(count);
      tape.d_logits(i) = static_cast<float>(-sign / (1 + std::exp(s)) / static_cast<double>(count));
    }
    // logits = pooled head + head_bias
    coterie::product_weight_gradient<float>(tape.pooled, tape.d_logits, gradients.head, context);
    gradients.head_bias(0) += tape.d_logits.sum();
    tape.d_pooled.resize(count, model_dim);
    coterie::product_input_gradient<float>(tape.d_logits, head_, tape.d_pooled, context);
    tape.d_y.resize(tape.y.rows(), model_dim);
    for (Index i = 0; i < count; ++i) {
      auto d_y = rows_of(tape.d_y, offsets, i);
      d_y.rowwise() = tape.d_pooled.row(i) / static_cast<float>(d_y.rows());
    }
    block_.backward({tape.x, offsets}, tape.block, tape.d_y, tape.d_x, {}, gradients.block, context);
    transformer::embed_backward<float>(documents.tokens(), offsets, gradients.embedding, tape.d_x);
    return loss;
  }

  void update_router(const Tape& tape, coterie::Context& context) {
    block_.attention().update_router(tape.block.attention, context);
  }

 private:
  Matrix embedding_, head_, head_bias_;
  Block block_;
};

struct Result {
  std::string pattern;
  double accuracy, shorter, longer, seconds, keys_per_query;
};

double accuracy(const Documents& documents, const Matrix& logits, Index from, Index to) {
  double right = 0, all = 0;
  for (std::size_t i = 0; i < documents.classes().size(); ++i) {
    const Index length = documents.offsets()[i + 1] - documents.offsets()[i];
    if (length < from || length >= to) continue;
    all += 1;
    right += (logits(static_cast<Index>(i)) > 0) == (documents.classes()[i] == 1);
  }
  return right / all;
}

/// Keys that a query sees in the two heads that differ between the patterns.
double keys_per_query(const Classifier::Tape& tape) {
  const auto& attention = tape.block.attention;
  const auto plans = attention.plans().empty() ? attention.local_plans() : attention.plans();
  double sum = 0;
  for (const coterie::AttentionPlan& plan : plans) sum += coterie::statistics(plan).keys_per_query.mean;
  return sum / static_cast<double>(plans.size());
}

Result train(const std::string& pattern, const Settings& settings, Classifier::Tape& tape, coterie::Context& context) {
  const std::uint64_t seed = static_cast<std::uint64_t>(settings.seed);
  coterie::RoutingAttentionConfig attention{.model_dim = model_dim, .seed = seed};
  attention.local = {.heads = pattern == "routed" ? heads / 2 : heads, .window = window + 1, .lookahead = window};
  if (pattern == "routed")
    attention.routed = {.heads = heads / 2,
                        .clusters = clusters,
                        .window = window,
                        .router = {.decay = 0.99},
                        .matching = {.shared_qk = true}};
  Classifier model(attention, transformer::Random(seed));
  Classifier::Gradients gradients = model.zero_gradients();
  transformer::AdamW<float> optimizer;
  Documents documents(batch_documents, seed + 1000);

  examples::Progress progress(format("%-6s", pattern.c_str()));
  examples::Stopwatch watch;
  double average = 0, tokens = 0;
  for (std::int64_t step = 0; step < settings.steps; ++step) {
    model.set_zero(gradients);
    model.forward(documents, tape, context);
    const double loss = model.backward(documents, tape, gradients, context);
    model.update_router(tape, context);
    if (!std::isfinite(loss)) throw std::runtime_error(format("the loss is not finite at step %lld", (long long)step));
    const double done = static_cast<double>(step) / static_cast<double>(settings.steps);
    optimizer.step(model, gradients, 4e-3 * transformer::learning_rate_factor(step, 20, done, 0.1));

    average = step == 0 ? loss : 0.95 * average + 0.05 * loss;
    tokens += static_cast<double>(documents.offsets().back());
    progress.show(static_cast<double>(step + 1) / static_cast<double>(settings.steps),
                  [&] { return format("loss %.3f  %.0f tokens/s", average, tokens / watch.seconds()); });
    documents.draw();
  }
  const double seconds = watch.seconds();

  const Documents test(test_documents, 77);
  model.forward(test, tape, context);
  return {pattern,
          accuracy(test, tape.logits, 0, longest + 1),
          accuracy(test, tape.logits, 0, middle),
          accuracy(test, tape.logits, middle, longest + 1),
          seconds,
          keys_per_query(tape)};
}

void run(int argument_count, char** arguments) {
  Settings settings;
  settings.threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  examples::Options options("documents",
                            "Trains an encoder to classify documents of different lengths, without and with routing.");
  options.add("--steps", settings.steps, 1, 1000000, "training steps");
  options.add("--seed", settings.seed, 0, std::int64_t(1) << 53, "of weights and data");
  options.add("--threads", settings.threads, 1, 1024, "worker threads; results do not depend on them");
  options.parse(argument_count, arguments);

  coterie::ThreadPool pool(settings.threads);
  coterie::Workspace workspace;
  coterie::Context context{pool, workspace};
  std::printf("Documents of %d to %d tokens, window %d, %lld steps of %d documents, seed %lld\n\n", int(shortest),
              int(longest), int(window), (long long)settings.steps, int(batch_documents), (long long)settings.seed);

  Classifier::Tape tape;
  std::vector<Result> results;
  for (const char* pattern : {"local", "routed"}) results.push_back(train(pattern, settings, tape, context));

  std::vector<std::vector<std::string>> table{
      {"pattern", "accuracy", "shorter half", "longer half", "seconds", "keys seen per query"}};
  for (const Result& r : results)
    table.push_back({r.pattern, format("%.3f", r.accuracy), format("%.3f", r.shorter), format("%.3f", r.longer),
                     format("%.1f", r.seconds), format("%.1f", r.keys_per_query)});
  std::printf("\n");
  examples::print_table(table);
  std::printf("\n  %d new documents; chance is 0.5; the longer half has %d tokens or more\n", int(test_documents),
              int(middle));
  std::printf("  keys seen per query: in the two heads that differ\n");
  for (Index head = 0; head < heads / 2; ++head) {
    const coterie::RouterLoad load = coterie::router_load(tape.block.attention.cluster_sizes(head));
    std::printf("  routed head %d: perplexity %.1f of %d clusters, fullest %.0f %%, empty %d\n", int(head),
                load.perplexity, int(clusters), 100 * load.largest, int(load.empty));
  }
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("documents", [&] { run(argument_count, arguments); });
}
