// Nearest centroids: which row of a matrix has the largest dot product with each row of another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/kernel/panel.hpp"

namespace coterie {
namespace detail {

/// Rows of x and the number of their nearest centroid.
template <class T>
struct NearestArguments {
  const T* x = nullptr;
  Index x_stride = 0;
  Index rows = 0, d = 0;
  const T* const* centroids = nullptr;  // a pointer to each
  Index clusters = 0;
  std::int32_t* labels = nullptr;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Nearest centroids on the micro-kernels M.
template <class T, class M>
struct Nearest {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes;
  static constexpr int centroid_block = 64;

  static constexpr Index scratch_size(Index d) { return (d + centroid_block) * width; }

  // best, label = the largest of these scores and where it was, for N vectors of lanes; number: of the first centroid.
  template <int N>
  static COTERIE_INLINE void largest(const T* scores, Index count, Index number, F* best, Ints* label) {
    F b[N];
    Ints l[N], j = Ints{} + static_cast<typename L::Integer>(number);
    COTERIE_UNROLL for (int v = 0; v < N; ++v) b[v] = best[v], l[v] = label[v];
    for (const T* const end = scores + count * width; scores < end; scores += width, j += 1)
      COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        F s;
        L::load(scores + v * lanes, s);
        const Ints better = s > b[v];
        b[v] = better ? s : b[v];
        l[v] = better ? j : l[v];
      }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) best[v] = b[v], label[v] = l[v];
  }

  /// The number of the centroid nearest to x: lanes are centroids.
  static COTERIE_INLINE std::int32_t nearest_of(const NearestArguments<T>& arguments, const T* x, T* scores) {
    const T* rows[centroid_block];
    Index label = 0;
    T best = 0;
    for (Index c = 0; c < arguments.clusters; c += centroid_block) {
      const Index n = std::min<Index>(centroid_block, arguments.clusters - c), vectors = (n + lanes - 1) / lanes;
      for (Index j = 0; j < vectors * lanes; ++j) rows[j] = arguments.centroids[c + (std::min)(j, n - 1)];
      M::row_dots(rows, arguments.d, x, scores, static_cast<int>(vectors));
      if (c == 0) best = scores[0];
      for (Index j = 0; j < n; ++j)
        if (scores[j] > best) best = scores[j], label = c + j;
    }
    return static_cast<std::int32_t>(label);
  }

  /// labels[i] = argmax_c x_i . centroids_c: lanes are rows of x, if there are several, and centroids are broadcast.
  static COTERIE_INLINE void run(const NearestArguments<T>& arguments, T* scratch) {
    if (arguments.rows == 1) {
      *arguments.labels = nearest_of(arguments, arguments.x, scratch);
      return;
    }
    T *const x = scratch, *const scores = scratch + arguments.d * width;
    for (Index first = 0; first < arguments.rows; first += width) {
      const Index count = std::min<Index>(width, arguments.rows - first);
      const int vectors = Panel<T, M>::vectors_of(count);
      Panel<T, M>::pack_transposed(arguments.x + first * arguments.x_stride, arguments.x_stride, count, arguments.d, x);
      // The next rows are on their way while these are compared: heads lie side by side, so rows are far apart.
      for (Index l = first + width; l < (std::min)(first + 2 * width, arguments.rows); ++l)
        L::fetch(arguments.x + l * arguments.x_stride, arguments.d);
      F best[V];
      Ints label[V];
      for (Index c = 0; c < arguments.clusters; c += centroid_block) {
        const Index n = std::min<Index>(centroid_block, arguments.clusters - c);
        M::scores(arguments.centroids + c, n, arguments.d, x, scores, vectors);
        if (c == 0)
          for (int v = 0; v < vectors; ++v) {
            L::load(scores + v * lanes, best[v]);
            label[v] = Ints{};
          }
        if (vectors == V)
          largest<V>(scores, n, c, best, label);
        else
          for (int v = 0; v < vectors; ++v) largest<1>(scores + v * lanes, n, c, best + v, label + v);
      }
      for (Index l = 0; l < count; ++l)
        arguments.labels[first + l] = static_cast<std::int32_t>(label[l / lanes][l % lanes]);
    }
  }
};

COTERIE_KERNEL(NearestKernel, Nearest, run, (const NearestArguments<T>& arguments, T* scratch), (arguments, scratch))

/// Numbers of scratch memory.
template <class T>
Index nearest_scratch(InstructionSet instructions, Index d) {
  return with_micro<T>(instructions, [d]<class M>(M) { return Nearest<T, M>::scratch_size(d); });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace detail

inline namespace COTERIE_FLAGS_NAMESPACE {

/// labels[i] = argmax over c of x_i . centroids_c; the lowest c wins ties.
/// Shapes: x tokens x d, centroids clusters x d (at least one), labels tokens.
/// Requires: shapes that fit, otherwise ShapeError.
/// Threads and determinism: a label depends on that row, the centroids and the instruction set alone.
/// Cost: 2 tokens clusters d operations.
template <class T>
void nearest_centroids(ConstView<T> x, ConstView<T> centroids, std::span<std::int32_t> labels, Context& context) {
  if (centroids.rows() < 1)
    detail::fail<ShapeError>("nearest_centroids", "centroids", "at least 1 row", centroids.rows());
  detail::check_shape<T>("nearest_centroids", "x", x, x.rows(), centroids.cols());
  detail::check_shape<T>("nearest_centroids", "centroids", centroids, centroids.rows(), centroids.cols());
  if (Index(labels.size()) != x.rows())
    detail::fail<ShapeError>("nearest_centroids", "labels", detail::join(x.rows(), " labels"), labels.size());
  const auto kernel = detail::NearestKernel<T>::on(context.instructions());
  const Index scratch = detail::nearest_scratch<T>(context.instructions(), x.cols());
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  const T** const rows = shared.template take<const T*>(centroids.rows());
  for (Index c = 0; c < centroids.rows(); ++c) rows[c] = centroids.row(c);
  context.for_chunks(x.rows(), 512, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope task_scope(arena);
    kernel(detail::NearestArguments<T>{x.row(first), x.stride(), last - first, x.cols(), rows, centroids.rows(),
                                       labels.data() + first},
           arena.template take<T>(scratch));
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie
