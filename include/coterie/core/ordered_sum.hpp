// Sums whose order follows from the number of terms alone, so that their bits do too.
#pragma once

#include <algorithm>

#include "coterie/core/context.hpp"

namespace coterie::detail {

/// The sum of term(i) for i in [0, count), in eight interleaved partial sums that are added pairwise at the end.
///
/// Threads and determinism: the order depends on `count` only; compilers may run the eight side by side in vector
/// lanes without changing a bit.
template <class T, class F>
[[gnu::always_inline]] inline T striped_sum(Index count, F term) {
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
  Index i = 0;
  for (; i + 8 <= count; i += 8) {
    s0 += term(i), s1 += term(i + 1), s2 += term(i + 2), s3 += term(i + 3);
    s4 += term(i + 4), s5 += term(i + 5), s6 += term(i + 6), s7 += term(i + 7);
  }
  if (i < count) s0 += term(i);
  if (i + 1 < count) s1 += term(i + 1);
  if (i + 2 < count) s2 += term(i + 2);
  if (i + 3 < count) s3 += term(i + 3);
  if (i + 4 < count) s4 += term(i + 4);
  if (i + 5 < count) s5 += term(i + 5);
  if (i + 6 < count) s6 += term(i + 6);
  return ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7));
}

/// Sums over rows: f(partial, first, last) adds the rows [first, last) into a zeroed partial sum of `size` numbers; the
/// partial sums, at most 64 of them, are then added to `sum` in row order.
template <class T, class F>
void sum_over_rows(Index rows, Index size, T* sum, Context& context, F&& f) {
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const Index chunk = (std::max)(Index(512), (rows + 63) / 64), partials = (rows + chunk - 1) / chunk;
  T* const all = arena.take<T>(partials * size);
  context.for_chunks(rows, chunk, [&](Index first, Index last, Index) {
    T* const partial = all + first / chunk * size;
    std::fill(partial, partial + size, T(0));
    f(partial, first, last);
  });
  for (Index p = 0; p < partials; ++p)
    for (Index j = 0; j < size; ++j) sum[j] += all[p * size + j];
}

}  // namespace coterie::detail
