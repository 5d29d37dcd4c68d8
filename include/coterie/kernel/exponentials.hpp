// Exponentials of a list of numbers and their sum: the weights of an unnormalised softmax.
#pragma once

#include <limits>

#include "coterie/kernel/dispatch.hpp"

namespace coterie::detail {

/// Arguments of a kernel: x[i] becomes factor[i] 2^(x[i] - reference), and *sum their sum.
template <class T>
struct ExponentialArguments {
  T* x = nullptr;
  Index count = 0;
  T reference = 0;            // at least every x[i] - 126
  const T* factor = nullptr;  // null: 1
  T* sum = nullptr;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Exponentials on the micro-kernels M. The sum depends on the numbers and the width of vectors alone.
/// Accuracy: that of Lanes::exp2; minus infinity gives 0.
template <class T, class M>
struct Exponentials {
  using L = typename M::L;
  using F = typename L::F;
  static constexpr int lanes = L::count;

  static COTERIE_INLINE void vector(const ExponentialArguments<T>& a, T* x, const T* factor, F& sum) {
    F in, y;
    L::load(x, in);
    in -= a.reference;
    L::exp2(in, y);
    if (a.factor != nullptr) {
      F scale;
      L::load(factor, scale);
      y *= scale;
    }
    L::store(x, y);
    sum += y;
  }

  static COTERIE_INLINE void run(const ExponentialArguments<T>& a) {
    F sum = F{};
    Index i = 0;
    for (; i + lanes <= a.count; i += lanes) vector(a, a.x + i, a.factor + (a.factor != nullptr ? i : 0), sum);
    if (i < a.count) {
      T x[lanes], factor[lanes];
      for (int l = 0; l < lanes; ++l) {
        const bool inside = i + l < a.count;
        x[l] = inside ? a.x[i + l] : a.reference - 1000;
        factor[l] = inside && a.factor != nullptr ? a.factor[i + l] : T(0);
      }
      F part = F{};
      vector(a, x, factor, part);
      for (int l = 0; l < lanes && i + l < a.count; ++l) {
        a.x[i + l] = x[l];
        sum[l] += x[l];
      }
    }
    T total = 0;
    for (int l = 0; l < lanes; ++l) total += sum[l];
    *a.sum = total;
  }
};

COTERIE_KERNEL(ExponentialsKernel, Exponentials, run, (const ExponentialArguments<T>& arguments), (arguments))

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
