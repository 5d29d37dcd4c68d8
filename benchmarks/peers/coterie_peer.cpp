// Coterie behind a C interface, for peers.py: attention of several heads along one of three patterns, on one thread.
//
// Matrices are float, row-major, tokens x heads*width. Every call plans anew, as a layer would. Functions return 0, or
// 1 after an error that peer_error() describes.
#include <algorithm>
#include <coterie/coterie.hpp>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../peak.hpp"

using namespace coterie;

namespace {

enum Pattern : std::int64_t { dense = 0, local = 1, routed = 2 };

thread_local std::string error;

template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

}  // namespace

extern "C" {

/// What is computed; the same fields as peers.py's.
struct PeerSettings {
  std::int64_t tokens, heads, width, pattern, causal, window;
  std::int64_t clusters;  ///< routed only
  std::int64_t shared;    ///< routed only: queries are keys, normalised, and see themselves only if alone
};
}

namespace {

class Peer {
 public:
  explicit Peer(const PeerSettings& settings) : s_(settings) {
    plans_.resize(s_.pattern == routed ? std::size_t(s_.heads) : 1);
    if (s_.pattern != routed) return;
    const Index clusters = Index(s_.clusters), width = Index(s_.width), heads = Index(s_.heads);
    for (Index h = 0; h < heads; ++h) routers_.emplace_back(KMeansConfig{.clusters = clusters, .dim = width});
    statistics_ = RouterStatistics<float>(heads, clusters, width);
    q_labels_.resize(std::size_t(s_.tokens * heads));
    k_labels_.resize(s_.shared ? 0 : q_labels_.size());
    for (RowMatrix<float>* m : {&q_rows_, &k_rows_}) m->resize(s_.tokens, columns());
    if (!s_.shared) return;
    for (RowMatrix<float>* m : {&d_queries_, &d_keys_}) m->resize(s_.tokens, columns());
    inverse_.resize(s_.tokens, heads);
  }

  /// Centroids of all heads, heads * clusters x width, as if learned from many even batches.
  void set_centroids(const float* centroids) {
    const Index clusters = Index(s_.clusters), width = Index(s_.width);
    const double count = double(s_.shared ? s_.tokens : 2 * s_.tokens) / double(clusters);
    const std::vector<double> counts(std::size_t(clusters), count);
    std::vector<double> sums(std::size_t(clusters * width));
    for (std::size_t h = 0; h < routers_.size(); ++h) {
      const ConstView<float> own(centroids + Index(h) * clusters * width, clusters, width);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = count * double(own.data()[i]);
      routers_[h].restore(own, counts, sums, 100000);
    }
  }

  void forward(const float* q, const float* k, const float* v, float* out) {
    plan(q, k);
    attend(q, k, v, out);
  }

  /// Attention alone, along the plan of the last call.
  void attend(const float* q, const float* k, const float* v, float* out) {
    attention_forward(plans_, queries(q), keys(k), in(v), in_out(out), config(), context_);
  }

  /// Forward and backward, and the routers' statistics and update. Overwrites the gradients.
  void train(const float* q, const float* k, const float* v, float* out, const float* d_out, float* d_q, float* d_k,
             float* d_v) {
    plan(q, k);
    attend_backward(q, k, v, out, d_out, d_q, d_k, d_v);
    if (s_.pattern != routed) return;
    statistics_.clear();
    for (std::size_t h = 0; h < routers_.size(); ++h) {
      const Index head = Index(h);
      routers_[h].observe(rows(q_rows_, head), labels(q_labels_, head), statistics_, head);
      if (!s_.shared) routers_[h].observe(rows(k_rows_, head), labels(k_labels_, head), statistics_, head);
      routers_[h].update(statistics_, head);
    }
  }

  /// Forward and backward of attention alone, along the plan of the last call. Overwrites the gradients.
  void attend_backward(const float* q, const float* k, const float* v, float* out, const float* d_out, float* d_q,
                       float* d_k, float* d_v) {
    attention_forward(plans_, queries(q), keys(k), in(v), in_out(out), tape_, config(), context_);
    in_out(d_v).fill(0);
    in_out(d_q).fill(0);
    if (!s_.shared) {
      in_out(d_k).fill(0);
      attention_backward(plans_, queries(q), keys(k), in(v), in(out), tape_, in(d_out), in_out(d_q), in_out(d_k),
                         in_out(d_v), config(), context_);
      return;
    }
    d_queries_.setZero();
    d_keys_.setZero();
    attention_backward(plans_, queries(q), keys(k), in(v), in(out), tape_, in(d_out), d_queries_, d_keys_, in_out(d_v),
                       config(), context_);
    d_queries_ += d_keys_;
    normalise_rows_backward<float>(q_rows_, inverse_, d_queries_, in_out(d_q), s_.width, context_);
  }

  /// Query-key pairs of all heads.
  std::int64_t pairs() const {
    std::int64_t sum = 0;
    for (const AttentionPlan& plan : plans_) sum += statistics(plan).visible_pairs;
    return plans_.size() == 1 ? sum * s_.heads : sum;
  }

  /// Log-sum-exp of the last train() or attend_backward(), tokens x heads.
  void log_sum_exp(float* out) const {
    View<float>(out, Index(s_.tokens), Index(s_.heads)).eigen() = tape_.lse().eigen();
  }

 private:
  Index columns() const { return Index(s_.heads * s_.width); }
  ConstView<float> in(const float* m) const { return {m, Index(s_.tokens), columns()}; }
  View<float> in_out(float* m) const { return {m, Index(s_.tokens), columns()}; }
  ConstView<float> queries(const float* q) const { return s_.shared ? ConstView<float>(q_rows_) : in(q); }
  ConstView<float> keys(const float* k) const { return s_.shared ? ConstView<float>(q_rows_) : in(k); }

  AttentionConfig config() const {
    // Normalised rows are sqrt(width) long; the peer's keys are 1 long, its logits q.k / sqrt(width).
    return {.heads = Index(s_.heads), .scale = s_.shared ? 1.0 / double(s_.width) : 0.0};
  }

  ConstView<float> rows(const RowMatrix<float>& all, Index head) const {
    return view(all).columns(head * s_.width, s_.width);
  }

  std::span<std::int32_t> labels(std::vector<std::int32_t>& all, Index head) const {
    return std::span(all).subspan(std::size_t(head * s_.tokens), std::size_t(s_.tokens));
  }

  void plan(const float* q, const float* k) {
    const Index tokens = Index(s_.tokens), window = Index(s_.window);
    const bool causal = s_.causal != 0;
    if (s_.pattern == dense) plan_dense({.tokens = tokens, .causal = causal}, plans_[0]);
    if (s_.pattern == local) plan_local({.tokens = tokens, .window = window, .causal = causal}, plans_[0]);
    if (s_.pattern != routed) return;

    const View<float> inverse = s_.shared ? View<float>(inverse_) : View<float>();
    normalise_rows<float>(in(q), q_rows_, inverse, s_.width, context_);
    if (!s_.shared) normalise_rows<float>(in(k), k_rows_, {}, s_.width, context_);
    for (std::size_t h = 0; h < routers_.size(); ++h) {
      const Index head = Index(h);
      const std::span<std::int32_t> q_labels = labels(q_labels_, head);
      const std::span<std::int32_t> k_labels = s_.shared ? q_labels : labels(k_labels_, head);
      routers_[h].assign(rows(q_rows_, head), q_labels, context_);
      if (!s_.shared) routers_[h].assign(rows(k_rows_, head), k_labels, context_);
      plan_clustered(q_labels, k_labels,
                     {.clusters = Index(s_.clusters),
                      .window = window,
                      .causal = causal,
                      .self = s_.shared ? Self::only_if_alone : Self::visible},
                     plans_[h]);
    }
  }

  PeerSettings s_;
  Context context_;
  std::vector<AttentionPlan> plans_;
  AttentionTape<float> tape_;
  std::vector<OnlineKMeans<float>> routers_;
  RouterStatistics<float> statistics_;
  std::vector<std::int32_t> q_labels_, k_labels_;  // head by head
  RowMatrix<float> q_rows_, k_rows_, inverse_;     // normalised, and what normalising back needs
  RowMatrix<float> d_queries_, d_keys_;            // of the normalised rows
};

}  // namespace

#define COTERIE_PEER_API extern "C" __attribute__((visibility("default")))

COTERIE_PEER_API const char* peer_error() { return error.c_str(); }

/// Version, instruction set and compiler.
COTERIE_PEER_API const char* peer_build() {
  static const std::string text =
      std::string(version) + ", " + benchmarks::instruction_set_name() + ", compiled by " + __VERSION__;
  return text.c_str();
}

/// Multiply-adds in registers: operations per second of the best of ten runs, 3 ms in all.
COTERIE_PEER_API double peer_fma_peak() {
  const benchmarks::PeakRoutines<float> routines(InstructionSet::automatic);
  double best = 0;
  for (int run = 0; run < 10; ++run) {
    const double begin = benchmarks::thread_seconds();
    routines.fma();
    best = std::max(best, routines.flops() / (benchmarks::thread_seconds() - begin));
  }
  return best;
}

/// A null pointer after an error.
COTERIE_PEER_API Peer* peer_open(const PeerSettings* settings) {
  std::unique_ptr<Peer> peer;
  guarded([&] { peer = std::make_unique<Peer>(*settings); });
  return peer.release();
}

COTERIE_PEER_API void peer_close(Peer* peer) { delete peer; }

COTERIE_PEER_API int peer_set_centroids(Peer* peer, const float* centroids) {
  return guarded([&] { peer->set_centroids(centroids); });
}

COTERIE_PEER_API int peer_forward(Peer* peer, const float* q, const float* k, const float* v, float* out) {
  return guarded([&] { peer->forward(q, k, v, out); });
}

COTERIE_PEER_API int peer_attend(Peer* peer, const float* q, const float* k, const float* v, float* out) {
  return guarded([&] { peer->attend(q, k, v, out); });
}

COTERIE_PEER_API int peer_train(Peer* peer, const float* q, const float* k, const float* v, float* out,
                                const float* d_out, float* d_q, float* d_k, float* d_v) {
  return guarded([&] { peer->train(q, k, v, out, d_out, d_q, d_k, d_v); });
}

COTERIE_PEER_API int peer_attend_backward(Peer* peer, const float* q, const float* k, const float* v, float* out,
                                          const float* d_out, float* d_q, float* d_k, float* d_v) {
  return guarded([&] { peer->attend_backward(q, k, v, out, d_out, d_q, d_k, d_v); });
}

/// Query-key pairs of all heads in the last call's plan.
COTERIE_PEER_API std::int64_t peer_pairs(const Peer* peer) { return peer->pairs(); }

COTERIE_PEER_API int peer_log_sum_exp(const Peer* peer, float* out) {
  return guarded([&] { peer->log_sum_exp(out); });
}
