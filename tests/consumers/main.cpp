// What a user's first program does: a layer, one training step.
#include <coterie/coterie.hpp>
#include <cstdio>

int main() {
  using namespace coterie;
  RoutingAttention<float> layer({.model_dim = 32,
                                 .causal = true,
                                 .seed = 1,
                                 .local = {.heads = 2, .window = 8},
                                 .routed = {.heads = 2, .clusters = 4, .window = 8}});
  RowMatrix<float> x(64, 32), y(64, 32), d_x = RowMatrix<float>::Zero(64, 32);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(i % 17) / 17;
  Context context;
  RoutingAttention<float>::Tape tape;
  Parameters<float> gradients = layer.zero_gradients();
  layer.forward(x, y, tape, context);
  layer.backward(x, tape, y, d_x, gradients, context);
  layer.update_router(tape, context);
  std::printf("coterie %s: |y| = %g, |d_x| = %g\n", version, static_cast<double>(y.norm()),
              static_cast<double>(d_x.norm()));
  return y.norm() > 0 && d_x.norm() > 0 ? 0 : 1;
}
