// libFuzzer target of the reader: safetensors files, and layers in them.
//     fuzz_safetensors -max_len=4096 NEW_CORPUS tests/fuzz/corpus

#include "read_bytes.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::read_bytes({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
