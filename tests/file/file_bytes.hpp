#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "coterie/file/safetensors.hpp"

namespace test {

/// The bytes of a safetensors file of this header and so many zeros as data.
inline std::vector<std::byte> file_bytes(std::string_view header, std::size_t zeros = 0) {
  std::vector<std::byte> bytes(8);
  coterie::detail::to_little_endian(static_cast<std::uint64_t>(header.size()), bytes.data());
  for (const char c : header) bytes.push_back(static_cast<std::byte>(c));
  bytes.resize(bytes.size() + zeros);
  return bytes;
}

}  // namespace test
