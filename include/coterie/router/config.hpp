// Settings of routers.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/kernel/normalise.hpp"

namespace coterie {

/// What an update averages; the formulas stand at OnlineKMeans::update.
enum class Average {
  counts_and_sums,  ///< counts and sums, their ratio is the centroid: every row weighs the same, whatever its batch
  batch_mean,       ///< the batch's mean of each cluster: every batch weighs the same, however many rows it brings
  batch_direction,  ///< that mean scaled to the length of the rows: how tight a cluster is does not matter
};

/// How the centroids of a router follow its rows; designated initialisers in this order.
struct RouterConfig {
  /// How much of the past an update keeps in the long run, in [0, 1). The first ones keep less
  /// (OnlineKMeans::next_decay).
  double decay = 0.999;
  Average average = Average::counts_and_sums;
  /// Whether centroids that an update moved are scaled to the length of the rows: the nearest is then that by the
  /// cosine.
  bool renormalise = false;
  /// In [0, 1). A cluster is dead, and revived, when a batch gave it no row and its average count has fallen below this
  /// share of the mean count; 0: none ever is.
  double dead_share = 0.1;
  /// Above 1. A cluster is overfull, and split, when its average count stays above this many times the mean count; 0:
  /// none ever is.
  double split_share = 0;

  bool operator==(const RouterConfig&) const = default;
};

/// Settings of OnlineKMeans; designated initialisers in this order.
struct KMeansConfig {
  Index clusters = 0;  ///< at least 1
  /// Width of the rows: at least 3 with layer norm, which leaves nothing of narrower ones; 2 with unit length.
  Index dim = 0;
  std::uint64_t seed = 0;  ///< of the first directions, the seeding, the sample, the revivals and the splits
  Normalisation normalisation = Normalisation::layer_norm;  ///< of the rows: says their length
  RouterConfig router = {};

  bool operator==(const KMeansConfig&) const = default;
};

namespace detail {

/// Collects the faults of a router's settings. `path` stands before their names: "router.", or longer.
inline void check_router(Faults& faults, const RouterConfig& config, const std::string& path) {
  const auto expect = [&](bool good, const char* name, const char* expected, const auto& got) {
    faults.expect(good, (path + name).c_str(), expected, got);
  };
  expect(config.decay >= 0 && config.decay < 1, "decay", "in [0, 1)", config.decay);
  expect(config.average == Average::counts_and_sums || config.average == Average::batch_mean ||
             config.average == Average::batch_direction,
         "average", "counts_and_sums, batch_mean or batch_direction", static_cast<int>(config.average));
  expect(config.dead_share >= 0 && config.dead_share < 1, "dead_share", "in [0, 1)", config.dead_share);
  expect(config.split_share == 0 || (config.split_share > 1 && std::isfinite(config.split_share)), "split_share",
         "above 1, or 0 for no splits", config.split_share);
}

/// The narrowest rows that normalisation leaves more than a sign of.
inline Index least_width(Normalisation normalisation) { return normalisation == Normalisation::layer_norm ? 3 : 2; }

inline void check_normalisation(Faults& faults, Normalisation normalisation) {
  faults.expect(normalisation == Normalisation::layer_norm || normalisation == Normalisation::unit_length,
                "normalisation", "layer_norm or unit_length", static_cast<int>(normalisation));
}

/// Throws ValueError, one for all faults, where a setting is out of its range.
inline void check_config(const char* function, const KMeansConfig& config) {
  Faults faults(function);
  faults.expect(config.clusters >= 1, "clusters", "at least 1", config.clusters);
  const Index least = least_width(config.normalisation);
  faults.expect(config.dim >= least, "dim", least == 3 ? "at least 3" : "at least 2", config.dim);
  check_normalisation(faults, config.normalisation);
  check_router(faults, config.router, "router.");
  faults.raise();
}

}  // namespace detail
}  // namespace coterie
