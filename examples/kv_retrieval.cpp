// Attention over a long key/value cache whose heads were never trained to be routed: how well do a few keys and the
// means of the rest stand for all of it?
//
// A KeyIndex clusters the keys once; a query then sees the best keys of the clusters that promise most, and takes the
// rest from means. This program trains a small byte-level language model with dense heads, runs it over held-out text,
// takes what its heads have as queries, keys and values, and compares with dense attention over all keys: share of the
// attention seen, error of the output with and without the rest, time.
//
//     kv_retrieval                    induction heads, 16384 keys
//     kv_retrieval --model plain      queries and keys apart: flatter, so more of the attention is in the rest
//     kv_retrieval --full             more sizes of clusters and budgets, and times up to 262144 keys
//     kv_retrieval --queries q.f32 --keys k.f32 --values v.f32 --dim 64 --kv-heads 8 --heads 32     your own cache
//
// Expect of the first (half a minute of processor time), and with --model plain (error: of the outputs, relative to
// dense, with the rest by means and with the rest dropped):
//
//     heads       cluster   budget   attention seen   estimated   error   rest dropped
//     induction        64      5 %            0.745       0.010   0.228          0.231
//     induction        64     20 %            0.987       0.000   0.008          0.013
//     plain            64      5 %            0.161       0.623   0.031          0.453
//     plain            64     20 %            0.431       0.099   0.023          0.184
//
// Files are rows of little-endian 32-bit floats, heads side by side: tokens x heads*dim, as NumPy's tofile writes them.
#include <array>
#include <bit>
#include <coterie/coterie.hpp>
#include <numeric>
#include <thread>

#include "model/adamw.hpp"
#include "model/model.hpp"
#include "support/console.hpp"
#include "support/corpus.hpp"
#include "support/options.hpp"

namespace {

using coterie::AttentionPlan;
using coterie::ConstView;
using coterie::Context;
using coterie::Index;
using coterie::KeyIndex;
using coterie::view;
using examples::format;
using examples::UsageError;
using Matrix = coterie::RowMatrix<float>;
using Model = transformer::Model<float>;

constexpr Index context_bytes = 1024, tokens_per_step = 4096;  // of training
constexpr Index query_rows = 128;
constexpr double bits_per_nat = 1.4426950408889634;

struct Settings {
  std::int64_t tokens = 16384, steps = 100, cluster_size = 0, sinks = 4, recent = 64, seed = 0, threads = 1;
  std::int64_t dim = 0, kv_heads = 1, heads = 0, timed = 65536;
  double minutes = 0;
  bool full = false;
  std::string model = "induction", text, queries, keys, values, json;
};

Settings read_settings(int argument_count, char** arguments) {
  Settings s;
  s.threads = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  examples::Options options("kv_retrieval",
                            "Attends to a key/value cache by clusters of its keys, and compares with dense attention.");
  options.add("--model", s.model, {"induction", "plain"}, "heads of the model that makes the cache");
  options.add("--text", s.text, "text to train on, instead of the source text of Eigen");
  options.add("--steps", s.steps, 1, std::int64_t(1) << 40, "training steps");
  options.add("--minutes", s.minutes, 1e6, "training time, instead of --steps");
  options.add("--tokens", s.tokens, 64, 1 << 20, "keys of the cache that the model makes");
  options.add("--queries", s.queries, "read queries from this file instead, and");
  options.add("--keys", s.keys, "keys from this one, and");
  options.add("--values", s.values, "values from this one");
  options.add("--dim", s.dim, 1, 1 << 16, "columns of a head in the files");
  options.add("--kv-heads", s.kv_heads, 1, 1 << 16, "heads of keys and values in the files");
  options.add("--heads", s.heads, 1, 1 << 16, "heads of queries in the files (default: as --kv-heads)");
  options.add("--cluster-size", s.cluster_size, 1, 1 << 20, "mean keys of a cluster, instead of several sizes");
  options.add("--sinks", s.sinks, 0, 1 << 20, "first tokens that every query sees");
  options.add("--recent", s.recent, 0, 1 << 20, "last tokens that every query sees");
  options.add("--timed", s.timed, 0, 1 << 22, "most keys of the table of times (--full: 262144); 0: no such table");
  options.add("--full", s.full, "more sizes of clusters and budgets, and longer caches");
  options.add("--seed", s.seed, 0, std::int64_t(1) << 53, "of weights and batches");
  options.add("--threads", s.threads, 1, 1024, "worker threads; results do not depend on them");
  options.add("--json", s.json, "write the results to this file");
  options.parse(argument_count, arguments);
  if (options.given("--steps") && options.given("--minutes"))
    throw UsageError("--steps and --minutes: give one of them");
  const int files = options.given("--queries") + options.given("--keys") + options.given("--values");
  if (files != 0 && files != 3) throw UsageError("--queries, --keys and --values: give all of them, or none");
  if (files == 3 && s.dim == 0) throw UsageError("--dim: needed with files, got none");
  if (files == 0 && (options.given("--dim") || options.given("--heads") || options.given("--kv-heads")))
    throw UsageError("--dim, --kv-heads and --heads: only for files");
  if (s.heads == 0) s.heads = s.kv_heads;
  if (s.heads % s.kv_heads != 0)
    throw UsageError("--heads: expected a multiple of --kv-heads = " + std::to_string(s.kv_heads) + ", got " +
                     std::to_string(s.heads));
  if (s.full && !options.given("--timed")) s.timed = 262144;
  return s;
}

/// Keys and values of a cache, and queries that come after them; heads side by side.
struct Cache {
  Matrix q, k, v;
  Index heads = 1, kv_heads = 1;
  std::vector<std::string> names;  // of the query heads
  Index dim() const { return k.cols() / kv_heads; }
};

// ---------------------------------------------------------------------------------------------- a cache from a model

/// Dense heads. Induction: half of them, next to local ones; a key carries the value of the next position, and queries
/// and keys are the same. Plain: all of them, queries and keys projected apart and rotated, as in most language models.
transformer::ModelConfig model_config(const Settings& s) {
  const bool plain = s.model == "plain";
  transformer::ModelConfig config{.vocabulary = 256, .layers = 2, .feed_forward = 256, .embedding_deviation = 0.3};
  coterie::RoutingAttentionConfig& attention = config.attention;
  attention.model_dim = plain ? 64 : 96;
  config.feed_forward = 4 * attention.model_dim;
  attention.causal = true;
  attention.dense.heads = 2;
  if (!plain) {
    attention.local = {.heads = 2, .window = 64, .positions = {.kind = coterie::PositionKind::bias}};
    attention.dense.matching = {.induction = true, .key_taps = 8};
  }
  attention.seed = static_cast<std::uint64_t>(s.seed);
  return config;
}

/// Trains; returns bits per byte of the last steps.
double train(Model& model, Model::Tape& tape, const examples::Bytes& text, const Settings& s, Context& context) {
  Model::Gradients gradients = model.zero_gradients();
  transformer::AdamW<float> optimizer;
  transformer::Random random(static_cast<std::uint64_t>(s.seed) + 1000);
  std::vector<std::int32_t> tokens(tokens_per_step), targets(tokens_per_step);
  std::vector<Index> offsets(tokens_per_step / context_bytes + 1);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<Index>(i) * context_bytes;
  std::vector<float> losses(tokens_per_step);
  examples::Progress progress("training");
  examples::Stopwatch watch;
  double average = 0;
  std::int64_t step = 0;
  for (double done = 0; done < 1;) {
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      const auto first = text.begin() + random.below(static_cast<Index>(text.size()) - context_bytes);
      std::copy(first, first + context_bytes, tokens.begin() + offsets[i]);
      std::copy(first + 1, first + context_bytes + 1, targets.begin() + offsets[i]);
    }
    const transformer::Batch batch{tokens, targets, offsets, static_cast<std::uint64_t>(step)};
    Model::set_zero(gradients);
    model.forward(batch, losses, tape, context);
    model.backward(batch, tape, gradients, context);
    const Index warm_up = s.minutes > 0 ? 50 : std::min<Index>(50, s.steps / 6);
    optimizer.step(model, gradients, 4e-3 * transformer::learning_rate_factor(step, warm_up, done, 0.05));
    const double loss = std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(losses.size());
    if (!std::isfinite(loss)) throw std::runtime_error(format("the loss is not finite at step %lld", (long long)step));
    average = step == 0 ? loss : 0.9 * average + 0.1 * loss;
    ++step;
    done =
        s.minutes > 0 ? watch.seconds() / (60 * s.minutes) : static_cast<double>(step) / static_cast<double>(s.steps);
    progress.show(done, [&] { return format("%.3f bits per byte", average * bits_per_nat); });
  }
  return average * bits_per_nat;
}

/// What the dense heads of a layer attend with, as the layer makes it of its normalised input x.
void take_heads(const coterie::RoutingAttention<float>& layer, const Matrix& x, Index column, Matrix& q, Matrix& k,
                Matrix& v, Context& context) {
  const coterie::RoutingAttentionConfig& c = layer.config();
  const coterie::Parameters<float>& w = layer.parameters();
  const Index d = c.head_dim, heads = c.dense.heads, width = heads * d, first = c.local.heads * d, n = x.rows();
  Matrix rows(n, width), values(n, width);
  coterie::product<float>(x, view(w.w_q).columns(first, width), view(rows), context);
  coterie::product<float>(x, view(w.w_v).columns(first, width), view(values), context);
  if (!c.dense.matching.induction) {
    Matrix keys(n, width);
    coterie::product<float>(x, view(w.w_k).columns(0, width), view(keys), context);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(n));
    std::iota(positions.begin(), positions.end(), 0);
    const coterie::Rotary rotary(d, c.dense.positions.base, c.dense.positions.layout);
    rotary.forward<float>(view(rows), heads, positions, context);
    rotary.forward<float>(view(keys), heads, positions, context);
    q.middleCols(column, width) = rows;
    k.middleCols(column, width) = keys;
    v.middleCols(column, width) = values;
    return;
  }
  // Queries and keys: the last positions by their taps, normalised. Key t carries the value of position t + 1.
  const Index taps = c.dense.matching.key_taps;
  Matrix mixed = Matrix::Zero(n, width);
  for (Index h = 0; h < heads; ++h)
    for (Index t = 0; t < taps; ++t)
      mixed.block(t, h * d, n - t, d).array() +=
          rows.block(0, h * d, n - t, d).array().rowwise() * w.taps.row(h * taps + t).array();
  coterie::normalise_rows<float>(mixed, view(mixed), {}, d, context);
  k.middleCols(column, width) = mixed;
  for (Index h = 0; h < heads; ++h) mixed.middleCols(h * d, d) *= w.gain(0, h);  // logits are q.k / sqrt(d) again
  q.middleCols(column, width) = mixed;
  v.middleCols(column, width).topRows(n - 1) = values.bottomRows(n - 1);
  v.middleCols(column, width).row(n - 1).setZero();
}

/// The cache of all dense heads of a model that has read `count` bytes of text; the last `queries` of them only ask.
Cache run_model(const Model& model, Model::Tape& tape, const examples::Bytes& text, Index count, Index queries,
                Context& context) {
  const std::vector<std::int32_t> tokens(text.begin(), text.begin() + count);
  const std::array<Index, 2> offsets{0, count};
  const std::vector<std::int32_t> targets(static_cast<std::size_t>(count), -1);
  std::vector<float> losses(static_cast<std::size_t>(count));
  model.forward({tokens, targets, offsets, 0}, losses, tape, context);
  const coterie::RoutingAttentionConfig& c = model.blocks().front().attention().config();
  const Index width = c.dense.heads * c.head_dim, layers = model.config().layers;
  Matrix q(count, layers * width), k = q, v = q;
  Cache cache;
  for (Index l = 0; l < layers; ++l) {
    const auto at = static_cast<std::size_t>(l);
    take_heads(model.blocks()[at].attention(), tape.blocks[at].normed, l * width, q, k, v, context);
    for (Index h = 0; h < c.dense.heads; ++h)
      cache.names.push_back(format("layer %lld head %lld", (long long)l + 1, (long long)h + 1));
  }
  cache.heads = cache.kv_heads = layers * c.dense.heads;
  cache.q = q.bottomRows(queries);
  cache.k = k.topRows(count - queries);
  cache.v = v.topRows(count - queries);
  return cache;
}

Cache make_cache(const Settings& s, Context& context) {
  const std::size_t needed = static_cast<std::size_t>(s.tokens + query_rows + 1);
#ifdef COTERIE_EIGEN_INCLUDE_DIR
  const std::string eigen = COTERIE_EIGEN_INCLUDE_DIR;
#else
  const std::string eigen = "/usr/include/eigen3";
#endif
  const examples::Corpus corpus =
      s.text.empty() ? examples::read_eigen(eigen, needed) : examples::read_text(s.text, needed);
  if (static_cast<Index>(corpus.training.size()) <= context_bytes)
    throw UsageError("the text is too short to train on: " + std::to_string(corpus.training.size()) + " bytes");
  Model model(model_config(s));
  std::printf("Byte-level language model with %s heads on %s\n", s.model.c_str(), corpus.description.c_str());
  Model::Tape tape;
  train(model, tape, corpus.training, s, context);
  return run_model(model, tape, corpus.held_out, s.tokens + query_rows, query_rows, context);
}

// ------------------------------------------------------------------------------------------------ a cache from files

Matrix read_matrix(const std::string& path, Index columns) {
  const examples::Bytes bytes = examples::read_bytes(path);
  const std::size_t row = static_cast<std::size_t>(columns) * 4;
  if (bytes.empty() || bytes.size() % row != 0)
    throw UsageError("'" + path + "': expected rows of " + std::to_string(columns) + " 32-bit floats, got " +
                     std::to_string(bytes.size()) + " bytes");
  Matrix m(static_cast<Index>(bytes.size() / row), columns);
  for (Index i = 0; i < m.size(); ++i) {
    const std::uint8_t* const b = bytes.data() + 4 * i;
    m.data()[i] = std::bit_cast<float>(std::uint32_t(b[0]) | std::uint32_t(b[1]) << 8 | std::uint32_t(b[2]) << 16 |
                                       std::uint32_t(b[3]) << 24);
  }
  return m;
}

Cache read_cache(const Settings& s) {
  Cache cache;
  cache.heads = s.heads;
  cache.kv_heads = s.kv_heads;
  cache.q = read_matrix(s.queries, s.heads * s.dim);
  cache.k = read_matrix(s.keys, s.kv_heads * s.dim);
  cache.v = read_matrix(s.values, s.kv_heads * s.dim);
  if (cache.v.rows() != cache.k.rows())
    throw UsageError("--values: expected " + std::to_string(cache.k.rows()) + " rows, as --keys, got " +
                     std::to_string(cache.v.rows()));
  if (cache.q.rows() > query_rows) cache.q = Matrix(cache.q.bottomRows(query_rows));
  for (Index h = 0; h < s.heads; ++h) cache.names.push_back(format("head %lld", (long long)h + 1));
  return cache;
}

// --------------------------------------------------------------------------------------------------------- the tables

struct Point {
  Index cluster_size = 0;
  double budget = 0, keys = 0, mass = 0, worst = 0, estimated = 0, error = 0, dropped = 0;
  Index worst_head = 0;
};

/// By how much `out` differs from `want`, as a share of the length of all of `want`.
double relative_error(const Matrix& out, const Matrix& want) {
  return static_cast<double>((out - want).norm() / want.norm());
}

coterie::KeyIndexConfig index_config(const Settings& s, Index kv_heads, Index cluster_size, bool tail = true) {
  return {.kv_heads = kv_heads, .keys_per_cluster = cluster_size, .sinks = s.sinks, .recent = s.recent, .tail = tail};
}

std::vector<Point> sweep(const Cache& cache, const Settings& s, Context& context) {
  const Index n = cache.k.rows(), queries = cache.q.rows();
  const coterie::AttentionConfig attention{.heads = cache.heads, .kv_heads = cache.kv_heads};
  AttentionPlan dense;
  coterie::plan_dense({.tokens = queries, .keys = n}, dense);
  Matrix want(queries, cache.heads * (cache.v.cols() / cache.kv_heads)), out = want;
  coterie::AttentionTape<float> all, some;
  coterie::attention_forward(dense, cache.q, cache.k, cache.v, want, all, attention, context);

  std::vector<AttentionPlan> plans;
  const auto measure = [&](const KeyIndex<float>& index, const KeyIndex<float>& without_tail, double budget) {
    Point point{.cluster_size = index.config().keys_per_cluster, .budget = budget};
    const coterie::KeyIndexQuery query{.heads = cache.heads, .budget = budget};
    index.plan(cache.q, cache.k, query, plans, context);
    // Some of the keys have e^(lse - lse of all) of the probability.
    coterie::attention_forward(plans, cache.q, cache.k, cache.v, out, some, attention, context);
    point.worst = 1;
    for (Index h = 0; h < cache.heads; ++h) {
      const auto difference = some.lse().eigen().col(h) - all.lse().eigen().col(h);
      const double mass = static_cast<double>(difference.array().exp().mean());
      point.mass += mass / static_cast<double>(cache.heads);
      if (mass < point.worst) point.worst = mass, point.worst_head = h;
    }
    coterie::KeyIndexReport report;
    index.attend(cache.q, cache.k, cache.v, out, query, context, &report);
    point.keys = report.keys_seen.mean();
    point.estimated = report.estimated_mass.mean();
    point.error = relative_error(out, want);
    without_tail.attend(cache.q, cache.k, cache.v, out, query, context);
    point.dropped = relative_error(out, want);
    return point;
  };

  std::vector<Index> sizes{64, 16};
  std::vector<double> budgets{0.02, 0.05, 0.1, 0.2};
  if (s.full) sizes = {256, 64, 32, 16, 8}, budgets = {0.01, 0.02, 0.05, 0.1, 0.2, 0.4};
  if (s.cluster_size > 0) sizes = {s.cluster_size};
  std::vector<Point> points;
  examples::Progress progress("measuring", 4);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    KeyIndex<float> index(index_config(s, cache.kv_heads, sizes[i]));
    KeyIndex<float> without_tail(index_config(s, cache.kv_heads, sizes[i], false));
    index.build(cache.k, cache.v, context);
    without_tail.build(cache.k, cache.v, context);
    for (std::size_t j = 0; j < budgets.size(); ++j) {
      points.push_back(measure(index, without_tail, budgets[j]));
      progress.show((static_cast<double>(i) + static_cast<double>(j + 1) / static_cast<double>(budgets.size())) /
                    static_cast<double>(sizes.size()));
    }
  }
  return points;
}

struct Timing {
  Index keys = 0, cluster_size = 0;
  double budget = 0, build = 0, append = 0, dense = 0, attend = 0, seen = 0;  // seconds; per key; per query
};

/// Times of one query after the other. Longer caches than the one that there is repeat its rows with a little noise.
std::vector<Timing> time_queries(const Cache& cache, const Settings& s, Context& context) {
  std::vector<Index> sizes;
  for (Index n = 16384; n <= s.timed; n *= 4) sizes.push_back(n);
  std::vector<Timing> timings;
  if (sizes.empty()) return timings;
  const coterie::AttentionConfig attention{.heads = cache.heads, .kv_heads = cache.kv_heads};
  transformer::Random random(static_cast<std::uint64_t>(s.seed) + 2000);
  examples::Progress progress("timing", 4);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const Index n = sizes[i], grown = n + 256;
    Matrix k(grown, cache.k.cols()), v(grown, cache.v.cols());
    for (Index row = 0; row < grown; ++row) {
      const float noise = row < cache.k.rows() ? 0 : 0.1f;
      k.row(row) = cache.k.row(row % cache.k.rows());
      v.row(row) = cache.v.row(row % cache.k.rows());
      for (Index c = 0; noise > 0 && c < k.cols(); ++c) k(row, c) += noise * static_cast<float>(random.normal());
    }
    const auto first = [](const Matrix& m, Index rows) { return view(m).rows(0, rows); };
    // A budget that halves as the cache grows fourfold.
    Timing timing{.keys = n,
                  .cluster_size = s.cluster_size > 0 ? s.cluster_size : 64,
                  .budget = 0.1 / static_cast<double>(Index(1) << i)};
    KeyIndex<float> index(index_config(s, cache.kv_heads, timing.cluster_size));
    examples::Stopwatch watch;
    index.build(first(k, n), first(v, n), context);
    timing.build = watch.seconds();
    watch.reset();
    for (Index row = n; row < grown; ++row) index.append(first(k, row + 1), first(v, row + 1), context);
    timing.append = watch.seconds() / 256;

    // In turns, the first round for warming up; medians.
    AttentionPlan dense;
    coterie::plan_dense({.tokens = 1, .keys = grown}, dense);
    Matrix out(1, cache.heads * (v.cols() / cache.kv_heads));
    const coterie::KeyIndexQuery query{.heads = cache.heads, .budget = timing.budget};
    std::vector<double> dense_times, times;
    const Index rounds = std::min<Index>(cache.q.rows(), 33);
    for (Index r = 0; r < rounds; ++r) {
      const ConstView<float> q = view(cache.q).rows(r, 1);
      watch.reset();
      coterie::attention_forward(dense, q, k, v, out, attention, context);
      dense_times.push_back(watch.seconds());
      watch.reset();
      index.attend(q, k, v, out, query, context);
      times.push_back(watch.seconds());
      progress.show((static_cast<double>(i) + static_cast<double>(r + 1) / static_cast<double>(rounds)) /
                    static_cast<double>(sizes.size()));
    }
    const auto median = [](std::vector<double> x) {
      if (x.size() > 1) x.erase(x.begin());
      std::nth_element(x.begin(), x.begin() + static_cast<Index>(x.size()) / 2, x.end());
      return x[x.size() / 2];
    };
    timing.dense = median(dense_times);
    timing.attend = median(times);
    coterie::KeyIndexReport report;
    index.attend(view(cache.q).rows(0, 1), k, v, out, query, context, &report);
    timing.seen = report.keys_seen.mean();
    timings.push_back(timing);
  }
  return timings;
}

std::string json(const std::vector<Point>& points, const std::vector<Timing>& timings) {
  std::string text = "{\"points\": [";
  for (const Point& p : points)
    text += (&p == points.data() ? "" : ", ") +
            format(
                "{\"cluster_size\": %lld, \"budget\": %g, \"keys\": %.2f, \"mass\": %.6f, \"worst_head\": %.6f, "
                "\"estimated\": %.6f, \"error\": %.6f, \"error_dropped\": %.6f}",
                (long long)p.cluster_size, p.budget, p.keys, p.mass, p.worst, p.estimated, p.error, p.dropped);
  text += "], \"times\": [";
  for (const Timing& t : timings)
    text += (&t == timings.data() ? "" : ", ") +
            format(
                "{\"keys\": %lld, \"cluster_size\": %lld, \"budget\": %g, \"build\": %.6f, \"append\": %.9f, "
                "\"dense\": %.9f, \"attend\": %.9f, \"seen\": %.2f}",
                (long long)t.keys, (long long)t.cluster_size, t.budget, t.build, t.append, t.dense, t.attend, t.seen);
  return text + "]}\n";
}

void run(int argument_count, char** arguments) {
  const Settings s = read_settings(argument_count, arguments);
  const examples::ResultFile file(s.json);
  coterie::ThreadPool pool(s.threads);
  coterie::Workspace workspace;
  Context context{pool, workspace};
  const Cache cache = s.keys.empty() ? make_cache(s, context) : read_cache(s);
  std::printf(
      "Cache of %lld keys, %lld heads of %lld columns; %lld queries of %lld heads; %lld first and %lld recent keys "
      "visible\n",
      (long long)cache.k.rows(), (long long)cache.kv_heads, (long long)cache.dim(), (long long)cache.q.rows(),
      (long long)cache.heads, (long long)s.sinks, (long long)s.recent);
  const std::vector<Point> points = sweep(cache, s, context);
  std::vector<std::vector<std::string>> table{
      {"cluster", "budget", "keys per query", "attention seen", "estimated", "error", "rest dropped", "least seen"}};
  for (const Point& p : points)
    table.push_back({format("%lld", (long long)p.cluster_size), format("%g %%", 100 * p.budget), format("%.0f", p.keys),
                     format("%.3f", p.mass), format("%.3f", p.estimated), format("%.3f", p.error),
                     format("%.3f", p.dropped),
                     cache.names[static_cast<std::size_t>(p.worst_head)] + format(": %.3f", p.worst)});
  std::printf("\n");
  examples::print_table(table);
  std::printf(
      "\n  Cluster: mean keys of one. Attention seen: dense attention's probability on the keys seen. Estimated: what\n"
      "  the index knows by means alone. Error: of all outputs, relative to dense; with what is not seen by means, "
      "and\n"
      "  dropped.\n\n");

  const std::vector<Timing> timings = time_queries(cache, s, context);
  if (!timings.empty()) {
    table = {{"keys", "cluster", "budget", "keys per query", "dense", "index", "ratio", "build", "append"}};
    for (const Timing& t : timings)
      table.push_back({format("%lld", (long long)t.keys), format("%lld", (long long)t.cluster_size),
                       format("%g %%", 100 * t.budget), format("%.0f", t.seen), format("%.0f us", 1e6 * t.dense),
                       format("%.0f us", 1e6 * t.attend), format("%.1f", t.dense / t.attend), format("%.2f s", t.build),
                       format("%.1f us", 1e6 * t.append)});
    std::printf("\n");
    examples::print_table(table);
    std::printf("\n  One query of all heads at a time, in turns; medians. Append: per key of all heads.\n");
  }
  file.write(json(points, timings));
}

}  // namespace

int main(int argument_count, char** arguments) {
  return examples::run_program("kv_retrieval", [&] { run(argument_count, arguments); });
}
