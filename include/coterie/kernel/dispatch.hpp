// Picks the instruction set once, at run time, and holds the entry points of every kernel.
#pragma once

#include "coterie/core/context.hpp"
#include "coterie/kernel/backward.hpp"
#include "coterie/kernel/forward.hpp"
#include "coterie/kernel/panel.hpp"

#if defined(__x86_64__) || defined(__i386__)
#define COTERIE_X86 1
#else
#define COTERIE_X86 0
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
  };

#if defined(__aarch64__)
COTERIE_MICRO(BaselineMicro, , 16, 4, 6)  // 32 registers
#else
COTERIE_MICRO(BaselineMicro, , 16, 2, 4)
#endif
#if COTERIE_X86
#define COTERIE_AVX2 __attribute__((target("avx2,fma")))
#define COTERIE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
COTERIE_MICRO(Avx2Micro, COTERIE_AVX2, 32, 2, 6)
COTERIE_MICRO(Avx512Micro, COTERIE_AVX512, 64, 4, 6)
#endif
#undef COTERIE_MICRO

// One entry point per kernel and instruction set; targets are additive, so that they also inline into files built with
// flags of their own.
#define COTERIE_ENTRY_POINTS(name, target, micro)                                                                     \
  template <class T>                                                                                                  \
  target void forward_##name(const AttentionArguments<T>& arguments, T* scratch) {                                    \
    Forward<T, micro<T>>::run(arguments, scratch);                                                                    \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void backward_##name(const AttentionArguments<T>& arguments, const AttentionGradientArguments<T>& gradients, \
                              T* scratch) {                                                                           \
    Backward<T, micro<T>>::run(arguments, gradients, scratch);                                                        \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void add_rows_##name(const RowSums<T>& sums) {                                                               \
    Tile<T, micro<T>>::add_rows(sums);                                                                                \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void pack_##name(const PanelSource<T>& source, T* panels) {                                                  \
    Panel<T, micro<T>>::pack(source, panels);                                                                         \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void product_##name(const ProductArguments<T>& arguments) {                                                  \
    Panel<T, micro<T>>::product(arguments);                                                                           \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void weight_gradient_##name(const WeightGradientArguments<T>& arguments) {                                   \
    Panel<T, micro<T>>::weight_gradient(arguments);                                                                   \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void nearest_##name(const NearestArguments<T>& arguments, T* scratch) {                                      \
    Panel<T, micro<T>>::nearest(arguments, scratch);                                                                  \
  }

COTERIE_ENTRY_POINTS(baseline, , BaselineMicro)
#if COTERIE_X86
COTERIE_ENTRY_POINTS(avx2, COTERIE_AVX2, Avx2Micro)
COTERIE_ENTRY_POINTS(avx512, COTERIE_AVX512, Avx512Micro)
#undef COTERIE_AVX2
#undef COTERIE_AVX512
#endif
#undef COTERIE_ENTRY_POINTS

// With COTERIE_EXTERN_KERNELS a file leaves the kernels to another one, which defines COTERIE_INSTANTIATE_KERNELS.
// Both must be compiled with the same instruction set flags.
#define COTERIE_KERNEL_LIST(prefix, name, T)                                                                       \
  prefix template void forward_##name<T>(const AttentionArguments<T>&, T*);                                        \
  prefix template void backward_##name<T>(const AttentionArguments<T>&, const AttentionGradientArguments<T>&, T*); \
  prefix template void add_rows_##name<T>(const RowSums<T>&);                                                      \
  prefix template void pack_##name<T>(const PanelSource<T>&, T*);                                                  \
  prefix template void product_##name<T>(const ProductArguments<T>&);                                              \
  prefix template void weight_gradient_##name<T>(const WeightGradientArguments<T>&);                               \
  prefix template void nearest_##name<T>(const NearestArguments<T>&, T*);
#if COTERIE_X86
#define COTERIE_ALL_KERNELS(prefix, T)     \
  COTERIE_KERNEL_LIST(prefix, baseline, T) \
  COTERIE_KERNEL_LIST(prefix, avx2, T)     \
  COTERIE_KERNEL_LIST(prefix, avx512, T)
#else
#define COTERIE_ALL_KERNELS(prefix, T) COTERIE_KERNEL_LIST(prefix, baseline, T)
#endif
#if defined(COTERIE_INSTANTIATE_KERNELS)
COTERIE_ALL_KERNELS(, float)
COTERIE_ALL_KERNELS(, double)
#elif defined(COTERIE_EXTERN_KERNELS)
COTERIE_ALL_KERNELS(extern, float)
COTERIE_ALL_KERNELS(extern, double)
#endif

/// The entry points of one instruction set.
template <class T>
struct KernelTable {
  void (*forward)(const AttentionArguments<T>&, T*);
  void (*backward)(const AttentionArguments<T>&, const AttentionGradientArguments<T>&, T*);
  void (*add_rows)(const RowSums<T>&);
  void (*pack)(const PanelSource<T>&, T*);
  void (*product)(const ProductArguments<T>&);
  void (*weight_gradient)(const WeightGradientArguments<T>&);
  void (*nearest)(const NearestArguments<T>&, T*);
  Index (*forward_scratch)(const PartSizes&);  // numbers of scratch memory
  Index (*backward_scratch)(const PartSizes&);
  Index panel_width;  // columns of a packed panel
  Index (*nearest_scratch)(Index d);
};

#define COTERIE_TABLE(name, micro)                                                                          \
  KernelTable<T> {                                                                                          \
    forward_##name<T>, backward_##name<T>, add_rows_##name<T>, pack_##name<T>, product_##name<T>,           \
        weight_gradient_##name<T>, nearest_##name<T>, Forward<T, micro<T>>::scratch_size,                   \
        Backward<T, micro<T>>::scratch_size, Panel<T, micro<T>>::width, Panel<T, micro<T>>::nearest_scratch \
  }

/// The kernels for a context's instruction set; throws ValueError where the machine lacks it.
template <class T>
const KernelTable<T>& kernels(InstructionSet instructions) {
  static const KernelTable<T> baseline = COTERIE_TABLE(baseline, BaselineMicro);
#if COTERIE_X86
  static const KernelTable<T> avx2 = COTERIE_TABLE(avx2, Avx2Micro);
  static const KernelTable<T> avx512 = COTERIE_TABLE(avx512, Avx512Micro);
  switch (resolve(instructions)) {
    case InstructionSet::avx512:
      return avx512;
    case InstructionSet::avx2:
      return avx2;
    default:
      return baseline;
  }
#else
  resolve(instructions);
  return baseline;
#endif
}

#undef COTERIE_TABLE
#undef COTERIE_ALL_KERNELS
#undef COTERIE_KERNEL_LIST

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
