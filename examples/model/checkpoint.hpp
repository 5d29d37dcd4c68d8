// A Model and its training as a safetensors file: a resumed training is bit-identical to one that was never stopped.
#pragma once

#include <cmath>
#include <coterie/saved/saved_layer.hpp>
#include <string>
#include <vector>

#include "adamw.hpp"
#include "model.hpp"

namespace transformer {

/// The state of a training, beside the model.
template <class T>
struct Training {
  AdamW<T> optimizer;
  Random random;            // draws the batches
  std::int64_t step = 0;    // steps done so far
  double average_loss = 0;  // running average over the last steps
  double seconds = 0;       // time spent so far

  explicit Training(std::uint64_t seed) : random(seed) {}
};

/// Adds a model to what will be written: the attention of block i as coterie::add_layer has it, under
/// "blocks.<i>.attention.", all other matrices by the names of Model::visit. Refers to the model: it must outlive the
/// writing, and not change before it.
template <class T>
void add_model(coterie::SafetensorsWriter& writer, Model<T>& model) {
  for (std::size_t i = 0; i < model.blocks().size(); ++i)
    coterie::add_layer(writer, Model<T>::block_name(i) + ".attention.", model.blocks()[i].attention());
  model.visit_rest([&](std::string_view name, View<T> w) { writer.add(std::string(name), ConstView<T>(w)); });
}

/// Reads what add_model wrote.
/// Requires: a model of the same config (FileError, which names what differs).
/// Overwrites the model, or nothing on error. Its layers move, so make new decoders of it.
template <class T>
void read_model(const coterie::SafetensorsView& file, Model<T>& model) {
  Model<T> read = model;
  const std::size_t layers = read.blocks().size();
  for (std::size_t i = 0; i < layers; ++i)
    coterie::read_layer(file, Model<T>::block_name(i) + ".attention.", read.blocks()[i].attention());
  if (file.find(Model<T>::block_name(layers) + ".attention.w_q"))
    file.fail("read_model", "expected " + std::to_string(layers) + " layers, got more");
  read.visit_rest([&](std::string_view name, View<T> w) { file.read(name, w); });
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
/// Requires: the moments of such a model, or none, finite numbers (FileError).
/// Overwrites the training, or nothing on error.
template <class T>
void read_training(const coterie::SafetensorsView& file, Index parameters, Training<T>& training) {
  const char* const function = "read_training";
  const auto whole = [&](const char* name) {
    const std::vector<std::int64_t> numbers = file.template numbers<std::int64_t>(name);
    const std::int64_t most = std::int64_t(1) << 53;
    if (numbers.size() != 1 || numbers[0] < 0 || numbers[0] > most)
      file.fail(function, std::string("tensor '") + name + "': damaged: expected one number from 0 to 2^53");
    return numbers[0];
  };
  const auto real = [&](const char* name) {
    const std::vector<double> numbers = file.template numbers<double>(name);
    if (numbers.size() != 1 || !std::isfinite(numbers[0]) || numbers[0] < 0)
      file.fail(function, std::string("tensor '") + name + "': damaged: expected one number of at least 0");
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
