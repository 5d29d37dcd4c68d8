// What an attention kernel gets: one part of a plan for one head, as pointers, intervals and numbers.
#pragma once

#include <cstdint>

#include "coterie/core/interval.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/core/random.hpp"
#include "coterie/kernel/lanes.hpp"

namespace coterie::detail {

/// Rows in scratch memory are padded to this many numbers, so that whole vectors fit.
inline constexpr Index row_padding = 16;
constexpr Index padded(Index n) { return (n + row_padding - 1) / row_padding * row_padding; }

/// A read-only source of rows: `row(i)` for i below `rows` lies in `data`, above in `memory`.
template <class T>
struct RowSource {
  const T* data = nullptr;
  Index stride = 0;
  Index rows = 0;
  const T* memory = nullptr;
  Index memory_stride = 0;

  const T* row(Index i) const { return i < rows ? data + i * stride : memory + (i - rows) * memory_stride; }
};

/// Rows of a partial sum that belong to keys [begin, end) of the group, from row `row` on. Keys of one block lie in one
/// range.
struct PartialRange {
  std::int32_t begin = 0, end = 0;
  Index row = 0;
};

/// Where the softmaxes of rows stand. reference: subtracted from logits to base 2, the largest one or less than it by
/// at most max_slack; a row's probabilities are 2^(logit - reference) * inverse. lse: log-sum-exp to base e, minus
/// infinity where nothing is seen. Arrays of rows x heads; null where not wanted.
template <class T>
struct SoftmaxStates {
  T *reference = nullptr, *inverse = nullptr, *lse = nullptr;
  Index stride = 0;

  /// From row `row` and head `head` on.
  SoftmaxStates from(Index row, Index head) const {
    const auto at = [&](T* p) { return p ? p + row * stride + head : nullptr; };
    return {at(reference), at(inverse), at(lse), stride};
  }
};

/// What the scratch memory of a kernel depends on.
struct PartSizes {
  Index d = 0, dv = 0;
  Index bias_count = 0, relative_count = 0;
  Index keys = 0;  // key rows that there are
};

/// One part of a plan for one head: what the forward tile reads and writes.
template <class T>
struct AttentionArguments {
  Index entries = 0;                      // number of entries of this part
  const std::int32_t* rows = nullptr;     // query row of each entry
  const Interval* visible = nullptr;      // per entry
  const Interval* visible_too = nullptr;  // per entry, or null
  const std::int32_t* keys = nullptr;     // key row of each rank of the group
  RowSource<T> q, k, v;
  Index d = 0, dv = 0;
  T scale = 1;
  T soft_cap = 0;           // bound of logits to base 2, before the bias; 0: none
  const T* bias = nullptr;  // bias by distance; see AttentionTerms
  Index bias_first = 0, bias_count = 0;
  const T* relative_keys = nullptr;    // row r: of distance relative_first + r; or null
  const T* relative_values = nullptr;  // or null
  Index relative_keys_stride = 0, relative_values_stride = 0;
  Index relative_first = 0, relative_count = 0;
  const std::int32_t* query_positions = nullptr;
  const std::int32_t* key_positions = nullptr;
  std::uint64_t dropout_call = 0;   // seed, step and head
  std::uint32_t dropout_bound = 0;  // pairs whose bits are below are dropped; 0: none
  T dropout_scale = 1;              // factor of the pairs that are kept
  bool by_entry = false;            // out and states: row e of the part instead of row rows[e]
  T* out = nullptr;
  Index out_stride = 0;
  SoftmaxStates<T> states;

  /// Puts out and states where query rows have theirs.
  void use_rows(View<T> rows_out, const SoftmaxStates<T>& row_states) {
    out = rows_out.data();
    out_stride = rows_out.stride();
    states = row_states;
  }
  /// Puts them where entries have theirs, this part's from entry `first` on.
  void use_entries(View<T> entry_out, const SoftmaxStates<T>& entry_states, Index first) {
    by_entry = true;
    out = entry_out.row(first);
    out_stride = entry_out.stride();
    states = entry_states.from(first, 0);
  }

  /// The part that this thread will probably turn to next, or null: its first rows are prefetched.
  const AttentionArguments* next = nullptr;

  // Copies of the keys and values from rank gathered_first on, side by side; or null. See Tile::gather.
  const T *gathered_k = nullptr, *gathered_v = nullptr;
  Index gathered_first = 0;

  /// The key and the value of a rank.
  void locate(Index rank, const T*& key, const T*& value) const {
    if (gathered_k) {
      key = gathered_k + (rank - gathered_first) * padded(d);
      value = gathered_v + (rank - gathered_first) * padded(dv);
      return;
    }
    const Index row = keys[rank];
    if (row < k.rows) [[likely]] {
      key = k.data + row * k.stride;
      value = v.data + row * v.stride;
    } else {
      key = k.row(row);
      value = v.row(row);
    }
  }

  /// Whether keys that follow each other, and values, leave no gap in memory; and whether those of ranks [begin, end)
  /// follow each other. The machine finds such rows before they are read.
  bool without_gaps() const { return k.stride == d && v.stride == dv; }
  bool side_by_side(Index begin, Index end) const {
    return without_gaps() && keys[end - 1] - keys[begin] == end - 1 - begin;
  }

  std::uint32_t query_bits(Index entry) const { return row_bits(dropout_call, RowKind::query, rows[entry]); }
  std::uint32_t key_bits(Index rank) const {
    const Index row = keys[rank];
    return row < k.rows ? row_bits(dropout_call, RowKind::key, row)
                        : row_bits(dropout_call, RowKind::memory, row - k.rows);
  }

  /// The sizes without `keys`, on which only copies depend.
  PartSizes sizes() const { return {d, dv, bias_count, relative_count, 0}; }

  Index target(Index entry) const { return by_entry ? entry : rows[entry]; }
  Index query_position(Index entry) const { return query_positions ? query_positions[rows[entry]] : rows[entry]; }
  bool has_position(Index rank) const { return keys[rank] < k.rows; }  // memory has none
  Index key_position(Index rank) const { return key_positions ? key_positions[keys[rank]] : keys[rank]; }
};

/// What the backward tile reads and writes beside that; out and states are read.
template <class T>
struct AttentionGradientArguments {
  const T* d_out = nullptr;  // by query row
  Index d_out_stride = 0;
  const T* weight = nullptr;  // per entry: factor of d_out, or null
  const T* d_lse = nullptr;   // by query row, or null
  Index d_lse_stride = 0;
  bool by_entry = false;  // d_q: row e of the part instead of row rows[e]
  T* d_q = nullptr;       // added to
  Index d_q_stride = 0;
  const PartialRange* ranges = nullptr;  // ranges of the partial sums, ascending
  Index range_count = 0;
  T* d_k = nullptr;  // partial sums: rows of padded(d) and padded(dv) numbers, added to
  T* d_v = nullptr;
  T* d_bias = nullptr;             // partial sum: bias_count numbers, added to; or null
  T* d_relative_keys = nullptr;    // partial sum: relative_count rows of padded(d) numbers, added to; or null
  T* d_relative_values = nullptr;  // the same, of padded(dv)
  T* d_scale = nullptr;            // partial sum: one number, added to; or null
};

/// Rows of a partial sum, to be added to rows of a matrix: to[rows[i] - first][c] += from[i][c].
template <class T>
struct RowSums {
  const T* from = nullptr;
  Index from_stride = 0;
  T* to = nullptr;
  Index to_stride = 0;
  const std::int32_t* rows = nullptr;
  Index first = 0, count = 0, columns = 0;
};

/// Keys of a block: key lists are cut at multiples of it.
inline constexpr int key_block = 64;

/// A row's reference moves, and with it what has been summed, only where a block brings a logit more than this above
/// it: so blocks after the first one seldom cost a pass over the output.
template <class T>
inline constexpr T max_slack = 8;

/// Bytes of one head's keys and values that forward reads in place, however they are scattered. Larger ones do not stay
/// in caches, and copies pay; for backward, which computes longer with a row, never.
inline constexpr Index most_in_place = Index(6) << 20;

/// Keys that a part copies at most; see Tile::gather.
inline constexpr Index most_gathered = 4096;

}  // namespace coterie::detail
