// The parts that the keys of a head are in: clusters of like keys, and pages of neighbouring ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "coterie/core/context.hpp"
#include "coterie/core/finite.hpp"
#include "coterie/core/offsets.hpp"
#include "coterie/kernel/int8_keys.hpp"
#include "coterie/kernel/nearest.hpp"

namespace coterie::detail {

/// Parts of the keys of one key/value head, and what is known of each: size, mean key, mean value, and an int8 copy of
/// its keys.
///
/// Parts lie one behind the other in flat arrays, so that the scores of all of them are one product. A key with NaN or
/// infinity, in itself or in its value, is in no part but in a list of its own.
template <class T>
class KeyParts {
 public:
  KeyParts() = default;
  KeyParts(Index d, Index dv) : d_(d), dv_(dv) {}

  Index dim() const { return d_; }
  Index count() const { return static_cast<Index>(begin_.size()) - 1; }
  Index size(Index part) const { return begin_[at(part + 1)] - begin_[at(part)]; }
  /// Keys in all parts.
  Index keys() const { return begin_.back(); }
  /// Cache rows of a part, ascending.
  std::span<const std::int32_t> rows(Index part) const {
    return {rows_.data() + begin_[at(part)], static_cast<std::size_t>(size(part))};
  }
  /// The int8 copy of a part: size(part) keys, as in kernel/int8_keys.hpp.
  const std::int32_t* words(Index part) const { return words_.data() + begin_[at(part)] * int8_words(d_); }
  /// Which row of scales a part's int8 copy has.
  Index scale_of(Index part) const { return scale_of_[at(part)]; }
  const T* scales(Index row) const { return scales_.data() + row * d_; }
  /// d x count(): mean keys, a column each.
  ConstView<T> centroids() const { return {centroids_.data(), d_, count(), (std::max<Index>)(1, capacity_)}; }
  /// count() x dv: mean values.
  ConstView<T> values() const { return {values_.data(), count(), dv_}; }
  /// Sizes as numbers.
  const T* sizes() const { return sizes_.data(); }
  /// Rows of keys that are not finite, ascending.
  std::span<const std::int32_t> loose() const { return loose_; }
  /// Bytes held.
  std::size_t bytes() const {
    return (begin_.capacity() + rows_.capacity() + words_.capacity() + scale_of_.capacity() + loose_.capacity()) *
               sizeof(std::int32_t) +
           (scales_.capacity() + centroids_.capacity() + values_.capacity() + sizes_.capacity()) * sizeof(T);
  }

  /// Adds clusters of the keys in `range`: k-means by distance from evenly spaced keys, `steps` Lloyd steps; a cluster
  ///   of
  /// more than twice its mean size is clustered again.
  ///
  /// Distances, unlike dot products, do not depend on what all keys have in common; nor do the probabilities of
  /// attention. Clusters without keys are left out.
  /// Requires: an object without keys. context: serial.
  void add_clusters(ConstView<T> k, ConstView<T> v, RowRange range, Index keys_per_cluster, Index steps,
                    Context& context) {
    std::vector<std::int32_t> rows = finite_rows_of(k, v, range);
    std::vector<Index> begin{0};
    ClusterScratch scratch;
    cluster(k, rows, keys_per_cluster, steps, begin, scratch, context, 3);
    set_parts(k, v, std::move(rows), begin);
    if (count() > 0)
      add_scales(k, 0, count());
    else
      scales_.resize(at(d_));  // a row for every call
  }

  /// Adds pages of `page` neighbouring keys: those in `range`, whose length is a multiple of `page`.
  /// Requires: an object without keys.
  void add_pages(ConstView<T> k, ConstView<T> v, RowRange range, Index page) {
    std::vector<std::int32_t> rows = finite_rows_of(k, v, range);
    std::vector<Index> begin{0};
    std::size_t i = 0;
    for (Index end = range.begin + page; end <= range.end; end += page) {
      while (i < rows.size() && rows[i] < end) ++i;
      begin.push_back(static_cast<Index>(i));
    }
    set_parts(k, v, std::move(rows), begin);
    for (Index part = 0; part < count(); ++part) add_scales(k, part, part + 1);
  }

  /// Makes room, so that take() of all of `others` after drop_to() allocates nothing.
  void reserve(std::span<const KeyParts> others) {
    Index parts = count(), keys = this->keys(), loose = static_cast<Index>(loose_.size());
    Index scales = static_cast<Index>(scales_.size()) / (std::max<Index>)(1, d_);
    for (const KeyParts& other : others) {
      parts += other.count();
      keys += other.keys();
      loose += static_cast<Index>(other.loose_.size());
      scales += static_cast<Index>(other.scales_.size()) / (std::max<Index>)(1, d_);
    }
    if (parts > capacity_) {
      const Index capacity = (std::max)(parts, 2 * capacity_);
      std::vector<T> wider(at(d_ * capacity), T(0));
      for (Index e = 0; e < d_; ++e)
        std::copy_n(centroids_.data() + e * capacity_, count(), wider.data() + e * capacity);
      centroids_.swap(wider);
      capacity_ = capacity;
    }
    grow(begin_, parts + 1);
    grow(scale_of_, parts);
    grow(sizes_, parts);
    grow(values_, parts * dv_);
    grow(rows_, keys);
    grow(words_, keys * int8_words(d_) + int8_slack);
    grow(scales_, scales * d_);
    grow(loose_, loose);
  }

  /// Drops, behind the first `parts` parts of `runs` calls of add_clusters, all pages from row `row` on; and loose keys
  /// from there on.
  /// Requires: reserve().
  void drop_to(Index parts, Index runs, Index row) noexcept {
    Index kept = parts;
    while (kept < count() && rows(kept).front() < row) ++kept;
    begin_.resize(at(kept + 1));
    scale_of_.resize(at(kept));
    sizes_.resize(at(kept));
    values_.resize(at(kept * dv_));
    rows_.resize(at(keys()));
    words_.resize(at(keys() * int8_words(d_) + int8_slack));
    scales_.resize(at((runs + kept - parts) * d_));
    while (!loose_.empty() && loose_.back() >= row) loose_.pop_back();
  }

  /// Adds the parts of another object behind its own.
  /// Requires: reserve().
  void take(const KeyParts& other) noexcept {
    const Index first = count(), scale = static_cast<Index>(scales_.size()) / (std::max<Index>)(1, d_);
    const std::int32_t before = begin_.back();
    for (Index e = 0; e < d_; ++e)
      std::copy_n(other.centroids_.data() + e * other.capacity_, other.count(),
                  centroids_.data() + e * capacity_ + first);
    for (Index part = 0; part < other.count(); ++part) {
      begin_.push_back(before + other.begin_[at(part + 1)]);
      scale_of_.push_back(static_cast<std::int32_t>(scale) + other.scale_of_[at(part)]);
    }
    append(sizes_, other.sizes_);
    append(values_, other.values_);
    append(rows_, other.rows_);
    words_.resize(at(before * int8_words(d_)));
    append(words_, other.words_);
    append(scales_, other.scales_);
    append(loose_, other.loose_);
  }

 private:
  static constexpr std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  template <class V>
  static void grow(V& list, Index size) {
    if (list.capacity() < at(size)) list.reserve((std::max)(at(size), 2 * list.capacity()));
  }
  template <class V>
  static void append(V& list, const V& other) noexcept {
    list.insert(list.end(), other.begin(), other.end());
  }

  struct ClusterScratch {
    std::vector<T> x, nearest, centroid;
    std::vector<std::int32_t> labels;
    std::vector<double> sums;
  };

  /// Sorts rows by cluster, ascending inside each, and appends where clusters end to `begin`.
  void cluster(ConstView<T> k, std::span<std::int32_t> rows, Index keys_per_cluster, Index steps,
               std::vector<Index>& begin, ClusterScratch& scratch, Context& context, int depth) const {
    const Index n = static_cast<Index>(rows.size()), first = begin.back();
    const Index clusters = (std::min)(n, (std::max<Index>)(1, (n + keys_per_cluster / 2) / keys_per_cluster));
    if (clusters == 0) return;
    // x = (key - mean, 1), whose dot product with (c, -c.c/2) is (|key - mean|^2 - |key - mean - c|^2) / 2.
    scratch.x.resize(at(n * (d_ + 1)));
    scratch.nearest.resize(at(clusters * (d_ + 1)));
    scratch.centroid.resize(at(d_));
    const View<T> x(scratch.x.data(), n, d_ + 1), nearest(scratch.nearest.data(), clusters, d_ + 1);
    std::vector<std::int32_t>& labels = scratch.labels;
    std::vector<double>& sums = scratch.sums;
    labels.resize(at(n));
    sums.assign(at(d_), 0.0);
    for (const std::int32_t row : rows)
      for (Index e = 0; e < d_; ++e) sums[at(e)] += static_cast<double>(k(row, e));
    for (Index i = 0; i < n; ++i) {
      for (Index e = 0; e < d_; ++e) x(i, e) = k(rows[at(i)], e) - static_cast<T>(sums[at(e)] / static_cast<double>(n));
      x(i, d_) = 1;
    }
    for (Index c = 0; c < clusters; ++c)
      set_centroid(nearest.row(c), x.row(clusters > 1 ? c * (n - 1) / (clusters - 1) : 0));
    std::vector<Index> sizes;
    for (Index step = 0; step < steps; ++step) {
      nearest_centroids<T>(x, nearest, labels, context);
      sizes.assign(at(clusters), 0);
      sums.assign(at(clusters * d_), 0.0);
      for (Index i = 0; i < n; ++i) {
        const Index c = labels[at(i)];
        ++sizes[at(c)];
        for (Index e = 0; e < d_; ++e) sums[at(c * d_ + e)] += static_cast<double>(x(i, e));
      }
      for (Index c = 0; c < clusters; ++c) {
        if (sizes[at(c)] == 0) continue;
        for (Index e = 0; e < d_; ++e)
          scratch.centroid[at(e)] = static_cast<T>(sums[at(c * d_ + e)] / static_cast<double>(sizes[at(c)]));
        set_centroid(nearest.row(c), scratch.centroid.data());
      }
    }
    nearest_centroids<T>(x, nearest, labels, context);
    std::vector<Index> next(at(clusters) + 1, 0);
    for (const std::int32_t label : labels) ++next[at(label) + 1];
    for (Index c = 0; c < clusters; ++c) next[at(c) + 1] += next[at(c)];
    const std::vector<Index> ends(next.begin() + 1, next.end());
    const std::vector<std::int32_t> before(rows.begin(), rows.end());
    for (Index i = 0; i < n; ++i) rows[at(next[at(labels[at(i)])]++)] = before[at(i)];
    for (Index c = 0, from = 0; c < clusters; from = ends[at(c++)]) {
      const Index size = ends[at(c)] - from;
      if (size > 2 * keys_per_cluster && size < n && depth > 1)
        cluster(k, rows.subspan(at(from), at(size)), keys_per_cluster, steps, begin, scratch, context, depth - 1);
      else
        begin.push_back(first + ends[at(c)]);
    }
  }

  std::vector<std::int32_t> finite_rows_of(ConstView<T> k, ConstView<T> v, RowRange range) {
    std::vector<std::int32_t> rows;
    rows.reserve(at(range.count()));
    for (Index i = range.begin; i < range.end; ++i)
      (finite_row(k.row(i), d_) && finite_row(v.row(i), dv_) ? rows : loose_).push_back(static_cast<std::int32_t>(i));
    return rows;
  }

  void set_centroid(T* row, const T* centroid) const {
    std::copy(centroid, centroid + d_, row);
    double square = 0;
    for (Index e = 0; e < d_; ++e) square += static_cast<double>(centroid[e]) * static_cast<double>(centroid[e]);
    row[d_] = static_cast<T>(square / -2);
  }

  /// Takes rows in the order of parts, which begin at begin[0], begin[1], ..; empty parts are left out.
  void set_parts(ConstView<T> k, ConstView<T> v, std::vector<std::int32_t> rows, const std::vector<Index>& begin) {
    rows_ = std::move(rows);
    for (std::size_t c = 0; c + 1 < begin.size(); ++c)
      if (begin[c + 1] > begin[c]) begin_.push_back(static_cast<std::int32_t>(begin[c + 1]));
    capacity_ = count();
    centroids_.resize(at(d_ * capacity_));
    values_.resize(at(count() * dv_));
    std::vector<double> sum(at(d_ + dv_));
    for (Index part = 0; part < count(); ++part) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (const std::int32_t row : this->rows(part)) {
        for (Index e = 0; e < d_; ++e) sum[at(e)] += static_cast<double>(k(row, e));
        for (Index e = 0; e < dv_; ++e) sum[at(d_ + e)] += static_cast<double>(v(row, e));
      }
      const double n = static_cast<double>(size(part));
      sizes_.push_back(static_cast<T>(size(part)));
      for (Index e = 0; e < d_; ++e) centroids_[at(e * capacity_ + part)] = static_cast<T>(sum[at(e)] / n);
      for (Index e = 0; e < dv_; ++e) values_[at(part * dv_ + e)] = static_cast<T>(sum[at(d_ + e)] / n);
    }
    words_.resize(at(keys() * int8_words(d_)) + int8_slack);
  }

  /// Makes the int8 copies of parts [first, last), with scales of their own.
  void add_scales(ConstView<T> k, Index first, Index last) {
    if (first == last) return;
    const Index begin = begin_[at(first)], count = begin_[at(last)] - begin;
    std::vector<T> keys(at(count * d_)), scale(at(d_));
    for (Index i = 0; i < count; ++i) std::copy_n(k.row(rows_[at(begin + i)]), d_, keys.data() + i * d_);
    int8_scales(keys.data(), d_, count, d_, scale.data());
    for (Index part = first; part < last; ++part) {
      int8_write(keys.data() + (begin_[at(part)] - begin) * d_, d_, size(part), d_, scale.data(),
                 words_.data() + begin_[at(part)] * int8_words(d_));
      scale_of_.push_back(static_cast<std::int32_t>(scales_.size()) / static_cast<std::int32_t>(d_));
    }
    scales_.insert(scales_.end(), scale.begin(), scale.end());
  }

  Index d_ = 0, dv_ = 0, capacity_ = 0;
  std::vector<std::int32_t> begin_{0}, rows_, words_, scale_of_, loose_;
  std::vector<T> scales_, centroids_, values_, sizes_;
};

}  // namespace coterie::detail
