// Picks the instruction set of a kernel at run time.
//
// A kernel is written once, as a template over micro-kernels M. At the end of its header COTERIE_KERNEL makes one
// function of it for every instruction set; a file compiles those of the kernels that it calls, and no others.
#pragma once

#include "coterie/core/context.hpp"
#include "coterie/kernel/micro.hpp"

#if defined(__x86_64__) || defined(__i386__)
#define COTERIE_X86 1
#define COTERIE_ON_X86(...) __VA_ARGS__
#define COTERIE_AVX2 __attribute__((target("avx2,fma")))
#define COTERIE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define COTERIE_X86 0
#define COTERIE_ON_X86(...)
#endif

namespace coterie::detail {

/// The widest instruction set of this machine.
inline InstructionSet machine_instruction_set() {
#if COTERIE_X86
  static const InstructionSet found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      return InstructionSet::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
    return InstructionSet::baseline;
  }();
  return found;
#else
  return InstructionSet::baseline;
#endif
}

/// The instruction set that `asked` means here. Throws ValueError where the machine lacks it.
inline InstructionSet resolve(InstructionSet asked) {
  const InstructionSet machine = machine_instruction_set();
  if (asked < InstructionSet::automatic || asked > InstructionSet::avx512)
    fail<ValueError>("Context", "instructions", "automatic, baseline, avx2 or avx512", static_cast<int>(asked));
  if (asked == InstructionSet::automatic) return machine;
  if (asked > machine) {
    constexpr const char* names[] = {"automatic", "baseline", "avx2", "avx512"};
    fail<ValueError>("Context", "instructions", join("at most ", names[static_cast<int>(machine)], " on this machine"),
                     names[static_cast<int>(asked)]);
  }
  return asked;
}

inline namespace COTERIE_FLAGS_NAMESPACE {

// The micro-kernels of one instruction set. Never inlined: between the loops of a tile g++ would keep constants in the
// registers that the sums need, and spill sums in the innermost loop.
#define COTERIE_MICRO(name, target, bytes, vectors, rows_at_once)                                                     \
  template <class T>                                                                                                  \
  struct name : Micro<T, bytes, vectors, rows_at_once> {                                                              \
    using Inline = Micro<T, bytes, vectors, rows_at_once>;                                                            \
    template <class Work>                                                                                             \
    target __attribute__((noinline)) static void apart(const Work& work) {                                            \
      work();                                                                                                         \
    }                                                                                                                 \
    target __attribute__((noinline)) static void scores(const T* const* keys, Index count, Index depth, const T* qt,  \
                                                        T* s, int used) {                                             \
      Inline::scores(keys, count, depth, qt, s, used);                                                                \
    }                                                                                                                 \
    target __attribute__((noinline)) static Index columns(const T* const* rows, Index begin, Index end, Index count,  \
                                                          const T* p, T* out, int used, bool checked) {               \
      return Inline::columns(rows, begin, end, count, p, out, used, checked);                                         \
    }                                                                                                                 \
    target __attribute__((noinline)) static Index rows(const T* const* p, Index count, Index depth, const T* x,       \
                                                       Index columns, T* to, bool checked) {                          \
      return Inline::rows(p, count, depth, x, columns, to, checked);                                                  \
    }                                                                                                                 \
    target __attribute__((noinline)) static void row_product(const T* x, Index depth, const T* w, Index w_stride,     \
                                                             T* y, Index used, bool add) {                            \
      Inline::row_product(x, depth, w, w_stride, y, used, add);                                                       \
    }                                                                                                                 \
    target __attribute__((noinline)) static void row_dots(const T* const* rows, Index depth, const T* q, T* s,        \
                                                          int used) {                                                 \
      Inline::row_dots(rows, depth, q, s, used);                                                                      \
    }                                                                                                                 \
    target __attribute__((noinline)) static void row_values(const T* p, const T* const* rows, Index begin, Index end, \
                                                            Index columns, T* out, T& total) {                        \
      Inline::row_values(p, rows, begin, end, columns, out, total);                                                   \
    }                                                                                                                 \
    target __attribute__((noinline)) static void products(const T* const* a, Index count, Index depth, const T* b,    \
                                                          Index b_stride, T* c, Index c_stride, int used, bool add) { \
      if (add)                                                                                                        \
        Inline::template product<true>(a, count, depth, b, b_stride, c, c_stride, used);                              \
      else                                                                                                            \
        Inline::template product<false>(a, count, depth, b, b_stride, c, c_stride, used);                             \
    }                                                                                                                 \
    target __attribute__((noinline)) static void strips(const T* x, Index rows, const T* d_y, Index tokens, T* d_w,   \
                                                        Index stride, int used) {                                     \
      Strips<T, bytes, vectors, rows_at_once>::run(x, rows, d_y, tokens, d_w, stride, used);                          \
    }                                                                                                                 \
    target __attribute__((noinline)) static void transpose_in(const T* rows, Index stride, int used, Index columns,   \
                                                              T* transposed) {                                        \
      Inline::transpose_in(rows, stride, used, columns, transposed);                                                  \
    }                                                                                                                 \
    target __attribute__((noinline)) static void transpose_out(const T* transposed, int used, Index columns, T* rows, \
                                                               Index stride) {                                        \
      Inline::transpose_out(transposed, used, columns, rows, stride);                                                 \
    }                                                                                                                 \
    target __attribute__((noinline)) static void gather_columns(const T* const* rows, int used, Index columns,        \
                                                                T factor, T* transposed, Index stride) {              \
      Inline::gather_columns(rows, used, columns, factor, transposed, stride);                                        \
    }                                                                                                                 \
    target __attribute__((noinline)) static void scatter_columns(const T* transposed, const T* factor, int count,     \
                                                                 Index columns, T* const* rows) {                     \
      Inline::scatter_columns(transposed, factor, count, columns, rows);                                              \
    }                                                                                                                 \
  };

#if defined(__aarch64__)
COTERIE_MICRO(BaselineMicro, , 16, 4, 6)  // 32 registers
#else
COTERIE_MICRO(BaselineMicro, , 16, 2, 4)
#endif
#if COTERIE_X86
COTERIE_MICRO(Avx2Micro, COTERIE_AVX2, 32, 2, 6)
COTERIE_MICRO(Avx512Micro, COTERIE_AVX512, 64, 4, 6)
#endif
#undef COTERIE_MICRO

/// choose(M()) for the micro-kernels M of a context's instruction set. Throws ValueError where the machine lacks it.
template <class T, class Choose>
auto with_micro(InstructionSet instructions, const Choose& choose) {
  switch (resolve(instructions)) {
#if COTERIE_X86
    case InstructionSet::avx512:
      return choose(Avx512Micro<T>());
    case InstructionSet::avx2:
      return choose(Avx2Micro<T>());
#endif
    default:
      return choose(BaselineMicro<T>());
  }
}

// With COTERIE_EXTERN_KERNELS a file leaves the kernels to another one, which defines COTERIE_INSTANTIATE_KERNELS.
// Both must be compiled with the same instruction set flags.
#if defined(COTERIE_INSTANTIATE_KERNELS)
#define COTERIE_INSTANTIATE(name) \
  template struct name<float>;    \
  template struct name<double>;
#elif defined(COTERIE_EXTERN_KERNELS)
#define COTERIE_INSTANTIATE(name)     \
  extern template struct name<float>; \
  extern template struct name<double>;
#else
#define COTERIE_INSTANTIATE(name)
#endif

// COTERIE_KERNEL(name, implementation, member, parameters, arguments): the struct name<T> with a function of these
// parameters for every instruction set, which calls implementation<T, M>::member with these arguments; name<T>::on(set)
// is a pointer to one.
// Functions are defined outside of the struct, or `extern template` would not keep them from being compiled. Targets
// are additive, so that everything inlines into them in files built with flags of their own.
#define COTERIE_KERNEL(name, implementation, member, parameters, arguments)                                    \
  template <class T>                                                                                           \
  struct name {                                                                                                \
    using Function = void parameters;                                                                          \
    static void baseline parameters;                                                                           \
    COTERIE_ON_X86(static void avx2 parameters; static void avx512 parameters;)                                \
                                                                                                               \
    static Function* on(InstructionSet instructions) {                                                         \
      switch (resolve(instructions)) {                                                                         \
        COTERIE_ON_X86(case InstructionSet::avx512 : return avx512; case InstructionSet::avx2 : return avx2;)  \
        default:                                                                                               \
          return baseline;                                                                                     \
      }                                                                                                        \
    }                                                                                                          \
  };                                                                                                           \
  template <class T>                                                                                           \
  void name<T>::baseline parameters {                                                                          \
    implementation<T, BaselineMicro<T>>::member arguments;                                                     \
  }                                                                                                            \
  COTERIE_ON_X86(                                                                                              \
      template <class T> COTERIE_AVX2 void name<T>::avx2 parameters {                                          \
        implementation<T, Avx2Micro<T>>::member arguments;                                                     \
      } template <class T>                                                                                     \
      COTERIE_AVX512 void name<T>::avx512 parameters { implementation<T, Avx512Micro<T>>::member arguments; }) \
  COTERIE_INSTANTIATE(name)

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
