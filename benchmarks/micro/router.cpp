// The router: nearest centroids, statistics, centroid update.
#include "coterie/router/kmeans.hpp"

#include <memory>

#include "common.hpp"
#include "coterie/kernel/normalise.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

template <class T>
struct Router {
  Router(Index n, Index k, Index d)
      : rows(test::Random(1).matrix<T>(n, d)),
        labels(static_cast<std::size_t>(n)),
        kmeans({.clusters = k, .dim = d}),
        statistics(1, k, d) {
    normalise_rows(rows, view(rows), {}, d, context);
    kmeans.assign(rows, labels, context);
  }

  Context context;
  RowMatrix<T> rows;
  std::vector<std::int32_t> labels;
  OnlineKMeans<T> kmeans;
  RouterStatistics<T> statistics;
};

template <class T>
void add(const std::string& prefix, Index n, Index k, Index d) {
  const std::string sizes = name("/", scalar_name<T>(), "/n:", n, "/k:", k, "/d:", d);
  const double flops = 2.0 * static_cast<double>(n * k * d);
  benchmark::RegisterBenchmark(name(prefix, "assign", sizes).c_str(), [=](benchmark::State& state) {
    Router<T> router(n, k, d);
    measure<T>(state, router.context, flops, [&] { router.kmeans.assign(router.rows, router.labels, router.context); });
  });
  benchmark::RegisterBenchmark(name(prefix, "observe", sizes).c_str(), [=](benchmark::State& state) {
    Router<T> router(n, k, d);
    measure<T>(state, router.context, 0, [&] {
      router.statistics.clear();
      router.kmeans.observe(router.rows, router.labels, router.statistics, 0, router.context);
    });
  });
  benchmark::RegisterBenchmark(name(prefix, "first_update", sizes).c_str(), [=](benchmark::State& state) {
    Router<T> router(n, k, d);
    router.kmeans.observe(router.rows, router.labels, router.statistics, 0, router.context);
    measure<T>(state, router.context, 0, [&] {
      OnlineKMeans<T> fresh({.clusters = k, .dim = d});
      fresh.update(router.statistics, 0);
    });
  });
  benchmark::RegisterBenchmark(name(prefix, "update", sizes).c_str(), [=](benchmark::State& state) {
    Router<T> router(n, k, d);
    router.kmeans.observe(router.rows, router.labels, router.statistics, 0, router.context);
    measure<T>(state, router.context, 0, [&] { router.kmeans.update(router.statistics, 0); });
  });
}

template <class T>
void add_all() {
  for (const Index n : {4096, 16384})
    for (const Index k : {32, 128})
      for (const Index d : {64, 128}) add<T>("router/", n, k, d);
}

}  // namespace

int main(int argc, char** argv) {
  add<float>("router/smoke/", 256, 8, 16);
  add<double>("router/smoke/", 256, 8, 16);
  add_all<float>();
  add_all<double>();
  return run(argc, argv);
}
