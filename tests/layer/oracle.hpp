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
  // Of the queries and keys of the routed key/value heads; unused where no head is routed.
  std::vector<std::vector<std::int32_t>> query_labels = {}, key_labels = {};
  std::vector<Index> key_offsets = offsets;  // of the source, if there is one
  ConstView<double> source = {};
  // Instead of labels: [head][row], all clusters of a row.
  std::vector<std::vector<std::vector<Index>>> query_clusters = {}, key_clusters = {};

  Index heads() const { return c.local.heads + c.routed.heads + c.dense.heads; }
  Index per_kv() const { return heads() / c.kv_heads; }
  // Among the routed key/value heads.
  std::size_t routed_number(Index head) const { return static_cast<std::size_t>((head - c.local.heads) / per_kv()); }

  bool local(Index head) const { return head < c.local.heads; }
  bool dense(Index head) const { return head >= c.local.heads + c.routed.heads; }
  bool routed(Index head) const { return !local(head) && !dense(head); }
  // What stands in the block of a head.
  template <class Field>
  const Field& of_block(Index head, const Field& local_one, const Field& routed_one, const Field& dense_one) const {
    return local(head) ? local_one : routed(head) ? routed_one : dense_one;
  }
  const Matching& matching(Index head) const {
    return of_block(head, c.local.matching, c.routed.matching, c.dense.matching);
  }
  const Positions& positions(Index head) const {
    return of_block(head, c.local.positions, c.routed.positions, c.dense.positions);
  }
  Index own_number(Index head) const {
    return head - of_block<Index>(head, 0, c.local.heads, c.local.heads + c.routed.heads);
  }
  bool induction(Index head) const { return matching(head).induction; }
  bool shared(Index head) const { return *matching(head).shared_qk; }

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

  static std::vector<double> layer_norm(std::vector<double> x) {
    double mean = 0, square = 0;
    for (const double v : x) mean += v / static_cast<double>(x.size());
    for (double& v : x) v -= mean;
    for (const double v : x) square += v * v / static_cast<double>(x.size());
    for (double& v : x) v /= std::sqrt(square + 1e-6);
    return x;
  }
  std::vector<double> normalise(std::vector<double> x, Index head) const {
    if (matching(head).normalisation == Normalisation::layer_norm) return layer_norm(x);
    double square = 0;
    for (const double v : x) square += v * v;
    for (double& v : x) v /= std::sqrt(square);
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

  PositionKind position_kind(Index head) const { return *positions(head).kind; }

  std::vector<double> rotate(std::vector<double> x, Index head, Index position) const {
    if (position_kind(head) != PositionKind::rotary) return x;
    const Positions& own = positions(head);
    const std::size_t half = x.size() / 2;
    for (std::size_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(position) * std::pow(own.base, -static_cast<double>(j) / static_cast<double>(half));
      const bool halves = own.layout == RotaryLayout::halves;
      double &u = x[halves ? j : 2 * j], &v = x[halves ? j + half : 2 * j + 1];
      const double old_u = u, old_v = v;
      u = old_u * std::cos(angle) - old_v * std::sin(angle);
      v = old_u * std::sin(angle) + old_v * std::cos(angle);
    }
    return x;
  }

  // What the distance of a pair adds to its logit.
  double distance_bias(Index head, Index distance) const {
    const Index number = own_number(head);
    const Positions& own = positions(head);
    switch (*own.kind) {
      case PositionKind::bias: {
        if (local(head))
          return p.local_distance_bias(
              number, std::clamp(distance, -c.local.lookahead, c.local.window - 1) + c.local.lookahead);
        const Index most = own.distances - 1;
        return (dense(head) ? p.dense_distance_bias : p.routed_distance_bias)(
            number, std::clamp(distance, -most, most) + (c.causal ? 0 : most));
      }
      case PositionKind::alibi:
        return -alibi_slope(number, of_block(head, c.local.heads, c.routed.heads, c.dense.heads)) *
               static_cast<double>(std::abs(distance));
      case PositionKind::t5_buckets:
        return of_block(head, p.local_bucket_bias, p.routed_bucket_bias, p.dense_bucket_bias)(
            number, relative_position_bucket(
                        distance, {.buckets = own.buckets, .max_distance = own.max_distance, .causal = c.causal}));
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

  Logits logits(Index head) const { return *matching(head).logits; }

  // The query as it is projected and, of induction heads, convolved.
  std::vector<double> projected_query(ConstView<double> x, Index i, Index head) const {
    const Index count = matching(head).key_taps;
    if (count == 0) return project(x, i, p.w_q, p.b_q, head);
    std::vector<double> sum(static_cast<std::size_t>(c.head_dim), 0.0);
    Index first = 0;
    for (Index h = 0; h < head; ++h) first += matching(h).key_taps;
    for (Index t = 0; t < count && t <= query_place(i); ++t) {
      const auto q = project(x, i - t, p.w_q, p.b_q, head);
      for (Index j = 0; j < c.head_dim; ++j)
        sum[static_cast<std::size_t>(j)] += p.taps(first + t, j) * q[static_cast<std::size_t>(j)];
    }
    return sum;
  }
  std::vector<double> projected_key(ConstView<double> x, Index i, Index head) const {
    if (shared(head)) return projected_query(x, i, head);
    const Index first = head / per_kv() * per_kv();  // of its key/value head
    return project(x, i, p.w_k, p.b_k, before(first, [&](Index h) { return !shared(h); }) / per_kv());
  }

  // Queries and keys, before they are rotated.
  std::vector<double> query(ConstView<double> x, Index i, Index head) const {
    const std::vector<double> q = projected_query(x, i, head);
    return logits(head) == Logits::normalised ? normalise(q, head) : q;
  }
  std::vector<double> key(ConstView<double> x, Index i, Index head) const {
    const std::vector<double> k = projected_key(x, i, head);
    return logits(head) == Logits::raw ? k : normalise(k, head);
  }

  // What the router of a head sees.
  std::vector<double> router_query(ConstView<double> x, Index i, Index head) const {
    const Index first = head / per_kv() * per_kv();
    std::vector<double> sum(static_cast<std::size_t>(c.head_dim), 0.0);
    for (Index h = first; h < first + per_kv(); ++h) {
      const auto q = normalise(projected_query(x, i, h), head);
      for (std::size_t j = 0; j < q.size(); ++j) sum[j] += q[j];
    }
    return normalise(sum, head);
  }
  std::vector<double> router_key(ConstView<double> x, Index i, Index head) const {
    return normalise(projected_key(x, i, head), head);
  }

  // The clusters of all rows, by centroids [head](cluster, column); for learned routing.
  void route(ConstView<double> x, const std::vector<ConstView<double>>& centroids) {
    for (std::size_t r = 0; r < centroids.size(); ++r) {
      const Index head = c.local.heads + static_cast<Index>(r) * per_kv();
      for (const bool keys : {false, true}) {
        const ConstView<double> rows = keys && source.rows() > 0 ? source : x;
        std::vector<std::vector<double>> scores;
        for (Index i = 0; i < rows.rows(); ++i) {
          const auto row = keys ? router_key(rows, i, head) : router_query(rows, i, head);
          scores.emplace_back();
          for (Index cluster = 0; cluster < c.routed.clusters; ++cluster) {
            double score = 0;
            for (std::size_t j = 0; j < row.size(); ++j) score += row[j] * centroids[r](cluster, static_cast<Index>(j));
            scores.back().push_back(score);
          }
        }
        (keys ? key_clusters : query_clusters).push_back(memberships(scores, keys ? key_offsets : offsets, keys));
      }
    }
  }
  std::vector<std::vector<Index>> memberships(const std::vector<std::vector<double>>& scores,
                                              const std::vector<Index>& bounds, bool keys) const {
    std::vector<std::vector<Index>> clusters(scores.size());
    const auto best = [](std::vector<Index> candidates, std::size_t count, auto score) {
      std::stable_sort(candidates.begin(), candidates.end(), [&](Index a, Index b) { return score(a) > score(b); });
      candidates.resize(std::min(count, candidates.size()));
      return candidates;
    };
    std::vector<Index> all_clusters;
    for (Index cluster = 0; cluster < c.routed.clusters; ++cluster) all_clusters.push_back(cluster);
    const auto nearest = [&](std::size_t i, Index count) {
      auto found = best(all_clusters, static_cast<std::size_t>(count),
                        [&](Index cluster) { return scores[i][static_cast<std::size_t>(cluster)]; });
      std::sort(found.begin(), found.end());
      return found;
    };
    if (c.routed.membership.kind == MembershipKind::nearest) {
      for (std::size_t i = 0; i < scores.size(); ++i) clusters[i] = nearest(i, keys ? 1 : c.routed.membership.probes);
      return clusters;
    }
    for (std::size_t s = 0; s + 1 < bounds.size(); ++s) {
      std::vector<Index> rows;
      for (Index i = bounds[s]; i < bounds[s + 1]; ++i) rows.push_back(i);
      Index count = c.routed.window;
      if (!keys && c.routed.membership.query_share > 0)
        count = std::max<Index>(
            1, static_cast<Index>(std::floor(c.routed.membership.query_share * static_cast<double>(rows.size()) /
                                             static_cast<double>(c.routed.clusters))));
      for (const Index cluster : all_clusters)
        for (const Index i : best(rows, static_cast<std::size_t>(count), [&](Index row) {
               return scores[static_cast<std::size_t>(row)][static_cast<std::size_t>(cluster)];
             }))
          clusters[static_cast<std::size_t>(i)].push_back(cluster);
    }
    for (std::size_t i = 0; i < scores.size(); ++i)
      if (clusters[i].empty() && c.routed.membership.unassigned == Unassigned::nearest) clusters[i] = nearest(i, 1);
    return clusters;
  }

  std::vector<Index> clusters_of(Index head, Index row, bool keys) const {
    const auto r = routed_number(head), i = static_cast<std::size_t>(row);
    if (!query_clusters.empty()) return (keys ? key_clusters : query_clusters)[r][i];
    const std::int32_t label = (keys ? key_labels : query_labels)[r][i];
    return label < 0 ? std::vector<Index>{} : std::vector<Index>{label};
  }

  // The rule about oneself: keys of several entries of a row where the rule looks at all of them.
  std::vector<std::vector<Index>> without_self(std::vector<std::vector<Index>> entries, Index place, Self self) const {
    const bool together =
        entries.size() > 1 && (c.routed.membership.probes > 1 || c.routed.membership.combine == Combine::lse);
    bool any_other = false;
    for (const auto& keys : entries)
      for (const Index j : keys) any_other |= key_place(j) != place;
    for (auto& keys : entries) {
      std::vector<Index> others;
      for (const Index j : keys)
        if (key_place(j) != place) others.push_back(j);
      if (self == Self::never || (self == Self::only_if_alone && (together ? any_other : !others.empty())))
        keys = others;
    }
    return entries;
  }

  // The keys that a query sees, of each entry that it has.
  std::vector<std::vector<Index>> visible(Index i, Index head) const {
    const Index s = sequence_of(offsets, i), place = query_place(i);
    const Index first = at(key_offsets, s), end = at(key_offsets, s + 1);
    const Self self = *matching(head).self;
    const bool global = !dense(head) && c.globals > 0 && place < c.globals;
    const bool is_short = c.dense_up_to > 0 && (c.causal ? place < c.dense_up_to : end - first <= c.dense_up_to);
    std::vector<Index> all;
    for (Index j = first; j < end; ++j)
      if (!c.causal || key_place(j) <= place) all.push_back(j);
    const bool balanced = c.routed.membership.kind == MembershipKind::balanced;
    if (dense(head) || is_short || global) return without_self({all}, place, self);

    std::vector<std::vector<Index>> entries;
    if (local(head)) {
      entries.emplace_back();
      for (Index j = first; j < end; ++j)
        if (key_place(j) > place - c.local.window && key_place(j) <= place + c.local.lookahead) entries[0].push_back(j);
    } else {
      for (const Index cluster : clusters_of(head, i, false)) {
        std::vector<Index> members;
        Index up_to = 0;
        for (Index j = first; j < end; ++j) {
          const auto clusters = clusters_of(head, j, true);
          if (std::find(clusters.begin(), clusters.end(), cluster) == clusters.end()) continue;
          members.push_back(j);
          up_to += key_place(j) <= place;
        }
        entries.emplace_back();
        for (Index rank = 0; rank < static_cast<Index>(members.size()); ++rank) {
          const bool in_window =
              balanced || (c.causal ? rank >= up_to - c.routed.window
                                    : rank >= up_to - (c.routed.window + 1) / 2 && rank < up_to + c.routed.window / 2);
          if (in_window && (!c.causal || rank < up_to))
            entries.back().push_back(members[static_cast<std::size_t>(rank)]);
        }
      }
    }
    if (routed(head) && c.routed.sinks + c.routed.recent > 0) {
      // One entry: the keys by position, and those of clusters that are not among them.
      std::vector<Index> seen;
      for (Index j = first; j < end && key_place(j) <= place; ++j) {
        Index times = key_place(j) < c.routed.sinks || key_place(j) > place - c.routed.recent;
        if (times == 0)  // balanced: in one cluster or in several
          for (const auto& keys : entries) times += std::find(keys.begin(), keys.end(), j) != keys.end();
        for (Index t = 0; t < times; ++t) seen.push_back(j);
      }
      return without_self({seen}, place, self);
    }
    entries = without_self(entries, place, self);
    if (c.globals > 0 && !entries.empty())
      for (Index j = first; j < std::min(end, first + c.globals); ++j)
        if (std::find(entries[0].begin(), entries[0].end(), j) == entries[0].end()) entries[0].push_back(j);
    return entries;
  }

  double scale(Index head) const {
    const double usual = 1 / std::sqrt(static_cast<double>(c.head_dim));
    const auto learned = [&](Index h) { return *matching(h).learned_gain; };
    return usual * (learned(head) ? p.gain(0, before(head, learned)) : *matching(head).gain);
  }

  /// y of row i.
  std::vector<double> row(ConstView<double> x, Index i) const {
    const ConstView<double> from = source.rows() > 0 ? source : x;
    const auto d = static_cast<std::size_t>(c.head_dim);
    std::vector<double> y(static_cast<std::size_t>(c.model_dim), 0.0);
    for (Index head = 0; head < heads(); ++head) {
      const Index kv = head / per_kv();
      const std::vector<double> q = rotate(query(x, i, head), head, query_place(i));
      // Sums of exp(logit) v and of exp(logit), of one entry or of all.
      std::vector<double> sum(d, 0.0), out(d, 0.0);
      double total = 0, seeing = 0;
      const auto add = [&](double logit, const std::vector<double>& v) {
        for (std::size_t l = 0; l < d; ++l) sum[l] += std::exp(logit) * v[l];
        total += std::exp(logit);
      };
      const auto dot = [&](const auto& k) {
        double product = 0;
        for (std::size_t l = 0; l < d; ++l) product += q[l] * k(l);
        product *= scale(head);
        return c.soft_cap > 0 ? c.soft_cap * std::tanh(product / c.soft_cap) : product;
      };
      const auto add_memory = [&] {
        for (Index j = 0; j < c.memory; ++j) {
          std::vector<double> v;
          for (Index l = 0; l < c.head_dim; ++l) v.push_back(p.memory_values(j, kv * c.head_dim + l));
          add(dot([&](std::size_t l) { return p.memory_keys(j, kv * c.head_dim + static_cast<Index>(l)); }), v);
        }
      };
      const auto finish_entry = [&] {
        if (total > 0) {
          for (std::size_t l = 0; l < d; ++l) out[l] += sum[l] / total;
          ++seeing;
        }
        std::fill(sum.begin(), sum.end(), 0.0);
        total = 0;
      };
      const bool shaw = position_kind(head) == PositionKind::shaw;
      const auto relative = [&](Index distance, bool values) {
        const RowMatrix<double>& table =
            values ? of_block(head, p.local_relative_values, p.routed_relative_values, p.dense_relative_values)
                   : of_block(head, p.local_relative_keys, p.routed_relative_keys, p.dense_relative_keys);
        const Index ahead = local(head) ? c.local.lookahead : c.causal ? 0 : positions(head).distances - 1;
        return table.row(std::clamp<Index>(distance + ahead, 0, table.rows() - 1));
      };
      const auto entries = visible(i, head);
      const bool mean = routed(head) && c.routed.membership.kind == MembershipKind::balanced &&
                        c.routed.membership.combine == Combine::mean;
      for (std::size_t e = 0; e < entries.size(); ++e) {
        for (const Index j : entries[e]) {
          const Index distance = query_place(i) - key_place(j);
          std::vector<double> k = rotate(key(from, j, head), head, key_place(j));
          std::vector<double> v = project(from, induction(head) ? j + 1 : j, p.w_v, p.b_v, kv);
          for (std::size_t l = 0; l < d && shaw; ++l) {
            k[l] += relative(distance, false)(static_cast<Index>(l));
            v[l] += relative(distance, true)(static_cast<Index>(l));
          }
          add(dot([&](std::size_t l) { return k[l]; }) + distance_bias(head, distance), v);
        }
        if (mean || e == 0) add_memory();
        if (mean) finish_entry();
      }
      if (!mean) finish_entry();
      if (mean) seeing += seeing > 0 ? c.routed.membership.mean_epsilon : 0;
      if (seeing > 0)
        for (std::size_t l = 0; l < d; ++l)
          for (Index m = 0; m < c.model_dim; ++m)
            y[static_cast<std::size_t>(m)] += out[l] / seeing * p.w_o(head * c.head_dim + static_cast<Index>(l), m);
    }
    if (p.b_o.size() > 0)
      for (Index m = 0; m < c.model_dim; ++m) y[static_cast<std::size_t>(m)] += p.b_o(0, m);
    return y;
  }
};

}  // namespace test
