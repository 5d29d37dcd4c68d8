#include "model/model.hpp"

#include "catch.hpp"
#include "model/adamw.hpp"

using namespace transformer;

namespace {

// Sizes beyond a chunk of rows and a tile of weights; a sequence of one token; positions without a target.
struct Example {
  ModelConfig config{
      .vocabulary = 51,
      .layers = 2,
      .feed_forward = 50,
      .embedding_deviation = 0.5,
      .attention = {.model_dim = 12,
                    .causal = true,
                    .seed = 3,
                    .local = {.heads = 2, .window = 16, .positions = {.kind = coterie::PositionKind::bias}},
                    .routed = {.heads = 1, .clusters = 3, .window = 16}}};
  std::vector<Index> offsets{0, 1, 20, 150};
  std::vector<std::int32_t> tokens, targets;

  Example() {
    Random random(5);
    for (Index i = 0; i < offsets.back(); ++i) {
      tokens.push_back(static_cast<std::int32_t>(random.below(config.vocabulary)));
      targets.push_back(i % 5 == 0 ? -1 : static_cast<std::int32_t>(random.below(config.vocabulary)));
    }
  }
  Batch batch() const { return {tokens, targets, offsets, 1}; }
};

template <class T>
double mean_loss(const Model<T>& model, const Example& example, typename Model<T>::Tape& tape, Context& context) {
  std::vector<T> losses(example.tokens.size());
  model.evaluate(example.batch(), losses, tape, context);
  double sum = 0, count = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    sum += static_cast<double>(losses[i]);
    count += example.targets[i] >= 0;
  }
  return sum / count;
}

void check_gradients(const Example& example) {
  Context context;
  Model<double> model(example.config);
  Model<double>::Tape tape, scratch;
  // Weights away from their special starts (norms of 1, biases of 0), gradients too: backward has to add.
  Random random(11);
  Model<double>::Gradients gradients = model.zero_gradients();
  model.visit(gradients, [&](std::string_view, View<double> w, ConstView<double>) {
    for (Index i = 0; i < w.rows(); ++i)
      for (Index j = 0; j < w.cols(); ++j) w(i, j) += 0.1 * random.normal();
  });
  std::vector<double> losses(example.tokens.size());
  model.forward(example.batch(), losses, tape, context);
  model.backward(example.batch(), tape, gradients, context);
  model.forward(example.batch(), losses, tape, context);
  model.backward(example.batch(), tape, gradients, context);

  const double step = 1e-5;
  model.visit(gradients, [&](std::string_view name, View<double> w, ConstView<double> g) {
    for (int sample = 0; sample < 6; ++sample) {
      const Index i = random.below(w.rows()), j = random.below(w.cols());
      const double start = w(i, j);
      w(i, j) = start + step;
      const double above = mean_loss(model, example, scratch, context);
      w(i, j) = start - step;
      const double below = mean_loss(model, example, scratch, context);
      w(i, j) = start;
      INFO(name << "(" << i << ", " << j << ")");
      REQUIRE(g(i, j) / 2 == Approx((above - below) / (2 * step)).epsilon(1e-5).margin(1e-8));
    }
  });
}

}  // namespace

TEST_CASE("a model's gradients are those of central differences") {
  Example example;
  SECTION("attention and feed-forward") { check_gradients(example); }
  SECTION("attention only") {
    example.config.feed_forward = 0;
    check_gradients(example);
  }
  SECTION("induction heads") {
    example.config.attention.routed.matching = {.induction = true, .key_taps = 3};
    check_gradients(example);
  }
}

TEST_CASE("training gives the same bits with every number of threads") {
  const Example example;
  const auto train = [&](Index threads) {
    coterie::ThreadPool pool(threads);
    coterie::Workspace workspace;
    Context context{pool, workspace};
    Model<float> model(example.config);
    Model<float>::Tape tape;
    Model<float>::Gradients gradients = model.zero_gradients();
    AdamW<float> optimizer;
    std::vector<float> losses(example.tokens.size());
    for (int step = 0; step < 3; ++step) {
      Model<float>::set_zero(gradients);
      model.forward(example.batch(), losses, tape, context);
      model.backward(example.batch(), tape, gradients, context);
      model.update_router(tape, context);
      optimizer.step(model, gradients, 1e-2);
    }
    model.evaluate(example.batch(), losses, tape, context);
    return losses;
  };
  const std::vector<float> alone = train(1);
  for (const Index threads : {2, 3, 8}) REQUIRE(train(threads) == alone);
}

TEST_CASE("evaluate gives what forward gives") {
  const Example example;
  Context context;
  const Model<float> model(example.config);
  Model<float>::Tape tape, scratch;
  std::vector<float> trained(example.tokens.size()), evaluated(trained);
  model.forward(example.batch(), trained, tape, context);
  model.evaluate(example.batch(), evaluated, scratch, context);
  REQUIRE(trained == evaluated);
  REQUIRE(tape.p == scratch.p);
  REQUIRE(tape.p.rowwise().sum().isOnes(1e-4f));
}

TEST_CASE("a model cannot see later tokens") {
  Example example;
  Context context;
  const Model<float> model(example.config);
  Model<float>::Tape tape;
  std::vector<float> before(example.tokens.size()), after(before);
  model.evaluate(example.batch(), before, tape, context);
  for (std::size_t i = 100; i < example.tokens.size(); ++i) example.tokens[i] = 1;
  model.evaluate(example.batch(), after, tape, context);
  REQUIRE(std::equal(before.begin(), before.begin() + 100, after.begin()));
  REQUIRE(before != after);
}

TEST_CASE("training lowers the loss") {
  const Example example;
  Context context;
  Model<float> model(example.config);
  Model<float>::Tape tape;
  Model<float>::Gradients gradients = model.zero_gradients();
  AdamW<float> optimizer;
  std::vector<float> losses(example.tokens.size());
  const double start = mean_loss(model, example, tape, context);
  for (int step = 0; step < 30; ++step) {
    Model<float>::set_zero(gradients);
    model.forward(example.batch(), losses, tape, context);
    model.backward(example.batch(), tape, gradients, context);
    model.update_router(tape, context);
    optimizer.step(model, gradients, 1e-2);
  }
  REQUIRE(mean_loss(model, example, tape, context) < 0.5 * start);
}
