// Shaw's relative keys and values in a tile.
//
//     R[r][lane]    = sum_d rK[r][d] Qt[d][lane]     rows kernel, once a tile, for the table rows r that it reaches
//     S[key][lane] += R[c][lane]                     c: the table row of the pair's distance
//     A[c][lane]   += P[key][lane]                   so that the table is read once a tile here too:
//     Ot[d][lane]  += sum_r rV[r][d] A[r][lane]      columns kernel
//
// Most pairs need no look-up of their own. Where all lanes of a vector are at or beyond an end of the table, they share
// its end row. Where queries ascend by one, lane after lane, they need a diagonal of R: R and A are then kept skewed,
// lane l of a vector l rows further up, so that a diagonal is one vector.
//
// The row invariant: a sum R[r][lane] has the same bits whatever else is computed, A[r][lane] adds its pairs in the
// order of their keys, and rows that a lane does not use add exact zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "coterie/kernel/micro.hpp"
#include "coterie/kernel/positions.hpp"
#include "coterie/kernel/visibility.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Relative keys and values of the tiles of a part. Its buffers hold numbers per table row and lane.
template <class T, class M>
struct Relative {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width;

  // Rows of a buffer: the table's first row; its last row; room for what skewing moves up; from here on the rows of
  // `rows`, ends among them; room behind.
  static constexpr Index skew_rows = lanes / 2, listed = lanes + skew_rows, room = listed + lanes + skew_rows;

  const AttentionArguments<T>* arguments = nullptr;
  const TilePositions<T, M>* positions = nullptr;
  Index count = 0;                     // number of table rows
  std::int32_t* rows = nullptr;        // table rows that the tile reaches, ascending, and the two ends always
  Index reached = 0;                   // number of rows in `rows`
  Index at_once = 0;                   // rows that go through one product: about the same number every time
  std::int32_t* buffer_row = nullptr;  // per table row: its row in buffers, 0 if no visible pair uses it
  std::int32_t* marks = nullptr;       // per table row, and one more: zeros between tiles
  unsigned char* used = nullptr;       // [reached][width]: whether the lane uses the row; found where it is needed
  bool used_known = false;
  bool skewed = false;
  Index earlier_low = 0,
        earlier_high = 0;               // bounds of the rows of earlier blocks' pairs, which may be outside the table
  Index block_low = 0, block_high = 0;  // of the current block's
  // Where in a buffer the block's pairs have their numbers: of a vector that has them side by side the first one's, of
  // others every lane's, the first as -1 - it.
  std::int32_t where[key_block * width];
  // Of a vector whose lanes ascend by one against keys that do, without `where`: keys [run_begin, run_end), counted
  // from the block's first one, have theirs at run_from, one row further up for every key.
  int run_begin[width / lanes], run_end[width / lanes];
  int last_row_until[width / lanes],
      first_row_from[width / lanes];  // keys before and from there on: all of the last, first row
  Index run_from[width / lanes];

  /// Numbers of a buffer, and of the scratch memory beside the buffers.
  static constexpr Index buffer_size(Index count) { return count > 0 ? (count + room) * width : 0; }
  static constexpr Index scratch_size(Index count) {
    return count > 0 ? padded(((3 * count + 1) * bytes<std::int32_t> + count * width) / bytes<T> + 1) : 0;
  }

  COTERIE_INLINE void begin(const AttentionArguments<T>& given, const TilePositions<T, M>& tile_positions, T* scratch) {
    arguments = &given;
    positions = &tile_positions;
    count = given.relative_count;
    reached = 0;
    if (count == 0) return;
    buffer_row = ::new (static_cast<void*>(scratch)) std::int32_t[std::size_t(3 * count + 1)];
    rows = buffer_row + count;
    marks = rows + count;
    used = ::new (static_cast<void*>(marks + count + 1)) unsigned char[std::size_t(count * width)];
    std::fill_n(buffer_row, count, 0);
    std::fill_n(marks, count + 1, 0);
  }

  /// Finds the table rows that the tile's pairs use.
  COTERIE_INLINE void take(const Visibility<T, M>& visibility) {
    M::apart([&]() __attribute__((always_inline)) {
      for (Index t = 0; t < reached; ++t) buffer_row[rows[t]] = 0;
      used_known = false;
      earlier_low = block_low = count;
      earlier_high = block_high = -1;
      skewed = true;
      for (int v = 0; v < visibility.vectors; ++v) skewed &= positions->ascending[v];
      Index begin_row = count, end_row = 0;
      // marks of skewed tiles: +1 where a run of rows begins, -1 behind its end; of others: 1 for every row
      const auto mark = [&](Index begin, Index end) __attribute__((always_inline)) {
        begin = std::max<Index>(begin, 1);
        end = (std::min)(end, count - 1);
        if (begin >= end) return;
        ++marks[begin];
        --marks[end];
        begin_row = (std::min)(begin_row, begin);
        end_row = (std::max)(end_row, end);
      };
      for (int i = 0; i < visibility.intervals; ++i)
        for (int v = 0; v < visibility.vectors; ++v) {
          int begin = Visibility<T, M>::none, end = 0;
          for (int l = v * lanes; l < (v + 1) * lanes; ++l)
            if (visibility.from[i][l] < visibility.until[i][l]) {
              begin = (std::min)(begin, static_cast<int>(visibility.from[i][l]));
              end = (std::max)(end, static_cast<int>(visibility.until[i][l]));
            }
          // Memory comes before all tokens or after.
          while (begin < end && !arguments->has_position(begin)) ++begin;
          while (begin < end && !arguments->has_position(end - 1)) --end;
          if (begin >= end) continue;
          const Index lowest = positions->lowest[v] - arguments->relative_first;
          const Index highest = positions->highest[v] - arguments->relative_first;
          if (skewed && !arguments->key_positions &&
              arguments->keys[end - 1] - arguments->keys[begin] == end - 1 - begin) {
            mark(lowest - arguments->key_position(end - 1), highest - arguments->key_position(begin) + 1);
            continue;
          }
          // Mostly the first keys are beyond the last row, and the last ones before the first.
          while (begin < end && lowest - arguments->key_position(begin) >= count - 1) ++begin;
          while (begin < end && highest - arguments->key_position(end - 1) <= 0) --end;
          for (int key = begin; key < end; ++key) {
            const Index position = arguments->key_position(key);
            if (highest - position <= 0 || lowest - position >= count - 1) continue;
            if (skewed) {
              mark(lowest - position, highest - position + 1);
              continue;
            }
            for (int l = v * lanes; l < (v + 1) * lanes; ++l)
              marks[std::clamp<Index>(lowest + positions->above[l] - position, 0, count - 1)] = 1;
            begin_row = (std::min)(begin_row, std::max<Index>(lowest - position, 1));
            end_row = (std::max)(end_row, (std::min)(highest - position + 1, count - 1));
          }
        }
      reached = 0;
      rows[reached++] = 0;
      for (Index r = begin_row, open = 0; r < end_row; ++r) {
        open = marks[r] + (skewed ? open : 0);
        marks[r] = 0;
        rows[reached] = static_cast<std::int32_t>(r);
        buffer_row[r] = static_cast<std::int32_t>(open != 0 ? listed + reached : 0);
        reached += open != 0;  // no branch, for what scattered tiles reach is chance
      }
      if (begin_row < end_row) marks[end_row] = 0;
      marks[0] = marks[count - 1] = 0;
      if (count > 1) {
        buffer_row[count - 1] = 1;
        rows[reached++] = static_cast<std::int32_t>(count - 1);
      }
      constexpr Index rows_of_sums = M::most_rows, most = key_block / rows_of_sums * rows_of_sums;
      const Index products = (reached + most - 1) / most;
      at_once = (reached + products * rows_of_sums - 1) / (products * rows_of_sums) * rows_of_sums;
    });
  }

  /// R[r][lane] = sum_c table[r][c] packed[c][lane]
  COTERIE_INLINE void products(const Visibility<T, M>& visibility, const T* table, Index stride, Index columns,
                               const T* packed, T* buffer) const {
    M::apart([&]() __attribute__((always_inline)) {
      T* const to = buffer + listed * width;
      const T* table_rows[key_block];
      for (Index t = 0; t < reached; t += at_once) {
        const Index n = locate(table, stride, t, table_rows);
        M::scores(table_rows, n, columns, packed, to + t * width, visibility.vectors);
      }
      std::memcpy(buffer, to, row_bytes);
      std::memcpy(buffer + width, to + (reached - 1) * width, row_bytes);
      if (skewed) skew<1>(visibility, buffer, listed + 1, reached - 2);
    });
  }

  COTERIE_INLINE void clear(T* buffer) const {
    std::memset(buffer, 0, static_cast<std::size_t>(listed + reached) * row_bytes);
  }

  /// Finds where in a buffer the block's pairs have their numbers, after TilePositions::turn_to_block.
  COTERIE_INLINE void turn_to_block(const Visibility<T, M>& visibility, int block_begin) {
    M::apart([&]() __attribute__((always_inline)) {
      const Index end = count - 1, first = arguments->relative_first;
      earlier_low = (std::min)(earlier_low, block_low);
      earlier_high = (std::max)(earlier_high, block_high);
      block_low = count;
      block_high = -1;
      for (int v = 0; v < visibility.vectors && positions->key_begin < positions->key_end; ++v) {
        block_low = (std::min)(block_low, positions->lowest[v] - positions->key_most - first);
        block_high = (std::max)(block_high, positions->highest[v] - positions->key_least - first);
      }
      const int key_begin = positions->key_begin - block_begin, key_end = positions->key_end - block_begin;
      for (int v = 0; v < visibility.vectors; ++v) {
        const Index lowest = positions->lowest[v] - first, span = positions->highest[v] - positions->lowest[v];
        const Index* const of_key = positions->of_key;
        std::int32_t* const at = where + v * lanes;
        // Mostly the first keys are beyond the last row, and the last ones before the first.
        int j = key_begin, after = key_end;
        while (j < after && lowest - of_key[j] >= end) ++j;
        while (j < after && lowest + span - of_key[after - 1] <= 0) --after;
        last_row_until[v] = j;
        first_row_from[v] = after;
        const Index diagonals = skewed ? std::max<Index>(end - 1 - span, 0) : 0;  // table rows of lowest lanes
        run_begin[v] = run_end[v] = after;
        if (diagonals > 0 && positions->keys_ascend) {
          const Index none = lowest - of_key[key_begin] + key_begin;  // the key at row 0
          const auto from = static_cast<int>(std::clamp<Index>(none - diagonals, j, after));
          const auto until = static_cast<int>(std::clamp<Index>(none, from, after));
          // Rows that no visible pair uses have no row in the buffers.
          const bool placed =
              from < until && buffer_row[none - from] >= listed && buffer_row[none - until + 1] >= listed;
          if (placed && buffer_row[none - from] - buffer_row[none - until + 1] == until - 1 - from) {
            run_begin[v] = from;
            run_end[v] = until;
            run_from[v] = (buffer_row[none - from] + from) * Index(width) + v * lanes;
          }
        }
        for (; j < after; ++j) {
          if (j == run_begin[v]) {
            j = run_end[v] - 1;
            continue;
          }
          const Index row = lowest - of_key[j];
          std::int32_t* const to = at + j * width;
          if (row > 0 && row <= diagonals)
            *to = buffer_row[row] * width + v * lanes;
          else if (row >= end)
            *to = buffer_row[end] * width + v * lanes;
          else if (row + span <= 0)
            *to = v * lanes;
          else
            find_each(row, v, to);
        }
      }
    });
  }

  /// Calls whole(at, from) for vectors of pairs that find their numbers side by side in a buffer, single(at, from)
  /// for the other pairs, and same(at, keys, from) for vectors of as many keys that find the same ones. `at` is where
  /// the block has them. Masked pairs are among them.
  template <class Whole, class Single, class Same>
  COTERIE_INLINE void each(const KeySegment& s, int block_begin, const Whole& whole, const Single& single,
                           const Same& same) const {
    const int begin = (std::max)(s.begin, positions->key_begin) - block_begin;
    const int end = (std::min)(s.end, positions->key_end) - block_begin;
    const auto found = [&](int v, int from, int until) __attribute__((always_inline)) {
      for (int j = from; j < until; ++j) {
        const Index at = Index(j) * width + v * lanes;
        const std::int32_t* const to = where + at;
        if (*to >= 0) {
          whole(at, Index(*to));
        } else {
          single(at, Index(-1 - *to));
          for (int l = 1; l < lanes; ++l) single(at + l, Index(to[l]));
        }
      }
    };
    for (int v = s.first; v < s.last && begin < end; ++v) {
      const int middle = std::clamp(last_row_until[v], begin, end),
                first_row = std::clamp(first_row_from[v], middle, end);
      const int from = std::clamp(run_begin[v], middle, first_row), until = std::clamp(run_end[v], from, first_row);
      same(Index(begin) * width + v * lanes, middle - begin, buffer_row[count - 1] * Index(width) + v * lanes);
      found(v, middle, from);
      for (int j = from; j < until; ++j) whole(Index(j) * width + v * lanes, run_from[v] - Index(j) * width);
      found(v, until, first_row);
      same(Index(first_row) * width + v * lanes, end - first_row, Index(v) * lanes);
    }
  }

  /// to[key][lane] += R[c][lane]
  COTERIE_INLINE void add(const KeySegment& s, int block_begin, const T* buffer, T* to) const {
    M::apart([&]() __attribute__((always_inline)) {
      const auto whole = [&](Index at, Index row) __attribute__((always_inline)) { L::add(buffer + row, to + at); };
      const auto single = [&](Index at, Index row) __attribute__((always_inline)) { to[at] += buffer[row]; };
      const auto same = [&](Index at, int keys, Index row) __attribute__((always_inline)) {
        F x, y;
        L::load(buffer + row, y);
        for (T* here = to + at; keys > 0; --keys, here += width) {
          L::load(here, x);
          L::store(here, x + y);
        }
      };
      each(s, block_begin, whole, single, same);
    });
  }

  /// A[c][lane] += from[key][lane]; masked pairs must be zero.
  COTERIE_INLINE void collect(const KeySegment& s, int block_begin, const T* from, T* buffer) const {
    M::apart([&]() __attribute__((always_inline)) {
      const auto whole = [&](Index at, Index row) __attribute__((always_inline)) { L::add(from + at, buffer + row); };
      const auto single = [&](Index at, Index row) __attribute__((always_inline)) { buffer[row] += from[at]; };
      const auto same = [&](Index at, int keys, Index row) __attribute__((always_inline)) {
        F x, sum;
        L::load(buffer + row, sum);
        for (const T* here = from + at; keys > 0; --keys, here += width) {
          L::load(here, x);
          sum += x;
        }
        L::store(buffer + row, sum);
      };
      each(s, block_begin, whole, single, same);
    });
  }

  /// A[r][lane] *= factor[lane]
  COTERIE_INLINE void rescale(const Visibility<T, M>& visibility, const T* factor, T* buffer) const {
    M::apart([&]() __attribute__((always_inline)) {
      // Between the ends only rows of earlier blocks' pairs hold something.
      const Index lower = std::lower_bound(rows, rows + reached, earlier_low) - rows;
      const Index upper = std::upper_bound(rows, rows + reached, earlier_high) - rows;
      T* const begin = buffer + (listed + lower - (skewed ? lanes - 1 : 0)) * width;
      T* const end = buffer + (listed + upper) * width;
      for (int v = 0; v < visibility.vectors; ++v) {
        F x, y;
        L::load(factor + v * lanes, y);
        const auto scale = [&](T * row) __attribute__((always_inline)) {
          L::load(row + v * lanes, x);
          L::store(row + v * lanes, x * y);
        };
        scale(buffer);
        scale(buffer + width);
        for (T* row = begin; row < end; row += width) scale(row);
      }
    });
  }

  /// Ends collecting: rows of A stand as `rows` lists them, from `listed` on.
  COTERIE_INLINE void straighten(const Visibility<T, M>& visibility, T* buffer) const {
    M::apart([&]() __attribute__((always_inline)) {
      if (skewed) skew<-1>(visibility, buffer, listed + reached - 2, reached - 2);
      std::memcpy(buffer + listed * width, buffer, row_bytes);
      if (count > 1) std::memcpy(buffer + (listed + reached - 1) * width, buffer + width, row_bytes);
    });
  }

  /// out[c][lane] += sum_r table[r][c] A[r][lane], of straightened rows.
  COTERIE_INLINE void add_columns(const Visibility<T, M>& visibility, const T* table, Index stride, Index columns,
                                  const T* buffer, T* out) {
    M::apart([&]() __attribute__((always_inline)) {
      const T* table_rows[key_block];
      for (Index t = 0; t < reached; t += at_once) {
        const Index n = locate(table, stride, t, table_rows);
        const T* const a = buffer + (listed + t) * width;
        const Index from = M::columns(table_rows, 0, n, columns, a, out, visibility.vectors, true);
        if (from == columns) continue;
        // A row that is no number met lanes that do not use it. The same operations, kept only where it is used.
        find_used(visibility);
        for (Index c = from; c < columns; ++c)
          for (int v = 0; v < visibility.vectors; ++v) {
            F sum, x;
            L::load(out + c * width + v * lanes, sum);
            for (Index j = 0; j < n; ++j) {
              Ints uses{};
              for (int l = 0; l < lanes; ++l) uses[l] = used[(t + j) * width + v * lanes + l] ? -1 : 0;
              L::load(a + j * width + v * lanes, x);
              F next = sum;
              L::add_product(table_rows[j][c], x, next);
              sum = uses ? next : sum;
            }
            L::store(out + c * width + v * lanes, sum);
          }
      }
    });
  }

  /// to[r][c] += sum_lane A[r][lane] x[lane][c], of straightened rows; `to` has all rows of the table, in rows of
  /// `columns` numbers as x, which are padded. sums: key_block such rows.
  COTERIE_INLINE void add_rows(const Visibility<T, M>& visibility, const T* buffer, const T* x, Index columns, T* sums,
                               T* to) {
    M::apart([&]() __attribute__((always_inline)) {
      const int depth = visibility.vectors * lanes;
      const T* a[key_block];
      for (Index t = 0; t < reached; t += at_once) {
        const Index n = (std::min)(at_once, reached - t);
        for (Index j = 0; j < n; ++j) a[j] = buffer + (listed + t + j) * width;
        const bool side_by_side = rows[t + n - 1] - rows[t] == n - 1;
        T* const target = side_by_side ? to + rows[t] * columns : sums;
        if (!side_by_side) std::memset(sums, 0, static_cast<std::size_t>(n * columns) * sizeof(T));
        const Index from = M::rows(a, n, depth, x, columns, target, true);
        if (from < columns) find_used(visibility);
        for (Index c = from; c < columns; c += lanes)
          for (Index j = 0; j < n; ++j) {
            F sum, y;
            L::load(target + j * columns + c, sum);
            for (int l = 0; l < visibility.count; ++l) {
              if (!used[(t + j) * width + l]) continue;
              L::load(x + l * columns + c, y);
              L::add_product(a[j][l], y, sum);
            }
            L::store(target + j * columns + c, sum);
          }
        for (Index j = 0; !side_by_side && j < n; ++j)
          for (Index c = 0; c < columns; c += lanes) L::add(sums + j * columns + c, to + rows[t + j] * columns + c);
      }
    });
  }

 private:
  static constexpr std::size_t row_bytes = width * sizeof(T);
  template <class U>
  static constexpr Index bytes = static_cast<Index>(sizeof(U));

  template <int Bit>
  static COTERIE_INLINE void skew_by(F (&x)[skew_rows], F (&earlier)[2 * lanes]) {
    F y[skew_rows];
    COTERIE_UNROLL for (int i = 0; i < skew_rows; ++i)
        L::template choose<Bit>(x[i], i < Bit ? earlier[Bit + i] : x[i < Bit ? 0 : i - Bit], y[i]);
    COTERIE_UNROLL for (int i = 0; i < Bit; ++i) earlier[Bit + i] = x[skew_rows - Bit + i];
    COTERIE_UNROLL for (int i = 0; i < skew_rows; ++i) x[i] = y[i];
    if constexpr (2 * Bit < lanes) skew_by<2 * Bit>(x, earlier);
  }

  /// Moves lane l of every vector by l rows, up (Step 1) or down (-1), for `inner` rows from `first` on in the step's
  /// direction.
  /// The bits of l one after the other, each a choice between two rows; rows stream through registers.
  template <int Step>
  static COTERIE_INLINE void skew(const Visibility<T, M>& visibility, T* buffer, Index first, Index inner) {
    constexpr int at_a_time = skew_rows;
    for (int v = 0; v < visibility.vectors; ++v) {
      F earlier[2 * lanes];  // from a power of two on, as many rows: the last ones of that bit
      COTERIE_UNROLL for (int bit = 1; bit < lanes; bit *= 2) {
        COTERIE_UNROLL for (int i = 0; i < bit; ++i) earlier[bit + i] = F{};
      }
      T* from = buffer + first * width + v * lanes;
      for (Index row = 0; row < inner + lanes - 1; row += at_a_time) {
        F x[at_a_time];
        COTERIE_UNROLL for (int i = 0; i < at_a_time; ++i) L::load(from + i * Step * width, x[i]);
        skew_by<1>(x, earlier);
        COTERIE_UNROLL for (int i = 0; i < at_a_time; ++i) L::store(from + (i - (lanes - 1)) * Step * width, x[i]);
        from += at_a_time * Step * width;
      }
    }
  }

  /// Where the lanes of vector v, the lowest of which stands at table row `row`, have their numbers.
  COTERIE_INLINE void find_each(Index row, int v, std::int32_t* to) const {
    const Index* const above = positions->above + v * lanes;
    for (int l = 0; l < lanes; ++l) {
      const std::int32_t at = buffer_row[std::clamp<Index>(row + above[l], 0, count - 1)];
      to[l] = (at - (skewed && at >= static_cast<std::int32_t>(listed) ? l : 0)) * width + v * lanes + l;
    }
    *to = -1 - *to;
  }

  COTERIE_INLINE Index locate(const T* table, Index stride, Index t, const T** table_rows) const {
    const Index n = (std::min)(at_once, reached - t);
    for (Index j = 0; j < n; ++j) table_rows[j] = table + rows[t + j] * stride;
    return n;
  }

  /// Which rows each lane uses.
  COTERIE_INLINE void find_used(const Visibility<T, M>& visibility) {
    if (used_known) return;
    used_known = true;
    std::memset(used, 0, static_cast<std::size_t>(reached * width));
    for (int i = 0; i < visibility.intervals; ++i)
      for (int l = 0; l < visibility.count; ++l)
        for (int key = static_cast<int>(visibility.from[i][l]); key < static_cast<int>(visibility.until[i][l]); ++key) {
          if (!arguments->has_position(key)) continue;
          const Index query = positions->lowest[l / lanes] + positions->above[l];
          const Index row = query - arguments->key_position(key) - arguments->relative_first;
          const Index t = row <= 0 ? 0 : row >= count - 1 ? reached - 1 : buffer_row[row] - listed;
          used[t * width + l] = 1;
        }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
