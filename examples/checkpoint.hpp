// A transformer::Model and its training as a safetensors file: training that is loaded goes on with the bits of not having
// been stopped.
#pragma once

#include <coterie/saved/saved_layer.hpp>

#include "transformer.hpp"

namespace transformer {

/// All that training changes beside the model.
template <class T>
struct Training {
  AdamW<T> optimizer;
  Random random;            // that draws the batches
  std::int64_t step = 0;    // done so far
  double average_loss = 0;  // running average over the last steps
  double seconds = 0;       // spent so far

  explicit Training(std::uint64_t seed) : random(seed) {}
};

namespace detail {

inline std::string layer_prefix(std::size_t layer) { return "attention." + std::to_string(layer) + "."; }

}  // namespace detail

/// Adds a model to what will be written: the attention of layer i as coterie::add_layer has it, under "attention.<i>.", all other
/// matrices by the names of Model::visit. Refers to the model: it must outlive the writing, and not change before it.
template <class T>
void add_model(coterie::SafetensorsWriter& writer, Model<T>& model) {
  for (std::size_t i = 0; i < model.attention().size(); ++i)
    coterie::add_layer(writer, detail::layer_prefix(i), model.attention()[i]);
  model.visit_weights([&](std::string_view name, View<T> w) { writer.add(std::string(name), ConstView<T>(w)); });
}

/// Reads what add_model wrote.
/// Requires: a model of the same config (FileError, which names what differs).
/// Overwrites the model, or nothing on error. Its layers move: decoders of it have to be made anew.
template <class T>
void read_model(const coterie::SafetensorsView& file, Model<T>& model) {
  Model<T> read = model;
  for (std::size_t i = 0; i < read.attention().size(); ++i)
    coterie::read_layer(file, detail::layer_prefix(i), read.attention()[i]);
  if (file.find(detail::layer_prefix(read.attention().size()) + "w_q"))
    file.fail("read_model", coterie::detail::join("expected ", read.attention().size(), " layers, got more"));
  read.visit_weights([&](std::string_view name, View<T> w) { file.read(name, w); });
  model = std::move(read);
}

/// Adds the state of a training to what will be written; it has to outlive the writing, and not change before it.
template <class T>
void add_training(coterie::SafetensorsWriter& writer, const Training<T>& training) {
  writer.add("training.first", training.optimizer.first());
  writer.add("training.second", training.optimizer.second());
  writer.add_number("training.optimizer_steps", training.optimizer.steps());
  writer.add_number("training.step", training.step);
  writer.add("training.average_loss", ConstView<double>(&training.average_loss, 1, 1));
  writer.add("training.seconds", ConstView<double>(&training.seconds, 1, 1));
  writer.set_metadata("training.random", training.random.state());
}

/// Reads what add_training wrote, for a model of so many parameters.
/// Requires: the moments of such a model, or none, numbers that can be gone on from (FileError). Overwrites, or nothing on error.
template <class T>
void read_training(const coterie::SafetensorsView& file, Index parameters, Training<T>& training) {
  const char* const function = "read_training";
  const auto whole = [&](const char* name) {
    const std::vector<std::int64_t> numbers = file.template numbers<std::int64_t>(name);
    const std::int64_t most = std::int64_t(1) << 53;
    if (numbers.size() != 1 || numbers[0] < 0 || numbers[0] > most)
      file.fail(function, coterie::detail::join("tensor '", name, "': damaged: expected one number from 0 to ", most));
    return numbers[0];
  };
  const auto real = [&](const char* name) {
    const std::vector<double> numbers = file.template numbers<double>(name);
    if (numbers.size() != 1 || !std::isfinite(numbers[0]) || numbers[0] < 0)
      file.fail(function, coterie::detail::join("tensor '", name, "': damaged: expected one number of at least 0"));
    return numbers[0];
  };
  Training<T> read = training;
  read.step = whole("training.step");
  read.average_loss = real("training.average_loss");
  read.seconds = real("training.seconds");
  const Index steps = static_cast<Index>(whole("training.optimizer_steps"));
  const Index count = steps == 0 ? 0 : parameters;
  RowMatrix<T> first(count == 0 ? 0 : 1, count), second(first);
  file.read("training.first", first);
  file.read("training.second", second);
  read.optimizer.restore(std::move(first), std::move(second), steps);
  const auto random = file.metadata().find("training.random");
  if (random == file.metadata().end() || !read.random.restore(random->second))
    file.fail(function, "training.random: damaged: expected the state of a generator of random numbers");
  training = std::move(read);
}

}  // namespace transformer
