// What files and layers are after memory has run out while a layer was saved or read: what they were, or what they had to be.
#include <memory>

#include "allocation.hpp"
#include "catch.hpp"
#include "coterie/saved/saved_layer.hpp"
#include "file/folder.hpp"
#include "layer/kinds.hpp"

using namespace test;

namespace {

std::vector<std::byte> bytes_of(const RoutingAttention<float>& layer) {
  SafetensorsWriter writer;
  add_layer(writer, {}, layer);
  return writer.bytes();
}

}  // namespace

TEST_CASE("a layer saved while any one allocation fails: the old file is whole, or the new one is") {
  const Folder folder;
  const std::filesystem::path path = folder / "layer.safetensors";
  const RoutingAttentionConfig config = kinds()[0].config;
  const RoutingAttention<float> old = make_layer<float>(config);
  RoutingAttention<float> next = make_layer<float>(config);
  next.parameters().w_q.setConstant(3);
  const std::vector<std::byte> old_bytes = bytes_of(old), next_bytes = bytes_of(next);
  REQUIRE(old_bytes != next_bytes);
  REQUIRE(fail_each_allocation([&] { save(path, old); }, [&] { save(path, next); },
                               [&](bool threw) {
                                 REQUIRE(bytes_of(load<float>(path)) == (threw ? old_bytes : next_bytes));
                                 REQUIRE(folder.files() == 1);
                               }) > 50);
  REQUIRE(bytes_of(load<float>(path)) == next_bytes);
}

TEST_CASE("a layer that is read while any one allocation fails is read whole, or not at all") {
  const Folder folder;
  const std::filesystem::path path = folder / "layer.safetensors";
  const RoutingAttentionConfig config = kinds()[0].config;
  const RoutingAttention<float> saved = make_layer<float>(config);
  RoutingAttention<float> before = make_layer<float>(config);
  before.parameters().w_q.setConstant(3);
  save(path, saved);
  const SafetensorsView file = read_safetensors(path);
  const std::vector<std::byte> saved_bytes = bytes_of(saved), before_bytes = bytes_of(before);
  std::unique_ptr<RoutingAttention<float>> layer;
  REQUIRE(fail_each_allocation(
              [&] { layer = std::make_unique<RoutingAttention<float>>(before); }, [&] { read_layer(file, {}, *layer); },
              [&](bool threw) { REQUIRE(bytes_of(*layer) == (threw ? before_bytes : saved_bytes)); }) > 20);
  // A layer that is made by reading is right, or there is none.
  layer.reset();
  REQUIRE(fail_each_allocation([&] { layer.reset(); },
                               [&] { layer = std::make_unique<RoutingAttention<float>>(load<float>(path)); },
                               [&](bool) { REQUIRE((!layer || bytes_of(*layer) == saved_bytes)); }) > 20);
  REQUIRE(bytes_of(*layer) == saved_bytes);
}
