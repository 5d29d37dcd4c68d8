// Layers as files: weights and routers by name, their config and the format in the metadata.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "coterie/file/safetensors.hpp"
#include "coterie/file/safetensors_writer.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "coterie/saved/config_text.hpp"
#include "coterie/version.hpp"

namespace coterie {

namespace detail {

inline constexpr char format_key[] = "coterie.format";

/// The metadata key of a setting, with the prefix of its layer.
inline std::string config_key(std::string_view prefix, std::string_view field) {
  return join(prefix, "config.", field);
}

/// The tensors of the router of a routed key/value head, with its layer's prefix.
inline std::string router_name(std::string_view prefix, Index head, std::string_view what) {
  return join(prefix, "routers.", head, ".", what);
}

/// Reads the config of the layer under `prefix`.
inline RoutingAttentionConfig read_config(const char* function, const SafetensorsView& file, std::string_view prefix) {
  const auto& metadata = file.metadata();
  const auto format_text = metadata.find(std::string_view(format_key));
  if (format_text == metadata.end())
    file.fail(function, join("no saved layer: expected ", in_quotes(format_key), " in the metadata, got none"));
  int format = 0;
  const std::string expected = read_field(std::string_view(format_text->second), format);
  if (!expected.empty() || format < 1)
    file.fail(function, join(format_key, ": damaged: expected a whole number of at least 1, got ",
                             in_quotes(format_text->second)));
  if (format < oldest_format)
    file.fail(function, join(format_key, ": older than this library: expected ", oldest_format, " to ", format_version,
                             ", got ", format, ", which coterie 0.1 reads"));
  if (format > format_version)
    file.fail(function,
              join(format_key, ": newer than this library: expected at most ", format_version, ", got ", format));

  RoutingAttentionConfig config;
  const std::string first = config_key(prefix, "");
  auto at = metadata.lower_bound(first);
  if (at == metadata.end() || !at->first.starts_with(first))
    file.fail(function, join("no saved layer: expected a config under the prefix ", in_quotes(prefix), ", got none"));
  const auto text_of = [&](std::string_view path) {
    const auto text = metadata.find(config_key(prefix, path));
    return text == metadata.end() ? nullptr : &text->second;
  };
  const std::string fault = read_settings(config, format, text_of, first_format);
  if (!fault.empty()) file.fail(function, join(first, fault));
  std::set<std::string> known;
  visit(config, [&](std::string_view path, const auto&) {
    if (first_format(path) <= format) known.insert(config_key(prefix, path));
  });
  for (; at != metadata.end() && at->first.starts_with(first); ++at)
    if (!known.contains(at->first))
      file.fail(function,
                join(in_quotes(at->first), ": newer than this library: expected fields that it knows, got this one"));
  try {
    config = resolve(config);
  } catch (const ValueError& error) {
    file.fail(function, join("damaged: ", error.what()));
  }
  return config;
}

/// Requires the tensors of a layer of this config under the prefix, with their shapes and dtypes, and no others there.
template <class T>
void check_tensors(const char* function, const SafetensorsView& file, std::string_view prefix,
                   const RoutingAttentionConfig& c) {
  std::set<std::string> known;
  const auto expect_tensor = [&](const std::string& name, Dtype dtype, Index rows, Index cols) {
    const SafetensorsTensor& tensor = file.required(function, name);
    file.require_shape(function, tensor, std::array<Index, 2>{rows, cols});
    if (tensor.dtype != dtype)
      file.fail(function, join("tensor ", in_quotes(name), ": dtype: expected ", dtype_info(dtype).name, ", got ",
                               dtype_info(tensor.dtype).name));
    known.insert(name);
  };
  for (const TensorShape& shape : parameter_shapes(c))
    expect_tensor(join(prefix, shape.name), dtype_of<T>, shape.rows, shape.cols);
  const Index routers = c.routed.routing == Routing::learned ? routed_kv_heads(c) : 0;
  for (Index h = 0; h < routers; ++h) {
    expect_tensor(router_name(prefix, h, "centroids"), dtype_of<T>, c.routed.clusters, c.head_dim);
    expect_tensor(router_name(prefix, h, "counts"), Dtype::f64, 1, c.routed.clusters);
    expect_tensor(router_name(prefix, h, "sums"), Dtype::f64, c.routed.clusters, c.head_dim);
    expect_tensor(router_name(prefix, h, "updates"), Dtype::i64, 1, 1);
    expect_tensor(router_name(prefix, h, "frozen"), Dtype::i64, 1, 1);
  }
  file.require_no_others(function, prefix, known);
}

/// Sets weights and routers of a layer of the config for which check_tensors has passed; all or nothing.
template <class T>
void fill_layer(const char* function, const SafetensorsView& file, std::string_view prefix,
                RoutingAttention<T>& layer) {
  std::vector<OnlineKMeans<T>> routers(layer.routers().begin(), layer.routers().end());
  for (std::size_t h = 0; h < routers.size(); ++h) {
    const auto name = [&](std::string_view what) { return router_name(prefix, static_cast<Index>(h), what); };
    RowMatrix<T> centroids(routers[h].clusters(), routers[h].dim());
    file.read(name("centroids"), centroids);
    const auto number = [&](std::string_view what, std::int64_t most) {
      const std::int64_t value = file.template numbers<std::int64_t>(name(what))[0];
      if (value < 0 || value > most)
        file.fail(function, join("tensor ", in_quotes(name(what)), ": damaged: expected 0 to ", most, ", got ", value));
      return value;
    };
    const std::int64_t updates = number("updates", std::int64_t(1) << 53);  // can be counted on from
    const bool frozen = number("frozen", 1) == 1;
    try {
      routers[h].restore(centroids, file.template numbers<double>(name("counts")),
                         file.template numbers<double>(name("sums")), static_cast<Index>(updates));
    } catch (const ValueError& error) {
      file.fail(function, join("damaged: ", name(""), ": ", error.what()));
    }
    routers[h].freeze(frozen);
  }
  // Names first: from here on nothing throws, for check_tensors has passed and what is copied has its size.
  std::vector<std::string> names;
  layer.parameters().visit([&](std::string_view name, View<T>) { names.push_back(join(prefix, name)); });
  std::size_t next = 0;
  layer.parameters().visit([&](std::string_view, View<T> m) { file.read(names[next++], m); });
  std::copy(routers.begin(), routers.end(), layer.routers().begin());
}

}  // namespace detail

/// Adds a layer to a writer: all that training changes, and the config.
///
/// Parameters are named "<prefix>w_q" and so on, the state of the router of routed key/value head h (centroids, counts,
/// sums, updates, frozen) "<prefix>routers.<h>.centroids" and so on. Settings are metadata "<prefix>config.<path>",
/// such as config.routed.window; the format is metadata too.
///
///     SafetensorsWriter writer;
///     for (std::size_t i = 0; i < layers.size(); ++i)
///       add_layer(writer, "blocks." + std::to_string(i) + ".attention.", layers[i]);
///     writer.add("embedding", embedding);
///     writer.write("model.safetensors");
///
/// Requires: names that are new (ValueError); the writer may have taken some of the layer by then. The writer refers to
///   the layer, which must outlive the writing, and not change before it.
template <class T>
void add_layer(SafetensorsWriter& writer, std::string_view prefix, const RoutingAttention<T>& layer) {
  writer.set_metadata(detail::format_key, std::to_string(detail::format_version));
  writer.set_metadata("coterie.version", version);
  visit(layer.config(), [&](std::string_view path, const auto& field) {
    writer.set_metadata(detail::config_key(prefix, path), detail::field_text(field));
  });
  layer.parameters().visit([&](std::string_view name, ConstView<T> m) { writer.add(detail::join(prefix, name), m); });
  Index head = 0;
  for (const OnlineKMeans<T>& router : layer.routers()) {
    const auto name = [&](std::string_view what) { return detail::router_name(prefix, head, what); };
    writer.add(name("centroids"), router.centroids());
    writer.add(name("counts"), ConstView<double>(router.counts().data(), 1, router.clusters()));
    writer.add(name("sums"), ConstView<double>(router.sums().data(), router.clusters(), router.dim()));
    writer.add_number(name("updates"), router.updates());
    writer.add_number(name("frozen"), router.frozen() ? 1 : 0);
    ++head;
  }
}

/// Makes the layer that add_layer wrote under this prefix; its training continues bit-identically.
///
/// Requires: format 2 or later (files of coterie 0.1 have format 1), not newer than this library; all settings of that
///   format and no others, with valid values; under the prefix all tensors of the layer and no others, in the shapes of
///   its config and the scalar type T (FileError). Settings that came after the format take their defaults.
/// Allocates: the layer, and only after its config was found to fit the tensors of the file.
template <class T>
RoutingAttention<T> read_layer(const SafetensorsView& file, std::string_view prefix = {}) {
  const RoutingAttentionConfig config = detail::read_config("read_layer", file, prefix);
  detail::check_tensors<T>("read_layer", file, prefix, config);
  RoutingAttention<T> layer(config);
  detail::fill_layer("read_layer", file, prefix, layer);
  return layer;
}

/// The same into an existing layer, whose memory stays.
///
/// Requires: also the config of the layer, field by field (FileError, which names those that differ).
/// Overwrites parameters and routers: all of them, or on error none.
template <class T>
void read_layer(const SafetensorsView& file, std::string_view prefix, RoutingAttention<T>& layer) {
  const RoutingAttentionConfig config = detail::read_config("read_layer", file, prefix);
  std::string differences;
  std::vector<std::string> expected;
  visit(layer.config(), [&](std::string_view, const auto& field) { expected.push_back(detail::field_text(field)); });
  std::size_t i = 0;
  visit(config, [&](std::string_view path, const auto& field) {
    const std::string got = detail::field_text(field);
    if (got != expected[i])
      differences += detail::join(differences.empty() ? "" : "; ", path, ": expected ", expected[i], ", got ", got);
    ++i;
  });
  if (!differences.empty()) file.fail("read_layer", detail::join(detail::config_key(prefix, ""), differences));
  detail::check_tensors<T>("read_layer", file, prefix, config);
  detail::fill_layer("read_layer", file, prefix, layer);
}

/// Writes a layer to a file of its own; see add_layer and SafetensorsWriter::write. On error an old file of that name
/// stays.
///
///     save("layer.safetensors", layer);
///     RoutingAttention<float> same = load<float>("layer.safetensors");
template <class T>
void save(const std::filesystem::path& path, const RoutingAttention<T>& layer) {
  SafetensorsWriter writer;
  add_layer(writer, {}, layer);
  writer.write(path);
}

/// Reads a file that save() wrote; see read_safetensors and read_layer.
template <class T>
RoutingAttention<T> load(const std::filesystem::path& path) {
  return read_layer<T>(read_safetensors(path));
}

}  // namespace coterie
