// Row-major matrices and the views through which every function of the library reads and writes.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <functional>
#include <type_traits>
#include <utility>

#include "coterie/core/check.hpp"

namespace coterie {

/// Signed size and row number.
using Index = Eigen::Index;

/// The owning matrix that fits every argument: dense, row-major, sized at run time.
template <class T>
using RowMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

template <class M>
inline constexpr bool is_eigen_dense = std::is_base_of_v<Eigen::DenseBase<M>, M>;

// Compile-time facts of an Eigen type; all false for anything else.
template <class M, bool = is_eigen_dense<M>>
struct RowMajorStorage {
  static constexpr bool readable = false, writable = false, owning = false;
  using Scalar = void;
};
template <class M>
struct RowMajorStorage<M, true> {
  using Scalar = typename M::Scalar;
  static constexpr int flags = Eigen::internal::traits<M>::Flags;
  // A column vector of one column is stored like a column-major matrix: refused, its rows are not contiguous in general.
  static constexpr bool readable = (flags & Eigen::DirectAccessBit) != 0 && (flags & Eigen::RowMajorBit) != 0 &&
                                   int(Eigen::internal::inner_stride_at_compile_time<M>::ret) == 1;
  static constexpr bool writable = readable && (flags & Eigen::LvalueBit) != 0;
  static constexpr bool owning = std::is_base_of_v<Eigen::PlainObjectBase<M>, M>;
};

template <class M, class T>
concept ReadableRows = RowMajorStorage<std::remove_cvref_t<M>>::readable &&
    std::same_as<typename RowMajorStorage<std::remove_cvref_t<M>>::Scalar, T>;

// An lvalue matrix, or a block, map or Ref by value (it refers to somebody's storage); never const, never a temporary owner.
template <class M, class T>
concept WritableRows = RowMajorStorage<std::remove_cvref_t<M>>::writable &&
                       std::same_as<typename RowMajorStorage<std::remove_cvref_t<M>>::Scalar, T> &&
                       !std::is_const_v<std::remove_reference_t<M>> &&
                       (!RowMajorStorage<std::remove_cvref_t<M>>::owning || std::is_lvalue_reference_v<M>);

}  // namespace detail

/// A read-only view of `rows` x `cols` numbers; row i starts at data() + i * stride(). Does not own.
///
/// Converts from row-major Eigen matrices, maps, blocks and Refs with contiguous rows. Column-major matrices and
/// expressions do not compile: Eigen would copy them silently, the library never copies an argument.
template <class T>
class ConstView {
 public:
  using Scalar = T;

  constexpr ConstView() = default;
  constexpr ConstView(const T* data, Index rows, Index cols, Index stride)
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  constexpr ConstView(const T* data, Index rows, Index cols) : ConstView(data, rows, cols, cols) {}

  template <class M>
  requires detail::ReadableRows<M, T> ConstView(const M& matrix)  // NOLINT: converts on purpose
      : ConstView(matrix.data(), matrix.rows(), matrix.cols(),
                  matrix.rows() == 1 ? matrix.cols() : matrix.outerStride()) {}

  constexpr const T* data() const { return data_; }
  constexpr Index rows() const { return rows_; }
  constexpr Index cols() const { return cols_; }
  constexpr Index stride() const { return stride_; }
  constexpr const T* row(Index i) const { return data_ + i * stride_; }
  constexpr const T& operator()(Index i, Index j) const { return data_[i * stride_ + j]; }

  /// `count` columns from `first` on.
  constexpr ConstView columns(Index first, Index count) const {
    return {data_ == nullptr ? data_ : data_ + first, rows_, count, stride_};  // a view without rows may have no data
  }
  /// `count` rows from `first` on.
  constexpr ConstView rows(Index first, Index count) const { return {data_ + first * stride_, count, cols_, stride_}; }

  /// The same numbers as an Eigen matrix.
  auto eigen() const {
    return Eigen::Map<const RowMatrix<T>, 0, Eigen::OuterStride<>>(data_, rows_, cols_, Eigen::OuterStride<>(stride_));
  }

 private:
  const T* data_ = nullptr;
  Index rows_ = 0, cols_ = 0, stride_ = 0;
};

/// A writable view; see ConstView. Converts from what can be written to: a const matrix or a temporary one does not compile.
template <class T>
class View {
 public:
  using Scalar = T;

  constexpr View() = default;
  constexpr View(T* data, Index rows, Index cols, Index stride)
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  constexpr View(T* data, Index rows, Index cols) : View(data, rows, cols, cols) {}

  template <class M>
  requires detail::WritableRows<M&&, T> View(M&& matrix)  // NOLINT: converts on purpose
      : View(matrix.data(), matrix.rows(), matrix.cols(), matrix.rows() == 1 ? matrix.cols() : matrix.outerStride()) {}

  constexpr operator ConstView<T>() const { return {data_, rows_, cols_, stride_}; }

  constexpr T* data() const { return data_; }
  constexpr Index rows() const { return rows_; }
  constexpr Index cols() const { return cols_; }
  constexpr Index stride() const { return stride_; }
  constexpr T* row(Index i) const { return data_ + i * stride_; }
  constexpr T& operator()(Index i, Index j) const { return data_[i * stride_ + j]; }
  constexpr View columns(Index first, Index count) const {
    return {data_ == nullptr ? data_ : data_ + first, rows_, count, stride_};
  }
  constexpr View rows(Index first, Index count) const { return {data_ + first * stride_, count, cols_, stride_}; }

  /// Sets every element.
  void fill(T value) const {
    for (Index i = 0; i < rows_; ++i)
      for (Index j = 0; j < cols_; ++j) (*this)(i, j) = value;
  }

  auto eigen() const {
    return Eigen::Map<RowMatrix<T>, 0, Eigen::OuterStride<>>(data_, rows_, cols_, Eigen::OuterStride<>(stride_));
  }

 private:
  T* data_ = nullptr;
  Index rows_ = 0, cols_ = 0, stride_ = 0;
};

/// The view of a matrix, with its scalar type deduced.
template <class M>
requires detail::WritableRows<M&&, typename detail::RowMajorStorage<std::remove_cvref_t<M>>::Scalar>
    View<typename std::remove_cvref_t<M>::Scalar> view(M&& matrix) {
  return std::forward<M>(matrix);
}
template <class M>
requires detail::ReadableRows<M, typename detail::RowMajorStorage<M>::Scalar> ConstView<typename M::Scalar> view(
    const M& matrix) {
  return matrix;
}

namespace detail {

/// Makes an argument's scalar type follow from the others', so that matrices convert to views in templates.
template <class T>
using Same = std::type_identity_t<T>;

/// Requires `rows` x `cols` and, for more than one row, a stride of at least the width.
template <class T>
void check_shape(const char* function, const char* argument, ConstView<T> m, Index rows, Index cols) {
  if (m.rows() != rows || m.cols() != cols)
    fail<ShapeError>(function, argument, join(rows, " x ", cols), join(m.rows(), " x ", m.cols()));
  if (rows > 1 && m.stride() < cols)
    fail<ShapeError>(function, argument, join("a stride of at least ", cols), m.stride());
  if (rows > 0 && cols > 0 && m.data() == nullptr) fail<ShapeError>(function, argument, "data", "a null pointer");
}

/// Whether two views share an element. Column blocks of one matrix interleave without sharing: those are told apart.
template <class T>
bool overlap(ConstView<T> a, ConstView<T> b) {
  if (a.rows() == 0 || a.cols() == 0 || b.rows() == 0 || b.cols() == 0) return false;
  const std::less<const T*> before;
  const T* a_end = a.row(a.rows() - 1) + a.cols();
  const T* b_end = b.row(b.rows() - 1) + b.cols();
  if (!before(a.data(), b_end) || !before(b.data(), a_end)) return false;
  if (a.rows() == 1 && b.rows() == 1) return true;
  const Index stride = a.rows() == 1 ? b.stride() : a.stride();  // a single row fits any stride
  if (stride <= 0 || (b.rows() > 1 && b.stride() != stride)) return true;
  // Columns of b counted in a's rows: b starts at column `shift` (mod stride).
  Index shift = Index(b.data() - a.data()) % stride;
  if (shift < 0) shift += stride;
  return shift < a.cols() || shift + b.cols() > stride;
}

template <class T>
void check_no_alias(const char* function, const char* output, View<T> out, const char* other, ConstView<T> m) {
  if (overlap<T>(out, m))
    fail<ShapeError>(function, output, join("storage of its own"), join("an overlap with ", other));
}

}  // namespace detail
}  // namespace coterie
