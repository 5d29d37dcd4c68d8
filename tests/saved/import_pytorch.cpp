#include "coterie/saved/import_pytorch.hpp"

#include <functional>
#include <map>
#include <numeric>

#include "catch.hpp"
#include "coterie/saved/saved_layer.hpp"
#include "errors.hpp"
#include "file/file_bytes.hpp"
#include "layer/kinds.hpp"

using namespace test;

namespace {

constexpr Index torch_dim = 10, torch_d = 4;

// A state_dict: tensors of float of any shape, and flags.
struct State {
  struct Tensor {
    std::vector<Index> shape;
    std::vector<float> numbers;
  };
  std::map<std::string, Tensor> tensors;
  std::map<std::string, bool> flags;
  Random random{7};

  void add(const std::string& name, std::vector<Index> shape) {
    const Index count = std::accumulate(shape.begin(), shape.end(), Index(1), std::multiplies<>());
    Tensor tensor{std::move(shape), {}};
    for (Index i = 0; i < count; ++i) tensor.numbers.push_back(static_cast<float>(random.uniform()));
    tensors["m." + name] = tensor;
  }
  std::vector<float>& operator[](const std::string& name) { return tensors.at("m." + name).numbers; }

  std::vector<std::byte> bytes() const {
    std::string header;
    std::vector<std::byte> data;
    const auto describe = [&](const std::string& name, const char* dtype, std::span<const Index> shape,
                              std::size_t size) {
      header += detail::join(header.empty() ? "{" : ",", '"', name, "\":{\"dtype\":\"", dtype,
                             "\",\"shape\":", detail::shape_text(shape), ",\"data_offsets\":[", data.size(), ',',
                             data.size() + size, "]}");
      data.resize(data.size() + size);
    };
    for (const auto& [name, tensor] : tensors) {
      describe(name, "F32", tensor.shape, 4 * tensor.numbers.size());
      for (std::size_t i = 0; i < tensor.numbers.size(); ++i)
        detail::to_little_endian(tensor.numbers[i], data.data() + data.size() - 4 * (tensor.numbers.size() - i));
    }
    for (const auto& [name, flag] : flags) {
      describe(name, "BOOL", {}, 1);
      data.back() = static_cast<std::byte>(flag);
    }
    std::vector<std::byte> file = file_bytes(header + "}");
    file.insert(file.end(), data.begin(), data.end());
    return file;
  }
};

// What the module of a config has, with random numbers.
State state_of(const RoutingAttentionConfig& c) {
  State state;
  const Index routed = c.routed.heads * c.head_dim, all = (c.local.heads + c.routed.heads) * c.head_dim,
              local = all - routed;
  if (local > 0) {
    state.add("local_to_qkv.weight", {3 * local, torch_dim});
    state.add("local_to_qkv.bias", {3 * local});
    state.add("local_attn.rel_pos.inv_freq", {c.head_dim / 2});
    for (Index j = 0; j < c.head_dim / 2; ++j)
      state["local_attn.rel_pos.inv_freq"][static_cast<std::size_t>(j)] =
          static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(c.head_dim)));
  }
  state.add("to_q.weight", {routed, torch_dim});
  if (!c.routed.matching.shared_qk.value_or(c.causal)) state.add("to_k.weight", {routed, torch_dim});
  state.add("to_v.weight", {routed, torch_dim});
  state.add("to_out.weight", {torch_dim, all});
  if (routed > 0) {
    state.add("global_attn.kmeans.means", {c.routed.heads, c.routed.clusters, c.head_dim});
    state.flags["m.global_attn.kmeans.initted"] = true;
    state.add("global_attn.mem_key", {c.routed.heads, c.routed.clusters, c.memory, c.head_dim});
    state.add("global_attn.mem_value", {c.routed.heads, c.routed.clusters, c.memory, c.head_dim});
  }
  return state;
}

// Two local heads and three routed ones.
const RoutingAttentionConfig mixed = presets::pytorch({.model_dim = torch_dim,
                                                       .head_dim = torch_d,
                                                       .bias = true,
                                                       .local = {.heads = 2, .window = 4},
                                                       .routed = {.heads = 3, .clusters = 2, .window = 4}});

// Two routed heads with memory.
RoutingAttentionConfig routed_config() {
  RoutingAttentionConfig c = mixed;
  c.local = {};
  c.routed.heads = 2;
  c.routed.clusters = 1;
  c.routed.window = 100;
  c.bias = false;
  c.memory = 3;
  return c;
}

// What import_pytorch says once state and config are spoilt.
template <class Error>
std::string import_fault(const std::function<void(State&, RoutingAttentionConfig&)>& spoil) {
  State state = state_of(mixed);
  RoutingAttentionConfig config = mixed;
  spoil(state, config);
  const std::vector<std::byte> bytes = state.bytes();
  return message_of<Error>([&] { import_pytorch<float>(parse_safetensors(bytes, "x"), "m.", config); });
}

}  // namespace

TEMPLATE_TEST_CASE("weights of PyTorch arrive transposed, local heads before routed ones", "", float, double) {
  State state = state_of(mixed);
  const std::vector<std::byte> bytes = state.bytes();
  const RoutingAttention<TestType> layer = import_pytorch<TestType>(parse_safetensors(bytes), "m.", mixed);
  const Parameters<TestType>& p = layer.parameters();
  const auto row_of = [&](const std::string& name, Index row) {
    return Eigen::Map<const Eigen::VectorXf>(state[name].data() + row * torch_dim, torch_dim)
        .template cast<TestType>()
        .eval();
  };
  for (Index j = 0; j < 2 * torch_d; ++j) {
    REQUIRE(p.w_q.col(j) == row_of("local_to_qkv.weight", j));
    REQUIRE(p.w_k.col(j) == row_of("local_to_qkv.weight", 2 * torch_d + j));
    REQUIRE(p.w_v.col(j) == row_of("local_to_qkv.weight", 4 * torch_d + j));
    const std::vector<float>& bias = state["local_to_qkv.bias"];
    REQUIRE(p.b_q(0, j) == static_cast<TestType>(bias[static_cast<std::size_t>(j)]));
    REQUIRE(p.b_k(0, j) == static_cast<TestType>(bias[static_cast<std::size_t>(2 * torch_d + j)]));
    REQUIRE(p.b_v(0, j) == static_cast<TestType>(bias[static_cast<std::size_t>(4 * torch_d + j)]));
  }
  for (Index j = 0; j < 3 * torch_d; ++j) {
    REQUIRE(p.w_q.col(2 * torch_d + j) == row_of("to_q.weight", j));
    REQUIRE(p.w_k.col(2 * torch_d + j) == row_of("to_k.weight", j));
    REQUIRE(p.w_v.col(2 * torch_d + j) == row_of("to_v.weight", j));
    for (const RowMatrix<TestType>* b : {&p.b_q, &p.b_k, &p.b_v}) REQUIRE((*b)(0, 2 * torch_d + j) == 0);
  }
  REQUIRE(p.b_o.isZero(0));
  for (Index i = 0; i < torch_dim; ++i)
    for (Index j = 0; j < 5 * torch_d; ++j)
      REQUIRE(p.w_o(j, i) ==
              static_cast<TestType>(state["to_out.weight"][static_cast<std::size_t>(i * 5 * torch_d + j)]));
  for (Index h = 0; h < 3; ++h) {
    const OnlineKMeans<TestType>& router = layer.routers()[static_cast<std::size_t>(h)];
    for (Index c = 0; c < 2; ++c)
      for (Index j = 0; j < torch_d; ++j)
        REQUIRE(router.centroids()(c, j) ==
                static_cast<TestType>(
                    state["global_attn.kmeans.means"][static_cast<std::size_t>((h * 2 + c) * torch_d + j)]));
    REQUIRE(router.next_decay() == 0.999);
  }
  // What was imported is a layer like any other.
  SafetensorsWriter writer;
  add_layer(writer, "", layer);
  const std::vector<std::byte> saved = writer.bytes();
  REQUIRE(same_bits(read_layer<TestType>(parse_safetensors(saved)).parameters(), p));
}

TEST_CASE("heads of one cluster give torch's formula: y = softmax(x W_q^T (x W_k^T)^T / sqrt(d)) x W_v^T W_out^T") {
  const RoutingAttentionConfig config = routed_config();
  State state = state_of(config);
  const std::vector<std::byte> bytes = state.bytes();
  const RoutingAttention<double> layer = import_pytorch<double>(parse_safetensors(bytes), "m.", config);
  const Index n = 9;
  const RowMatrix<double> x = Random(3).matrix<double>(n, torch_dim);
  const auto matrix = [&](const char* name, Index rows, Index cols) {
    return Eigen::Map<const RowMatrix<float>>(state[name].data(), rows, cols).cast<double>().eval();
  };
  const RowMatrix<double> w_q = matrix("to_q.weight", 2 * torch_d, torch_dim),
                          w_k = matrix("to_k.weight", 2 * torch_d, torch_dim),
                          w_v = matrix("to_v.weight", 2 * torch_d, torch_dim),
                          w_out = matrix("to_out.weight", torch_dim, 2 * torch_d);
  RowMatrix<double> joined(n, 2 * torch_d);
  for (Index h = 0; h < 2; ++h) {
    // Memory stands before the keys.
    RowMatrix<double> k(3 + n, torch_d), v(3 + n, torch_d);
    k << matrix("global_attn.mem_key", 6, torch_d).middleRows(3 * h, 3),
        x * w_k.middleRows(h * torch_d, torch_d).transpose();
    v << matrix("global_attn.mem_value", 6, torch_d).middleRows(3 * h, 3),
        x * w_v.middleRows(h * torch_d, torch_d).transpose();
    RowMatrix<double> p = (x * w_q.middleRows(h * torch_d, torch_d).transpose() * k.transpose() / 2).array().exp();
    for (Index i = 0; i < n; ++i) p.row(i) /= p.row(i).sum();
    joined.middleCols(h * torch_d, torch_d) = p * v / (1 + 1e-5);  // the module's mean over one cluster
  }
  RowMatrix<double> y(n, torch_dim);
  Context context;
  layer.forward(x, y, context);
  REQUIRE((y - joined * w_out.transpose()).cwiseAbs().maxCoeff() < 1e-12);
}

TEST_CASE("modules without local heads, without routed heads, shared, and untrained ones") {
  const RoutingAttentionConfig local{
      .model_dim = torch_dim, .head_dim = torch_d, .bias = true, .local = {.heads = 5, .window = 4}};
  for (const bool empty_tensors : {true, false}) {
    State state = state_of(local);
    if (!empty_tensors)
      for (const char* const name : {"m.to_q.weight", "m.to_k.weight", "m.to_v.weight"}) state.tensors.erase(name);
    const std::vector<std::byte> bytes = state.bytes();
    REQUIRE(import_pytorch<float>(parse_safetensors(bytes), "m.", local).parameters().w_q(1, 2) ==
            state["local_to_qkv.weight"][2 * torch_dim + 1]);
  }

  RoutingAttentionConfig shared = mixed;
  shared.causal = true;
  shared.routed.matching.shared_qk.reset();
  shared = presets::pytorch(shared);
  State state = state_of(shared);
  state.flags["m.global_attn.kmeans.initted"] = false;
  state.tensors.erase("m.local_attn.rel_pos.inv_freq");
  const std::vector<std::byte> bytes = state.bytes();
  const RoutingAttention<float> layer = import_pytorch<float>(parse_safetensors(bytes), "m.", shared);
  REQUIRE(layer.parameters().w_k.cols() == 2 * torch_d);
  REQUIRE(layer.parameters().w_q(1, 2 * torch_d) == state["to_q.weight"][1]);
  // The first update is still to come, and takes centroids of its own.
  REQUIRE(layer.routers()[0].updates() == 0);
  REQUIRE(same_bits<float>(layer.routers()[2].centroids(), RoutingAttention<float>(shared).routers()[2].centroids()));
}

TEST_CASE("memory of clusters: taken where all of a head have the same, else refused") {
  RoutingAttentionConfig config = routed_config();
  config.routed.clusters = 2;
  State state = state_of(config);
  const auto import = [&] {
    const std::vector<std::byte> bytes = state.bytes();
    return import_pytorch<float>(parse_safetensors(bytes, "x"), "m.", config);
  };
  REQUIRE(
      contains(message_of<FileError>(import),
               "tensor 'global_attn.mem_key': expected the same memory for all clusters of a head (ours is per head), "
               "got others for the clusters 0 and 1 of head 0"));
  for (const char* const name : {"global_attn.mem_key", "global_attn.mem_value"})
    for (const std::size_t h : {0u, 1u})
      std::copy_n(state[name].begin() + static_cast<std::ptrdiff_t>(h * 2 * 3 * torch_d), 3 * torch_d,
                  state[name].begin() + static_cast<std::ptrdiff_t>((h * 2 + 1) * 3 * torch_d));
  const RoutingAttention<float> layer = import();
  for (Index h = 0; h < 2; ++h)
    for (Index i = 0; i < 3; ++i)
      for (Index j = 0; j < torch_d; ++j) {
        const auto at = static_cast<std::size_t>(h * 2 * 3 * torch_d + i * torch_d + j);
        REQUIRE(layer.parameters().memory_keys(i, h * torch_d + j) == state["global_attn.mem_key"][at]);
        REQUIRE(layer.parameters().memory_values(i, h * torch_d + j) == state["global_attn.mem_value"][at]);
      }
  state["global_attn.mem_value"].back() += 1;
  REQUIRE(contains(message_of<FileError>(import), "clusters 0 and 1 of head 1"));
}

TEST_CASE("files that are not of the config are refused by what is wrong") {
  REQUIRE(import_fault<FileError>([](State&, RoutingAttentionConfig&) {}).empty());
  struct Lie {
    const char* names;
    void (*spoil)(State&, RoutingAttentionConfig&);
  };
  const Lie lies[] = {
      {"tensor 'm.to_q.weight': expected one of this name, got none",
       [](State& s, RoutingAttentionConfig&) { s.tensors.erase("m.to_q.weight"); }},
      {"tensor 'm.to_k.weight': expected one",
       [](State& s, RoutingAttentionConfig&) { s.tensors.erase("m.to_k.weight"); }},
      {"tensor 'm.global_attn.kmeans.initted': expected one",
       [](State& s, RoutingAttentionConfig&) { s.flags.clear(); }},
      {"tensor 'm.to_v.weight': shape: expected [12, 10], got [10, 12]",
       [](State& s, RoutingAttentionConfig&) {
         s.add("to_v.weight", {10, 12});
       }},
      {"tensor 'm.local_to_qkv.bias': shape: expected [24], got [1, 24]",
       [](State& s, RoutingAttentionConfig&) {
         s.add("local_to_qkv.bias", {1, 24});
       }},
      {"tensor 'm.global_attn.kmeans.means': shape: expected [3, 8, 4], got [3, 2, 4]",
       [](State&, RoutingAttentionConfig& c) { c.routed.clusters = 8; }},
      {"tensor 'm.global_attn.mem_key': shape: expected [3, 2, 0, 4], got [3, 2, 1, 4]",
       [](State& s, RoutingAttentionConfig&) {
         s.add("global_attn.mem_key", {3, 2, 1, 4});
       }},
      {"got 'm.to_out.bias' beside them", [](State& s, RoutingAttentionConfig&) { s.add("to_out.bias", {10}); }},
      {"got 'm.to_k.weight' beside them",
       [](State&, RoutingAttentionConfig& c) { c.routed.matching.shared_qk = true; }},
      {"expected none but for local.positions.kind = rotary",
       [](State&, RoutingAttentionConfig& c) { c.local.positions.kind = PositionKind::none; }},
      {"expected the frequencies of local.positions.base = 500",
       [](State&, RoutingAttentionConfig& c) { c.local.positions.base = 500; }},
      {"damaged: global_attn.kmeans.means",
       [](State& s, RoutingAttentionConfig&) {
         s["global_attn.kmeans.means"][3] = std::numeric_limits<float>::infinity();
       }},
  };
  for (const Lie& lie : lies) {
    INFO(lie.names);
    const std::string text = import_fault<FileError>(lie.spoil);
    INFO(text);
    REQUIRE(contains(text, "import_pytorch: 'x': "));
    REQUIRE(contains(text, lie.names));
  }
}

TEST_CASE("configs that the module's tensors do not fit are refused by what is wrong") {
  struct Lie {
    const char* names;
    void (*spoil)(State&, RoutingAttentionConfig&);
  };
  const Lie lies[] = {
      {"import_pytorch: bias: expected true with local heads",
       [](State&, RoutingAttentionConfig& c) { c.bias = false; }},
      {"import_pytorch: memory: expected 0 with local heads", [](State&, RoutingAttentionConfig& c) { c.memory = 1; }},
      {"import_pytorch: routed.routing: expected learned",
       [](State&, RoutingAttentionConfig& c) {
         c = {.model_dim = torch_dim,
              .head_dim = torch_d,
              .bias = true,
              .local = {.heads = 2, .window = 4},
              .routed = {.heads = 3, .clusters = 2, .window = 4, .routing = Routing::random}};
       }},
      {"import_pytorch: routed.matching.normalisation: expected unit_length",
       [](State&, RoutingAttentionConfig& c) { c.routed.matching.normalisation = Normalisation::layer_norm; }},
      {"import_pytorch: kv_heads: expected as many as heads",
       [](State&, RoutingAttentionConfig& c) { c.routed.heads = 4, c.kv_heads = 3; }},
      {"import_pytorch: dense.heads: expected 0",
       [](State&, RoutingAttentionConfig& c) { c.dense.heads = 2, c.head_dim = torch_d; }},
      {"import_pytorch: local.matching: expected its default",
       [](State&, RoutingAttentionConfig& c) { c.local.matching.shared_qk = true; }},
      {"import_pytorch: config: expected no parameters that the module has not, got gain",
       [](State&, RoutingAttentionConfig& c) { c.routed.matching.learned_gain = true; }},
      {"import_pytorch: local.positions.layout: expected halves (the module's), got interleaved",
       [](State&, RoutingAttentionConfig& c) { c.local.positions.layout = RotaryLayout::interleaved; }},
      {"got local_distance_bias",
       [](State&, RoutingAttentionConfig& c) { c.local.positions.kind = PositionKind::bias; }},
      {"RoutingAttentionConfig: routed.window", [](State&, RoutingAttentionConfig& c) { c.routed.window = 0; }},
  };
  for (const Lie& lie : lies) {
    INFO(lie.names);
    const std::string text = import_fault<ValueError>(lie.spoil);
    INFO(text);
    REQUIRE(contains(text, lie.names));
  }
}

TEST_CASE("queries of two-sided local heads turn as far as the module turns them") {
  State state = state_of(mixed);
  const std::vector<std::byte> bytes = state.bytes();
  const auto import = [&](const RoutingAttentionConfig& c, Index ahead) {
    return import_pytorch<double>(parse_safetensors(bytes), "m.", c, ahead);
  };
  const RoutingAttention<double> usual = import(mixed, 0), turned = import(mixed, 6);
  const Index n = 20, heads = 2, d = torch_d, cols = heads * d;
  const RowMatrix<double> x = Random(3).matrix<double>(n, torch_dim);
  const auto projected = [&](const RoutingAttention<double>& layer) {
    const Parameters<double>& p = layer.parameters();
    RowMatrix<double> q = x * p.w_q.leftCols(cols);
    q.rowwise() += p.b_q.leftCols(cols).row(0);
    return q;
  };
  // A query at position i of the module, with the angles of position i + 6.
  const Rotary rotary(d);
  Context context;
  std::vector<std::int32_t> positions(static_cast<std::size_t>(n)), ahead = positions;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(n); ++i) {
    positions[static_cast<std::size_t>(i)] = i;
    ahead[static_cast<std::size_t>(i)] = i + 6;
  }
  RowMatrix<double> expected = projected(usual), got = projected(turned);
  rotary.forward(view(expected), heads, ahead, context);
  rotary.forward(view(got), heads, positions, context);
  REQUIRE((expected - got).cwiseAbs().maxCoeff() < 1e-12);
  REQUIRE((projected(usual) - projected(turned)).cwiseAbs().maxCoeff() > 0.1);
  // All else is the same.
  REQUIRE(usual.parameters().w_q.rightCols(3 * d) == turned.parameters().w_q.rightCols(3 * d));
  REQUIRE(usual.parameters().w_k == turned.parameters().w_k);

  const auto refused = [&](const RoutingAttentionConfig& c, Index positions_ahead) {
    return message_of<ValueError>([&] { import(c, positions_ahead); });
  };
  CHECK(contains(refused(mixed, -1), "import_pytorch: queries_ahead: expected at least 0, got -1"));
  RoutingAttentionConfig none = mixed;
  none.local.positions.kind = PositionKind::none;
  CHECK(contains(refused(none, 6), "import_pytorch: queries_ahead: expected 0 without rotary"));
}
