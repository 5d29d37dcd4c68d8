// Time and memory of a token that a decoder adds, over the position: routed heads, dense ones, and forward of the whole
// prefix.
#include <deque>
#include <limits>
#include <memory>

#include "coterie/decoder/decoder.hpp"
#include "plot.hpp"
#include "random.hpp"
#include "report.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

constexpr Index model_dim = 64, heads = 4, routed_heads = 2, head_dim = 64, clusters = 64, window = 128;
constexpr Index pool = 4096;  ///< different tokens; they come again and again

RoutingAttentionConfig layer_config(bool dense) {
  RoutingAttentionConfig config{.model_dim = model_dim, .head_dim = head_dim, .causal = true, .seed = 1};
  config.local = {.heads = heads - routed_heads, .window = window};
  if (dense)
    config.dense = {.heads = routed_heads, .matching = {.shared_qk = true}, .positions = {.kind = PositionKind::none}};
  else
    config.routed = {.heads = routed_heads, .clusters = clusters, .window = window};
  return config;
}

/// A decoder at `position`, and the time of its next tokens.
class Point {
 public:
  Point(Index position, const Decoder<float>& decoder) : position_(position), there_(decoder), decoder_(decoder) {}

  /// Times `count` tokens from the position on. The copy of the cache is not timed, nor are as many tokens after it.
  void run(const RowMatrix<float>& tokens, Index count, Context& context) {
    decoder_ = there_;
    steps(tokens, count, context);
    const double begin = thread_seconds();
    steps(tokens, count, context);
    seconds.push_back((thread_seconds() - begin) / static_cast<double>(count));
  }

  Index position() const { return position_; }
  double bytes() const { return static_cast<double>(there_.bytes()); }
  double typical() const { return median(seconds); }

  std::vector<double> seconds;  ///< per token, run by run

 private:
  void steps(const RowMatrix<float>& tokens, Index count, Context& context) {
    for (Index i = 0; i < count; ++i) decoder_.step(tokens.middleRows(decoder_.length(0) % pool, 1), view(y_), context);
  }

  Index position_;
  Decoder<float> there_, decoder_;
  RowMatrix<float> y_ = RowMatrix<float>(1, model_dim);
};

/// Decoders at all positions: up to `prefilled` by forward, from there on token by token.
std::deque<Point> points_at(const RoutingAttention<float>& layer, const std::vector<Index>& positions, Index prefilled,
                            const RowMatrix<float>& tokens, Context& context, Progress& progress) {
  std::deque<Point> points;
  std::unique_ptr<Decoder<float>> decoder;
  RowMatrix<float> y(1, model_dim);
  for (const Index position : positions) {
    if (position <= prefilled) {
      decoder = std::make_unique<Decoder<float>>(layer);
      RowMatrix<float> x(position, model_dim), all(position, model_dim);
      for (Index i = 0; i < position; ++i) x.row(i) = tokens.row(i % pool);
      decoder->prefill(x, view(all), 0, context);
    } else {
      for (Index i = decoder->length(0); i < position; ++i) {
        decoder->step(tokens.middleRows(i % pool, 1), view(y), context);
        if (i % 10000 == 0) progress.show(static_cast<double>(i) / static_cast<double>(positions.back()));
      }
    }
    points.emplace_back(position, *decoder);
  }
  progress.show(1);
  return points;
}

std::string position_label(double n) {
  return n < 1e3 ? format("%.0f", n) : n < 1e6 ? format("%.0fk", n / 1e3) : format("%.0fM", n / 1e6);
}

std::string seconds_label(double s) {
  return s < 1e-3 ? format("%g us", 1e6 * s) : s < 1 ? format("%g ms", 1e3 * s) : format("%g s", s);
}

std::string bytes_label(double b) {
  return b < 1e6 ? format("%g kB", b / 1e3) : b < 1e9 ? format("%g MB", b / 1e6) : format("%g GB", b / 1e9);
}

int report(const Options& options) {
  const std::vector<Index> positions =
      options.smoke ? std::vector<Index>{100, 400} : std::vector<Index>{1000, 10000, 100000, 1000000};
  const Index prefilled = options.smoke ? 100 : 100000;
  const Index dense_most = options.smoke ? 100 : 100000, forward_most = options.smoke ? 400 : 10000;
  const int rounds = options.smoke ? 1 : 11;
  const Index count = options.smoke ? 2 : 32, dense_count = 2;

  const RoutingAttention<float> routed(layer_config(false)), dense(layer_config(true));
  const RowMatrix<float> tokens = test::Random(1).matrix<float>(pool, model_dim);
  Context context;
  std::vector<Index> dense_positions, forward_positions;
  for (const Index n : positions) {
    if (n <= dense_most) dense_positions.push_back(n);
    if (n <= forward_most) forward_positions.push_back(n);
  }
  Progress filling("decoder: routed"), filling_dense("decoder: dense ");
  std::deque<Point> routed_points = points_at(routed, positions, prefilled, tokens, context, filling);
  std::deque<Point> dense_points = points_at(dense, dense_positions, dense_most, tokens, context, filling_dense);

  struct Forward {
    RowMatrix<float> x, y;
    std::vector<double> seconds;
  };
  std::deque<Forward> forwards;
  for (const Index n : forward_positions) {
    Forward& forward =
        forwards.emplace_back(Forward{RowMatrix<float>(n, model_dim), RowMatrix<float>(n, model_dim), {}});
    for (Index i = 0; i < n; ++i) forward.x.row(i) = tokens.row(i % pool);
    routed.forward(forward.x, view(forward.y), context);  // first touches of pages, growth of buffers
  }

  Progress progress("decoder: turns ");
  for (int round = 0; round < rounds; ++round) {
    for (Point& point : routed_points) point.run(tokens, count, context);
    for (Point& point : dense_points) point.run(tokens, dense_count, context);
    for (Forward& forward : forwards) {
      const double begin = thread_seconds();
      routed.forward(forward.x, view(forward.y), context);
      forward.seconds.push_back(thread_seconds() - begin);
    }
    progress.show((round + 1.0) / rounds);
  }
  const double peak = fma_peak<float>(InstructionSet::automatic);

  std::printf(
      "\nOne token of a decoder: model_dim %lld, %lld heads of width %lld, %lld of them routed (%lld clusters), window "
      "%lld, "
      "causal, float, one core; %s, %s.\nSeconds of this thread, the median of %d runs; dense: the routed heads see "
      "everything; forward: of the whole prefix.\n\n",
      static_cast<long long>(model_dim), static_cast<long long>(heads), static_cast<long long>(head_dim),
      static_cast<long long>(routed_heads), static_cast<long long>(clusters), static_cast<long long>(window),
      compiler_name().c_str(), instruction_set_name(), rounds);
  std::vector<std::vector<std::string>> table = {
      {"position", "us/token", "to the first", "dense us/token", "forward us", "bytes held", "dense bytes"}};
  Line time{.name = "routed", .colour = green}, dense_time{.name = "dense", .colour = red};
  Line forward_time{.name = "forward", .colour = blue};
  Line memory{.name = "routed", .colour = green}, dense_memory{.name = "dense", .colour = red};
  std::vector<JsonObject> json_points;
  for (std::size_t i = 0; i < routed_points.size(); ++i) {
    const Point& point = routed_points[i];
    const auto n = static_cast<double>(point.position());
    const auto us = [](double seconds) { return format("%.1f", 1e6 * seconds); };
    const double ratio = point.typical() / routed_points.front().typical();
    const double nothing = std::numeric_limits<double>::quiet_NaN();
    const double dense_seconds = i < dense_points.size() ? dense_points[i].typical() : nothing;
    const double dense_bytes = i < dense_points.size() ? dense_points[i].bytes() : nothing;
    const double forward_seconds = i < forwards.size() ? median(forwards[i].seconds) : nothing;
    const auto or_dash = [](double value, const std::string& text) { return std::isnan(value) ? "-" : text; };
    table.push_back({std::to_string(point.position()), us(point.typical()), format("%.2f", ratio),
                     or_dash(dense_seconds, us(dense_seconds)), or_dash(forward_seconds, us(forward_seconds)),
                     format("%.1f MB", 1e-6 * point.bytes()),
                     or_dash(dense_bytes, format("%.1f MB", 1e-6 * dense_bytes))});
    time.points.push_back({n, point.typical()});
    memory.points.push_back({n, point.bytes()});
    if (!std::isnan(dense_seconds)) dense_time.points.push_back({n, dense_seconds});
    if (!std::isnan(dense_bytes)) dense_memory.points.push_back({n, dense_bytes});
    if (!std::isnan(forward_seconds)) forward_time.points.push_back({n, forward_seconds});
    JsonObject object;
    object.add("position", point.position()).add("seconds", point.typical()).add("bytes", point.bytes());
    object.add("dense_seconds", dense_seconds).add("dense_bytes", dense_bytes).add("forward_seconds", forward_seconds);
    json_points.push_back(object);
  }
  print_table(table);
  if (options.smoke) std::printf("  A smoke run, with few tokens: no figures.\n");

  std::vector<Tick> ticks;
  for (const Index n : positions) ticks.push_back({static_cast<double>(n), position_label(static_cast<double>(n))});
  const Axis x{.title = "position", .ticks = ticks};
  const std::vector<Line> times = {time, dense_time, forward_time}, memories = {memory, dense_memory};
  options.write("decoder.svg", svg({{.title = "Time of the next token",
                                     .x = x,
                                     .y = {.title = "seconds of one core", .ticks = decades(times, seconds_label)},
                                     .lines = times},
                                    {.title = "Bytes that the decoder holds",
                                     .x = x,
                                     .y = {.title = "memory", .ticks = decades(memories, bytes_label)},
                                     .lines = memories}},
                                   caption(peak)));
  JsonObject json;
  json.add("context", json_context()).add("fma_peak", peak).add("points", json_points);
  options.write("decoder.json", json.text() + "\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_report(argc, argv, report); }
