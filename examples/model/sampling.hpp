// Draws tokens from the probabilities of a language model: temperature, then top-k, then top-p.
#pragma once

#include <algorithm>
#include <cmath>
#include <coterie/core/check.hpp>
#include <coterie/core/matrix.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "random.hpp"

namespace transformer {

/// Settings of a Sampler; designated initialisers in this order.
struct SamplingConfig {
  double temperature = 1;    ///< probabilities to the power of 1/temperature; 0: always the likeliest token
  coterie::Index top_k = 0;  ///< only so many of the likeliest tokens; 0: all
  double top_p = 1;  ///< only the likeliest tokens whose mass reaches this, the one that crosses it included; 1: all
  std::uint64_t seed = 0;
};

/// Draws the next token, each row by itself: what is drawn is a function of the row, the seed, and the sequence and
/// position that the caller gives, never of other rows or of how many there are.
///
/// Semantics, in this order: temperature; the top_k likeliest; of these, made to sum to 1, the smallest set of the
/// likeliest whose mass is at least top_p; a draw among these. Of equally likely tokens the lowest comes first.
/// Allocates: at construction, and no more for rows of `vocabulary` tokens.
/// Cost of a draw: a sort of the row.
class Sampler {
 public:
  /// A token that may be drawn.
  struct Candidate {
    std::int32_t token;
    double weight;  // relative to the likeliest, whose weight is 1
  };

  /// Requires: a temperature of at least 0, top_k of at least 0, top_p above 0 and at most 1 (ValueError).
  explicit Sampler(const SamplingConfig& config = {}) : config_(config) {
    const auto require = [](bool good, const char* name, const char* expected, double got) {
      if (!good)
        throw coterie::ValueError(std::string("Sampler: ") + name + ": expected " + expected + ", got " +
                                  std::to_string(got));
    };
    require(config.temperature >= 0 && std::isfinite(config.temperature), "temperature", "at least 0",
            config.temperature);
    require(config.top_k >= 0, "top_k", "at least 0", static_cast<double>(config.top_k));
    require(config.top_p > 0 && config.top_p <= 1, "top_p", "above 0, at most 1", config.top_p);
  }

  /// The tokens that may follow, the likeliest first. Stays until the next call.
  /// Shapes: p 1 x vocabulary. Requires: that, no empty row (ShapeError), numbers of at least 0, not all 0
  /// (ValueError).
  template <class T>
  const std::vector<Candidate>& candidates(coterie::ConstView<T> p) & {
    if (p.rows() != 1 || p.cols() < 1)
      throw coterie::ShapeError("Sampler: p: expected 1 x vocabulary, got " + std::to_string(p.rows()) + " x " +
                                std::to_string(p.cols()));
    kept_.clear();
    for (coterie::Index i = 0; i < p.cols(); ++i) {
      const double probability = static_cast<double>(p(0, i));
      if (!(probability >= 0 && std::isfinite(probability)))
        throw coterie::ValueError("Sampler: p: expected finite numbers of at least 0, got " +
                                  std::to_string(probability));
      kept_.push_back({static_cast<std::int32_t>(i), probability});
    }
    std::sort(kept_.begin(), kept_.end(), [](const Candidate& a, const Candidate& b) {
      return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
    });
    const double highest = kept_.front().weight;
    if (highest == 0) throw coterie::ValueError("Sampler: p: expected some number above 0, got zeros");

    // Ratios, not probabilities, are raised to the power: at a low temperature only small ones may vanish.
    if (config_.temperature == 0) kept_.resize(1);
    for (Candidate& one : kept_)
      one.weight = config_.temperature == 0 ? 1 : std::pow(one.weight / highest, 1 / config_.temperature);
    if (config_.top_k > 0 && config_.top_k < static_cast<coterie::Index>(kept_.size()))
      kept_.resize(static_cast<std::size_t>(config_.top_k));
    if (config_.top_p < 1) {
      const double enough = config_.top_p * total();
      double mass = 0;
      std::size_t count = 0;
      while (count < kept_.size() && mass < enough) mass += kept_[count++].weight;
      kept_.resize(count);
    }
    return kept_;
  }

  /// A token for this position of this sequence. Shapes, requires: as candidates.
  template <class T>
  std::int32_t draw(coterie::ConstView<T> p, std::uint64_t sequence, std::uint64_t position) {
    candidates(p);
    double rest = uniform_at(config_.seed, sequence, position) * total();
    for (const Candidate& one : kept_)
      if ((rest -= one.weight) < 0) return one.token;
    return kept_.front().token;  // rounding: the sum fell short of itself
  }

 private:
  double total() const {
    double sum = 0;
    for (const Candidate& one : kept_) sum += one.weight;
    return sum;
  }

  SamplingConfig config_;
  std::vector<Candidate> kept_;
};

}  // namespace transformer
