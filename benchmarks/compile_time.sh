#!/bin/sh
# What a small program costs to compile: user seconds of the compiler for four programs, at several levels of
# optimisation, with kernels compiled into the file and with kernels left to the library coterie::kernels.
#
#     sh benchmarks/compile_time.sh                          g++ at -O0, -O2, -O3 and clang++ at -O2, all programs
#     sh benchmarks/compile_time.sh "g++ -O2" "clang++ -O3"  these compilers and options instead
#
# PROGRAMS="forward attention" chooses programs, LINKING="inlined extern" the ways, INCLUDE another copy of the headers,
# EIGEN where Eigen is, ROUNDS=3 the least of as many runs.

set -eu
include=${INCLUDE:-$(cd "$(dirname "$0")/../include" && pwd)}
eigen=${EIGEN:-/usr/include/eigen3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The first layer is that of version 0.1, whose config was flat.
layer='
#if __has_include(<coterie/layer/head_block.hpp>)
  RoutingAttention<float> layer({.model_dim = 64,
                                 .causal = true,
                                 .local = {.heads = 2, .window = 32},
                                 .routed = {.heads = 2, .clusters = 16, .window = 32}});
#else
  RoutingAttention<float> layer(
      {.model_dim = 64, .heads = 4, .routed_heads = 2, .clusters = 16, .window = 32, .causal = true});
#endif
  RowMatrix<float> x = RowMatrix<float>::Random(1024, 64), y(1024, 64);
  Context context;'

write() {
  cat >"$scratch/$1.cpp"
}

write standard <<END
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
int main() {}
END

write eigen <<END
#include <Eigen/Core>
int main() {}
END

write attention <<END
#include <coterie/attention/attention.hpp>
#include <coterie/plan/local.hpp>
using namespace coterie;
int main() {
  const RowMatrix<float> q = RowMatrix<float>::Random(2048, 128), k = q, v = q;
  RowMatrix<float> out(2048, 128);
  Context context;
  AttentionPlan plan;
  plan_local({.tokens = 2048, .window = 256, .causal = true}, plan);
  attention_forward(plan, q, k, v, out, {.heads = 4}, context);
}
END

write forward <<END
#include <coterie/layer/routing_attention.hpp>
using namespace coterie;
int main() {
  $layer
  layer.forward(x, y, context);
}
END

write backward <<END
#include <coterie/layer/routing_attention.hpp>
using namespace coterie;
int main() {
  $layer
  RowMatrix<float> d_x = x * 0, d_y = x;
  RoutingAttention<float>::Tape tape;
  Parameters<float> gradients = layer.zero_gradients();
  layer.forward(x, y, tape, context);
  layer.backward(x, tape, d_y, d_x, gradients, context);
}
END

write decoder <<END
#if __has_include(<coterie/decoder/decoder.hpp>)
#include <coterie/decoder/decoder.hpp>
#else
#include <coterie/layer/decoder.hpp>  // version 0.1
#endif
using namespace coterie;
int main() {
  $layer
  Decoder<float> decoder(layer, {.sequences = 2});
  decoder.step(x.topRows(2), y.topRows(2), context);
}
END

# User seconds of a command. dash has no option of time that prints them alone.
seconds() {
  if ! LC_ALL=C bash -c 'TIMEFORMAT=%U; time "$@" >&3' seconds "$@" 3>&1 2>"$scratch/seconds"; then
    cat "$scratch/seconds" >&2
    exit 1
  fi
  tail -n 1 "$scratch/seconds"
}

measure() {  # program, way, compiler and options
  program=$1
  way=$2
  shift 2
  if [ "$way" = extern ]; then set -- "$@" -DCOTERIE_EXTERN_KERNELS -DCOTERIE_EXTERN_HEADS; fi
  least=
  for round in $(seq "${ROUNDS:-1}"); do
    took=$(seconds "$@" -std=c++20 -I"$include" -isystem "$eigen" -c "$scratch/$program.cpp" -o "$scratch/$program.o")
    least=$(printf '%s\n%s\n' "$least" "$took" | grep . | sort -g | head -n 1)
  done
  printf '%-24s %-10s %-8s %7s\n' "$compiler" "$program" "$way" "$least"
}

if [ $# -eq 0 ]; then
  set -- "g++ -O0" "g++ -O2" "g++ -O3"
  if command -v clang++ >/dev/null; then set -- "$@" "clang++ -O2"; fi
fi

printf '%-24s %-10s %-8s %7s\n' compiler program kernels seconds
for compiler; do
  # shellcheck disable=SC2086  # a compiler with its options
  for program in ${PROGRAMS:-standard eigen attention forward backward decoder}; do
    case $program in
      standard | eigen) measure "$program" none $compiler ;;
      *) for way in ${LINKING:-inlined extern}; do measure "$program" "$way" $compiler; done ;;
    esac
  done
done
