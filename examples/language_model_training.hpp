// Training of language_model, and its scores on held-out text.
#pragma once

#include <array>

#include "language_model_settings.hpp"
#include "model/checkpoint.hpp"
#include "support/console.hpp"
#include "support/interrupt.hpp"

namespace language_model {

using examples::format;
using Training = transformer::Training<float>;

inline constexpr Index test_bytes = 128 * 1024;  // of the held-out text, spread evenly, at most
inline constexpr double bits_per_nat = 1.4426950408889634;

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
inline double cluster_load(const Model& model, const Model::Tape& tape) {
  double sum = 0, heads = 0;
  for (std::size_t layer = 0; layer < model.blocks().size(); ++layer)
    for (Index head = 0; head < model.config().attention.routed.heads; ++head) {
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
inline double keys_per_query(const Model& model, const Model::Tape& tape) {
  double sum = 0, count = 0;
  const coterie::RoutingAttentionConfig& attention = model.config().attention;
  for (const auto& block : tape.blocks) {
    const auto add = [&](std::span<const coterie::AttentionPlan> plans, Index of_heads) {
      for (const coterie::AttentionPlan& plan : plans) {
        const double weight = static_cast<double>(of_heads) / static_cast<double>(plans.size());
        sum += weight * coterie::statistics(plan).keys_per_query.mean;
        count += weight;
      }
    };
    add(block.attention.local_plans(), attention.local.heads);
    add(block.attention.plans(), attention.routed.heads);
    add(block.attention.dense_plans(), attention.dense.heads);
  }
  return sum / count;
}

/// A fingerprint that identifies a text in saved files.
inline std::string fingerprint(const Bytes& text) {
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const std::uint8_t byte : text) hash = (hash ^ byte) * 0x100000001b3;
  return format("%zu bytes to train on, FNV-1a %016llx", text.size(), static_cast<unsigned long long>(hash));
}

inline void save(Model& model, const Training& training, const std::string& text, const Settings& settings) {
  coterie::SafetensorsWriter writer;
  transformer::add_model(writer, model);
  transformer::add_training(writer, training);
  add_settings(writer, settings);
  writer.set_metadata("language_model.text", text);
  writer.write(settings.save);
}

/// Requires that the training of --resume was on this text (UsageError).
inline void check_text(const std::string& text, const Settings& settings) {
  const auto there = settings.file->metadata().find("language_model.text");
  if (there == settings.file->metadata().end() || there->second != text)
    throw UsageError("--resume " + settings.resume + ": made with another --text: expected " +
                     (there == settings.file->metadata().end() ? "none" : there->second) + ", got " + text);
}

/// How training ended.
struct TrainingEnd {
  bool done = true;  // otherwise stopped before, and saved
  int signal = 0;    // the signal that stopped it
};

/// Continues the training, and saves; fills in the tokens per second and keys per query of the result.
inline TrainingEnd train(Model& model, Training& training, Model::Tape& tape, const Bytes& text,
                         const Settings& settings, Result& result, coterie::Context& context) {
  Model::Gradients gradients = model.zero_gradients();
  Sequences sequences;
  std::vector<float> losses(static_cast<std::size_t>(settings.sequences() * settings.context));
  const auto next_batch = [&] {
    sequences.clear();
    for (Index s = 0; s < settings.sequences(); ++s)
      sequences.append(text, training.random.below(static_cast<Index>(text.size()) - settings.context),
                       settings.context);
    return sequences.batch(static_cast<std::uint64_t>(training.step));
  };
  const bool learned = has_routers(model.config());
  const bool saves = !settings.save.empty();
  const std::string text_name = saves ? fingerprint(text) : "";
  std::optional<examples::InterruptGuard> interrupt;
  if (saves) interrupt.emplace();

  examples::Progress progress(format("%-6s", result.pattern.c_str()));
  examples::Stopwatch watch, since_checkpoint;
  const double seconds_before = training.seconds;
  const auto done_at = [&](std::int64_t step) {
    return settings.minutes > 0 ? training.seconds / (60 * settings.minutes)
                                : static_cast<double>(step) / static_cast<double>(settings.steps);
  };
  const Index warm_up = settings.minutes > 0 ? 50 : std::min<Index>(50, settings.steps / 6);
  TrainingEnd end;
  double done = settings.trains ? done_at(training.step) : 1;
  while (done < 1) {
    const transformer::Batch batch = next_batch();
    Model::set_zero(gradients);
    model.forward(batch, losses, tape, context);
    model.backward(batch, tape, gradients, context);
    model.update_router(tape, context);
    training.optimizer.step(model, gradients,
                            4e-3 * transformer::learning_rate_factor(training.step, warm_up, done, 0.05));

    double loss = 0;
    for (const float one : losses) loss += static_cast<double>(one) / static_cast<double>(losses.size());
    if (!std::isfinite(loss))
      throw std::runtime_error(format("the loss is not finite at step %lld", (long long)training.step));
    training.average_loss = training.step == 0 ? loss : 0.95 * training.average_loss + 0.05 * loss;
    ++training.step;
    training.seconds = seconds_before + watch.seconds();
    done = done_at(training.step);
    result.tokens_per_second =
        static_cast<double>(training.step) * static_cast<double>(losses.size()) / training.seconds;
    progress.show(done, [&] {
      return format("loss %.3f  %.3f bits per byte  %.0f tokens/s", training.average_loss,
                    training.average_loss * bits_per_nat, result.tokens_per_second) +
             (learned ? format("  load %.0f %%", 100 * cluster_load(model, tape)) : "");
    });
    end.signal = interrupt ? interrupt->signal() : 0;
    end.done = done >= 1 || (end.signal == 0 && (settings.stop_at == 0 || training.step < settings.stop_at));
    if (!end.done) break;
    if (saves && done < 1 && since_checkpoint.seconds() > 60 * settings.checkpoint_minutes) {
      save(model, training, text_name, settings);
      since_checkpoint.reset();
    }
  }
  if (saves) save(model, training, text_name, settings);
  if (tape.blocks.size() < model.blocks().size()) {  // nothing was trained: a batch only shows what queries see
    model.forward(next_batch(), losses, tape, context);
  }
  result.keys_per_query = keys_per_query(model, tape);
  return end;
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
inline void evaluate(const Model& model, Model::Tape& tape, const Bytes& text, const Settings& settings, Result& result,
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

}  // namespace language_model
