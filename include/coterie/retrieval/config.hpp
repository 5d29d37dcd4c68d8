// Settings and the report of KeyIndex.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace coterie {

/// Settings of KeyIndex; designated initialisers in this order.
struct KeyIndexConfig {
  Index kv_heads = 1;           ///< key/value heads side by side in the cache, each with clusters of its own
  Index keys_per_cluster = 64;  ///< mean size of a cluster, at least 1; with smaller ones single keys are found better
  Index page = 16;              ///< neighbouring keys that are a part until their segment is clustered; at least 1
  Index segment = 1024;         ///< keys that are clustered together; a multiple of page
  Index sinks = 4;              ///< first keys, which every query sees; at least 0
  Index recent = 64;            ///< last keys, which every query sees; at least 0
  bool tail = true;             ///< keys not seen count by their part's mean key and mean value; false: not at all
  Index rank = 4;               ///< candidates, in budgets, ranked by an int8 copy; 0: parts are seen whole; at least 0
  bool shared_choice = false;   ///< one choice for all query heads of a key/value head
  Index steps = 10;             ///< Lloyd steps of k-means; at least 0
};

/// Calls f(name, field) for all settings of a KeyIndexConfig, in their order.
template <class C, class F>
requires std::same_as<std::remove_const_t<C>, KeyIndexConfig>
void visit(C& config, F&& f) {
  auto& [kv_heads, keys_per_cluster, page, segment, sinks, recent, tail, rank, shared_choice, steps] = config;
  f("kv_heads", kv_heads);
  f("keys_per_cluster", keys_per_cluster);
  f("page", page);
  f("segment", segment);
  f("sinks", sinks);
  f("recent", recent);
  f("tail", tail);
  f("rank", rank);
  f("shared_choice", shared_choice);
  f("steps", steps);
}

/// The clusters of a key/value head, as KeyIndex::clusters gives them and KeyIndex::restore takes them.
struct KeyClusters {
  std::vector<std::int32_t> sizes;  ///< of each cluster, at least 1
  std::vector<std::int32_t> rows;   ///< their keys, cluster by cluster, ascending inside each
};

/// Settings of one call of a KeyIndex; designated initialisers in this order.
struct KeyIndexQuery {
  Index heads = 0;      ///< query heads, a multiple of the index's kv_heads; 0: as those
  double budget = 0.1;  ///< keys that a query sees, sinks and recent ones included. Up to 1: share of all; else: number
  double scale = 0;     ///< factor of q.k; 0: 1/sqrt(d)
  bool causal = false;  ///< the queries are those of the last rows of k, and see no later row
  Index rank = -1;      ///< in place of the index's rank; -1: that one
  Index samples = 0;    ///< keys, drawn from those not seen, that the report's sampled mass looks at; at least 0
};

/// What a call left out: queries x heads matrices, overwritten by each call that is given one.
///
/// Shares are of the sum of the weights of all keys, as far as it is known: keys seen and keys ranked out by their own
/// score, all others by their part's mean key. A mean key gives too small a weight, never too large (Jensen), but for
/// the error of the int8 scores: estimated_mass is a lower bound. sampled_mass has no bias: it looks at single keys.
struct KeyIndexReport {
  RowMatrix<double> keys_seen;       ///< number of keys with their own score and value
  RowMatrix<double> ranked_mass;     ///< share of keys with their own score, by the int8 copy, and their part's value
  RowMatrix<double> estimated_mass;  ///< share of keys that only their part's mean key and mean value stand for
  RowMatrix<double> sampled_mass;    ///< the same share from samples of those keys; without samples: 0
  RowMatrix<double> sampled_error;   ///< standard error of sampled_mass; without samples: 0
};

}  // namespace coterie
