// One group of heads of a layer: projections, routing, attention, output; forward and backward side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "coterie/attention/attention.hpp"
#include "coterie/kernel/convolution.hpp"
#include "coterie/kernel/normalise.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/kernel/rotary.hpp"
#include "coterie/kernel/rows.hpp"
#include "coterie/layer/input.hpp"
#include "coterie/layer/memberships.hpp"
#include "coterie/layer/parts.hpp"
#include "coterie/layer/positions.hpp"
#include "coterie/layer/router_rows.hpp"
#include "coterie/layer/tape.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/dense_up_to.hpp"
#include "coterie/plan/globals.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/memory.hpp"
#include "coterie/router/kmeans.hpp"

namespace coterie::detail {

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Logit scales of a group of heads, gain/sqrt(d), in scratch; empty where the gain is always 1.
template <class T>
std::span<const double> logit_scales(const LayerState<T>& layer, const HeadBlock& group, Arena& arena) {
  if (!group.learned_gain && group.gain == 1) return {};
  double* const scales = arena.take<double>(group.count);
  for (Index h = 0; h < group.count; ++h) {
    const double gain =
        group.learned_gain ? static_cast<double>(layer.parameters.gain(0, group.gain_first + h)) : group.gain;
    scales[h] = gain / std::sqrt(static_cast<double>(group.head_dim));
  }
  return {scales, static_cast<std::size_t>(group.count)};
}

template <class T>
void add_memory_terms(const LayerState<T>& layer, const HeadBlock& group, AttentionTerms<T>& terms) {
  if (layer.config.memory == 0) return;
  terms.memory_keys = view(layer.parameters.memory_keys).columns(group.kv_first_col(), group.kv_cols());
  terms.memory_values = view(layer.parameters.memory_values).columns(group.kv_first_col(), group.kv_cols());
}

/// What attention adds for a group: terms by distance, and memory.
template <class T>
AttentionTerms<T> attention_terms(const LayerState<T>& layer, const HeadBlock& group,
                                  std::span<const std::int32_t> key_places, Arena& arena) {
  AttentionTerms<T> terms = position_terms(layer.config, layer.parameters, group, key_places, arena);
  add_memory_terms(layer, group, terms);
  return terms;
}

/// What attention is asked to do for a group. Training: forward with a tape, and backward.
template <class T>
AttentionConfig attention_config(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                                 bool training, Arena& arena) {
  AttentionConfig config;
  config.heads = group.count;
  config.kv_heads = group.kv_count;
  config.scales = logit_scales(layer, group, arena);
  config.soft_cap = layer.config.soft_cap;
  if (group.routed) config.mean_epsilon = layer.config.mean_epsilon;
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
M carried_values(const HeadBlock& group, M v, Index keys) {
  return v.rows(group.induction ? 1 : 0, keys);
}

/// q, k, v = x w + b, of the group's columns.
template <class T>
void project(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in, const HeadsMatrices<T>& m,
             Context& context) {
  const Parameters<T>& p = layer.parameters;
  const Index first = group.first_col(), cols = group.cols(), kv_first = group.kv_first_col();
  const Index key_first = group.key_first * group.head_dim, kv_cols = group.kv_cols();
  const bool bias = layer.config.bias;
  // q = x w_q + b_q
  product<T>(in.x, view(p.w_q).columns(first, cols), m.q, context);
  if (bias) add_bias(m.q, p.b_q.data() + first, context);
  if (!group.shared) {
    // k = x w_k + b_k
    product<T>(in.keys, view(p.w_k).columns(key_first, kv_cols), m.k, context);
    if (bias) add_bias(m.k, p.b_k.data() + key_first, context);
  }
  // v = x w_v + b_v
  const View<T> v = m.v.rows(0, in.keys.rows());
  product<T>(in.keys, view(p.w_v).columns(kv_first, kv_cols), v, context);
  if (bias) add_bias(v, p.b_v.data() + kv_first, context);
  if (group.induction) m.v.rows(in.keys.rows(), 1).fill(0);  // the last row has no next value, and nobody sees it
}

/// Undoes project: adds into the gradients of x, of the keys' source (x itself or another) and of the weights.
template <class T>
void project_backward(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in, ConstView<T> d_q,
                      ConstView<T> d_k, ConstView<T> d_v, View<T> d_x, View<T> d_keys, Parameters<T>& gradients,
                      Context& context) {
  const Parameters<T>& p = layer.parameters;
  const Index first = group.first_col(), key_first = group.key_first * group.head_dim;
  const auto undo = [&](ConstView<T> x, const RowMatrix<T>& w, Index from, ConstView<T> d, View<T> d_input,
                        RowMatrix<T>& d_w, RowMatrix<T>& d_b) {
    product_weight_gradient<T>(x, d, view(d_w).columns(from, d.cols()), context);
    product_input_gradient<T>(d, view(w).columns(from, d.cols()), d_input, context, true);
    if (layer.config.bias) add_bias_backward(d, d_b.data() + from, context);
  };
  undo(in.x, p.w_q, first, d_q, d_x, gradients.w_q, gradients.b_q);
  if (!group.shared) undo(in.keys, p.w_k, key_first, d_k, d_keys, gradients.w_k, gradients.b_k);
  undo(in.keys, p.w_v, group.kv_first_col(), d_v, d_keys, gradients.w_v, gradients.b_v);
}

/// Labels of queries and keys of the routed heads: given, drawn, or by their routers.
template <class T>
void assign_labels(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                   const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), heads = group.kv_count;
  const bool given = !in.input.routes.empty(), drawn = !given && layer.config.routing == Routing::random;
  const bool own_keys = in.crosses || (!given && !drawn && !group.shared);
  const auto query_labels = HeadsPlans::grow(plans.query_labels, heads * n);
  const auto key_labels = HeadsPlans::grow(plans.key_labels, own_keys ? heads * keys : 0);
  if (given) {
    std::copy(in.input.routes.begin(), in.input.routes.end(), query_labels.begin());
    return;
  }
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const View<T> normalised = drawn ? View<T>() : arena.matrix<T>(std::max(n, keys), group.head_dim);
  const auto stream = static_cast<std::uint64_t>(LayerStream::routes);
  const std::uint64_t step = random_bits(layer.config.seed, stream, in.input.step);
  for (Index h = 0; h < heads; ++h) {
    const auto assign = [&](const RouterRows<T>& rows, std::span<const std::int32_t> places,
                            std::span<std::int32_t> labels) {
      if (drawn) {
        const std::uint64_t seed = random_bits(step, stream, static_cast<std::uint64_t>(h));
        for (std::size_t i = 0; i < labels.size(); ++i)
          labels[i] = random_label(seed, places[i], layer.config.clusters);
        return;
      }
      layer.routers[static_cast<std::size_t>(h)].assign(rows.of(h, normalised, layer.config, context), labels, context);
    };
    assign(router_queries(group, m), in.places, labels_of(query_labels, h, n));
    if (own_keys) assign(router_keys(group, m), in.key_places, labels_of(key_labels, h, keys));
  }
}

/// The plans of a group, without what comes on top of them.
template <class T>
void build_token_plans(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                       const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  const RoutingAttentionConfig& c = layer.config;
  const Index n = in.x.rows(), keys = in.keys.rows();
  const std::span<const Index> offsets = in.input.offsets, key_offsets = in.input.source_offsets;
  if (!group.routed) {
    AttentionPlan& plan = plans.use(1)[0];
    plan_local({.tokens = n,
                .keys = keys,
                .window = c.local_window,
                .lookahead = c.lookahead,
                .causal = c.causal,
                .self = group.induction ? Self::never : Self::visible,
                .offsets = offsets,
                .key_offsets = key_offsets},
               plan, &plans.scratch[0]);
  } else if (c.routing == Routing::dense) {
    AttentionPlan& plan = plans.use(1)[0];
    plan_dense({.tokens = n,
                .keys = keys,
                .causal = c.causal,
                .self = *c.self,
                .offsets = offsets,
                .key_offsets = key_offsets},
               plan, &plans.scratch[0]);
  } else if (has_members(c)) {
    const ScoredRows<T> queries{router_queries(group, m), offsets},
        key_rows{router_keys(group, m), in.crosses ? key_offsets : offsets};
    build_member_plans<T>(c, layer.routers, queries, key_rows, group.shared, plans, context);
  } else {
    assign_labels(layer, group, in, m, plans, context);
    const std::span<AttentionPlan> built = plans.use(static_cast<std::size_t>(group.kv_count));
    context.for_each(group.kv_count, [&](Index h, Index) {
      const std::span<const std::int32_t> queries = plans.query_labels, own = plans.key_labels;
      const auto query_labels = labels_of(queries, h, n);
      plan_clustered(query_labels, own.empty() ? query_labels : labels_of(own, h, keys),
                     {.clusters = c.clusters,
                      .window = c.window,
                      .causal = c.causal,
                      .self = *c.self,
                      .offsets = offsets,
                      .key_offsets = key_offsets},
                     built[static_cast<std::size_t>(h)], &plans.scratch[static_cast<std::size_t>(h)]);
    });
  }
}

/// The plans of a group.
template <class T>
void build_plans(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                 const HeadsMatrices<T>& m, HeadsPlans& plans, Context& context) {
  build_token_plans(layer, group, in, m, plans, context);
  const RoutingAttentionConfig& c = layer.config;
  const bool dense = group.routed && c.routing == Routing::dense;
  const Index dense_up_to = dense ? 0 : c.dense_up_to, globals = dense ? 0 : c.globals;
  if (dense_up_to + globals + c.memory == 0) return;
  const Self self = group.routed ? *c.self : group.induction ? Self::never : Self::visible;
  const std::span<const Index> offsets = in.input.offsets;
  context.for_each(static_cast<Index>(plans.count), [&](Index i, Index) {
    const auto number = static_cast<std::size_t>(i);
    AttentionPlan& plan = plans.plans[number];
    PlanScratch* const scratch = &plans.scratch[number];
    if (dense_up_to > 0)
      plan_dense_up_to({.length = dense_up_to,
                        .causal = c.causal,
                        .self = self,
                        .offsets = offsets,
                        .key_offsets = in.input.source_offsets},
                       plan, scratch);
    if (globals > 0)
      plan_add_globals({.globals = globals, .causal = c.causal, .self = self, .offsets = offsets}, plan, scratch);
    if (c.memory > 0) plan_add_memory(c.memory, plan, scratch);
  });
}

/// The group's matrices up to what routers see: projected, convolved, normalised, summed. take(buffer, rows, columns) gives
/// memory, convolve(q, u) makes convolved queries: forward from the rows before, a decoder from those that it remembers.
template <class T, class Take, class Convolve>
HeadsMatrices<T> prepare_rows(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                              const Take& take, const Convolve& convolve, Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), d = group.head_dim, cols = group.cols(),
              kv_cols = group.kv_cols();
  const Normalisation normalisation = layer.config.normalisation;
  HeadsMatrices<T> m;
  m.q = take(&HeadsTape<T>::q, n, cols);
  if (!group.shared) m.k = take(&HeadsTape<T>::k, keys, kv_cols);
  m.v = take(&HeadsTape<T>::v, keys + (group.induction ? 1 : 0), kv_cols);
  m.out = take(&HeadsTape<T>::out, n, cols);
  // Projected queries are needed beside normalised ones by the convolution's gradient, and by attention that reads them.
  const bool apart = group.taps > 0 || (group.shared && group.logits != Logits::normalised);
  m.u = apart ? take(&HeadsTape<T>::u, n, cols) : m.q;

  project(layer, group, in, m, context);
  if (group.normalises_queries()) {
    m.inverse = take(&HeadsTape<T>::inverse, n, group.count);
    // u = normalise(convolve(q))
    if (group.taps > 0) convolve(m.q, m.u);
    normalise_rows<T>(group.taps > 0 ? m.u : m.q, m.u, m.inverse, d, context, normalisation);
  }
  if (group.normalises_keys()) {
    m.key_inverse = take(&HeadsTape<T>::key_inverse, keys, group.kv_count);
    normalise_rows<T>(m.k, m.k, m.key_inverse, d, context, normalisation);
  }
  m.route = m.u;
  if (group.routed && group.heads_per_kv() > 1 && !layer.routers.empty()) {
    m.route = take(&HeadsTape<T>::route, n, kv_cols);
    sum_queries<T>(layer.config, group, m.u, m.route, context);
  }
  return m;
}

/// Queries and keys as attention reads them. After routing, and apart from what routers and normalise_rows_backward read.
template <class T, class Take>
void read_rows(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in, const Take& take,
               HeadsMatrices<T>& m, Context& context) {
  m.read_q = group.logits == Logits::normalised ? m.u : m.q;
  m.read_k = !group.shared ? m.k : group.logits == Logits::raw ? m.q : m.u;
  if (group.positions != PositionKind::rotary) return;
  const auto turned = [&](Buffer<T> HeadsTape<T>::*buffer, View<T> from, Index heads,
                          std::span<const std::int32_t> places) {
    const View<T> to = group.routed || group.shared ? take(buffer, from.rows(), from.cols()) : from;
    if (to.data() != from.data()) copy_rows<T>(to, from, context);
    layer.rotary.forward(to, heads, places, context);
    return to;
  };
  // Rows that are both turn once: i is a query's place and its key's.
  const bool same = m.read_k.data() == m.read_q.data();
  m.read_q = turned(&HeadsTape<T>::read_q, m.read_q, group.count, in.places);
  m.read_k = same ? m.read_q : turned(&HeadsTape<T>::read_k, m.read_k, group.kv_count, in.key_places);
}

/// y (+)= the group's share of the output. `add`: another group has written y. With a tape, keeps its matrices; training: and
/// what backward needs beside them.
template <class T>
void heads_forward(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in, View<T> y, bool add,
                   HeadsTape<T>* tape, bool training, HeadsPlans& plans, Context& context) {
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const auto take = [&](Buffer<T> HeadsTape<T>::*buffer, Index rows, Index columns) {
    return tape ? (tape->*buffer).matrix(rows, columns) : arena.matrix<T>(rows, columns);
  };
  const auto convolved = [&](View<T> from, View<T> to) {
    convolve<T>(from, view(layer.parameters.taps).rows(group.taps_first, group.count * group.taps), group.taps,
                in.places, to, context);
  };
  HeadsMatrices<T> m = prepare_rows(layer, group, in, take, convolved, context);
  build_plans(layer, group, in, m, plans, context);
  read_rows(layer, group, in, take, m, context);

  const AttentionConfig config = attention_config(layer, group, in, training, arena);
  const AttentionTerms<T> terms = attention_terms(layer, group, in.key_places, arena);
  const ConstView<T> q = m.read_q, k = m.read_k, v = carried_values(group, m.v, in.keys.rows());
  if (training)
    attention_forward(Plans(plans.used()), q, k, v, m.out, tape->attention, config, context, terms);
  else
    attention_forward(Plans(plans.used()), q, k, v, m.out, config, context, terms);
  // y (+)= out w_o
  product<T>(m.out, view(layer.parameters.w_o).rows(group.first_col(), group.cols()), y, context, add);
  if (tape) tape->matrices = m;
}

/// From the gradients of what attention read of heads with shared queries and keys, those of the projected queries; both
/// are overwritten.
template <class T>
View<T> shared_rows_backward(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                             const HeadsTape<T>& tape, View<T> d_q, View<T> d_k, Parameters<T>& gradients,
                             Context& context) {
  const RoutingAttentionConfig& c = layer.config;
  const HeadsMatrices<T>& m = tape.matrices;
  const bool commits = group.routed && c.commitment > 0;
  const auto commit = [&](View<T> d_u) {
    if (commits) rows_commitment<T>(c, layer.routers, router_queries(group, m), tape.plans.query_labels, d_u, context);
  };
  const auto through = [&](View<T> d_u, View<T> d_projected) {
    normalise_rows_backward<T>(m.u, m.inverse, d_u, d_projected, group.head_dim, context, c.normalisation);
  };
  if (group.logits == Logits::normalised_keys) {
    // q = projected, k = u = normalise(projected)
    commit(d_k);
    through(d_k, d_q);
    return d_q;
  }
  add_rows<T>(d_q, d_k, context);
  if (group.logits == Logits::raw && !commits) return d_q;
  fill_rows(d_k, T(0), context);
  if (group.logits == Logits::raw) {
    // q = k = projected, and routers see u = normalise(projected)
    commit(d_k);
    through(d_k, d_q);
    return d_q;
  }
  // q = k = u = normalise(convolve(projected)): d_k takes the gradient of the convolved, then d_q of the projected
  commit(d_q);
  through(d_q, d_k);
  if (group.taps == 0) return d_k;
  const Index rows = group.count * group.taps;
  convolve_backward<T>(m.q, view(layer.parameters.taps).rows(group.taps_first, rows), group.taps, in.places, d_k, d_q,
                       view(gradients.taps).rows(group.taps_first, rows), context);
  return d_q;
}

/// From the gradients of what attention read of heads with keys of their own, those of the projected queries and keys: the
/// same views, or others in scratch. All may be overwritten.
template <class T>
void own_rows_backward(const LayerState<T>& layer, const HeadBlock& group, const HeadsTape<T>& tape, View<T>& d_q,
                       View<T>& d_k, Arena& arena, Context& context) {
  const RoutingAttentionConfig& c = layer.config;
  const HeadsMatrices<T>& m = tape.matrices;
  if (group.routed && c.commitment > 0) {
    const bool sums = group.heads_per_kv() > 1;
    const View<T> d_route = sums ? arena.matrix<T>(m.route.rows(), m.route.cols()) : d_q;
    if (sums) fill_rows(d_route, T(0), context);
    rows_commitment<T>(c, layer.routers, router_queries(group, m), tape.plans.query_labels, d_route, context);
    if (sums) sum_queries_backward<T>(c, group, m.u, d_route, d_q, context);
    rows_commitment<T>(c, layer.routers, router_keys(group, m), key_labels(tape.plans), d_k, context);
  }
  const auto through = [&](View<T> normalised, View<T> inverse, View<T>& d) {
    const View<T> d_projected = arena.matrix<T>(d.rows(), d.cols());
    fill_rows(d_projected, T(0), context);
    normalise_rows_backward<T>(normalised, inverse, d, d_projected, group.head_dim, context, c.normalisation);
    d = d_projected;
  };
  if (group.normalises_queries()) through(m.u, m.inverse, d_q);
  if (group.normalises_keys()) through(m.k, m.key_inverse, d_k);
}

/// Undoes heads_forward: adds into d_x, d_keys (the source's, or d_x itself) and the gradients.
template <class T>
void heads_backward(const LayerState<T>& layer, const HeadBlock& group, const CheckedInput<T>& in,
                    const HeadsTape<T>& tape, ConstView<T> d_y, View<T> d_x, View<T> d_keys, Parameters<T>& gradients,
                    Context& context) {
  const Index n = in.x.rows(), keys = in.keys.rows(), cols = group.cols(), kv_cols = group.kv_cols();
  const Parameters<T>& p = layer.parameters;
  const HeadsMatrices<T>& m = tape.matrices;
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);

  // y += out w_o
  const View<T> d_out = arena.matrix<T>(n, cols);
  product_weight_gradient<T>(m.out, d_y, view(gradients.w_o).rows(group.first_col(), cols), context);
  product_input_gradient<T>(d_y, view(p.w_o).rows(group.first_col(), cols), d_out, context);

  // out = attention(q, k, v)
  View<T> d_q = arena.matrix<T>(n, cols), d_k = arena.matrix<T>(keys, kv_cols);
  const View<T> d_v = arena.matrix<T>(m.v.rows(), kv_cols);
  for (const View<T>& zeroed : {d_q, d_k, d_v}) fill_rows(zeroed, T(0), context);
  const AttentionConfig config = attention_config(layer, group, in, true, arena);
  const AttentionTerms<T> terms = attention_terms(layer, group, in.key_places, arena);
  AttentionTermGradients<T> d_terms = position_term_gradients(terms, gradients, group, arena);
  if (group.learned_gain) {
    double* const d_scales = arena.take<double>(group.count);
    std::fill(d_scales, d_scales + group.count, 0.0);
    d_terms.d_scales = {d_scales, static_cast<std::size_t>(group.count)};
  }
  if (layer.config.memory > 0) {
    d_terms.d_memory_keys = view(gradients.memory_keys).columns(group.kv_first_col(), kv_cols);
    d_terms.d_memory_values = view(gradients.memory_values).columns(group.kv_first_col(), kv_cols);
  }
  const ConstView<T> q = m.read_q, k = m.read_k, v = carried_values(group, m.v, keys);
  attention_backward(Plans(tape.plans.used()), q, k, v, ConstView<T>(m.out), tape.attention, ConstView<T>(d_out), d_q,
                     d_k, carried_values(group, d_v, keys), config, context, terms, d_terms);
  position_terms_backward(layer.config, terms, d_terms.d_bias, gradients, group);
  if (group.positions == PositionKind::rotary) {
    layer.rotary.backward(d_q, group.count, in.places, context);
    layer.rotary.backward(d_k, group.kv_count, in.key_places, context);
  }
  // scale = gain / sqrt(d)
  for (Index h = 0; h < group.count && group.learned_gain; ++h)
    gradients.gain(0, group.gain_first + h) +=
        static_cast<T>(d_terms.d_scales[static_cast<std::size_t>(h)] / std::sqrt(static_cast<double>(group.head_dim)));
  if (group.shared)
    d_q = shared_rows_backward<T>(layer, group, in, tape, d_q, d_k, gradients, context);
  else
    own_rows_backward<T>(layer, group, tape, d_q, d_k, arena, context);
  project_backward<T>(layer, group, in, d_q, d_k, d_v.rows(0, keys), d_x, d_keys, gradients, context);
}

}  // namespace COTERIE_FLAGS_NAMESPACE

// As for kernels (dispatch.hpp): with COTERIE_EXTERN_HEADS a file leaves these functions to another one, which defines
// COTERIE_INSTANTIATE_HEADS.
#define COTERIE_HEADS(prefix, T)                                                                                       \
  prefix template void heads_forward<T>(const LayerState<T>&, const HeadBlock&, const CheckedInput<T>&, View<T>, bool, \
                                        HeadsTape<T>*, bool, HeadsPlans&, Context&);                                   \
  prefix template void heads_backward<T>(const LayerState<T>&, const HeadBlock&, const CheckedInput<T>&,               \
                                         const HeadsTape<T>&, ConstView<T>, View<T>, View<T>, Parameters<T>&,          \
                                         Context&);
#if defined(COTERIE_INSTANTIATE_HEADS)
COTERIE_HEADS(, float)
COTERIE_HEADS(, double)
#elif defined(COTERIE_EXTERN_HEADS)
COTERIE_HEADS(extern, float)
COTERIE_HEADS(extern, double)
#endif
#undef COTERIE_HEADS

}  // namespace coterie::detail
