// One group of heads of a layer: projections, routing, attention, output; forward and backward side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/core/normalise.hpp"
#include "coterie/kernel/positions.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/layer/commitment.hpp"
#include "coterie/layer/input.hpp"
#include "coterie/layer/memberships.hpp"
#include "coterie/layer/positions.hpp"
#include "coterie/layer/rows.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {

/// What a layer owns.
template <class T>
struct LayerParts {
  RoutingAttentionConfig config;  ///< resolved
  Heads heads;
  Parameters<T> parameters;
  Rotary rotary;
  std::vector<OnlineKMeans<T>> routers;  ///< one per routed head, if learned
};

/// The layer of a resolved config, with its first weights and centroids.
template <class T>
LayerParts<T> make_layer_parts(const RoutingAttentionConfig& c) {
  LayerParts<T> layer{c, Heads(c), initial_parameters<T>(c), {}, {}};
  for (const HeadGroup* group : {&layer.heads.local, &layer.heads.routed})
    if (group->count > 0 && group->positions == HeadPositions::rotary)
      layer.rotary = Rotary(c.head_dim, c.rotary_base, c.rotary_layout);
  if (c.routing != Routing::learned) return layer;
  const auto stream = static_cast<std::uint64_t>(LayerStream::centroids);
  for (Index h = 0; h < c.routed_heads; ++h) {
    const std::uint64_t seed = random_bits(c.seed, stream, static_cast<std::uint64_t>(h));
    layer.routers.emplace_back(router_config(c, seed));
  }
  return layer;
}

/// An input whose arguments have been checked: where queries and keys come from, and their places in their sequences.
template <class T>
struct CheckedInput {
  const Input<T>& input;
  ConstView<T> x, keys;  ///< keys: the source, or x itself
  std::span<const std::int32_t> places, key_places;
  bool crosses = false;  ///< keys come from a source

  CheckedInput(const Input<T>& from, const Places& where)
      : input(from),
        x(from.x),
        keys(from.crosses() ? from.source : from.x),
        places(where.queries),
        key_places(from.crosses() ? where.keys : where.queries),
        crosses(from.crosses()) {}
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Logit scales of a group of heads with a gain, in scratch: gain/sqrt(d); empty for the others, 1/sqrt(d).
template <class T>
std::span<const double> logit_scales(const LayerParts<T>& layer, const HeadGroup& group, Arena& arena) {
  if (!group.shared) return {};
  double* const scales = arena.take<double>(group.count);
  for (Index h = 0; h < group.count; ++h)
    scales[h] = static_cast<double>(layer.parameters.gain(0, group.gain_first + h)) /
                std::sqrt(static_cast<double>(group.head_dim));
  return {scales, static_cast<std::size_t>(group.count)};
}

/// What attention adds for a group: bias by distance, and memory.
template <class T>
AttentionTerms<T> attention_terms(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                                  Arena& arena) {
  AttentionTerms<T> terms = position_terms(layer.config, layer.parameters, group, in.key_places, arena);
  if (layer.config.memory > 0) {
    terms.memory_keys = view(layer.parameters.memory_keys).columns(group.first_col(), group.cols());
    terms.memory_values = view(layer.parameters.memory_values).columns(group.first_col(), group.cols());
  }
  return terms;
}

/// What attention is asked to do for a group. Training: forward with a tape, and backward.
template <class T>
AttentionConfig attention_config(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                                 bool training, Arena& arena) {
  AttentionConfig config;
  config.heads = group.count;
  config.scales = logit_scales(layer, group, arena);
  config.soft_cap = layer.config.soft_cap;
  if (training) {
    config.dropout = layer.config.dropout;
    config.dropout_seed =
        random_bits(layer.config.seed, static_cast<std::uint64_t>(LayerStream::dropout), group.routed);
    config.dropout_step = in.input.step;
  }
  return config;
}

/// The values that attention reads: of induction heads, key j carries the value of row j + 1.
template <class M>
M carried_values(const HeadGroup& group, M v, Index keys) {
  return v.rows(group.induction ? 1 : 0, keys);
}

/// q, k, v = x w + b, of the group's columns.
template <class T>
void project(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in, const HeadsMatrices<T>& m,
             Context& context) {
  const Parameters<T>& p = layer.parameters;
  const Index first = group.first_col(), cols = group.cols(), key_first = group.key_first * group.head_dim;
  const bool bias = layer.config.bias;
  // q = x w_q + b_q
  product<T>(in.x, view(p.w_q).columns(first, cols), m.q, context);
  if (bias) add_bias(m.q, p.b_q.data() + first, context);
  if (!group.shared) {
    // k = x w_k + b_k
    product<T>(in.keys, view(p.w_k).columns(key_first, cols), m.k, context);
    if (bias) add_bias(m.k, p.b_k.data() + key_first, context);
  }
  // v = x w_v + b_v
  const View<T> v = m.v.rows(0, in.keys.rows());
  product<T>(in.keys, view(p.w_v).columns(first, cols), v, context);
  if (bias) add_bias(v, p.b_v.data() + first, context);
  if (group.induction) m.v.rows(in.keys.rows(), 1).fill(0);  // the last row has no next value, and nobody sees it
}

/// Undoes project: adds into the gradients of x, of the keys' source (x itself or another) and of the weights.
template <class T>
void project_backward(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in, ConstView<T> d_q,
                      ConstView<T> d_k, ConstView<T> d_v, View<T> d_x, View<T> d_keys, Parameters<T>& gradients,
                      Context& context) {
  const Parameters<T>& p = layer.parameters;
  const Index first = group.first_col(), cols = group.cols(), key_first = group.key_first * group.head_dim;
  const auto undo = [&](ConstView<T> x, const RowMatrix<T>& w, Index from, ConstView<T> d, View<T> d_input,
                        RowMatrix<T>& d_w, RowMatrix<T>& d_b) {
    product_weight_gradient<T>(x, d, view(d_w).columns(from, cols), context);
    product_input_gradient<T>(d, view(w).columns(from, cols), d_input, context, true);
    if (layer.config.bias) add_bias_backward(d, d_b.data() + from, context);
  };
  undo(in.x, p.w_q, first, d_q, d_x, gradients.w_q, gradients.b_q);
  if (!group.shared) undo(in.keys, p.w_k, key_first, d_k, d_keys, gradients.w_k, gradients.b_k);
  undo(in.keys, p.w_v, first, d_v, d_keys, gradients.w_v, gradients.b_v);
}

/// Labels of queries and keys of the routed heads: given, drawn, or by their routers.
template <class T>
void assign_labels(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                   const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), d = group.head_dim;
  const bool given = !in.input.routes.empty(), drawn = !given && layer.config.routing == Routing::random;
  const bool normalises = !given && !drawn && !group.shared;
  const bool own_keys = in.crosses || normalises;
  const auto query_labels = HeadsPlans::grow(plans.query_labels, group.count * n);
  const auto key_labels = HeadsPlans::grow(plans.key_labels, own_keys ? group.count * keys : 0);
  if (given) {
    std::copy(in.input.routes.begin(), in.input.routes.end(), query_labels.begin());
    return;
  }
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const View<T> normalised = normalises ? arena.matrix<T>(std::max(n, keys), d) : View<T>();
  const auto stream = static_cast<std::uint64_t>(LayerStream::routes);
  const std::uint64_t step = random_bits(layer.config.seed, stream, in.input.step);
  for (Index h = 0; h < group.count; ++h) {
    const auto assign = [&](View<T> from, std::span<const std::int32_t> places, std::span<std::int32_t> labels) {
      if (drawn) {
        const std::uint64_t seed = random_bits(step, stream, static_cast<std::uint64_t>(h));
        for (std::size_t i = 0; i < labels.size(); ++i)
          labels[i] = random_label(seed, places[i], layer.config.clusters);
        return;
      }
      ConstView<T> rows = from.columns(h * d, d);
      if (normalises) {
        normalise_rows<T>(rows, normalised.rows(0, rows.rows()), View<T>(), d, context);
        rows = normalised.rows(0, rows.rows());
      }
      layer.routers[static_cast<std::size_t>(h)].assign(rows, labels, context);
    };
    assign(m.u, in.places, labels_of(query_labels, h, n));
    if (own_keys) assign(m.k, in.key_places, labels_of(key_labels, h, keys));
  }
}

/// The plans of a group, without memory.
template <class T>
void build_token_plans(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                       const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  const RoutingAttentionConfig& c = layer.config;
  const Index n = in.x.rows(), keys = in.keys.rows();
  const std::span<const Index> offsets = in.input.offsets, key_offsets = in.input.source_offsets;
  if (!group.routed) {
    plan_local({.tokens = n,
                .keys = keys,
                .window = c.local_window,
                .lookahead = c.lookahead,
                .causal = c.causal,
                .self = group.induction ? Self::never : Self::visible,
                .offsets = offsets,
                .key_offsets = key_offsets},
               plans.use(1)[0]);
  } else if (c.routing == Routing::dense) {
    plan_dense({.tokens = n,
                .keys = keys,
                .causal = c.causal,
                .self = *c.self,
                .offsets = offsets,
                .key_offsets = key_offsets},
               plans.use(1)[0]);
  } else if (has_members(c)) {
    const RoutedRows<T> queries{m.u, offsets}, key_rows{group.shared ? m.u : m.k, in.crosses ? key_offsets : offsets};
    build_member_plans<T>(c, layer.routers, queries, key_rows, group.shared, plans, context);
  } else {
    assign_labels(layer, group, in, m, plans, context);
    const std::span<AttentionPlan> built = plans.use(static_cast<std::size_t>(group.count));
    context.for_each(group.count, [&](Index h, Index) {
      const std::span<const std::int32_t> queries = plans.query_labels, own = plans.key_labels;
      const auto query_labels = labels_of(queries, h, n);
      plan_clustered(query_labels, own.empty() ? query_labels : labels_of(own, h, keys),
                     {.clusters = c.clusters,
                      .window = c.window,
                      .causal = c.causal,
                      .self = *c.self,
                      .offsets = offsets,
                      .key_offsets = key_offsets},
                     built[static_cast<std::size_t>(h)]);
    });
  }
}

/// The plans of a group.
template <class T>
void build_plans(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                 const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  build_token_plans(layer, group, in, m, plans, context);
  if (layer.config.memory == 0) return;
  context.for_each(static_cast<Index>(plans.count), [&](Index i, Index) {
    plan_add_memory(layer.config.memory, plans.plans[static_cast<std::size_t>(i)]);
  });
}

/// y (+)= the group's share of the output. `add`: another group has written y. With a tape, keeps what backward needs.
template <class T>
void heads_forward(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in, View<T> y, bool add,
                   HeadsTape<T>* tape, HeadsPlans& plans, Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), d = group.head_dim, cols = group.cols();
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  HeadsMatrices<T> m;
  const auto take = [&](Buffer<T> HeadsTape<T>::*buffer, Index rows, Index columns) {
    return tape ? (tape->*buffer).matrix(rows, columns) : arena.matrix<T>(rows, columns);
  };
  m.q = take(&HeadsTape<T>::q, n, cols);
  if (!group.shared) m.k = take(&HeadsTape<T>::k, keys, cols);
  m.v = take(&HeadsTape<T>::v, keys + (group.induction ? 1 : 0), cols);
  m.out = take(&HeadsTape<T>::out, n, cols);
  m.u = group.taps > 0 ? take(&HeadsTape<T>::u, n, cols) : m.q;
  if (group.shared) m.inverse = take(&HeadsTape<T>::inverse, n, group.count);

  project(layer, group, in, m, context);
  if (group.shared) {
    // u = normalise(convolve(q))
    if (group.taps > 0)
      convolve<T>(m.q, view(layer.parameters.taps).rows(group.taps_first, group.count * group.taps), group.taps,
                  in.places, m.u, context);
    normalise_rows<T>(m.u, m.u, m.inverse, d, context);
  }
  build_plans(layer, group, in, m, plans, context);
  m.read_q = m.u;
  m.read_k = group.shared ? m.u : m.k;
  if (group.positions == HeadPositions::rotary) {
    // After routing, and apart from what routers and normalise_rows_backward read. Shared rows turn once: i is a query's
    // place and its key's.
    const auto turned = [&](Buffer<T> HeadsTape<T>::*buffer, View<T> from, std::span<const std::int32_t> places) {
      const View<T> to = group.routed || group.shared ? take(buffer, from.rows(), cols) : from;
      if (to.data() != from.data()) copy_rows<T>(to, from, context);
      layer.rotary.forward(to, group.count, places, context);
      return to;
    };
    m.read_q = turned(&HeadsTape<T>::read_q, m.u, in.places);
    m.read_k = group.shared ? m.read_q : turned(&HeadsTape<T>::read_k, m.k, in.key_places);
  }

  const AttentionConfig config = attention_config(layer, group, in, tape != nullptr, arena);
  const AttentionTerms<T> terms = attention_terms(layer, group, in, arena);
  const ConstView<T> q = m.read_q, k = m.read_k, v = carried_values(group, m.v, keys);
  if (tape)
    attention_forward(Plans(plans.used()), q, k, v, m.out, tape->attention, config, context, terms);
  else
    attention_forward(Plans(plans.used()), q, k, v, m.out, config, context, terms);
  // y (+)= out w_o
  product<T>(m.out, view(layer.parameters.w_o).rows(group.first_col(), cols), y, context, add);
  if (tape) tape->matrices = m;
}

/// Undoes heads_forward: adds into d_x, d_keys (the source's, or d_x itself) and the gradients.
template <class T>
void heads_backward(const LayerParts<T>& layer, const HeadGroup& group, const CheckedInput<T>& in,
                    const HeadsTape<T>& tape, ConstView<T> d_y, View<T> d_x, View<T> d_keys, Parameters<T>& gradients,
                    Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), d = group.head_dim, cols = group.cols();
  const Parameters<T>& p = layer.parameters;
  const HeadsMatrices<T>& m = tape.matrices;
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);

  // y += out w_o
  const View<T> d_out = arena.matrix<T>(n, cols);
  product_weight_gradient<T>(m.out, d_y, view(gradients.w_o).rows(group.first_col(), cols), context);
  product_input_gradient<T>(d_y, view(p.w_o).rows(group.first_col(), cols), d_out, context);

  // out = attention(q, k, v)
  const View<T> d_q = arena.matrix<T>(n, cols), d_k = arena.matrix<T>(keys, cols);
  const View<T> d_v = arena.matrix<T>(m.v.rows(), cols);
  for (const View<T>& zeroed : {d_q, d_k, d_v}) fill_rows(zeroed, T(0), context);
  const AttentionConfig config = attention_config(layer, group, in, true, arena);
  AttentionTermGradients<T> d_terms;
  if (group.shared) {
    double* const d_scales = arena.take<double>(group.count);
    std::fill(d_scales, d_scales + group.count, 0.0);
    d_terms.d_scales = {d_scales, static_cast<std::size_t>(group.count)};
  }
  const AttentionTerms<T> terms = attention_terms(layer, group, in, arena);
  d_terms.d_bias = position_term_gradient(terms, gradients, group, arena);
  if (layer.config.memory > 0) {
    d_terms.d_memory_keys = view(gradients.memory_keys).columns(group.first_col(), cols);
    d_terms.d_memory_values = view(gradients.memory_values).columns(group.first_col(), cols);
  }
  const ConstView<T> q = m.read_q, k = m.read_k, v = carried_values(group, m.v, keys);
  attention_backward(Plans(tape.plans.used()), q, k, v, ConstView<T>(m.out), tape.attention, ConstView<T>(d_out), d_q,
                     d_k, carried_values(group, d_v, keys), config, context, terms, d_terms);
  position_terms_backward(layer.config, terms, d_terms.d_bias, gradients, group);
  if (group.positions == HeadPositions::rotary) {
    layer.rotary.backward(d_q, group.count, in.places, context);
    layer.rotary.backward(d_k, group.count, in.key_places, context);
  }

  const bool commits = group.routed && layer.config.commitment > 0;
  if (commits && !group.shared)
    layer_commitment<T>(layer.config, layer.routers, m, tape.plans, false, d_q, d_k, context);
  ConstView<T> d_projected = d_q;
  if (group.shared) {
    // scale = gain / sqrt(d)
    for (Index h = 0; h < group.count; ++h)
      gradients.gain(0, group.gain_first + h) +=
          static_cast<T>(d_terms.d_scales[static_cast<std::size_t>(h)] / std::sqrt(static_cast<double>(d)));
    // q = k = u = normalise(convolve(projected)): d_k takes the gradient of the convolved, then d_q of the projected
    add_rows<T>(d_q, d_k, context);
    if (commits) layer_commitment<T>(layer.config, layer.routers, m, tape.plans, true, d_q, {}, context);
    fill_rows(d_k, T(0), context);
    normalise_rows_backward<T>(m.u, m.inverse, d_q, d_k, d, context);
    d_projected = d_k;
    if (group.taps > 0) {
      const Index rows = group.count * group.taps;
      convolve_backward<T>(m.q, view(p.taps).rows(group.taps_first, rows), group.taps, in.places, d_k, d_q,
                           view(gradients.taps).rows(group.taps_first, rows), context);
      d_projected = d_q;
    }
  }
  project_backward<T>(layer, group, in, d_projected, d_k, d_v.rows(0, keys), d_x, d_keys, gradients, context);
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
