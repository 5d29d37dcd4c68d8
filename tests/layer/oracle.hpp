#pragma once

// The layer's formula once more, in plain double loops over heads, queries and keys, with no plan and no kernel.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kinds.hpp"

namespace test {

struct Oracle {
  const RoutingAttentionConfig& c;  // resolved
  const Parameters<double>& p;
  std::vector<Index> offsets;  // sequences + 1
  // Of the queries and keys of the routed heads; unused where routing is dense.
  std::vector<std::vector<std::int32_t>> query_labels = {}, key_labels = {};
  std::vector<Index> key_offsets = offsets;  // of the source, if there is one
  ConstView<double> source = {};

  bool local(Index head) const { return head < c.heads - c.routed_heads; }
  bool induction(Index head) const { return local(head) ? c.local_induction : c.induction; }
  bool shared(Index head) const { return local(head) ? c.local_induction : *c.shared_qk; }

  static Index sequence_of(const std::vector<Index>& bounds, Index i) {
    Index s = 0;
    while (bounds[static_cast<std::size_t>(s + 1)] <= i) ++s;
    return s;
  }
  static Index at(const std::vector<Index>& bounds, Index s) { return bounds[static_cast<std::size_t>(s)]; }

  // Where a query is among the keys of its sequence, and where a key is.
  Index query_place(Index i) const {
    const Index s = sequence_of(offsets, i), own = i - at(offsets, s);
    const Index tokens = at(offsets, s + 1) - at(offsets, s), keys = at(key_offsets, s + 1) - at(key_offsets, s);
    return c.causal ? own + keys - tokens : own * keys / tokens;
  }
  Index key_place(Index j) const { return j - at(key_offsets, sequence_of(key_offsets, j)); }

  static std::vector<double> normalise(std::vector<double> x) {
    double mean = 0, square = 0;
    for (const double v : x) mean += v / static_cast<double>(x.size());
    for (double& v : x) v -= mean;
    for (const double v : x) square += v * v / static_cast<double>(x.size());
    for (double& v : x) v /= std::sqrt(square + 1e-6);
    return x;
  }

  std::vector<double> project(ConstView<double> x, Index i, const RowMatrix<double>& w, const RowMatrix<double>& b,
                              Index head) const {
    std::vector<double> y;
    for (Index j = head * c.head_dim; j < (head + 1) * c.head_dim; ++j) {
      double sum = b.size() > 0 ? b(0, j) : 0;
      for (Index l = 0; l < c.model_dim; ++l) sum += x(i, l) * w(l, j);
      y.push_back(sum);
    }
    return y;
  }

  HeadPositions positions(Index head) const { return local(head) ? *c.local_positions : c.routed_positions; }

  std::vector<double> rotate(std::vector<double> x, Index head, Index position) const {
    if (positions(head) != HeadPositions::rotary) return x;
    const std::size_t half = x.size() / 2;
    for (std::size_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(position) * std::pow(c.rotary_base, -static_cast<double>(j) / static_cast<double>(half));
      const bool halves = c.rotary_layout == RotaryLayout::halves;
      double &u = x[halves ? j : 2 * j], &v = x[halves ? j + half : 2 * j + 1];
      const double old_u = u, old_v = v;
      u = old_u * std::cos(angle) - old_v * std::sin(angle);
      v = old_u * std::sin(angle) + old_v * std::cos(angle);
    }
    return x;
  }

  // What the distance of a pair adds to its logit.
  double distance_bias(Index head, Index distance) const {
    const Index routed_first = c.heads - c.routed_heads, own = local(head) ? head : head - routed_first;
    switch (positions(head)) {
      case HeadPositions::bias: {
        if (local(head)) return p.distance_bias(own, distance + c.lookahead);
        const Index most = c.routed_distances - 1;
        return p.routed_distance_bias(own, std::clamp(distance, -most, most) + (c.causal ? 0 : most));
      }
      case HeadPositions::alibi:
        return -alibi_slope(own, local(head) ? routed_first : c.routed_heads) * static_cast<double>(std::abs(distance));
      case HeadPositions::t5_buckets:
        return (local(head) ? p.bucket_bias : p.routed_bucket_bias)(
            own, relative_position_bucket(
                     distance, {.buckets = c.position_buckets, .max_distance = c.max_distance, .causal = c.causal}));
      default:
        return 0;
    }
  }

  // How many heads before this one satisfy a condition: where its own piece of w_k, gain or taps is.
  template <class F>
  Index before(Index head, F condition) const {
    Index count = 0;
    for (Index h = 0; h < head; ++h) count += condition(h);
    return count;
  }

  // Queries and keys, before they are rotated: what routers see.
  std::vector<double> query(ConstView<double> x, Index i, Index head) const {
    if (induction(head) && c.key_taps > 0) {
      std::vector<double> sum(static_cast<std::size_t>(c.head_dim), 0.0);
      const Index taps = before(head, [&](Index h) { return induction(h); }) * c.key_taps;
      for (Index t = 0; t < c.key_taps && t <= query_place(i); ++t) {
        const auto q = project(x, i - t, p.w_q, p.b_q, head);
        for (Index j = 0; j < c.head_dim; ++j)
          sum[static_cast<std::size_t>(j)] += p.taps(taps + t, j) * q[static_cast<std::size_t>(j)];
      }
      return normalise(sum);
    }
    std::vector<double> q = project(x, i, p.w_q, p.b_q, head);
    return shared(head) ? normalise(q) : q;
  }

  std::vector<double> key(ConstView<double> x, Index i, Index head) const {
    if (shared(head)) return query(x, i, head);
    return project(x, i, p.w_k, p.b_k, before(head, [&](Index h) { return !shared(h); }));
  }

  std::vector<Index> visible(Index i, Index head) const {
    const Index s = sequence_of(offsets, i), place = query_place(i);
    std::vector<Index> keys;
    Self self = local(head) ? (c.local_induction ? Self::never : Self::visible) : *c.self;
    std::vector<Index> members;
    Index up_to = 0;
    for (Index j = at(key_offsets, s); j < at(key_offsets, s + 1); ++j) {
      bool member = true;
      if (local(head)) {
        member = key_place(j) > place - c.local_window && key_place(j) <= place + c.lookahead;
      } else if (c.routing != Routing::dense) {
        const auto r = static_cast<std::size_t>(head - (c.heads - c.routed_heads));
        const auto label = query_labels[r][static_cast<std::size_t>(i)];
        member = label >= 0 && label == key_labels[r][static_cast<std::size_t>(j)];
      }
      if (!member) continue;
      members.push_back(j);
      up_to += key_place(j) <= place;
    }
    for (Index rank = 0; rank < static_cast<Index>(members.size()); ++rank) {
      bool in = true;
      if (c.causal) in = rank < up_to;
      if (!local(head) && c.routing != Routing::dense)
        in = in &&
             (c.causal ? rank >= up_to - c.window : rank >= up_to - (c.window + 1) / 2 && rank < up_to + c.window / 2);
      if (in) keys.push_back(members[static_cast<std::size_t>(rank)]);
    }
    std::vector<Index> others;
    for (const Index j : keys)
      if (key_place(j) != place) others.push_back(j);
    if (self == Self::never || (self == Self::only_if_alone && !others.empty())) return others;
    return keys;
  }

  /// y of row i.
  std::vector<double> row(ConstView<double> x, Index i) const {
    const ConstView<double> from = source.rows() > 0 ? source : x;
    std::vector<double> y(static_cast<std::size_t>(c.model_dim), 0.0);
    for (Index head = 0; head < c.heads; ++head) {
      const std::vector<double> q = rotate(query(x, i, head), head, query_place(i));
      double scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
      if (shared(head)) scale *= p.gain(0, before(head, [&](Index h) { return shared(h); }));
      std::vector<double> out(static_cast<std::size_t>(c.head_dim), 0.0);
      double total = 0;
      for (const Index j : visible(i, head)) {
        const std::vector<double> k = rotate(key(from, j, head), head, key_place(j));
        double logit = distance_bias(head, query_place(i) - key_place(j));
        for (std::size_t l = 0; l < q.size(); ++l) logit += scale * q[l] * k[l];
        const std::vector<double> v = project(from, induction(head) ? j + 1 : j, p.w_v, p.b_v, head);
        for (std::size_t l = 0; l < v.size(); ++l) out[l] += std::exp(logit) * v[l];
        total += std::exp(logit);
      }
      const bool in_plan =
          local(head) || c.routing == Routing::dense ||
          query_labels[static_cast<std::size_t>(head - (c.heads - c.routed_heads))][static_cast<std::size_t>(i)] >= 0;
      for (Index j = 0; in_plan && j < c.memory; ++j) {
        double logit = 0;
        for (Index l = 0; l < c.head_dim; ++l)
          logit += scale * q[static_cast<std::size_t>(l)] * p.memory_keys(j, head * c.head_dim + l);
        for (Index l = 0; l < c.head_dim; ++l)
          out[static_cast<std::size_t>(l)] += std::exp(logit) * p.memory_values(j, head * c.head_dim + l);
        total += std::exp(logit);
      }
      if (total > 0)
        for (Index l = 0; l < c.head_dim; ++l)
          for (Index m = 0; m < c.model_dim; ++m)
            y[static_cast<std::size_t>(m)] +=
                out[static_cast<std::size_t>(l)] / total * p.w_o(head * c.head_dim + l, m);
    }
    if (p.b_o.size() > 0)
      for (Index m = 0; m < c.model_dim; ++m) y[static_cast<std::size_t>(m)] += p.b_o(0, m);
    return y;
  }
};

}  // namespace test
