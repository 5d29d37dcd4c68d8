// Eigen's own products, built with the flags that suit them best, on plain pointers to row-major matrices without gaps.
#pragma once

#define COTERIE_EIGEN_PRODUCTS(T)                                                                      \
  /* y = x w, tokens x in times in x out */                                                            \
  void eigen_product(const T* x, const T* w, T* y, long tokens, long in, long out);                    \
  /* d_x = d_y w^T */                                                                                  \
  void eigen_product_input_gradient(const T* d_y, const T* w, T* d_x, long tokens, long in, long out); \
  /* d_w += x^T d_y */                                                                                 \
  void eigen_product_weight_gradient(const T* x, const T* d_y, T* d_w, long tokens, long in, long out);

namespace benchmarks {
COTERIE_EIGEN_PRODUCTS(float)
COTERIE_EIGEN_PRODUCTS(double)
}  // namespace benchmarks
