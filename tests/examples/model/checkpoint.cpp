#include "model/checkpoint.hpp"

#include "catch.hpp"
#include "examples/model/small_model.hpp"

using namespace transformer;

namespace {

ModelConfig small_model(coterie::Routing routing) {
  ModelConfig config = test::small_model();
  config.attention.routed.routing = routing;
  return config;
}

/// Steps on batches that the training's random numbers draw.
void train(Model<float>& model, Training<float>& training, int steps) {
  Context context;
  Model<float>::Tape tape;
  Model<float>::Gradients gradients = model.zero_gradients();
  for (int i = 0; i < steps; ++i) {
    std::vector<std::int32_t> tokens, targets;
    for (int t = 0; t < 90; ++t) {
      tokens.push_back(static_cast<std::int32_t>(training.random.below(40)));
      targets.push_back(tokens.front());
    }
    const std::array<Index, 3> offsets{0, 30, 90};
    std::vector<float> losses(tokens.size());
    const Batch batch{tokens, targets, offsets, static_cast<std::uint64_t>(training.step)};
    Model<float>::set_zero(gradients);
    model.forward(batch, losses, tape, context);
    model.backward(batch, tape, gradients, context);
    model.update_router(tape, context);
    training.optimizer.step(model, gradients, 1e-2);
    training.average_loss = 0.9 * training.average_loss + static_cast<double>(losses[0]);
    ++training.step;
  }
}

std::vector<std::byte> saved(Model<float>& model, const Training<float>& training) {
  coterie::SafetensorsWriter writer;
  add_model(writer, model);
  add_training(writer, training);
  return writer.bytes();
}

}  // namespace

TEST_CASE("save, load, continue training of a model is bit-identical to not stopping") {
  const ModelConfig config = small_model(GENERATE(coterie::Routing::learned, coterie::Routing::random));
  for (const int before : {0, 1, 4}) {
    Model<float> straight(config), stopped(config), resumed(config);
    Training<float> of_straight(7), of_stopped(7), of_resumed(99);
    train(straight, of_straight, before + 4);
    train(stopped, of_stopped, before);
    const std::vector<std::byte> file = saved(stopped, of_stopped);
    const coterie::SafetensorsView view = coterie::parse_safetensors(file);
    train(resumed, of_resumed, 2);  // what is there is replaced as a whole
    read_model(view, resumed);
    read_training(view, resumed.parameter_count(), of_resumed);
    REQUIRE(saved(resumed, of_resumed) == file);
    train(resumed, of_resumed, 4);
    REQUIRE(of_resumed.step == before + 4);
    REQUIRE(saved(resumed, of_resumed) == saved(straight, of_straight));
    REQUIRE(saved(resumed, of_resumed) != file);
  }
}

TEST_CASE("files of other models and damaged ones are refused, and nothing is written") {
  const ModelConfig config = small_model(coterie::Routing::learned);
  Model<float> model(config);
  Training<float> training(7);
  train(model, training, 1);
  const std::vector<std::byte> file = saved(model, training);
  const coterie::SafetensorsView view = coterie::parse_safetensors(file);
  const auto refuses = [&](ModelConfig other, const std::string& named) {
    Model<float> into(other);
    Training<float> of_into(5);
    const std::vector<std::byte> before = saved(into, of_into);
    std::string message;
    try {
      read_model(view, into);
    } catch (const coterie::FileError& error) {
      message = error.what();
    }
    INFO(message);
    REQUIRE(message.find(named) != std::string::npos);
    REQUIRE(saved(into, of_into) == before);
  };
  ModelConfig other = config;
  other.layers = 1;
  refuses(other, "layers");
  other.layers = 3;
  refuses(other, "blocks.2.attention.");
  other = config;
  other.feed_forward = 51;
  refuses(other, "blocks.0.feed_forward.expand");
  other = config;
  other.vocabulary = 41;
  refuses(other, "embedding");
  other = config;
  other.attention.routed.clusters = 4;
  other.attention.routed.window = 17;
  refuses(other, "routed.clusters: expected 4, got 3; routed.window: expected 17, got 16");

  Training<float> same(7);
  REQUIRE_THROWS_AS(read_training(view, model.parameter_count() + 1, same), coterie::FileError);
  REQUIRE(same.step == 0);
  const auto refuses_training = [&](auto&& change) {
    coterie::SafetensorsWriter writer;
    change(writer);
    const std::vector<std::byte> bytes = writer.bytes();
    const coterie::SafetensorsView damaged = coterie::parse_safetensors(bytes);
    REQUIRE_THROWS_AS(read_training(damaged, model.parameter_count(), same), coterie::FileError);
    REQUIRE(same.step == 0);
  };
  Training<float> bad = training;
  refuses_training([](coterie::SafetensorsWriter&) {});
  refuses_training([&](coterie::SafetensorsWriter& writer) {
    add_training(writer, training);
    writer.set_metadata("training.random", "1 2 3");
  });
  bad.step = -1;
  refuses_training([&](coterie::SafetensorsWriter& writer) { add_training(writer, bad); });
  bad.step = 1;
  bad.seconds = std::numeric_limits<double>::quiet_NaN();
  refuses_training([&](coterie::SafetensorsWriter& writer) { add_training(writer, bad); });
  read_training(view, model.parameter_count(), same);
  REQUIRE(same.step == 1);
}
