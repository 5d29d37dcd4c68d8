#include "model/sampling.hpp"

#include <limits>

#include "catch.hpp"

using namespace transformer;
using coterie::Index;
using coterie::RowMatrix;

namespace {

RowMatrix<double> row(std::initializer_list<double> numbers) {
  RowMatrix<double> p(1, static_cast<Index>(numbers.size()));
  std::copy(numbers.begin(), numbers.end(), p.data());
  return p;
}

std::vector<std::int32_t> kept(const RowMatrix<double>& p, const SamplingConfig& config) {
  std::vector<std::int32_t> tokens;
  Sampler sampler(config);
  for (const Sampler::Candidate& one : sampler.candidates<double>(p)) tokens.push_back(one.token);
  return tokens;
}

}  // namespace

TEST_CASE("T20: top-k keeps exactly the k likeliest, of equal ones the lowest, whatever the other rows are") {
  using Tokens = std::vector<std::int32_t>;
  const RowMatrix<double> p = row({0.1, 0.3, 0.05, 0.3, 0.1, 0.15});
  REQUIRE(kept(p, {.top_k = 1}) == Tokens{1});
  REQUIRE(kept(p, {.top_k = 2}) == Tokens{1, 3});
  REQUIRE(kept(p, {.top_k = 3}) == Tokens{1, 3, 5});
  REQUIRE(kept(p, {.top_k = 4}) == Tokens{1, 3, 5, 0});
  REQUIRE(kept(p, {.top_k = 6}) == Tokens{1, 3, 5, 0, 4, 2});
  REQUIRE(kept(p, {.top_k = 100}).size() == 6);
  REQUIRE(kept(p, {}).size() == 6);

  // A row far likelier than another in all of its tokens changes nothing in the other: thresholds are those of the row.
  Sampler sampler({.top_k = 2});
  RowMatrix<double> rows(2, 4);
  rows << 8, 9, 7, 6, 0.1, 0.2, 0.3, 0.4;
  sampler.candidates<double>(rows.topRows(1));
  REQUIRE(sampler.candidates<double>(rows.bottomRows(1)).size() == 2);
  REQUIRE(sampler.candidates<double>(rows.bottomRows(1))[0].token == 3);
  REQUIRE(sampler.candidates<double>(rows.bottomRows(1))[1].token == 2);
}

TEST_CASE("T20: top-p keeps the smallest set of the likeliest whose mass reaches p, the one that crosses it included") {
  using Tokens = std::vector<std::int32_t>;
  const RowMatrix<double> p = row({0.125, 0.5, 0.25, 0.125});
  REQUIRE(kept(p, {.top_p = 0.01}) == Tokens{1});
  REQUIRE(kept(p, {.top_p = 0.5}) == Tokens{1});
  REQUIRE(kept(p, {.top_p = 0.51}) == Tokens{1, 2});
  REQUIRE(kept(p, {.top_p = 0.75}) == Tokens{1, 2});
  REQUIRE(kept(p, {.top_p = 0.8}) == Tokens{1, 2, 0});
  REQUIRE(kept(p, {.top_p = 0.9}) == Tokens{1, 2, 0, 3});
  REQUIRE(kept(p, {.top_p = 1}).size() == 4);
  // After top-k: of the two that are left, 2/3 and 1/3.
  REQUIRE(kept(p, {.top_k = 2, .top_p = 0.6}) == Tokens{1});
  REQUIRE(kept(p, {.top_k = 2, .top_p = 0.7}) == Tokens{1, 2});
  // After temperature 1/2: squares, 16/22, 4/22, 1/22, 1/22.
  REQUIRE(kept(p, {.temperature = 0.5, .top_p = 0.7}) == Tokens{1});
  // Temperature 2 makes it flatter: square roots, 0.369, 0.261, 0.185, 0.185.
  REQUIRE(kept(p, {.temperature = 2, .top_p = 0.6}) == Tokens{1, 2});
  REQUIRE(kept(p, {.temperature = 2, .top_p = 0.64}) == Tokens{1, 2, 0});
}

TEST_CASE("T20: a draw is a function of row, seed, sequence and position") {
  const RowMatrix<double> p = row({0.25, 0.25, 0.25, 0.25}), other = row({0.9, 0.1, 0, 0});
  Sampler sampler({.seed = 3}), alone({.seed = 3}), reseeded({.seed = 4});
  int moved_by_position = 0, moved_by_sequence = 0, moved_by_seed = 0;
  for (std::uint64_t position = 0; position < 100; ++position) {
    sampler.draw<double>(other, 0, position);
    const std::int32_t token = sampler.draw<double>(p, 1, position);
    REQUIRE(token == alone.draw<double>(p, 1, position));
    moved_by_position += token != alone.draw<double>(p, 1, position + 1);
    moved_by_sequence += token != alone.draw<double>(p, 2, position);
    moved_by_seed += token != reseeded.draw<double>(p, 1, position);
  }
  for (const int moved : {moved_by_position, moved_by_sequence, moved_by_seed}) REQUIRE((moved > 55 && moved < 95));
}

TEST_CASE("draws have the frequencies of the tempered probabilities") {
  const RowMatrix<double> p = row({0.2, 0, 0.4, 0.4});
  Sampler sampler({.temperature = 0.5, .seed = 1});
  std::array<double, 4> count{};
  const int draws = 20000;
  for (int i = 0; i < draws; ++i) count[static_cast<std::size_t>(sampler.draw<double>(p, 0, std::uint64_t(i)))] += 1;
  REQUIRE(count[0] / draws == Approx(1.0 / 9).margin(0.01));
  REQUIRE(count[1] == 0);
  REQUIRE(count[2] / draws == Approx(4.0 / 9).margin(0.015));
  REQUIRE(count[3] / draws == Approx(4.0 / 9).margin(0.015));
}

TEST_CASE("temperature 0 takes the likeliest, and low temperatures come close to it") {
  const RowMatrix<double> p = row({0.2, 0.3, 0.3, 0.2});
  for (std::uint64_t i = 0; i < 50; ++i) {
    REQUIRE(Sampler({.temperature = 0, .seed = i}).draw<double>(p, 0, i) == 1);
    REQUIRE(Sampler({.temperature = 1e-4}).draw<double>(row({1e-30, 2e-30, 1e-30}), 0, i) == 1);
  }
}

TEST_CASE("a sampler refuses what has no meaning") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const SamplingConfig& config :
       {SamplingConfig{.temperature = -1}, SamplingConfig{.temperature = nan}, SamplingConfig{.top_k = -1},
        SamplingConfig{.top_p = 0}, SamplingConfig{.top_p = 1.5}, SamplingConfig{.top_p = nan}})
    REQUIRE_THROWS_AS(Sampler(config), coterie::ValueError);
  Sampler sampler;
  REQUIRE_THROWS_AS(sampler.candidates<double>(row({0.5, nan})), coterie::ValueError);
  REQUIRE_THROWS_AS(sampler.candidates<double>(row({0.5, -0.1})), coterie::ValueError);
  REQUIRE_THROWS_AS(sampler.candidates<double>(row({0, 0})), coterie::ValueError);
  REQUIRE_THROWS_AS(sampler.candidates<double>(RowMatrix<double>::Ones(2, 3).eval()), coterie::ShapeError);
}
