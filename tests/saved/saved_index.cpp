#include "coterie/saved/saved_index.hpp"

#include <map>

#include "catch.hpp"
#include "errors.hpp"
#include "file/folder.hpp"
#include "retrieval/key_cache.hpp"

using namespace coterie;
using namespace test;

namespace {

const KeyIndexConfig index_config{
    .kv_heads = 2, .keys_per_cluster = 3, .page = 2, .segment = 8, .sinks = 3, .recent = 5, .rank = 2};

KeyIndex<float> index_of(const KeyCache& cache, Index tokens, const KeyIndexConfig& config = index_config) {
  KeyIndex<float> index(config);
  Context context;
  index.build(cache.k.topRows(tokens), cache.v.topRows(tokens), context);
  return index;
}

std::vector<std::byte> saved_bytes(const KeyIndex<float>& index, const KeyCache& cache, std::string_view prefix) {
  SafetensorsWriter writer;
  add_index(writer, prefix, index, cache.k, cache.v);
  return writer.bytes();
}

bool same_numbers(const RowMatrix<double>& a, const RowMatrix<double>& b) {
  return a.size() == b.size() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(double)) == 0;
}

void require_same(const KeyIndex<float>& a, const KeyIndex<float>& b, const KeyCache& cache) {
  REQUIRE(a.tokens() == b.tokens());
  for (Index h = 0; h < a.config().kv_heads; ++h) {
    REQUIRE(a.parts(h) == b.parts(h));
    for (Index part = 0; part < a.parts(h); ++part)
      REQUIRE(std::equal(a.members(h, part).begin(), a.members(h, part).end(), b.members(h, part).begin(),
                         b.members(h, part).end()));
  }
  Context context;
  for (const Index rank : {0, 2}) {
    coterie::KeyIndexReport x, y;
    REQUIRE(same_bits(cache.attend(a, {.budget = 0.3, .rank = rank}, context, &x),
                      cache.attend(b, {.budget = 0.3, .rank = rank}, context, &y)));
    REQUIRE(same_numbers(x.keys_seen, y.keys_seen));
    REQUIRE(same_numbers(x.ranked_mass, y.ranked_mass));
    REQUIRE(same_numbers(x.estimated_mass, y.estimated_mass));
  }
}

// A saved index as lists that can be spoilt, and written again.
struct IndexContents {
  RowMatrix<float> k, v;
  std::int64_t tokens;
  std::map<std::string, std::vector<std::int32_t>> lists;
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::int64_t> others;

  std::vector<std::byte> bytes() const {
    SafetensorsWriter writer;
    if (k.size() > 0) writer.add("a.k", k);
    writer.add("a.v", v);
    writer.add_number("a.tokens", tokens);
    for (const auto& [name, list] : lists) writer.add_numbers(name, list);
    for (const auto& [name, number] : others) writer.add_number(name, number);
    for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
    return writer.bytes();
  }
};

// What read_index says of a file of 60 keys once it is spoilt; nothing if it reads it.
template <class Spoil>
std::string index_fault(Spoil spoil) {
  const KeyCache cache(60, 2, 4, 2, 7);
  const KeyIndex<float> index = index_of(cache, 58);
  const std::vector<std::byte> good = saved_bytes(index, cache, "a.");
  const SafetensorsView file = parse_safetensors(good);
  IndexContents contents{cache.k, cache.v, 58, {}, {file.metadata().begin(), file.metadata().end()}, {}};
  for (Index h = 0; h < 2; ++h) {
    const KeyClusters clusters = index.clusters(h);
    contents.lists["a.clusters." + std::to_string(h) + ".sizes"] = clusters.sizes;
    contents.lists["a.clusters." + std::to_string(h) + ".rows"] = clusters.rows;
  }
  spoil(contents);
  const std::vector<std::byte> bytes = contents.bytes();
  return message_of<FileError>([&] { read_index<float>(parse_safetensors(bytes, "x"), "a."); });
}

}  // namespace

TEST_CASE("saved index: attend, append and rollback are bit-identical to those of the index that was never saved") {
  Context context;
  for (const bool odd : {false, true})
    for (Index n = 0; n <= 120; n += n < 20 ? 1 : 7) {
      CAPTURE(n, odd);
      KeyCache cache(160, 3, 4, 2, static_cast<std::uint64_t>(n));
      if (odd) {  // keys that are in no cluster
        cache.k(5, 1) = std::numeric_limits<float>::quiet_NaN();
        cache.v(13, 7) = std::numeric_limits<float>::infinity();
        cache.k.middleRows(30, 16).setConstant(1);
      }
      KeyIndex<float> index = index_of(cache, n);
      const std::vector<std::byte> bytes = saved_bytes(index, cache, "");
      SavedIndex<float> read = read_index<float>(parse_safetensors(bytes));
      REQUIRE(same_bits(read.k, cache.k));
      REQUIRE(same_bits(read.v, cache.v));
      REQUIRE(saved_bytes(read.index, cache, "") == bytes);
      require_same(read.index, index, cache);
      for (const Index rows : {n + 1, n + 9, Index(160)}) {
        index.append(cache.k.topRows(rows), cache.v.topRows(rows), context);
        read.index.append(read.k.topRows(rows), read.v.topRows(rows), context);
        require_same(read.index, index, cache);
      }
      index.rollback(n, cache.k, cache.v, context);
      read.index.rollback(n, read.k, read.v, context);
      require_same(read.index, index, cache);
    }
}

TEST_CASE("saved index: every setting comes back; several indexes and other tensors fit one file") {
  const KeyCache cache(70, 3, 4, 2, 1), other(40, 3, 1, 1, 2);
  const KeyIndexConfig second{.kv_heads = 1,
                              .keys_per_cluster = 2,
                              .page = 1,
                              .segment = 4,
                              .sinks = 0,
                              .recent = 0,
                              .tail = false,
                              .rank = 0,
                              .shared_choice = true,
                              .steps = 1};
  const KeyIndex<float> a = index_of(cache, 70), b = index_of(other, 40, second);
  SafetensorsWriter writer;
  add_index(writer, "layers.0.", a, cache.k, cache.v);
  add_index(writer, "layers.1.", b, other.k, other.v);
  writer.add("layers.2", other.k);
  const std::vector<std::byte> bytes = writer.bytes();
  const SafetensorsView file = parse_safetensors(bytes);
  require_same(read_index<float>(file, "layers.0.").index, a, cache);
  const SavedIndex<float> read = read_index<float>(file, "layers.1.");
  require_same(read.index, b, other);
  std::vector<std::string> want, got;
  visit(second, [&](std::string_view, const auto& field) { want.push_back(coterie::detail::field_text(field)); });
  visit(read.index.config(),
        [&](std::string_view, const auto& field) { got.push_back(coterie::detail::field_text(field)); });
  REQUIRE(got == want);

  const Folder folder;
  save_index(folder / "index.safetensors", a, cache.k, cache.v);
  require_same(load_index<float>(folder / "index.safetensors").index, a, cache);
}

TEST_CASE("saved index: a file that holds no such index is refused, and says where") {
  using Catch::Matchers::Contains;
  const std::string sizes = "a.clusters.1.sizes", rows = "a.clusters.1.rows";
  REQUIRE(index_fault([](IndexContents&) {}).empty());
  const auto fault = [&](auto spoil, const std::string& text) {
    const std::string got = index_fault(spoil);
    CHECK_THAT(got, Contains("'x'"));
    CHECK_THAT(got, Contains(text));
  };
  const std::string in_rows = "clusters.1.rows";
  fault([&](IndexContents& c) { c.lists[rows][0] = -1; }, in_rows);
  fault([&](IndexContents& c) { c.lists[rows][0] = 60; }, in_rows);
  fault([&](IndexContents& c) { c.lists[rows][0] = 57; }, in_rows);                          // a recent key
  fault([&](IndexContents& c) { c.lists[rows].back() = c.lists[rows].front(); }, in_rows);   // of another run
  fault([&](IndexContents& c) { c.lists[rows][0] = 2; }, in_rows);                           // a sink
  fault([&](IndexContents& c) { std::swap(c.lists[rows][0], c.lists[rows][1]); }, in_rows);  // or of other clusters
  fault([&](IndexContents& c) { c.lists[rows][1] = c.lists[rows][0]; }, in_rows);            // twice
  fault([&](IndexContents& c) { c.k(10, 7) = std::numeric_limits<float>::infinity(); },
        in_rows);  // no longer in a cluster
  fault([&](IndexContents& c) { c.lists[rows].pop_back(); }, "clusters.1.sizes: expected a sum of");
  fault([&](IndexContents& c) { c.lists[rows].pop_back(), --c.lists[sizes].back(); }, in_rows);
  fault([&](IndexContents& c) { c.lists[rows].clear(), c.lists[sizes].clear(); }, in_rows);
  fault([&](IndexContents& c) { c.lists[rows].push_back(54), c.lists[sizes].push_back(1); }, "clusters.1.sizes");
  fault([&](IndexContents& c) { c.lists[sizes][0] = 0; }, "clusters.1.sizes: expected at least 1, got 0");
  fault([&](IndexContents& c) { c.lists[sizes][0] = -3; }, "clusters.1.sizes: expected at least 1, got -3");
  fault([&](IndexContents& c) { c.lists[sizes].push_back(2147483647); }, "clusters.1.sizes: expected a sum of");
  fault([&](IndexContents& c) { c.lists.erase(sizes); }, "tensor 'a.clusters.1.sizes'");
  fault([&](IndexContents& c) { c.lists.erase(rows), c.others[rows] = 1; }, "dtype: expected I32, got I64");
  fault([](IndexContents& c) { c.tokens = -1; }, "'a.tokens': damaged: expected 0 to 60, the rows of k, got -1");
  fault([](IndexContents& c) { c.tokens = 61; }, "'a.tokens'");
  fault([](IndexContents& c) { c.tokens = 40; }, "clusters.0.");
  fault([](IndexContents& c) { c.k.resize(0, 0); }, "tensor 'a.k'");
  fault([](IndexContents& c) { c.k = RowMatrix<float>(c.k.topRows(59)); }, "tensor 'a.v': shape");
  fault([](IndexContents& c) { c.k = RowMatrix<float>(c.k.leftCols(11)); }, "tensor 'a.k'");
  fault([](IndexContents& c) { c.others["a.more"] = 1; }, "expected the tensors of the index, got 'a.more'");
  fault([](IndexContents& c) { c.metadata.erase("coterie.index_format"); }, "no saved index");
  fault([](IndexContents& c) { c.metadata["coterie.index_format"] = "2"; }, "newer than this library");
  fault([](IndexContents& c) { c.metadata["coterie.index_format"] = "0"; }, "damaged");
  fault([](IndexContents& c) { c.metadata["a.config.page"] = "x"; }, "a.config.page: damaged: expected a whole number");
  fault([](IndexContents& c) { c.metadata.erase("a.config.page"); },
        "a.config.page: damaged: expected a value, got none");
  fault([](IndexContents& c) { c.metadata["a.config.more"] = "1"; }, "'a.config.more': newer");
  fault([](IndexContents& c) { c.metadata["a.config.page"] = "3"; },
        "segment: expected a positive multiple of page = 3");
  fault([](IndexContents& c) { c.metadata["a.config.segment"] = "4"; }, "clusters.0.");
  for (const char* heads : {"0", "-2", "5", "9223372036854775807"})
    fault([heads](IndexContents& c) { c.metadata["a.config.kv_heads"] = heads; }, "tensor 'a.k'");
  fault([](IndexContents& c) { c.metadata["a.config.kv_heads"] = "4"; }, "tensor 'a.v'");
}

TEST_CASE("saved index: a cache that is not the index's is refused; other scalars too") {
  const KeyCache cache(60, 2, 4, 2, 7);
  const KeyIndex<float> index = index_of(cache, 58);
  SafetensorsWriter writer;
  REQUIRE_THROWS_AS(add_index(writer, "a.", index, cache.k.topRows(57), cache.v.topRows(57)), ShapeError);
  REQUIRE_THROWS_AS(add_index(writer, "a.", index, cache.k, cache.v.topRows(59)), ShapeError);
  REQUIRE_THROWS_AS(add_index(writer, "a.", index, cache.v, cache.v), ShapeError);
  add_index(writer, "a.", index, cache.k, cache.v);
  const std::vector<std::byte> bytes = writer.bytes();
  REQUIRE_THROWS_AS(read_index<double>(parse_safetensors(bytes), "a."), FileError);
  REQUIRE_THROWS_AS(read_index<float>(parse_safetensors(bytes), "b."), FileError);
}

TEST_CASE("key index: restore of clusters that do not fit leaves the index as it was") {
  const KeyCache cache(60, 2, 4, 2, 7);
  const KeyIndex<float> index = index_of(cache, 58);
  KeyIndex<float> other = index_of(cache, 40);
  const KeyIndex<float> before = other;
  Context context;
  std::vector<KeyClusters> clusters{index.clusters(0), index.clusters(1)};
  REQUIRE_THROWS_AS(other.restore(61, cache.k, cache.v, clusters, context), ShapeError);
  REQUIRE_THROWS_AS(other.restore(-1, cache.k, cache.v, clusters, context), ValueError);
  REQUIRE_THROWS_AS(other.restore(58, cache.k, cache.v, std::span(clusters).first(1), context), ShapeError);
  std::swap(clusters[1].rows.front(), clusters[1].rows.back());
  REQUIRE_THROWS_AS(other.restore(58, cache.k, cache.v, clusters, context), ValueError);
  require_same(other, before, cache);
  std::swap(clusters[1].rows.front(), clusters[1].rows.back());
  other.restore(58, cache.k, cache.v, clusters, context);
  require_same(other, index, cache);
}
