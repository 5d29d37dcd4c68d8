#include "coterie/saved/saved_layer.hpp"

#include <map>

#include "catch.hpp"
#include "errors.hpp"
#include "file/folder.hpp"
#include "layer/kinds.hpp"

using namespace test;

namespace {

template <class T>
std::vector<std::byte> saved_bytes(const RoutingAttention<T>& layer, std::string_view prefix = {}) {
  SafetensorsWriter writer;
  add_layer(writer, prefix, layer);
  return writer.bytes();
}

// Steps of a training by plain gradient descent, on data that follow from the step's number; returns the last output.
template <class T>
RowMatrix<T> train(RoutingAttention<T>& layer, int first, int last) {
  Context context;
  typename RoutingAttention<T>::Tape tape;
  RowMatrix<T> y;
  for (int step = first; step < last; ++step) {
    const RowMatrix<T> x = 2 * Random(static_cast<std::uint64_t>(100 + step)).matrix<T>(60, 10);
    const std::vector<Index> offsets = three_sequences(60);
    const Input<T> input{x, offsets, {}, {}, static_cast<std::uint64_t>(step)};
    y.resize(60, 10);
    RowMatrix<T> d_x = RowMatrix<T>::Zero(60, 10);
    Parameters<T> gradients = layer.zero_gradients();
    layer.forward(input, y, tape, context);
    layer.backward(input, tape, y, d_x, gradients, context);
    visit(layer.parameters(), gradients,
          [](std::string_view, View<T> w, ConstView<T> d_w) { w.eigen() -= T(0.01) * d_w.eigen(); });
    layer.update_router(tape, context);
  }
  return y;
}

template <class T>
bool same_state(const RoutingAttention<T>& a, const RoutingAttention<T>& b) {
  if (!(a.config() == b.config()) || !same_bits(a.parameters(), b.parameters())) return false;
  if (a.routers().size() != b.routers().size()) return false;
  for (std::size_t h = 0; h < a.routers().size(); ++h) {
    const OnlineKMeans<T>&x = a.routers()[h], &y = b.routers()[h];
    if (!same_bits<T>(x.centroids(), y.centroids()) || x.updates() != y.updates() || x.frozen() != y.frozen() ||
        !std::equal(x.counts().begin(), x.counts().end(), y.counts().begin()) ||
        !std::equal(x.sums().begin(), x.sums().end(), y.sums().begin()))
      return false;
  }
  return true;
}

const RoutingAttentionConfig saved_config{.model_dim = 6,
                                          .head_dim = 3,
                                          .causal = true,
                                          .seed = 9,
                                          .local = {.heads = 1, .window = 4},
                                          .routed = {.heads = 1, .clusters = 2, .window = 4}};

// The tensors and metadata of a file, to be spoilt and written again.
struct Contents {
  std::map<std::string, RowMatrix<float>> floats;
  std::map<std::string, RowMatrix<double>> doubles;
  std::map<std::string, std::int64_t> numbers;
  std::map<std::string, std::string> metadata;

  explicit Contents(const SafetensorsView& file) : metadata(file.metadata().begin(), file.metadata().end()) {
    for (const SafetensorsTensor& tensor : file.tensors()) {
      if (tensor.dtype == Dtype::i64) {
        numbers[tensor.name] = file.numbers<std::int64_t>(tensor.name)[0];
      } else if (tensor.dtype == Dtype::f32) {
        floats[tensor.name].resize(tensor.shape[0], tensor.shape[1]);
        file.read(tensor.name, floats[tensor.name]);
      } else {
        doubles[tensor.name].resize(tensor.shape[0], tensor.shape[1]);
        file.read(tensor.name, doubles[tensor.name]);
      }
    }
  }

  std::vector<std::byte> bytes() const {
    SafetensorsWriter writer;
    for (const auto& [name, m] : floats) writer.add(name, m);
    for (const auto& [name, m] : doubles) writer.add(name, m);
    for (const auto& [name, number] : numbers) writer.add_number(name, number);
    for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
    return writer.bytes();
  }
};

// What read_layer says of the file of a small layer once it is spoilt; the layer it reads into has to be as it was.
template <class Spoil>
std::string saved_fault(Spoil spoil) {
  const RoutingAttention<float> layer = make_layer<float>(saved_config);
  const std::vector<std::byte> good = saved_bytes(layer, "a.");
  Contents contents(parse_safetensors(good));
  spoil(contents);
  const std::vector<std::byte> bytes = contents.bytes();
  const SafetensorsView file = parse_safetensors(bytes, "x");
  RoutingAttention<float> other(saved_config);
  const std::vector<std::byte> before = saved_bytes(other, "a.");
  const std::string made = message_of<FileError>([&] { read_layer<float>(file, "a."); });
  const std::string into = message_of<FileError>([&] { read_layer(file, "a.", other); });
  REQUIRE(made.empty() == into.empty());
  REQUIRE((saved_bytes(other, "a.") == before) == !into.empty());
  return made;
}

}  // namespace

TEMPLATE_TEST_CASE("save, load, continue gives the bits of not having stopped", "", float, double) {
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    RoutingAttention<TestType> layer = make_layer<TestType>(kind.config);
    train(layer, 0, 3);
    const std::vector<std::byte> bytes = saved_bytes(layer);
    RoutingAttention<TestType> loaded = read_layer<TestType>(parse_safetensors(bytes));
    REQUIRE(same_state(layer, loaded));
    const RowMatrix<TestType> y = train(layer, 3, 6), loaded_y = train(loaded, 3, 6);
    REQUIRE(y.allFinite());
    REQUIRE(same_bits<TestType>(y, loaded_y));
    REQUIRE(same_state(layer, loaded));
    REQUIRE(saved_bytes(layer) == saved_bytes(loaded));
    REQUIRE(saved_bytes(layer) != bytes);
  }
}

TEST_CASE("settings of the routers and of membership are saved as well") {
  std::vector<RoutingAttentionConfig> configs(7, kinds()[0].config);
  configs[0].routed.router.average = Average::batch_mean;
  configs[0].routed.router.renormalise = true;
  configs[1].routed.membership.kind = MembershipKind::balanced;
  configs[1].routed.membership.unassigned = Unassigned::nearest;
  configs[1].routed.membership.combine = Combine::lse;
  configs[2].routed.membership.probes = 2;
  configs[2].routed.commitment = 0.1;
  configs[3].dropout = 0.25;
  configs[3].soft_cap = 5;
  configs[4].routed.router.dead_share = 0.6;
  configs[4].routed.router.split_share = 1.5;
  configs[4].routed.router.decay = 1 / 3.0;
  configs[5].routed.router.average = Average::batch_direction;
  configs[5].routed.matching.normalisation = Normalisation::unit_length;
  configs[5].routed.matching.logits = Logits::normalised_keys;
  configs[5].routed.matching.learned_gain = false;
  configs[6].globals = 2;
  configs[6].dense_up_to = 9;
  configs[6].routed.matching.gain = 1.75;
  for (const RoutingAttentionConfig& config : configs) {
    RoutingAttention<float> layer = make_layer<float>(config);
    train(layer, 0, 4);
    const std::vector<std::byte> bytes = saved_bytes(layer);
    RoutingAttention<float> loaded = read_layer<float>(parse_safetensors(bytes));
    REQUIRE(same_bits<float>(train(layer, 4, 24), train(loaded, 4, 24)));
    REQUIRE(same_state(layer, loaded));
  }
}

TEST_CASE("the shapes that a file is checked against are those of the layer, for every kind") {
  for (const Kind& kind : kinds()) {
    INFO(kind.name);
    const RoutingAttentionConfig config = detail::resolve(kind.config);
    std::map<std::string, std::pair<Index, Index>> expected, got;
    detail::zero_parameters<float>(config).visit([&](std::string_view name, View<float> m) {
      expected[std::string(name)] = {m.rows(), m.cols()};
    });
    for (const detail::TensorShape& shape : detail::parameter_shapes(config))
      got[shape.name] = {shape.rows, shape.cols};
    REQUIRE(got == expected);
  }
}

TEST_CASE("a layer of its own file, frozen routers included") {
  const test::Folder folder;
  RoutingAttention<float> layer = make_layer<float>(kinds()[0].config);
  train(layer, 0, 2);
  save(folder / "layer.safetensors", layer);
  RoutingAttention<float> loaded = load<float>(folder / "layer.safetensors");
  REQUIRE(same_state(layer, loaded));
  train(loaded, 2, 3);
  REQUIRE(!same_state(layer, loaded));
  loaded.freeze_router(true);
  save(folder / "layer.safetensors", loaded);
  REQUIRE(load<float>(folder / "layer.safetensors").routers()[0].frozen());
  REQUIRE(folder.files() == 1);
  REQUIRE(contains(message_of<FileError>([&] { load<float>(folder / "none"); }), (folder / "none").string()));
}

TEST_CASE("a model: several layers under prefixes, other matrices beside them") {
  const RowMatrix<float> embedding = Random(5).matrix<float>(7, 10);
  std::vector<RoutingAttention<float>> layers;
  SafetensorsWriter writer;
  for (const Kind& kind : kinds()) layers.push_back(make_layer<float>(kind.config));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    train(layers[i], 0, 2);
    add_layer(writer, "blocks." + std::to_string(i) + ".attention.", layers[i]);
  }
  writer.add("embedding", embedding);
  writer.add("blocks.1.norm", embedding);
  writer.add_number("step", 2);
  writer.set_metadata("model", "test");
  const std::vector<std::byte> bytes = writer.bytes();
  const SafetensorsView file = parse_safetensors(bytes);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "blocks." + std::to_string(i) + ".attention.";
    REQUIRE(same_state(read_layer<float>(file, prefix), layers[i]));
    RoutingAttention<float> into = make_layer<float>(kinds()[i].config);
    const float* const place = into.parameters().w_q.data();
    read_layer(file, prefix, into);
    REQUIRE(same_state(into, layers[i]));
    REQUIRE(into.parameters().w_q.data() == place);
  }
  REQUIRE(contains(message_of<FileError>([&] { read_layer<float>(file, "blocks.99."); }),
                   "no saved layer: expected a config under the prefix 'blocks.99.', got none"));
  REQUIRE_THROWS_AS(read_layer<float>(file), FileError);
  REQUIRE_THROWS_AS(add_layer(writer, "blocks.1.attention.", layers[1]), ValueError);
}

TEST_CASE("a layer of another config is not read into, and the settings that differ are named") {
  RoutingAttention<float> layer(saved_config);
  const std::vector<std::byte> bytes = saved_bytes(layer, "a.");
  const SafetensorsView file = parse_safetensors(bytes, "x");
  RoutingAttentionConfig config = saved_config;
  config.local.window = config.routed.window = 5;
  config.routed.matching.self = Self::never;
  RoutingAttention<float> other(config);
  REQUIRE(message_of<FileError>([&] { read_layer(file, "a.", other); }) ==
          "read_layer: 'x': a.config.local.window: expected 5, got 4; routed.window: expected 5, got 4; "
          "routed.matching.self: expected never, got only_if_alone");
  RoutingAttention<double> wide(saved_config);
  REQUIRE(contains(message_of<FileError>([&] { read_layer(file, "a.", wide); }), "dtype: expected F64, got F32"));
  REQUIRE(contains(message_of<FileError>([&] { read_layer<double>(file, "a."); }),
                   "tensor 'a.w_q': dtype: expected F64, got F32"));
}

TEST_CASE("files of format 2 are read: settings that came later take their defaults") {
  const RoutingAttention<float> layer = make_layer<float>(saved_config);
  const std::vector<std::byte> now = saved_bytes(layer, "a.");
  Contents contents(parse_safetensors(now));
  contents.metadata["coterie.format"] = "2";
  REQUIRE(contents.metadata.erase("a.config.routed.sinks") == 1);
  REQUIRE(contents.metadata.erase("a.config.routed.recent") == 1);
  const std::vector<std::byte> old = contents.bytes();
  REQUIRE(saved_bytes(read_layer<float>(parse_safetensors(old, "x"), "a."), "a.") == now);
  // A file of today has them; one of format 2 has not.
  REQUIRE(saved_fault([](Contents& c) { c.metadata.erase("a.config.routed.recent"); }) ==
          "read_layer: 'x': a.config.routed.recent: damaged: expected a value, got none");
  REQUIRE(contains(saved_fault([](Contents& c) { c.metadata["coterie.format"] = "2"; }),
                   "'a.config.routed.recent': newer than this library"));
}

TEST_CASE("files that are not what they say are refused, and nothing is changed") {
  REQUIRE(saved_fault([](Contents&) {}).empty());
  // Other things may stand beside the layer.
  REQUIRE(saved_fault([](Contents& c) { c.floats["b"] = c.floats["a.w_q"], c.metadata["b"] = "c"; }).empty());
  struct Lie {
    const char* names;
    void (*spoil)(Contents&);
  };
  const Lie lies[] = {
      {"no saved layer: expected 'coterie.format' in the metadata, got none", [](Contents& c) { c.metadata.clear(); }},
      {"coterie.format: newer than this library: expected at most 3, got 4",
       [](Contents& c) { c.metadata["coterie.format"] = "4"; }},
      {"coterie.format: older than this library: expected 2 to 3, got 1, which coterie 0.1 reads",
       [](Contents& c) { c.metadata["coterie.format"] = "1"; }},
      {"coterie.format: damaged", [](Contents& c) { c.metadata["coterie.format"] = "one"; }},
      {"coterie.format: damaged", [](Contents& c) { c.metadata["coterie.format"] = "0"; }},
      {"a.config.local.heads: damaged: expected a value, got none",
       [](Contents& c) { c.metadata.erase("a.config.local.heads"); }},
      {"a.config.local.heads: damaged: expected a whole number in range, got 'two'",
       [](Contents& c) { c.metadata["a.config.local.heads"] = "two"; }},
      {"a.config.routed.routing: damaged: expected one of learned, random, got 'magic'",
       [](Contents& c) { c.metadata["a.config.routed.routing"] = "magic"; }},
      {"'a.config.magic': newer than this library", [](Contents& c) { c.metadata["a.config.magic"] = "1"; }},
      {"RoutingAttentionConfig: routed.window: expected",
       [](Contents& c) { c.metadata["a.config.routed.window"] = "-4"; }},
      {"damaged: RoutingAttentionConfig: model_dim: expected 1 to 2147483647",
       [](Contents& c) { c.metadata["a.config.model_dim"] = "9223372036854775806"; }},
      {"damaged: RoutingAttentionConfig: heads: expected 1 to 2147483647",
       [](Contents& c) {
         c.metadata["a.config.local.heads"] = c.metadata["a.config.kv_heads"] = "9223372036854775806";
       }},
      // Sizes that no memory holds, if anybody tried.
      {"tensor 'a.w_q': shape: expected [2147483647, 6], got [6, 6]",
       [](Contents& c) { c.metadata["a.config.model_dim"] = "2147483647"; }},
      {"tensor 'a.routers.0.centroids': shape: expected [2147483647, 3], got [2, 3]",
       [](Contents& c) { c.metadata["a.config.routed.clusters"] = "2147483647"; }},
      {"tensor 'a.memory_keys': expected one of this name",
       [](Contents& c) { c.metadata["a.config.memory"] = "2147483647"; }},
      {"tensor 'a.w_q': shape", [](Contents& c) { c.metadata["a.config.head_dim"] = "2147483647"; }},
      {"tensor 'a.w_v': expected one of this name, got none", [](Contents& c) { c.floats.erase("a.w_v"); }},
      {"tensor 'a.gain': expected one of this name, got none", [](Contents& c) { c.floats.erase("a.gain"); }},
      {"got 'a.b_q' beside them", [](Contents& c) { c.floats["a.b_q"] = c.floats["a.gain"]; }},
      {"got 'a.b' beside them", [](Contents& c) { c.floats["a.b"] = c.floats["a.gain"]; }},
      {"got 'a.routers.1.sums' beside them", [](Contents& c) { c.floats["a.routers.1.sums"] = c.floats["a.gain"]; }},
      {"tensor 'a.w_o': shape: expected [6, 6], got [5, 6]",
       [](Contents& c) { c.floats["a.w_o"].conservativeResize(5, 6); }},
      {"tensor 'a.routers.0.counts': dtype: expected F64, got F32",
       [](Contents& c) {
         c.floats["a.routers.0.counts"] = c.doubles["a.routers.0.counts"].cast<float>();
         c.doubles.erase("a.routers.0.counts");
       }},
      {"tensor 'a.routers.0.updates': expected one", [](Contents& c) { c.numbers.erase("a.routers.0.updates"); }},
      {"tensor 'a.routers.0.updates': damaged: expected 0 to",
       [](Contents& c) { c.numbers["a.routers.0.updates"] = -1; }},
      {"tensor 'a.routers.0.updates': damaged: expected 0 to",
       [](Contents& c) { c.numbers["a.routers.0.updates"] = std::numeric_limits<std::int64_t>::max(); }},
      {"tensor 'a.routers.0.frozen': damaged: expected 0 to 1, got 2",
       [](Contents& c) { c.numbers["a.routers.0.frozen"] = 2; }},
      {"damaged: a.routers.0.: OnlineKMeans::restore: counts: expected at least 0",
       [](Contents& c) { c.doubles["a.routers.0.counts"](0, 1) = -1; }},
      {"damaged: a.routers.0.: OnlineKMeans::restore: centroids: expected finite numbers",
       [](Contents& c) { c.floats["a.routers.0.centroids"](1, 1) = std::numeric_limits<float>::quiet_NaN(); }},
  };
  for (const Lie& lie : lies) {
    INFO(lie.names);
    const std::string text = saved_fault(lie.spoil);
    INFO(text);
    REQUIRE(contains(text, "read_layer: 'x': "));
    REQUIRE(contains(text, lie.names));
  }
}
