#include "pretrained/dequantise.hpp"

#include <cmath>
#include <functional>
#include <limits>

#include "catch.hpp"
#include "errors.hpp"
#include "gguf_writer.hpp"
#include "pretrained/gguf.hpp"
#include "random.hpp"

using pretrained::FileError;
using pretrained::GgufType;
using test::contains;
using test::GgufBytes;
using test::message_of;

namespace {

using coterie::Index;
using coterie::RowMatrix;
using coterie::View;

// The two halves 0.5 and -2, whose products with small integers are exact.
constexpr std::uint16_t half = 0x3800, minus_two = 0xC000;

// The numbers of one block of `count`.
std::vector<float> block(GgufType type, std::uint64_t count, const GgufBytes& bytes) {
  const std::vector<std::byte> file = test::GgufWriter().add("t", {count}, type, bytes.bytes()).bytes();
  const RowMatrix<float> row = pretrained::dequantise(pretrained::parse_gguf(file), "t", 1, static_cast<Index>(count));
  return {row.data(), row.data() + row.size()};
}

std::vector<float> formula(int count, const std::function<float(int)>& f) {
  std::vector<float> numbers;
  for (int i = 0; i < count; ++i) numbers.push_back(f(i));
  return numbers;
}

// Bytes of quants that differ: a small permutation of all bits.
std::uint8_t mixed(int i) { return static_cast<std::uint8_t>(i * 37 + 11 + i / 7); }

void append_mixed(GgufBytes& bytes, int count, int from = 0) {
  for (int i = 0; i < count; ++i) bytes.number(mixed(from + i));
}

// Of 256 numbers, the byte and the shift of number i where 128 numbers share 32 bytes, two bits each.
int two_bits(int i, int from = 0) {
  const int group = i / 128, part = i / 32 % 4, byte = 32 * group + i % 32;
  return mixed(from + byte) / (1 << (2 * part)) % 4;
}
// The same where 64 numbers share 32 bytes, four bits each.
int four_bits(int i, int from = 0) {
  const int byte = i / 64 * 32 + i % 32;
  return i / 32 % 2 == 0 ? mixed(from + byte) % 16 : mixed(from + byte) / 16;
}

// Eight scales and minima of six bits in the 12 bytes of Q4_K and Q5_K.
void append_scales(GgufBytes& bytes, const std::vector<int>& s, const std::vector<int>& m) {
  for (std::size_t j = 0; j < 4; ++j) bytes.number(static_cast<std::uint8_t>(s[j] + s[j + 4] / 16 * 64));
  for (std::size_t j = 0; j < 4; ++j) bytes.number(static_cast<std::uint8_t>(m[j] + m[j + 4] / 16 * 64));
  for (std::size_t j = 4; j < 8; ++j) bytes.number(static_cast<std::uint8_t>(s[j] % 16 + m[j] % 16 * 16));
}
const std::vector<int> scales{1, 63, 17, 32, 5, 62, 16, 33}, minima{0, 63, 3, 48, 18, 47, 15, 61};

}  // namespace

TEST_CASE("pretrained: F32, F16 and BF16 are read exactly") {
  const float inf = std::numeric_limits<float>::infinity();
  REQUIRE(block(GgufType::f32, 3, GgufBytes().number(1.5f).number(-0.0f).number(1e-42f)) ==
          std::vector<float>{1.5f, -0.0f, 1e-42f});
  GgufBytes halves, brains;
  for (const int bits : {0x3C00, 0xC100, 0x0001, 0x7BFF, 0xFC00, 0x8000})
    halves.number(static_cast<std::uint16_t>(bits));
  REQUIRE(block(GgufType::f16, 6, halves) == std::vector<float>{1, -2.5f, 0x1p-24f, 65504, -inf, -0.0f});
  for (const int bits : {0x3F80, 0xC020, 0x0001, 0x7F7F}) brains.number(static_cast<std::uint16_t>(bits));
  REQUIRE(block(GgufType::bf16, 4, brains) == std::vector<float>{1, -2.5f, 0x1p-133f, 0x1.FEp127f});
  REQUIRE(std::isnan(block(GgufType::f16, 1, GgufBytes().number(std::uint16_t(0x7E00)))[0]));
}

TEST_CASE("pretrained: blocks of 32 numbers") {
  GgufBytes q8 = GgufBytes().number(half);
  for (int i = 0; i < 32; ++i) q8.number(static_cast<std::int8_t>(8 * i - 128));
  REQUIRE(block(GgufType::q8_0, 32, q8) == formula(32, [](int i) { return 0.5f * static_cast<float>(8 * i - 128); }));

  // Byte i holds number i in its low half and number i + 16 in its high half: here i and 15 - i.
  GgufBytes nibbles;
  for (int i = 0; i < 16; ++i) nibbles.number(static_cast<std::uint8_t>(i + 16 * (15 - i)));
  const auto q = [](int i) { return static_cast<float>(i < 16 ? i : 31 - i); };
  REQUIRE(block(GgufType::q4_0, 32, GgufBytes().number(half).append(nibbles.bytes())) ==
          formula(32, [&](int i) { return 0.5f * (q(i) - 8); }));
  REQUIRE(block(GgufType::q4_1, 32, GgufBytes().number(half).number(minus_two).append(nibbles.bytes())) ==
          formula(32, [&](int i) { return 0.5f * q(i) - 2; }));

  // Bit i of the word in front is the fifth bit of number i: here of those that 3 divides.
  std::uint32_t fifths = 0;
  for (int i = 0; i < 32; i += 3) fifths |= std::uint32_t(1) << i;
  const auto five = [&](int i) { return q(i) + (i % 3 == 0 ? 16.0f : 0.0f); };
  REQUIRE(block(GgufType::q5_0, 32, GgufBytes().number(half).number(fifths).append(nibbles.bytes())) ==
          formula(32, [&](int i) { return 0.5f * (five(i) - 16); }));
  REQUIRE(
      block(GgufType::q5_1, 32, GgufBytes().number(half).number(minus_two).number(fifths).append(nibbles.bytes())) ==
      formula(32, [&](int i) { return 0.5f * five(i) - 2; }));
}

TEST_CASE("pretrained: Q2_K and Q3_K") {
  GgufBytes q2;
  append_mixed(q2, 16);
  append_mixed(q2, 64, 100);
  q2.number(half).number(minus_two);
  REQUIRE(block(GgufType::q2_k, 256, q2) == formula(256, [](int i) {
            const int scale = mixed(i / 16);
            return 0.5f * static_cast<float>(scale % 16 * two_bits(i, 100)) + 2 * static_cast<float>(scale / 16);
          }));

  GgufBytes q3;
  append_mixed(q3, 32);       // third bits
  append_mixed(q3, 64, 100);  // quants
  append_mixed(q3, 12, 200);  // scales
  q3.number(half);
  REQUIRE(block(GgufType::q3_k, 256, q3) == formula(256, [](int i) {
            // Scale j: four low bits of bytes 0..7, first the low halves; two high bits of bytes 8..11, by fours.
            const int j = i / 16;
            const int low = j < 8 ? mixed(200 + j) % 16 : mixed(200 + j - 8) / 16;
            const int high = mixed(200 + 8 + j % 4) / (1 << (2 * (j / 4))) % 4;
            const bool third = mixed(i % 32) / (1 << (i / 32)) % 2 == 1;
            return 0.5f * static_cast<float>((low + 16 * high - 32) * (two_bits(i, 100) - (third ? 0 : 4)));
          }));
}

TEST_CASE("pretrained: Q4_K, Q5_K and Q6_K") {
  GgufBytes q4 = GgufBytes().number(half).number(minus_two);
  append_scales(q4, scales, minima);
  append_mixed(q4, 128);
  const auto linear = [](int i, int q) {
    const auto j = static_cast<std::size_t>(i / 32);
    return 0.5f * static_cast<float>(scales[j] * q) + 2 * static_cast<float>(minima[j]);
  };
  REQUIRE(block(GgufType::q4_k, 256, q4) == formula(256, [&](int i) { return linear(i, four_bits(i)); }));

  GgufBytes q5 = GgufBytes().number(half).number(minus_two);
  append_scales(q5, scales, minima);
  append_mixed(q5, 32, 300);
  append_mixed(q5, 128);
  REQUIRE(block(GgufType::q5_k, 256, q5) == formula(256, [&](int i) {
            const int fifth = mixed(300 + i % 32) / (1 << (i / 32)) % 2;
            return linear(i, four_bits(i) + 16 * fifth);
          }));

  GgufBytes q6;
  append_mixed(q6, 128);
  append_mixed(q6, 64, 300);
  for (int j = 0; j < 16; ++j) q6.number(static_cast<std::int8_t>(17 * j - 128));
  q6.number(half);
  REQUIRE(block(GgufType::q6_k, 256, q6) == formula(256, [](int i) {
            // Of 128 numbers: 64 bytes hold numbers 0..63 in their low halves and 64..127 in their high ones.
            const int byte = i / 128 * 64 + i % 64;
            const int low = i % 128 < 64 ? mixed(byte) % 16 : mixed(byte) / 16;
            return 0.5f * static_cast<float>((17 * (i / 16) - 128) * (low + 16 * two_bits(i, 300) - 32));
          }));
}

TEST_CASE("pretrained: rows of a tensor are found, in a part of a matrix too") {
  GgufBytes bytes;
  for (int row = 0; row < 6; ++row)
    for (int j = 0; j < 2; ++j) {
      bytes.number(half);
      for (int i = 0; i < 32; ++i) bytes.number(static_cast<std::int8_t>(10 * row + 5 * j));
    }
  const std::vector<std::byte> written = test::GgufWriter().add("t", {64, 3, 2}, GgufType::q8_0, bytes.bytes()).bytes();
  const pretrained::GgufFile file = pretrained::parse_gguf(written);
  const RowMatrix<float> all = pretrained::dequantise(file, "t", 6, 64);
  for (Index i = 0; i < 6; ++i)
    for (Index j = 0; j < 64; ++j) REQUIRE(all(i, j) == static_cast<float>(10 * i + (j < 32 ? 0 : 5)) / 2);
  RowMatrix<float> wide = RowMatrix<float>::Constant(2, 66, -7);
  pretrained::dequantise_rows(file, file.tensor("t"), 3, View<float>(wide.data() + 1, 2, 64, 66));
  REQUIRE(wide.block(0, 1, 2, 64) == all.middleRows(3, 2));
  REQUIRE((wide.col(0).array() == -7).all());
  REQUIRE((wide.col(65).array() == -7).all());
}

TEST_CASE("pretrained: what cannot be dequantised is refused, by tensor and type") {
  std::vector<std::byte> written = test::GgufWriter()
                                       .add("iq", {32, 2}, static_cast<GgufType>(20), std::vector<std::byte>(36))
                                       .add("ok", {32, 2}, GgufType::q8_0, std::vector<std::byte>(68))
                                       .bytes();
  const pretrained::GgufFile file = pretrained::parse_gguf(written, "x");
  const auto fault = [](auto&& f) { return message_of<FileError>(f); };
  REQUIRE(contains(fault([&] { pretrained::dequantise(file, "iq", 2, 32); }),
                   "'x': tensor 'iq': type: expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, "
                   "Q5_K or Q6_K, got IQ4_NL"));
  REQUIRE(contains(fault([&] { pretrained::dequantise(file, "no", 2, 32); }),
                   "'x': tensor 'no': expected one of this name, got none"));
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{32, 2}, {2, 64}, {1, 32}, {Index(1) << 60, 32}})
    REQUIRE(contains(
        fault([&, r = rows, c = cols] { pretrained::dequantise(file, "ok", r, c); }),
        "'x': tensor 'ok': expected " + std::to_string(rows) + " rows of " + std::to_string(cols) + ", got 2 of 32"));
  RowMatrix<float> out = RowMatrix<float>::Constant(2, 32, 3);
  const pretrained::GgufTensor& tensor = file.tensor("ok");
  for (const Index first : {Index(-1), Index(1), Index(3), (std::numeric_limits<Index>::max)()})
    REQUIRE(contains(fault([&] { pretrained::dequantise_rows(file, tensor, first, out); }),
                     "rows: expected 2 from " + std::to_string(first) + " on, got 2 in all"));
  REQUIRE((out.array() == 3).all());
}
