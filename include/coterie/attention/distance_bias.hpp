// Tables for AttentionTerms.bias that follow from few numbers: ALiBi slopes and T5 buckets of distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie {

/// The slope of one of `heads` heads: 2^(-8 (head + 1) / heads) where heads is a power of two; otherwise those of the
/// largest power of two below, then every other one of the next power of two.
/// Requires: 0 <= head < heads, otherwise ValueError.
/// Source: Press et al. 2022, section 3, and the authors' code for other numbers of heads.
inline double alibi_slope(Index head, Index heads) {
  if (head < 0 || head >= heads)
    detail::fail<ValueError>("alibi_slope", "head", detail::join("0 to heads - 1, of ", heads, " heads"), head);
  Index power = 1;
  while (power <= heads / 2) power *= 2;
  // Slope i of `power` heads is 2^(-8 (i + 1) / power); slope 2i of twice as many is 2^(-4 (2i + 1) / power).
  const Index exponent = head < power ? 8 * (head + 1) : 4 * (2 * (head - power) + 1);
  return std::exp2(-static_cast<double>(exponent) / static_cast<double>(power));
}

namespace detail {

template <class T>
T alibi_bias_at(double slope, Index distance) {
  return static_cast<T>(-slope * static_cast<double>(std::abs(distance)));
}

}  // namespace detail

/// Fills a bias table with ALiBi: linear in the distance, with a slope per head.
/// Shapes: bias heads x distances.
/// Formula: bias(h, c) = -alibi_slope(h, heads) |bias_first + c|. Causal attention sees no distance below 0.
/// Overwrites bias. The distances that a call sees have to be in the table: others would take the nearest column.
/// Source: Press et al. 2022, section 3.
template <class T>
void alibi_bias(View<T> bias, Index bias_first = 0) {
  detail::check_shape<T>("alibi_bias", "bias", bias, bias.rows(), bias.cols());
  for (Index h = 0; h < bias.rows(); ++h) {
    const double slope = alibi_slope(h, bias.rows());
    for (Index c = 0; c < bias.cols(); ++c) bias(h, c) = detail::alibi_bias_at<T>(slope, bias_first + c);
  }
}

/// How distances are sorted into buckets, a number of a learned table each.
///
/// Of two-sided ones, the first half of the buckets is for distances of at least 0 and the second for those below. The
/// first half of these is for one distance each, the rest for ranges that grow in proportion, and the last bucket for
/// all distances from about max_distance on. Source: Raffel et al. 2020, section 2.1, and the authors' code.
struct PositionBuckets {
  Index buckets = 32;        ///< at least 2; two-sided: even, at least 4
  Index max_distance = 128;  ///< above the number of buckets of one distance: buckets / 2, two-sided buckets / 4
  bool causal = false;       ///< distances below 0 (later keys) have no buckets: they take that of 0

  bool operator==(const PositionBuckets&) const = default;
};

namespace detail {

inline Index exact_buckets(const PositionBuckets& b) { return b.buckets / (b.causal ? 2 : 4); }

// Texts are put together only where something is wrong: a good call allocates nothing.
inline void check_buckets(Faults& faults, const char* buckets, const char* max_distance, const PositionBuckets& b) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  const bool some = b.buckets <= most && (b.causal ? b.buckets >= 2 : b.buckets >= 4 && b.buckets % 2 == 0);
  faults.expect(some, buckets, b.causal ? "at least 2" : "an even number, at least 4 (half are for later keys)",
                b.buckets);
  if (some && (b.max_distance <= exact_buckets(b) || b.max_distance > most))
    faults.expect(false, max_distance,
                  join("above ", exact_buckets(b), ", the distances that have a bucket of their own"), b.max_distance);
}

/// Of buckets that have been checked. Division and product are those of the published code in float32; the logarithm
/// is rounded from that in double, so that it does not depend on the machine.
inline Index bucket_of(Index distance, const PositionBuckets& b) {
  const Index count = b.causal ? b.buckets : b.buckets / 2, exact = exact_buckets(b);
  const Index first = !b.causal && distance < 0 ? count : 0;
  const Index far = b.causal ? std::max<Index>(distance, 0) : std::abs(distance);
  if (far < exact) return first + far;
  const auto log = [](double x) { return static_cast<float>(std::log(x)); };
  // exact + log(far / exact) / log(max_distance / exact) * (count - exact)
  const float ratio = static_cast<float>(far) / static_cast<float>(exact);
  const float share = log(ratio) / log(static_cast<double>(b.max_distance) / static_cast<double>(exact));
  const float more = share * static_cast<float>(count - exact);
  const auto last = static_cast<float>(count - 1 - exact);
  return first + exact + static_cast<Index>(std::min(more, last));
}

inline void check_bucket_table(const char* function, const PositionBuckets& b, Index heads, Index table_heads,
                               Index table_buckets) {
  Faults faults(function);
  check_buckets(faults, "buckets", "max_distance", b);
  faults.raise();
  if (table_heads != heads || table_buckets != b.buckets)
    fail<ShapeError>(function, "table", join(heads, " x ", b.buckets), join(table_heads, " x ", table_buckets));
}

}  // namespace detail

/// The bucket of a distance (query position - key position).
/// Requires: buckets that make sense, otherwise ValueError.
/// Accuracy: that of the published code in float32 with a well rounded logarithm, on ties as well.
/// Source: Raffel et al. 2020, section 2.1, and the authors' code.
inline Index relative_position_bucket(Index distance, const PositionBuckets& buckets) {
  detail::Faults faults("relative_position_bucket");
  detail::check_buckets(faults, "buckets", "max_distance", buckets);
  faults.raise();
  return detail::bucket_of(distance, buckets);
}

/// Expands a learned table by bucket into a bias table by distance.
/// Shapes: table heads x buckets, bias heads x distances.
/// Formula: bias(h, c) = table(h, bucket of bias_first + c). A table of the distances up to max_distance, on both sides
///   where two-sided, serves all distances: farther ones share its end columns' buckets.
/// Requires: buckets that make sense (ValueError), shapes that fit and no overlap (ShapeError).
/// Overwrites bias.
template <class T>
void bucket_bias(detail::Same<ConstView<T>> table, View<T> bias, const PositionBuckets& buckets, Index bias_first = 0) {
  const char* const function = "bucket_bias";
  detail::check_bucket_table(function, buckets, bias.rows(), table.rows(), table.cols());
  detail::check_shape<T>(function, "table", table, table.rows(), table.cols());
  detail::check_shape<T>(function, "bias", bias, bias.rows(), bias.cols());
  detail::check_no_alias<T>(function, "bias", bias, "table", table);
  for (Index c = 0; c < bias.cols(); ++c) {
    const Index bucket = detail::bucket_of(bias_first + c, buckets);
    for (Index h = 0; h < bias.rows(); ++h) bias(h, c) = table(h, bucket);
  }
}

/// Undoes bucket_bias: adds the gradient by distance, in the order of distances, into that of the learned table.
/// Shapes: d_table heads x buckets, d_bias heads x distances.
/// Formula: d_table(h, bucket of bias_first + c) += d_bias(h, c).
/// Requires: as bucket_bias.
/// Adds into d_table.
template <class T>
void bucket_bias_backward(View<T> d_table, detail::Same<ConstView<T>> d_bias, const PositionBuckets& buckets,
                          Index bias_first = 0) {
  const char* const function = "bucket_bias_backward";
  detail::check_bucket_table(function, buckets, d_bias.rows(), d_table.rows(), d_table.cols());
  detail::check_shape<T>(function, "d_table", d_table, d_table.rows(), d_table.cols());
  detail::check_shape<T>(function, "d_bias", d_bias, d_bias.rows(), d_bias.cols());
  detail::check_no_alias<T>(function, "d_table", d_table, "d_bias", d_bias);
  for (Index c = 0; c < d_bias.cols(); ++c) {
    const Index bucket = detail::bucket_of(bias_first + c, buckets);
    for (Index h = 0; h < d_bias.rows(); ++h) d_table(h, bucket) += d_bias(h, c);
  }
}

}  // namespace coterie
