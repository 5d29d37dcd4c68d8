#include "coterie/core/ordered_sum.hpp"

#include "catch.hpp"

using namespace coterie;

TEST_CASE("a striped sum has every term once, at every length") {
  for (Index count = 0; count <= 40; ++count) {
    std::vector<int> used(static_cast<std::size_t>(count), 0);
    const double sum = detail::striped_sum<double>(count, [&](Index i) {
      ++used[static_cast<std::size_t>(i)];
      return static_cast<double>(i + 1);
    });
    REQUIRE(sum == static_cast<double>(count * (count + 1) / 2));
    for (const int times : used) REQUIRE(times == 1);
  }
}

TEST_CASE("a striped sum runs in its stated order") {
  // Eight partial sums, added as ((0+4)+(2+6)) + ((1+5)+(3+7)): 1 is lost beside 1e8 in float only where they meet
  // first.
  const auto sum = [](std::vector<float> x) {
    return detail::striped_sum<float>(static_cast<Index>(x.size()),
                                      [&](Index i) { return x[static_cast<std::size_t>(i)]; });
  };
  std::vector<float> x(16, 0.f);
  x[0] = 1e8f, x[8] = -1e8f, x[1] = 1.f;
  REQUIRE(sum(x) == 1.f);
  x[1] = 0.f, x[4] = 1.f;
  REQUIRE(sum(x) == 1.f);
  x[8] = 0.f, x[6] = -1e8f;
  REQUIRE(sum(x) == 0.f);
}

TEST_CASE("a sum over rows has every row once, in the same order for any number of workers") {
  for (Index rows : {0, 1, 511, 512, 513, 1300, 40000}) {
    std::vector<double> expected = {7, 7}, first_run;
    for (Index i = 0; i < rows; ++i) expected[0] += static_cast<double>(i + 1), expected[1] += 1;
    for (Index workers : {1, 2, 3, 8}) {
      ThreadPool pool(workers);
      Workspace workspace;
      Context context(pool, workspace);
      std::vector<double> sum = {7, 7};
      std::vector<float> rounded = {0};
      detail::sum_over_rows(rows, 2, sum.data(), context, [](double* partial, Index first, Index last) {
        for (Index i = first; i < last; ++i) partial[0] += static_cast<double>(i + 1), partial[1] += 1;
      });
      REQUIRE(sum == expected);
      detail::sum_over_rows(rows, 1, rounded.data(), context, [](float* partial, Index first, Index last) {
        for (Index i = first; i < last; ++i) *partial += 1.f / static_cast<float>(i + 1);
      });
      if (workers == 1) first_run = {static_cast<double>(rounded[0])};
      REQUIRE(static_cast<double>(rounded[0]) == first_run[0]);
    }
  }
}
