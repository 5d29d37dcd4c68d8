// One of two files of a program that are compiled for different instruction sets; see flags.cmake.
#include <coterie/layer/routing_attention.hpp>

double NAME() {
  using namespace coterie;
  RoutingAttention<float> layer({.model_dim = 12,
                                 .causal = true,
                                 .local = {.heads = 1, .window = 8},
                                 .routed = {.heads = 1, .clusters = 2, .window = 8}});
  RowMatrix<float> x(40, 12), y(40, 12);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(i % 17) / 17;
  Context context;
  RoutingAttention<float>::Tape tape;
  layer.forward(x, y, tape, context);
  layer.update_router(tape, context);
  return static_cast<double>(y.norm());
}
