// Arguments that Eigen would copy or that cannot be written must not become views.
#include <coterie/core/matrix.hpp>

using coterie::ConstView;
using coterie::RowMatrix;
using coterie::View;

float read(ConstView<float> m) { return m(0, 0); }
void write(View<float> m) { m(0, 0) = 1; }

int main() {
  RowMatrix<float> rows(2, 2);
  const RowMatrix<float> constant = RowMatrix<float>::Zero(2, 2);
  Eigen::MatrixXf columns(2, 2);
  RowMatrix<double> doubles(2, 2);
  rows.setZero();
  write(rows);
  write(rows.topRows(1));
  write(rows.leftCols(1));
  float sum = read(rows) + read(constant) + read(constant.leftCols(1)) + read(rows.row(1));

// CASE 1: a column-major matrix
#if CASE == 1
  sum += read(columns);
#endif
// CASE 2: a sum
#if CASE == 2
  sum += read(rows + rows);
#endif
// CASE 3: a transpose
#if CASE == 3
  sum += read(rows.transpose());
#endif
// CASE 4: a block of a column-major matrix
#if CASE == 4
  sum += read(columns.topRows(1));
#endif
// CASE 5: one column of a row-major matrix
#if CASE == 5
  sum += read(rows.col(0));
#endif
// CASE 6: another scalar type
#if CASE == 6
  sum += read(doubles);
#endif
// CASE 7: a const matrix to be written
#if CASE == 7
  write(constant);
#endif
// CASE 8: a block of a const matrix to be written
#if CASE == 8
  write(constant.topRows(1));
#endif
// CASE 9: a temporary matrix to be written
#if CASE == 9
  write(RowMatrix<float>(2, 2));
#endif
// CASE 10: a read-only view to be written
#if CASE == 10
  write(ConstView<float>(rows));
#endif
// CASE 11: a map with elements apart
#if CASE == 11
  sum += read(Eigen::Map<RowMatrix<float>, 0, Eigen::Stride<4, 2>>(rows.data(), 1, 2));
#endif
// CASE 12: an Eigen::Ref that would hold a copy
#if CASE == 12
  write(Eigen::Ref<const RowMatrix<float>>(columns));
#endif
  return static_cast<int>(sum + columns(0, 0) + static_cast<float>(doubles(0, 0)));
}
