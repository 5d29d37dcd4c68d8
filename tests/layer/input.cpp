#include "coterie/layer/input.hpp"

#include "catch.hpp"

using namespace coterie;

namespace {

using Column = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic>;
using Row = RowMatrix<float>;

template <class M>
constexpr bool reads = std::is_convertible_v<M, Input<float>>;
template <class M>
constexpr bool writes = std::is_convertible_v<M, InputGradient<float>>;

static_assert(reads<Row&> && reads<const Row&> && reads<Row> && reads<View<float>> && reads<ConstView<float>>);
static_assert(reads<Eigen::Block<Row>> && reads<Eigen::Map<const Row>> && reads<Eigen::Ref<const Row>>);
static_assert(!reads<Column&> && !reads<RowMatrix<double>&> && !reads<decltype(Row() + Row())>);
static_assert(writes<Row&> && writes<View<float>> && writes<Eigen::Block<Row>> && writes<Eigen::Map<Row>>);
static_assert(!writes<const Row&> && !writes<Row> && !writes<ConstView<float>> && !writes<Column&>);
static_assert(!writes<Eigen::Map<const Row>>);

// As the layer's functions take them.
Index rows(const Input<float>& input) { return input.x.rows(); }
Index rows(const Input<float>& input, InputGradient<float> gradient) { return input.x.rows() + gradient.d_x.rows(); }

}  // namespace

TEST_CASE("inputs convert from matrices and from lists of their members") {
  Row x = Row::Ones(4, 3), source = Row::Zero(5, 3);
  const std::vector<Index> offsets = {0, 1, 4}, source_offsets = {0, 2, 5};
  const std::vector<std::int32_t> routes = {0, 1, 0, 1};
  REQUIRE(rows(x) == 4);
  REQUIRE(rows(x.topRows(2)) == 2);
  REQUIRE(rows({x, offsets}) == 4);
  REQUIRE(rows({x, offsets}, x) == 8);
  REQUIRE(rows(x, {x, source}) == 8);
  REQUIRE(rows(x, view(x).rows(1, 2)) == 6);
  const Input<float> plain = x, all = {x, offsets, source, source_offsets, 7, routes};
  REQUIRE(plain.offsets.empty());
  REQUIRE(!plain.crosses());
  REQUIRE(plain.step == 0);
  REQUIRE(plain.routes.empty());
  REQUIRE(all.x.data() == x.data());
  REQUIRE(all.offsets.size() == 3);
  REQUIRE(all.crosses());
  REQUIRE(all.source.rows() == 5);
  REQUIRE(all.source_offsets.back() == 5);
  REQUIRE(all.step == 7);
  REQUIRE(all.routes.size() == 4);
  const InputGradient<float> gradient(x, source);
  REQUIRE(gradient.d_x.data() == x.data());
  REQUIRE(gradient.d_source.data() == source.data());
}
