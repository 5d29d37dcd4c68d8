#include "allocation.hpp"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif

namespace {
std::atomic<long> count{0};
std::atomic<long> until_failure{-1};  // allocations before the one that fails; negative: none fails
void note() { count.fetch_add(1, std::memory_order_relaxed); }
bool fails() {
  return until_failure.load(std::memory_order_relaxed) >= 0 &&
         until_failure.fetch_sub(1, std::memory_order_relaxed) == 0;
}
}  // namespace

long test::allocations() { return count.load(); }

test::FailAllocation::FailAllocation(long n) { until_failure.store(n); }
test::FailAllocation::~FailAllocation() { until_failure.store(-1); }
bool test::FailAllocation::failed() const { return until_failure.load() < 0; }

#if defined(SANITIZED)

// As in <sanitizer/allocator_interface.h>, which g++ does not bring.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, std::size_t),
                                                         void (*)(const volatile void*));

namespace {
[[maybe_unused]] const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, std::size_t) { note(); }, [](const volatile void*) {});
}  // namespace

#elif defined(__GLIBC__)

// The program's own malloc goes before the C library's; operator new, std::vector and Eigen all end here.
namespace {
void* refuse() {
  errno = ENOMEM;
  return nullptr;
}
}  // namespace

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) noexcept {
  note();
  if (fails()) return refuse();
  return __libc_malloc(size);
}
void* calloc(std::size_t number, std::size_t size) noexcept {
  note();
  if (fails()) return refuse();
  return __libc_calloc(number, size);
}
void* realloc(void* p, std::size_t size) noexcept {
  note();
  if (fails()) return refuse();
  return __libc_realloc(p, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  note();
  if (fails()) return refuse();
  return __libc_memalign(alignment, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  note();
  if (fails()) return refuse();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t size) noexcept {
  note();
  *p = fails() ? nullptr : __libc_memalign(alignment, size);
  return *p == nullptr ? ENOMEM : 0;
}
}

#endif

#if defined(SANITIZED) || !defined(__GLIBC__)

namespace {
#if defined(SANITIZED)
void note_new() {}  // the hook counts it
#else
void note_new() { note(); }
#endif

void* take(std::size_t size) {
  note_new();
  if (fails()) throw std::bad_alloc();
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
void* take(std::size_t size, std::align_val_t alignment) {
  note_new();
  if (fails()) throw std::bad_alloc();
  const auto a = static_cast<std::size_t>(alignment);
#if defined(_WIN32)
  void* const p = _aligned_malloc(size == 0 ? 1 : size, a);
#else
  void* const p = std::aligned_alloc(a, (size + a) / a * a);
#endif
  if (p != nullptr) return p;
  throw std::bad_alloc();
}
void give_aligned(void* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}
}  // namespace

void* operator new(std::size_t size) { return take(size); }
void* operator new[](std::size_t size) { return take(size); }
void* operator new(std::size_t size, std::align_val_t alignment) { return take(size, alignment); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return take(size, alignment); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  note_new();
  return fails() ? nullptr : std::malloc(size == 0 ? 1 : size);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  note_new();
  return fails() ? nullptr : std::malloc(size == 0 ? 1 : size);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { give_aligned(p); }
void operator delete[](void* p, std::align_val_t) noexcept { give_aligned(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { give_aligned(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { give_aligned(p); }

#endif
