// Attention along a plan, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "coterie/attention/call.hpp"
#include "coterie/attention/combine.hpp"
#include "coterie/attention/config.hpp"
#include "coterie/attention/partial_sums.hpp"
#include "coterie/attention/tape.hpp"
#include "coterie/attention/tasks.hpp"
#include "coterie/core/context.hpp"
#include "coterie/kernel/dispatch.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {
namespace detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The forward pass: heads' parts in any order, then rows that have none or several entries.
template <class T>
void forward(const AttentionCall<T>& call, View<T> out, AttentionTape<T>* tape, const KernelTable<T>& kernel,
             Context& context) {
  const bool single = call.combine() == Combine::single;
  SoftmaxStates<T> states;
  if (tape) states = tape->prepare(call.tokens(), call.heads(), call.combine());
  Arena& shared = context.workspace().shared();
  const Index workers = context.workers();

  // Several entries per row: every head's entries get rows of their own first.
  for (Index head_begin = 0; head_begin < call.heads();) {
    const Index head_end = single ? call.heads() : head_begin + 1;
    Arena::Scope scope(shared);
    View<T> entry_out;
    SoftmaxStates<T> entry_states;
    if (!single) {
      const Index entries = static_cast<Index>(call.plan(head_begin).entries.size());
      if (tape && call.combine() == Combine::mean) {
        tape->prepare_entries(head_begin, entries, call.dv());
        entry_out = tape->entry_out(head_begin);
        entry_states = tape->entry_states(head_begin);
      } else {
        entry_out = shared.template matrix<T>(entries, call.dv());
        entry_states = {shared.template take<T>(entries), shared.template take<T>(entries), nullptr, 1};
      }
    }
    const HeadTasks tasks(call.plans(), call.heads(), head_begin, head_end, shared);
    context.for_each(tasks.count(), [&](Index i, Index worker) {
      Arena& arena = context.workspace().worker(worker);
      Arena::Scope task_scope(arena);
      T* scratch = arena.template take<T>(kernel.forward_scratch(call.sizes()));
      const auto parts_of = [&](Index t) {
        const auto [head, task] = tasks[t];
        const std::int32_t* const begin = call.plan(head).task_begin.data() + task;
        return std::pair(begin[0], begin[1]);
      };
      const auto [part_begin, part_end] = parts_of(i);
      const Index count = part_end - part_begin, later = i + workers;
      const auto arguments_of = [&, part_begin = part_begin](Index p) {
        const Index head = tasks[p < count ? i : later].first;
        const Index at = p < count ? part_begin + p : parts_of(later).first;
        const AttentionPlan::Part& part = call.plan(head).parts[std::size_t(at)];
        AttentionArguments<T> arguments = call.arguments(head, part);
        if (single)
          arguments.use_rows(out.columns(head * call.dv(), call.dv()), states.from(0, head));
        else
          arguments.use_entries(entry_out, entry_states, part.entry_begin);
        return arguments;
      };
      each_part_in_turn<T>(count, later < tasks.count(), arguments_of,
                           [&](Index, const AttentionArguments<T>& arguments) { kernel.forward(arguments, scratch); });
    });
    for (Index head = head_begin; head < head_end; ++head)
      combine_rows(call, head, out, states.from(0, head), entry_out, entry_states, context);
    head_begin = head_end;
  }
}

/// The backward pass: wave after wave of tasks fills partial sums of d_k and d_v, which are then added part by part.
template <class T>
void backward(const AttentionCall<T>& call, ConstView<T> out, const AttentionTape<T>& tape, ConstView<T> d_out,
              const AttentionGradients<T>& gradients, const KernelTable<T>& kernel, Context& context) {
  const bool single = call.combine() == Combine::single, mean = call.combine() == Combine::mean;
  Arena& shared = context.workspace().shared();
  const Index workers = context.workers();

  for (Index head_begin = 0; head_begin < call.heads();) {
    const Index head_end = single ? call.heads() : head_begin + 1;
    Arena::Scope head_scope(shared);
    const Index entries = static_cast<Index>(call.plan(head_begin).entries.size());
    View<T> entry_d_q;
    T* weight = nullptr;
    if (!single) {
      entry_d_q = shared.template matrix<T>(entries, call.d());
      entry_d_q.fill(0);
    }
    if (mean) weight = entry_weights(call.plan(head_begin), call.mean_epsilon(), shared.template take<T>(entries));

    const HeadTasks tasks(call.plans(), call.heads(), head_begin, head_end, shared);
    for (Index begin = 0; begin < tasks.count();) {
      Arena::Scope wave_scope(shared);
      const Wave<T> wave(call, gradients, kernel, tasks, begin, workers, shared);
      context.for_each(wave.tasks(), [&](Index i, Index worker) {
        Arena& arena = context.workspace().worker(worker);
        Arena::Scope task_scope(arena);
        T* scratch = arena.template take<T>(kernel.backward_scratch(call.sizes()));
        // out and states are those of forward; the kernel reads them here.
        const std::span<const PartialSums<T>> task = wave.task(i);
        const Index later = i + workers;
        wave.clear_tables(i);
        const auto arguments_of = [&](Index p) {
          const PartialSums<T>& sums = p < Index(task.size()) ? task[std::size_t(p)] : wave.task(later)[0];
          AttentionArguments<T> arguments = call.arguments(sums.head, *sums.part);
          if (mean)
            arguments.use_entries(tape.entry_out(sums.head), tape.entry_states(sums.head), sums.part->entry_begin);
          else
            arguments.use_rows(
                View<T>(const_cast<T*>(out.data()) + sums.head * call.dv(), out.rows(), call.dv(), out.stride()),
                tape.states().from(0, sums.head));
          return arguments;
        };
        // Of a part of another head, the kernel would prefetch gradients in this head's columns.
        const bool more = later < wave.tasks() && wave.task(later)[0].head == task[0].head;
        each_part_in_turn<T>(Index(task.size()), more, arguments_of,
                             [&](Index p, const AttentionArguments<T>& arguments) {
                               PartialSums<T> sums = task[std::size_t(p)];
                               Arena::Scope part_scope(arena);
                               if (sums.alone) sums.take_rows(arena);
                               sums.clear();
                               const Index first = sums.part->entry_begin;
                               AttentionGradientArguments<T> g = sums.kernel_arguments();
                               g.d_out = d_out.data() + sums.head * call.dv();
                               g.d_out_stride = d_out.stride();
                               g.weight = weight ? weight + first : nullptr;
                               const ConstView<T> d_lse = gradients.terms.d_lse;
                               g.d_lse = given(d_lse) ? d_lse.data() + sums.head : nullptr;
                               g.d_lse_stride = d_lse.stride();
                               g.by_entry = !single;
                               g.d_q = single ? gradients.d_q.data() + sums.head * call.d() : entry_d_q.row(first);
                               g.d_q_stride = single ? gradients.d_q.stride() : entry_d_q.stride();
                               kernel.backward(arguments, g, scratch);
                               if (sums.alone) wave.add_rows(sums);
                             });
      });
      wave.add(context);
      begin += wave.tasks();
    }
    if (!single)
      add_entry_rows(call.plan(head_begin), entry_d_q, gradients.d_q.columns(head_begin * call.d(), call.d()), context);
    head_begin = head_end;
  }
}

template <class T>
void checked_forward(const Plans& plans, ConstView<T> q, ConstView<T> k, ConstView<T> v, View<T> out,
                     AttentionTape<T>* tape, const AttentionConfig& config, Context& context,
                     const AttentionTerms<T>& terms) {
  const char* const function = "attention_forward";
  const AttentionCall<T> call(function, plans, q, k, v, config, terms);
  call.check_output(function, "out", out, call.tokens(), call.heads() * call.dv());
  forward(call, out, tape, kernels<T>(context.instructions()), context);
}

template <class T>
void checked_backward(const Plans& plans, ConstView<T> q, ConstView<T> k, ConstView<T> v, ConstView<T> out,
                      const AttentionTape<T>& tape, ConstView<T> d_out, View<T> d_q, View<T> d_k, View<T> d_v,
                      const AttentionConfig& config, Context& context, const AttentionTerms<T>& terms,
                      const AttentionTermGradients<T>& d_terms) {
  const char* const function = "attention_backward";
  const AttentionCall<T> call(function, plans, q, k, v, config, terms);
  const AttentionGradients<T> gradients{d_q, d_k, d_v, d_terms};
  check_tape(function, call, out, tape);
  check_gradients(function, call, out, d_out, gradients);
  backward(call, out, tape, d_out, gradients, kernels<T>(context.instructions()), context);
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace detail

inline namespace COTERIE_FLAGS_NAMESPACE {

/// out = softmax(scale q (k + relative keys)^T + bias) (v + relative values) over the keys that the plan lets each query see.
///
/// Shapes: q tokens x heads*d, k key_tokens x kv_heads*d, v key_tokens x kv_heads*dv, out tokens x heads*dv; any d and dv.
/// Formula: out_i = sum_j p_ij v_j, p_i = softmax over visible j of (scale q_i.k_j + bias[i - j]), lse_i its log-sum-exp;
///   with a soft cap, cap tanh(scale q_i.k_j / cap) in place of scale q_i.k_j. Relative keys and values: k_j +
///   relative_keys[i - j] for k_j, v_j + relative_values[i - j] for v_j; i - j stands for the distance of the positions, and
///   takes the nearest row or column where a table has none for it. Dropout: p_ij / (1 - dropout) or 0 in the
///   sum over v_j, by row numbers (those of a sequence alone differ from those in a batch); the softmax and lse_i know
///   nothing of it.
///   A row with several entries: one softmax over all (Combine::lse), or the mean over entries that see a key (mean,
///   with mean_epsilon their sum / (number + mean_epsilon)).
///   A row that sees no key: out 0, lse minus infinity. NaN and infinity reach the rows that see them and no others.
/// Requires: completed plans; shapes that fit; out overlaps no input; otherwise ShapeError or ValueError, and nothing is
///   written.
/// Adds or overwrites: overwrites out, and the tape.
/// Allocates: nothing after warm-up.
/// Threads and determinism: the same bits for any number of workers. The row invariant: a row's bits depend on its query,
///   its visible keys and their ranks in the group's key list, the instruction set and the build.
/// Cost: 4 d operations per visible pair, and index reads; memory beside the arguments does not depend on cluster sizes.
///   With relative keys and values 4 d more per query and table row that any query near it uses.
/// Accuracy: that of the plain formula in the same scalar type; measured in float, d 4 to 64, logits up to 40: at most 1.1
///   times its root mean square error forward (1.4 at d = 1), 1.2 times backward. Sums of values before they are divided may be
///   2^8 times as large as those of the formula.
/// Source: Roy et al. 2021 (clusters); Milakov and Gimelshein 2018 (online softmax); Shaw et al. 2018 (relative keys, values).
inline void attention_forward(const Plans& plans, ConstView<float> q, ConstView<float> k, ConstView<float> v,
                              View<float> out, AttentionTape<float>& tape, const AttentionConfig& config,
                              Context& context, const AttentionTerms<float>& terms = {}) {
  detail::checked_forward<float>(plans, q, k, v, out, &tape, config, context, terms);
}
inline void attention_forward(const Plans& plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                              View<double> out, AttentionTape<double>& tape, const AttentionConfig& config,
                              Context& context, const AttentionTerms<double>& terms = {}) {
  detail::checked_forward<double>(plans, q, k, v, out, &tape, config, context, terms);
}

/// The same without a tape: for evaluation.
inline void attention_forward(const Plans& plans, ConstView<float> q, ConstView<float> k, ConstView<float> v,
                              View<float> out, const AttentionConfig& config, Context& context,
                              const AttentionTerms<float>& terms = {}) {
  detail::checked_forward<float>(plans, q, k, v, out, nullptr, config, context, terms);
}
inline void attention_forward(const Plans& plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                              View<double> out, const AttentionConfig& config, Context& context,
                              const AttentionTerms<double>& terms = {}) {
  detail::checked_forward<double>(plans, q, k, v, out, nullptr, config, context, terms);
}

/// Gradients of attention_forward; undoes out = softmax(scale q (k + relative keys)^T + bias) (v + relative values),
/// recomputing the probabilities from each row's sum and what forward subtracted from its logits.
///
/// Shapes: as in attention_forward; d_out as out, d_q, d_k, d_v as q, k, v.
/// Formula: dp_ij = d_out_i.v_j, ds_ij = p_ij (dp_ij - d_out_i.out_i + d_lse_i); d_v_j += p_ij d_out_i,
///   d_q_i += scale ds_ij k_j, d_k_j += scale ds_ij q_i, d_bias[i - j] += ds_ij, d_scale += ds_ij q_i.k_j,
///   d_relative_keys[i - j] += scale ds_ij q_i, d_relative_values[i - j] += p_ij d_out_i; k_j and v_j as in attention_forward.
/// Requires: the arguments, out and tape of the forward call; outputs overlap no input and not each other.
/// Adds or overwrites: adds.
/// Allocates: nothing after warm-up.
/// Threads and determinism: the same bits for any number of workers: partial sums of parts are added in order.
/// Cost: 10 d operations per visible pair, 10 d more per query and table row with relative keys and values. Scratch memory: gradients of the keys that a task (a part of 512 queries, or
///   small groups of as many) sees, for one task of every worker, or for more tasks up to 4 Mi numbers.
/// Source: Dao et al. 2022 (recomputation); from reference and sum rather than log-sum-exp, which rounds once more: ours.
inline void attention_backward(const Plans& plans, ConstView<float> q, ConstView<float> k, ConstView<float> v,
                               ConstView<float> out, const AttentionTape<float>& tape, ConstView<float> d_out,
                               View<float> d_q, View<float> d_k, View<float> d_v, const AttentionConfig& config,
                               Context& context, const AttentionTerms<float>& terms = {},
                               const AttentionTermGradients<float>& gradients = {}) {
  detail::checked_backward<float>(plans, q, k, v, out, tape, d_out, d_q, d_k, d_v, config, context, terms, gradients);
}
inline void attention_backward(const Plans& plans, ConstView<double> q, ConstView<double> k, ConstView<double> v,
                               ConstView<double> out, const AttentionTape<double>& tape, ConstView<double> d_out,
                               View<double> d_q, View<double> d_k, View<double> d_v, const AttentionConfig& config,
                               Context& context, const AttentionTerms<double>& terms = {},
                               const AttentionTermGradients<double>& gradients = {}) {
  detail::checked_backward<double>(plans, q, k, v, out, tape, d_out, d_q, d_k, d_v, config, context, terms, gradients);
}

}  // namespace COTERIE_FLAGS_NAMESPACE

namespace detail {

template <class T>
void merge(View<T> out, View<T> lse, ConstView<T> other_out, ConstView<T> other_lse) {
  const char* const function = "attention_merge";
  const Index tokens = lse.rows(), heads = lse.cols();
  check_shape<T>(function, "lse", lse, tokens, heads);
  if (heads < 1 || out.cols() % heads != 0)
    fail<ShapeError>(function, "out", join("a multiple of ", heads, " columns"), out.cols());
  check_shape<T>(function, "out", out, tokens, out.cols());
  check_shape<T>(function, "other_out", other_out, tokens, out.cols());
  check_shape<T>(function, "other_lse", other_lse, tokens, heads);
  check_no_alias<T>(function, "out", out, "other_out", other_out);
  check_no_alias<T>(function, "out", out, "other_lse", other_lse);
  check_no_alias<T>(function, "lse", lse, "out", out);
  check_no_alias<T>(function, "lse", lse, "other_out", other_out);
  check_no_alias<T>(function, "lse", lse, "other_lse", other_lse);
  const Index dv = out.cols() / heads;
  for (Index i = 0; i < tokens; ++i)
    for (Index h = 0; h < heads; ++h) {
      const T a = lse(i, h), b = other_lse(i, h);
      if (b < -(std::numeric_limits<T>::max)()) continue;  // the empty state: the identity element
      if (a < -(std::numeric_limits<T>::max)()) {
        std::copy(other_out.row(i) + h * dv, other_out.row(i) + (h + 1) * dv, out.row(i) + h * dv);
        lse(i, h) = b;
        continue;
      }
      const T most = a > b ? a : b;
      const T weight = std::exp(a - most), other_weight = std::exp(b - most), sum = weight + other_weight;
      for (Index c = h * dv; c < (h + 1) * dv; ++c)
        out(i, c) = (weight * out(i, c) + other_weight * other_out(i, c)) / sum;
      lse(i, h) = most + std::log(sum);
    }
}

}  // namespace detail

/// Merges attention over other keys into (out, lse), as if one softmax had seen both sets of keys.
///
/// Shapes: out and other_out tokens x heads*dv, lse and other_lse tokens x heads.
/// Formula: lse' = log(e^lse + e^other_lse), out' = (e^lse out + e^other_lse other_out) / e^lse'.
///   The empty state, output 0 with log-sum-exp minus infinity, of a row that sees no key, is the identity element on
///   both sides.
/// Requires: shapes that fit, no overlap; otherwise ShapeError.
/// Adds or overwrites: out and lse.
/// Source: FlashInfer's attention state; Milakov and Gimelshein 2018.
inline void attention_merge(View<float> out, View<float> lse, ConstView<float> other_out, ConstView<float> other_lse) {
  detail::merge<float>(out, lse, other_out, other_lse);
}
inline void attention_merge(View<double> out, View<double> lse, ConstView<double> other_out,
                            ConstView<double> other_lse) {
  detail::merge<double>(out, lse, other_out, other_lse);
}

}  // namespace coterie
