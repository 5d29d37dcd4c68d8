// libFuzzer target of examples/pretrained: GGUF files, their tensors, and tokenizers in them.
//     fuzz_gguf -max_len=8192 NEW_CORPUS tests/fuzz/gguf_corpus

#include "read_gguf_bytes.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::read_gguf_bytes({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
