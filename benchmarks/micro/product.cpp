// The layer's products, in turns with Eigen's built with the best flags.
#include "coterie/kernel/product.hpp"

#include "common.hpp"
#include "eigen/product.hpp"

using namespace coterie;
using namespace benchmarks;

namespace {

enum class Kind { forward, input_gradient, weight_gradient };
constexpr const char* kind_names[] = {"forward", "input_gradient", "weight_gradient"};

struct Sizes {
  Index n = 0, in = 0, out = 0;
};

// Eigen's time over ours, both summed over turns: other work on the machine meets both alike.
template <class Ours, class Eigens>
double time_ratio(Ours&& ours, Eigens&& eigens) {
  double our_seconds = 0, eigen_seconds = 0;
  ours();
  eigens();
  for (int turn = 0; turn < 5 || our_seconds + eigen_seconds < 0.2; ++turn) {
    const double begin = thread_seconds();
    ours();
    const double between = thread_seconds();
    eigens();
    our_seconds += between - begin;
    eigen_seconds += thread_seconds() - between;
  }
  return eigen_seconds / our_seconds;
}

template <class T>
void add(const std::string& prefix, Kind kind, Sizes sizes) {
  const std::string title = name(prefix, kind_names[static_cast<int>(kind)], "/", scalar_name<T>(), "/n:", sizes.n,
                                 "/in:", sizes.in, "/out:", sizes.out);
  auto* added = benchmark::RegisterBenchmark(title.c_str(), [=](benchmark::State& state) {
    const Index tokens = sizes.n, rows = sizes.in, columns = sizes.out;
    test::Random random(1);
    Context context;
    const RowMatrix<T> x = random.matrix<T>(tokens, rows), w = random.matrix<T>(rows, columns);
    const RowMatrix<T> d_y = random.matrix<T>(tokens, columns);
    RowMatrix<T> result, eigen_result;
    const auto ours = [&] {
      if (kind == Kind::forward)
        product<T>(x, w, result, context);
      else if (kind == Kind::input_gradient)
        product_input_gradient<T>(d_y, w, result, context);
      else
        product_weight_gradient<T>(x, d_y, result, context);
    };
    const auto eigens = [&] {
      if (kind == Kind::forward)
        eigen_product(x.data(), w.data(), eigen_result.data(), tokens, rows, columns);
      else if (kind == Kind::input_gradient)
        eigen_product_input_gradient(d_y.data(), w.data(), eigen_result.data(), tokens, rows, columns);
      else
        eigen_product_weight_gradient(x.data(), d_y.data(), eigen_result.data(), tokens, rows, columns);
    };
    result = RowMatrix<T>::Zero(kind == Kind::weight_gradient ? rows : tokens,
                                kind == Kind::input_gradient ? rows : columns);
    eigen_result = result;
    ours();
    eigens();
    if (!result.isApprox(eigen_result, T(1e-4))) return state.SkipWithError("differs from Eigen's product");
    measure<T>(state, context, 2.0 * static_cast<double>(tokens * rows * columns), ours);
    state.counters["eigen_ratio"] = time_ratio(ours, eigens);
  });
  added->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Kind kind : {Kind::forward, Kind::input_gradient, Kind::weight_gradient}) {
    add<float>("product/smoke/", kind, {40, 20, 30});
    // The layer's, widths around it, widths that end inside vectors, and few rows.
    for (const Sizes& sizes : {Sizes{8192, 512, 512},
                               {8192, 64, 64},
                               {8192, 128, 128},
                               {8192, 256, 256},
                               {4096, 1024, 1024},
                               {8192, 512, 256},
                               {8192, 256, 512},
                               {8192, 80, 80},
                               {8192, 100, 100},
                               {8192, 96, 40},
                               {8192, 65, 63},
                               {8192, 513, 511},
                               {1000, 512, 512},
                               {16, 512, 512},
                               {1, 512, 512}})
      add<float>("product/", kind, sizes);
    for (const Sizes& sizes : {Sizes{8192, 512, 512}, {8192, 64, 64}, {8192, 100, 100}})
      add<double>("product/", kind, sizes);
  }
  return run(argc, argv);
}
