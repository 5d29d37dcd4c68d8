// Texts to train on and held out, with the class of every byte by earlier repeats.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "options.hpp"

namespace examples {

using Bytes = std::vector<std::uint8_t>;

struct Corpus {
  Bytes training, held_out;
  std::string description;
};

/// All bytes of a file. Throws UsageError if it cannot be read.
inline Bytes read_bytes(const std::filesystem::path& path) {
  std::error_code error;
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path, error))
    throw UsageError("cannot read the file '" + path.string() + "'");
  return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

namespace detail {

/// Shuffles the pieces, the same way every time, and holds out the first ones: `share` of the bytes, and at least
/// `needed` of them. Throws UsageError if that is more than a quarter.
inline Corpus hold_out(std::vector<Bytes> pieces, double share, std::size_t needed, const std::string& name) {
  std::mt19937_64 random(1);
  for (std::size_t i = pieces.size(); i > 1; --i) std::swap(pieces[i - 1], pieces[random() % i]);

  std::size_t total = 0;
  for (const Bytes& piece : pieces) total += piece.size();
  const std::size_t wanted = std::max(needed, static_cast<std::size_t>(share * static_cast<double>(total)));

  Corpus corpus;
  std::size_t held = 0;
  for (const Bytes& piece : pieces) {
    Bytes& target = corpus.held_out.size() < wanted ? corpus.held_out : corpus.training;
    held += &target == &corpus.held_out;
    target.insert(target.end(), piece.begin(), piece.end());
  }
  if (corpus.held_out.size() < needed || corpus.held_out.size() > total / 4)
    throw UsageError(name + " has " + std::to_string(total) + " bytes: too few for this --context, which needs " +
                     std::to_string(needed) + " held out and three times as many to train on");
  corpus.description = name + ": " + std::to_string(corpus.training.size()) + " bytes to train on, " +
                       std::to_string(corpus.held_out.size()) + " held out (" + std::to_string(held) + " of " +
                       std::to_string(pieces.size()) + " ";
  return corpus;
}

}  // namespace detail

/// The source text of Eigen's headers below `directory`; whole files held out, 4 % of the bytes, at least `needed`.
inline Corpus read_eigen(const std::filesystem::path& directory, std::size_t needed) {
  std::vector<std::filesystem::path> paths;
  std::error_code error;
  for (std::filesystem::recursive_directory_iterator entry(directory / "Eigen", error), end; !error && entry != end;
       entry.increment(error))
    if (entry->is_regular_file()) paths.push_back(entry->path());
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> files;
  for (const std::filesystem::path& path : paths) files.push_back(read_bytes(path));
  Corpus corpus = detail::hold_out(std::move(files), 0.04, needed, "the source text of Eigen");
  corpus.description += "files)";
  return corpus;
}

/// Any file; pieces of 40 kB held out (smaller ones of a small file), 5 % of the bytes, at least `needed`.
inline Corpus read_text(const std::string& path, std::size_t needed) {
  const Bytes text = read_bytes(path);
  const std::size_t size = std::clamp<std::size_t>(text.size() / 20, 1, 40000);
  std::vector<Bytes> pieces;
  for (std::size_t begin = 0; begin < text.size(); begin += size) {
    const auto first = text.begin() + static_cast<std::ptrdiff_t>(begin);
    pieces.emplace_back(first, first + static_cast<std::ptrdiff_t>(std::min(size, text.size() - begin)));
  }
  Corpus corpus = detail::hold_out(std::move(pieces), 0.05, needed, path);
  corpus.description += "pieces)";
  return corpus;
}

/// The class of a byte, by the 12 bytes before it.
enum class ByteClass {
  far,   ///< they have occurred in the text before, last time more than the window back
  near,  ///< they have occurred before, last time within the window
  rest,  ///< they have not occurred before
};
inline constexpr std::array<const char*, 3> byte_class_names{"far", "near", "rest"};

/// The class of text[t + 1], for every t.
inline std::vector<ByteClass> classify_bytes(std::span<const std::uint8_t> text, std::size_t window) {
  constexpr std::size_t context = 12;
  std::vector<ByteClass> classes(text.empty() ? 0 : text.size() - 1, ByteClass::rest);
  // Where contexts ended last, by hash, with open addressing.
  std::vector<std::size_t> ends(std::bit_ceil(2 * text.size() + 1), 0);
  for (std::size_t t = context - 1; t < classes.size(); ++t) {
    const auto here = text.subspan(t + 1 - context, context);
    std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (const std::uint8_t byte : here) hash = (hash ^ byte) * 0x100000001b3;
    std::size_t slot = (hash ^ hash >> 32) & (ends.size() - 1);
    while (ends[slot] != 0 && !std::ranges::equal(here, text.subspan(ends[slot] + 1 - context, context)))
      slot = (slot + 1) & (ends.size() - 1);
    if (ends[slot] != 0) classes[t] = t - ends[slot] > window ? ByteClass::far : ByteClass::near;
    ends[slot] = t;
  }
  return classes;
}

}  // namespace examples
