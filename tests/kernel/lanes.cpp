#include "coterie/kernel/lanes.hpp"

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "random.hpp"

using coterie::detail::Lanes;

namespace {

template <class T, int Bytes>
T exp_of(T x, int lane) {
  using L = Lanes<T, Bytes>;
  T in[L::count] = {}, out[L::count];
  in[lane] = x;
  typename L::F v, y;
  L::load(in, v);
  L::exp2(v, y);
  L::store(out, y);
  return out[lane];
}

// Units in the last place of the exact value.
template <class T, int Bytes>
double largest_error() {
  test::Random random(1);
  double most = 0;
  const double low = sizeof(T) == 4 ? -126 : -1022;
  for (int i = 0; i < 40000; ++i) {
    const T x = static_cast<T>(i % 2 ? random.uniform(low, 0.5) : random.uniform(-2, 0.01));
    const double exact = std::exp2(static_cast<double>(x));
    const double unit = exact * std::numeric_limits<T>::epsilon() / 2;
    most = std::max(most, std::abs(exp_of<T, Bytes>(x, i % Lanes<T, Bytes>::count) - exact) / unit);
  }
  return most;
}

template <class T, int Bytes>
void check_exp() {
  CHECK(largest_error<T, Bytes>() < 3);  // 1.5 units in the last place, measured from the middle of the binade
  constexpr T infinity = std::numeric_limits<T>::infinity();
  CHECK(exp_of<T, Bytes>(0, 1) == 1);
  CHECK(exp_of<T, Bytes>(-infinity, 1) == 0);
  CHECK(exp_of<T, Bytes>(std::numeric_limits<T>::lowest(), 1) == 0);
  CHECK(exp_of<T, Bytes>(T(-1100), 1) == 0);
  volatile T nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(exp_of<T, Bytes>(nan, 1)));
}

template <class T, int Bytes>
void check_transpose() {
  using L = Lanes<T, Bytes>;
  typename L::F rows[L::count];
  for (int i = 0; i < L::count; ++i)
    for (int j = 0; j < L::count; ++j) rows[i][j] = static_cast<T>(i * 100 + j);
  L::transpose(rows);
  for (int i = 0; i < L::count; ++i)
    for (int j = 0; j < L::count; ++j) CHECK(rows[i][j] == static_cast<T>(j * 100 + i));
}

template <class T, int Bytes>
void check_finite() {
  using L = Lanes<T, Bytes>;
  constexpr T bad[] = {std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN()};
  typename L::F x{};
  CHECK(L::finite(x));
  L::fill(std::numeric_limits<T>::max(), x);
  CHECK(L::finite(x));
  for (T value : bad)
    for (int lane = 0; lane < L::count; ++lane) {
      typename L::F y = x;
      y[lane] = value;
      CHECK_FALSE(L::finite(y));
    }
}

}  // namespace

TEST_CASE("lanes: exp2 within its stated error, exact at 0, 0 far below, NaN kept") {
  check_exp<float, 16>();
  check_exp<float, 32>();
  check_exp<float, 64>();
  check_exp<double, 16>();
  check_exp<double, 32>();
  check_exp<double, 64>();
}

TEST_CASE("lanes: transposes at every width") {
  check_transpose<float, 16>();
  check_transpose<float, 32>();
  check_transpose<float, 64>();
  check_transpose<double, 16>();
  check_transpose<double, 32>();
  check_transpose<double, 64>();
}

TEST_CASE("lanes: NaN and infinity are found in any lane") {
  check_finite<float, 16>();
  check_finite<float, 32>();
  check_finite<float, 64>();
  check_finite<double, 16>();
  check_finite<double, 32>();
  check_finite<double, 64>();
}
