// Compiled for this very machine while the rest of the program is not. Under a name of its own, so that none of Eigen's
// inline functions is the same function as elsewhere in the program: they differ by these flags.
#define Eigen EigenOfThisMachine
#include "product.hpp"

#include <Eigen/Core>

namespace benchmarks {
namespace {

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using In = Eigen::Map<const Matrix<T>>;
template <class T>
using Out = Eigen::Map<Matrix<T>>;

}  // namespace

#define COTERIE_EIGEN_PRODUCTS_OF(T)                                                                     \
  void eigen_product(const T* x, const T* w, T* y, long tokens, long in, long out) {                     \
    Out<T>(y, tokens, out).noalias() = In<T>(x, tokens, in) * In<T>(w, in, out);                         \
  }                                                                                                      \
  void eigen_product_input_gradient(const T* d_y, const T* w, T* d_x, long tokens, long in, long out) {  \
    Out<T>(d_x, tokens, in).noalias() = In<T>(d_y, tokens, out) * In<T>(w, in, out).transpose();         \
  }                                                                                                      \
  void eigen_product_weight_gradient(const T* x, const T* d_y, T* d_w, long tokens, long in, long out) { \
    Out<T>(d_w, in, out).noalias() += In<T>(x, tokens, in).transpose() * In<T>(d_y, tokens, out);        \
  }

COTERIE_EIGEN_PRODUCTS_OF(float)
COTERIE_EIGEN_PRODUCTS_OF(double)

}  // namespace benchmarks
