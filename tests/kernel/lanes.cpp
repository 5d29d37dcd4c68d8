// Vectors of 64 bytes: no register of most machines holds them.
#define COTERIE_OPAQUE(x)
#include "coterie/kernel/lanes.hpp"

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "random.hpp"

using coterie::detail::Lanes;

namespace {

// Natural logarithms of normal numbers, in units in the last place of the exact value.
template <class T, int Bytes>
void check_log() {
  using L = Lanes<T, Bytes>;
  using Limits = std::numeric_limits<T>;
  test::Random random(1);
  double most = 0;
  const auto add = [&](T x) {
    typename L::F in, out;
    L::fill(x, in);
    L::log(in, out);
    const long double exact = std::log(static_cast<long double>(x));
    const long double unit = x == 1 ? Limits::min() : std::ldexp(1.0L, std::ilogb(exact) + 1 - Limits::digits);
    most = std::max(most, static_cast<double>(std::abs(out[0] - exact) / unit));
  };
  for (int i = 0; i < 20000; ++i) {
    add(static_cast<T>(std::exp2(random.uniform(Limits::min_exponent, Limits::max_exponent - 1))));
    add(static_cast<T>(random.uniform(0.5, 2)));
    add(static_cast<T>(random.uniform(1, 400)));
  }
  for (T x : {T(1), Limits::min(), Limits::max(), T(1) + Limits::epsilon(), T(1) - Limits::epsilon(), T(2), T(0.5)})
    add(x);
  CHECK(most < 3);
  const auto log = [](T x) {
    typename L::F in, out;
    L::fill(x, in);
    L::log(in, out);
    return out[L::count - 1];
  };
  volatile T nan = Limits::quiet_NaN();  // behind the compiler's back
  CHECK(std::isnan(log(nan)));
  CHECK(std::isnan(log(-nan)));
  CHECK(log(Limits::infinity()) == Limits::infinity());
  CHECK(log(0) == -Limits::infinity());
}

// Hyperbolic tangents, in units in the last place of the exact value; 1 and -1 far out.
template <class T, int Bytes>
void check_tanh() {
  using L = Lanes<T, Bytes>;
  using Limits = std::numeric_limits<T>;
  test::Random random(2);
  const auto tanh = [](T x) {
    typename L::F in, out;
    L::fill(x, in);
    L::tanh(in, out);
    return out[L::count - 1];
  };
  double most = 0;
  const auto add = [&](T x) {
    const long double exact = std::tanh(static_cast<long double>(x));
    const long double unit = x == 0 ? Limits::min() : std::ldexp(1.0L, std::ilogb(exact) + 1 - Limits::digits);
    most = std::max(most, static_cast<double>(std::abs(tanh(x) - exact) / unit));
  };
  for (int i = 0; i < 20000; ++i) {
    add(static_cast<T>(random.uniform(-0.5, 0.5)));
    add(static_cast<T>(random.uniform(-3, 3)));
    add(static_cast<T>(random.uniform(-40, 40)));
    add(static_cast<T>(std::exp2(random.uniform(-60, 0))));
  }
  CHECK(most < (sizeof(T) == 4 ? 6.4 : 10.1));
  volatile T nan = Limits::quiet_NaN();
  CHECK(std::isnan(tanh(nan)));
  CHECK(tanh(Limits::infinity()) == 1);
  CHECK(tanh(-Limits::infinity()) == -1);
  CHECK(tanh(0) == 0);
  CHECK(tanh(Limits::max()) == 1);
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

TEST_CASE("lanes: natural logarithm within 3 units in the last place") {
  check_log<float, 16>();
  check_log<float, 32>();
  check_log<float, 64>();
  check_log<double, 16>();
  check_log<double, 32>();
  check_log<double, 64>();
}

TEST_CASE("lanes: hyperbolic tangent within 6.3 units in the last place, 10 in double") {
  check_tanh<float, 16>();
  check_tanh<float, 32>();
  check_tanh<float, 64>();
  check_tanh<double, 16>();
  check_tanh<double, 32>();
  check_tanh<double, 64>();
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
