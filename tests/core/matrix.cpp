#include "coterie/core/matrix.hpp"

#include <string>
#include <vector>

#include "catch.hpp"
#include "errors.hpp"
#include "random.hpp"

using namespace coterie;
using namespace test;

namespace {

using Rows = RowMatrix<float>;
using Columns = Eigen::MatrixXf;

template <class M>
constexpr bool readable = std::is_convertible_v<M, ConstView<float>>;
template <class M>
constexpr bool writable = std::is_convertible_v<M, View<float>>;

// The sum through each kind of view, as a caller's function would take them.
float sum_of(ConstView<float> m) {
  float sum = 0;
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j) sum += m(i, j);
  return sum;
}
void set_all(View<float> m, float value) { m.fill(value); }

const char* overloaded(ConstView<float>) { return "float"; }
const char* overloaded(ConstView<double>) { return "double"; }

// Whether two views share an element, by looking at every one.
bool share(ConstView<float> a, ConstView<float> b) {
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j)
      for (Index r = 0; r < b.rows(); ++r)
        for (Index c = 0; c < b.cols(); ++c)
          if (&a(i, j) == &b(r, c)) return true;
  return false;
}

}  // namespace

TEST_CASE("views convert from row-major storage, and from nothing else") {
  using MapRows = Eigen::Map<Rows>;
  using MapConst = Eigen::Map<const Rows>;
  using MapStride = Eigen::Map<Rows, 0, Eigen::OuterStride<>>;
  using MapSpread = Eigen::Map<Rows, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
  using BlockRows = Eigen::Block<Rows>;
  using BlockConst = Eigen::Block<const Rows>;

  STATIC_REQUIRE(readable<Rows&>);
  STATIC_REQUIRE(readable<const Rows&>);
  STATIC_REQUIRE(readable<Rows>);  // for the length of a call
  STATIC_REQUIRE(readable<MapRows>);
  STATIC_REQUIRE(readable<MapConst>);
  STATIC_REQUIRE(readable<MapStride>);
  STATIC_REQUIRE(readable<BlockRows>);
  STATIC_REQUIRE(readable<BlockConst>);
  STATIC_REQUIRE(readable<Eigen::Ref<Rows>>);
  STATIC_REQUIRE(readable<Eigen::Ref<const Rows>>);
  STATIC_REQUIRE(readable<Eigen::RowVectorXf&>);
  STATIC_REQUIRE(readable<Eigen::Matrix<float, 3, 4, Eigen::RowMajor>&>);
  STATIC_REQUIRE(readable<View<float>>);
  STATIC_REQUIRE(!readable<Columns&>);
  STATIC_REQUIRE(!readable<Eigen::VectorXf&>);
  STATIC_REQUIRE(!readable<MapSpread>);
  STATIC_REQUIRE(!readable<RowMatrix<double>&>);
  STATIC_REQUIRE(!readable<decltype(std::declval<Rows&>() + std::declval<Rows&>())>);
  STATIC_REQUIRE(!readable<decltype(std::declval<Rows&>().transpose())>);
  STATIC_REQUIRE(!readable<decltype(std::declval<Rows&>().col(0))>);
  STATIC_REQUIRE(!readable<std::vector<float>&>);
  STATIC_REQUIRE(!readable<std::string&>);
  STATIC_REQUIRE(!readable<int>);

  STATIC_REQUIRE(writable<Rows&>);
  STATIC_REQUIRE(writable<MapRows>);
  STATIC_REQUIRE(writable<MapStride&>);
  STATIC_REQUIRE(writable<BlockRows>);
  STATIC_REQUIRE(writable<BlockRows&>);
  STATIC_REQUIRE(writable<Eigen::Ref<Rows>>);
  STATIC_REQUIRE(!writable<const Rows&>);
  STATIC_REQUIRE(!writable<Rows>);
  STATIC_REQUIRE(!writable<MapConst>);
  STATIC_REQUIRE(!writable<BlockConst>);
  STATIC_REQUIRE(!writable<const BlockRows&>);
  STATIC_REQUIRE(!writable<Eigen::Ref<const Rows>>);
  STATIC_REQUIRE(!writable<Columns&>);
  STATIC_REQUIRE(!writable<ConstView<float>>);
}

TEST_CASE("views address the matrix they come from") {
  Rows m = Random(1).matrix<float>(5, 7);
  const ConstView<float> whole = m;
  REQUIRE(whole.data() == m.data());
  REQUIRE(whole.rows() == 5);
  REQUIRE(whole.cols() == 7);
  REQUIRE(whole.stride() == 7);
  const ConstView<float> part = m.block(1, 2, 3, 4);
  REQUIRE(part.data() == &m(1, 2));
  REQUIRE(part.stride() == 7);
  REQUIRE(&part(2, 3) == &m(3, 5));
  REQUIRE(part.row(2) == &m(3, 2));
  REQUIRE(part.eigen() == m.block(1, 2, 3, 4));
  REQUIRE(whole.columns(2, 3).eigen() == m.middleCols(2, 3));
  REQUIRE(whole.rows(2, 3).eigen() == m.middleRows(2, 3));
  REQUIRE(ConstView<float>(m.row(3)).eigen() == m.row(3));
  REQUIRE(sum_of(m.topRows(2)) == Approx(m.topRows(2).sum()));

  set_all(m.block(1, 2, 3, 4), 9);
  REQUIRE((m.block(1, 2, 3, 4).array() == 9).all());
  REQUIRE(m(0, 2) != 9);
  REQUIRE(m(1, 6) != 9);
  const View<float> inner = View<float>(m).rows(1, 3).columns(2, 4);
  inner.eigen().setConstant(4);
  REQUIRE(m(3, 5) == 4);
  REQUIRE(view(m).data() == m.data());
  STATIC_REQUIRE(std::is_same_v<decltype(view(m)), View<float>>);
  STATIC_REQUIRE(std::is_same_v<decltype(view(std::as_const(m))), ConstView<float>>);
}

TEST_CASE("overloads for float and double are told apart by the matrix") {
  REQUIRE(std::string(overloaded(Rows(1, 1))) == "float");
  REQUIRE(std::string(overloaded(RowMatrix<double>(1, 1))) == "double");
}

TEST_CASE("check_shape names what does not fit") {
  const std::vector<float> data(20);
  const auto check = [&](const float* p, Index rows, Index cols, Index stride) {
    return message_of<ShapeError>(
        [&] { detail::check_shape("f", "q", ConstView<float>(p, rows, cols, stride), 3, 4); });
  };
  REQUIRE(check(data.data(), 3, 4, 4).empty());
  REQUIRE(check(data.data(), 3, 4, 6).empty());
  REQUIRE(check(data.data(), 3, 5, 5) == "f: q: expected 3 x 4, got 3 x 5");
  REQUIRE(check(data.data(), 2, 4, 4) == "f: q: expected 3 x 4, got 2 x 4");
  REQUIRE(check(data.data(), 3, 4, 3) == "f: q: expected a stride of at least 4, got 3");
  REQUIRE(check(nullptr, 3, 4, 4) == "f: q: expected data, got a null pointer");
  detail::check_shape("f", "q", ConstView<float>(), 0, 0);
  detail::check_shape("f", "q", ConstView<float>(nullptr, 0, 4), 0, 4);
  detail::check_shape("f", "q", ConstView<float>(data.data(), 1, 4, 0), 1, 4);
}

TEST_CASE("overlap: column blocks of one matrix interleave without sharing") {
  Rows m(6, 8);
  const View<float> whole = m;
  REQUIRE(!detail::overlap<float>(whole.columns(0, 4), whole.columns(4, 4)));
  REQUIRE(!detail::overlap<float>(whole.columns(4, 4), whole.columns(0, 4)));
  REQUIRE(detail::overlap<float>(whole.columns(0, 5), whole.columns(4, 4)));
  REQUIRE(!detail::overlap<float>(whole.rows(0, 3), whole.rows(3, 3)));
  REQUIRE(detail::overlap<float>(whole.rows(0, 4), whole.rows(3, 3)));
  REQUIRE(!detail::overlap<float>(whole, Rows(6, 8)));
  REQUIRE(!detail::overlap<float>(whole, ConstView<float>()));
}

TEST_CASE("overlap equals a look at every element, for all blocks of a matrix") {
  const Index rows = 4, cols = 4;
  Rows m(rows, cols);
  std::vector<ConstView<float>> blocks;
  for (Index i = 0; i < rows; ++i)
    for (Index r = 1; i + r <= rows; ++r)
      for (Index j = 0; j < cols; ++j)
        for (Index c = 1; j + c <= cols; ++c) blocks.push_back(m.block(i, j, r, c));
  // Also rows of another stride, for which it may only err on the safe side.
  const std::size_t same_stride = blocks.size();
  blocks.push_back({m.data() + 1, 3, 2, 3});
  blocks.push_back({m.data(), 2, 8, 8});
  std::size_t wrong = 0, missed = 0;
  for (std::size_t a = 0; a < blocks.size(); ++a)
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      const bool expected = share(blocks[a], blocks[b]), got = detail::overlap<float>(blocks[a], blocks[b]);
      missed += expected && !got;
      wrong += expected != got && a < same_stride && b < same_stride;
    }
  REQUIRE(missed == 0);
  REQUIRE(wrong == 0);
}

TEST_CASE("check_no_alias names both") {
  Rows m(4, 4);
  const View<float> out = m.leftCols(3);
  REQUIRE(message_of<ShapeError>([&] { detail::check_no_alias<float>("f", "out", out, "q", m.rightCols(2)); }) ==
          "f: out: expected storage of its own, got an overlap with q");
  detail::check_no_alias<float>("f", "out", out, "q", m.rightCols(1));
}

TEST_CASE("columns of a view without rows and data") {
  constexpr ConstView<float> none(nullptr, 0, 8);
  STATIC_REQUIRE(none.columns(4, 4).data() == nullptr);  // adding to a null pointer would be no constant
  STATIC_REQUIRE(none.columns(4, 4).cols() == 4);
  STATIC_REQUIRE(View<float>(nullptr, 0, 8).columns(4, 4).rows() == 0);
}
