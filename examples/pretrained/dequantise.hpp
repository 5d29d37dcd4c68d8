// Tensors of a GGUF file as float: plain numbers, and the blocks of quantised ones.
#pragma once

#include <Eigen/Core>
#include <coterie/core/matrix.hpp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "gguf_file.hpp"

namespace pretrained {

using coterie::RowMatrix;
using coterie::View;

namespace detail {

inline float half_at(const std::byte* bytes) { return static_cast<float>(little_endian<Eigen::half>(bytes)); }
inline int byte_at(const std::byte* bytes, int i) { return std::to_integer<int>(bytes[i]); }
inline int signed_at(const std::byte* bytes, int i) { return little_endian<std::int8_t>(bytes + i); }

// A function for each type of block: `in` is the block, `out` its numbers. Products and sums are rounded one by one, as
// in ggml, where the compiler makes no multiply-adds of its own.

inline void dequantise_f32(const std::byte* in, float* out) { *out = little_endian<float>(in); }
inline void dequantise_f16(const std::byte* in, float* out) { *out = half_at(in); }
inline void dequantise_bf16(const std::byte* in, float* out) {
  *out = Eigen::numext::bit_cast<float>(static_cast<std::uint32_t>(little_endian<std::uint16_t>(in)) << 16);
}

/// Block: half d, 32 signed bytes q.  x = d q
inline void dequantise_q8_0(const std::byte* in, float* out) {
  const float d = half_at(in);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(signed_at(in + 2, i));
}

/// Block: half d, 16 bytes: low halves are the numbers q of 0..15, high ones those of 16..31.  x = d (q - 8)
inline void dequantise_q4_0(const std::byte* in, float* out) {
  const float d = half_at(in);
  for (int i = 0; i < 16; ++i) {
    const int q = byte_at(in + 2, i);
    out[i] = d * static_cast<float>((q & 15) - 8);
    out[i + 16] = d * static_cast<float>((q >> 4) - 8);
  }
}

/// Block: half d, half m, 16 bytes as in Q4_0.  x = d q + m
inline void dequantise_q4_1(const std::byte* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  for (int i = 0; i < 16; ++i) {
    const int q = byte_at(in + 4, i);
    out[i] = d * static_cast<float>(q & 15) + m;
    out[i + 16] = d * static_cast<float>(q >> 4) + m;
  }
}

/// Block: half d, 32 fifth bits, 16 bytes as in Q4_0.  x = d (q - 16)
inline void dequantise_q5_0(const std::byte* in, float* out) {
  const float d = half_at(in);
  const auto high = little_endian<std::uint32_t>(in + 2);
  for (int i = 0; i < 16; ++i) {
    const int q = byte_at(in + 6, i);
    out[i] = d * static_cast<float>(((q & 15) | static_cast<int>(high >> i & 1) << 4) - 16);
    out[i + 16] = d * static_cast<float>(((q >> 4) | static_cast<int>(high >> (i + 16) & 1) << 4) - 16);
  }
}

/// Block: half d, half m, 32 fifth bits, 16 bytes as in Q4_0.  x = d q + m
inline void dequantise_q5_1(const std::byte* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  const auto high = little_endian<std::uint32_t>(in + 4);
  for (int i = 0; i < 16; ++i) {
    const int q = byte_at(in + 8, i);
    out[i] = d * static_cast<float>((q & 15) | static_cast<int>(high >> i & 1) << 4) + m;
    out[i + 16] = d * static_cast<float>((q >> 4) | static_cast<int>(high >> (i + 16) & 1) << 4) + m;
  }
}

/// Block of 256: 16 bytes of a scale s (low half) and a minimum m for 16 numbers each, 64 bytes of q, half d, half e.
/// Of each 32 bytes the lowest two bits are the first 32 numbers of 128, and so on.  x = d s q - e m
inline void dequantise_q2_k(const std::byte* in, float* out) {
  const float d = half_at(in + 80), e = half_at(in + 82);
  for (int i = 0; i < 256; ++i) {
    const int scale = byte_at(in, i / 16);
    const int q = byte_at(in + 16, i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(q) - e * static_cast<float>(scale >> 4);
  }
}

/// Block of 256: 32 bytes of third bits, 64 bytes of q as in Q2_K, 12 bytes of 16 scales s of 6 bits, half d.
/// x = d (s - 32) (q - 4), q with its third bit
inline void dequantise_q3_k(const std::byte* in, float* out) {
  const float d = half_at(in + 108);
  const std::byte* const scales = in + 96;
  for (int i = 0; i < 256; ++i) {
    const int j = i / 16;
    const int low = j < 8 ? byte_at(scales, j) & 15 : byte_at(scales, j - 8) >> 4;
    const int s = low | (byte_at(scales, 8 + j % 4) >> (j / 4 * 2) & 3) << 4;
    const int q = byte_at(in + 32, i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    const int high = byte_at(in, i % 32) >> (i / 32) & 1;
    out[i] = d * static_cast<float>(s - 32) * static_cast<float>((q | high << 2) - 4);
  }
}

/// The scale and the minimum, 6 bits each, of the numbers 32 j and on of a block of Q4_K or Q5_K.
struct ScaleAndMinimum {
  int scale = 0, minimum = 0;
};
inline ScaleAndMinimum scale_and_minimum(const std::byte* in, int j) {
  if (j < 4) return {byte_at(in, j) & 63, byte_at(in, j + 4) & 63};
  const int low = byte_at(in, j + 4);
  return {(low & 15) | (byte_at(in, j - 4) >> 6) << 4, (low >> 4) | (byte_at(in, j) >> 6) << 4};
}

/// Block of 256: half d, half e, 12 bytes of 8 scales s and minima m, 128 bytes of q: of each 32 bytes the low halves
/// are 32 numbers, the high ones the next 32.  x = d s q - e m
inline void dequantise_q4_k(const std::byte* in, float* out) {
  const float d = half_at(in), e = half_at(in + 2);
  for (int j = 0; j < 8; ++j) {
    const auto [s, m] = scale_and_minimum(in + 4, j);
    const float scale = d * static_cast<float>(s), minimum = e * static_cast<float>(m);
    for (int i = 0; i < 32; ++i) {
      const int q = byte_at(in + 16, j / 2 * 32 + i) >> (j % 2 * 4) & 15;
      out[32 * j + i] = scale * static_cast<float>(q) - minimum;
    }
  }
}

/// Block of 256: half d, half e, scales and minima as in Q4_K, 32 bytes of fifth bits, 128 bytes of q as in Q4_K.
/// x = d s q - e m
inline void dequantise_q5_k(const std::byte* in, float* out) {
  const float d = half_at(in), e = half_at(in + 2);
  for (int j = 0; j < 8; ++j) {
    const auto [s, m] = scale_and_minimum(in + 4, j);
    const float scale = d * static_cast<float>(s), minimum = e * static_cast<float>(m);
    for (int i = 0; i < 32; ++i) {
      const int q = byte_at(in + 48, j / 2 * 32 + i) >> (j % 2 * 4) & 15;
      const int high = byte_at(in + 16, i) >> j & 1;
      out[32 * j + i] = scale * static_cast<float>(q | high << 4) - minimum;
    }
  }
}

/// Block of 256: 128 bytes of low halves, 64 of high two bits, 16 signed scales s, half d.  x = d s (q - 32)
inline void dequantise_q6_k(const std::byte* in, float* out) {
  const float d = half_at(in + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, part = i % 128 / 32, j = i % 32;
    const int low = byte_at(in, half * 64 + part % 2 * 32 + j) >> (part / 2 * 4) & 15;
    const int high = byte_at(in + 128, half * 32 + j) >> (part * 2) & 3;
    out[i] = d * static_cast<float>(signed_at(in + 192, i / 16)) * static_cast<float>((low | high << 4) - 32);
  }
}

using DequantiseBlock = void (*)(const std::byte* in, float* out);

/// The function of a type; null if there is none.
inline DequantiseBlock dequantise_block(GgufType type) {
  switch (type) {
    case GgufType::f32:
      return dequantise_f32;
    case GgufType::f16:
      return dequantise_f16;
    case GgufType::bf16:
      return dequantise_bf16;
    case GgufType::q8_0:
      return dequantise_q8_0;
    case GgufType::q4_0:
      return dequantise_q4_0;
    case GgufType::q4_1:
      return dequantise_q4_1;
    case GgufType::q5_0:
      return dequantise_q5_0;
    case GgufType::q5_1:
      return dequantise_q5_1;
    case GgufType::q2_k:
      return dequantise_q2_k;
    case GgufType::q3_k:
      return dequantise_q3_k;
    case GgufType::q4_k:
      return dequantise_q4_k;
    case GgufType::q5_k:
      return dequantise_q5_k;
    case GgufType::q6_k:
      return dequantise_q6_k;
  }
  return nullptr;
}

}  // namespace detail

/// Copies rows of a tensor of `file` into `out`, from `first` on, as float.
/// Requires: a type that is decoded here: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K; as many columns
///   as the tensor has; rows of it (FileError, which names the tensor).
/// Overwrites out; nothing on error.
/// Accuracy: the bits of ggml's own functions, where the compiler makes no multiply-adds of its own.
/// Source: the block formats of github.com/ggml-org/ggml, src/ggml-common.h and ggml-quants.c.
inline void dequantise_rows(const GgufFile& file, const GgufTensor& tensor, Index first, View<float> out) {
  const std::string what = "tensor " + detail::quoted(tensor.name) + ": ";
  const detail::GgufTypeInfo* const info = detail::gguf_type_info(static_cast<std::uint32_t>(tensor.type));
  const detail::DequantiseBlock decode = detail::dequantise_block(tensor.type);
  if (!info || !decode)
    file.fail(what +
              "type: expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K, got " +
              (info ? std::string(info->name) : "an unknown one"));
  if (out.cols() != tensor.cols())
    file.fail(what + "columns: expected " + std::to_string(out.cols()) + ", got " + std::to_string(tensor.cols()));
  if (first < 0 || out.rows() > tensor.rows() - first)
    file.fail(what + "rows: expected " + std::to_string(out.rows()) + " from " + std::to_string(first) + " on, got " +
              std::to_string(tensor.rows()) + " in all");
  const Index blocks = tensor.cols() / info->block;
  const std::byte* in = tensor.bytes.data() + first * blocks * info->bytes;
  for (Index i = 0; i < out.rows(); ++i)
    for (Index j = 0; j < blocks; ++j, in += info->bytes) decode(in, &out(i, j * info->block));
}

/// A tensor as float, rows x cols.
/// Requires: a tensor of this name; its row length cols and as many rows, of one or more sizes (FileError); and what
///   dequantise_rows requires.
/// Allocates the matrix, once the sizes are known to be the tensor's.
inline RowMatrix<float> dequantise(const GgufFile& file, std::string_view name, Index rows, Index cols) {
  const GgufTensor& tensor = file.tensor(name);
  if (tensor.rows() != rows || tensor.cols() != cols)
    file.fail("tensor " + detail::quoted(name) + ": expected " + std::to_string(rows) + " rows of " +
              std::to_string(cols) + ", got " + std::to_string(tensor.rows()) + " of " + std::to_string(tensor.cols()));
  RowMatrix<float> result(rows, cols);
  dequantise_rows(file, tensor, 0, result);
  return result;
}

}  // namespace pretrained
