// The smallest program that learns: a RoutingAttention layer and a read-out recall values from far back by their keys.
#include <coterie/coterie.hpp>
#include <cstdio>
#include <random>

int main() {
  using namespace coterie;
  using Matrix = RowMatrix<float>;
  constexpr int keys = 64, values = 16, dim = 32, told = 2 * keys, tokens = told + keys;
  RoutingAttentionConfig config{.model_dim = dim, .causal = true};  // .local = {.heads = 2, .window = 32} cannot do it
  config.routed = {.heads = 2, .clusters = 12, .window = 32, .matching = {.induction = true}};
  RoutingAttention<float> layer(config);
  const Matrix embedding = Matrix::Random(keys + values, dim);
  Matrix read_out = 0.1f * Matrix::Random(dim, values), d_read_out(dim, values);
  Matrix x(tokens, dim), y(tokens, dim), p(tokens, values), d_y(tokens, dim), d_x(tokens, dim);
  std::mt19937 random(1);
  int value[keys], asked[keys], right = 0;
  const auto draw = [&] {  // key value key value .., then all keys in another order: what were their values?
    const int shift = int(random() % keys);
    for (int k = 0; k < keys; ++k) {
      value[k] = int(random() % values), asked[k] = (37 * k + shift) % keys;
      x.row(2 * k) = embedding.row(k);
      x.row(2 * k + 1) = embedding.row(keys + value[k]);
      x.row(told + k) = embedding.row(asked[k]);
    }
  };
  RoutingAttention<float>::Tape tape;
  Parameters<float> gradients = layer.zero_gradients();
  Context context;
  for (int step = 1; step <= 50; ++step) {
    draw();
    layer.forward(x, y, tape, context);
    product<float>(y, read_out, p, context);
    p.topRows(told).setZero();  // only questions have answers
    for (int i = 0; i < keys; ++i) {
      auto row = p.row(told + i);
      float& answer = p(told + i, value[asked[i]]);
      right += answer == row.maxCoeff();
      row = (row.array() - row.maxCoeff()).exp() / (row.array() - row.maxCoeff()).exp().sum();
      answer -= 1;  // the gradient of -log p[answer]
    }
    d_x.setZero(), d_read_out.setZero(), gradients.fill(0);
    product_weight_gradient<float>(y, p, d_read_out, context);
    product_input_gradient<float>(p, read_out, d_y, context);
    layer.backward(x, tape, d_y, d_x, gradients, context);
    visit(layer.parameters(), gradients, [](auto, auto w, auto d_w) { w.eigen() -= 0.01f * d_w.eigen(); });
    read_out -= 0.01f * d_read_out;
    layer.update_router(tape, context);
    if (step % 5 == 0) std::printf("step %2d: %5.1f %% right\n", step, 20.0 * std::exchange(right, 0) / keys);
  }
  draw();
  Decoder<float> decoder(layer);  // a new sequence: its pairs at once, its questions token by token
  decoder.prefill(x.topRows(told), view(y).rows(0, told), 0, context);
  for (int i = 0; i < keys; ++i) {
    decoder.step(x.row(told + i), view(y).rows(told + i, 1), context);
    product<float>(y.row(told + i), read_out, view(p).rows(told + i, 1), context);
    right += p(told + i, value[asked[i]]) == p.row(told + i).maxCoeff();
  }
  std::printf("decoded: %d of %d right\n", right, keys);
}
