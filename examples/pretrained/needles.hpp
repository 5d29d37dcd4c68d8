// Planted facts: "The secret number of NAME is NNNNN." in a long text, asked for at its end.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "generate.hpp"
#include "tokenizer.hpp"

namespace pretrained {

/// A fact of a text.
struct Fact {
  std::string name, number;
};

/// Whole numbers below a bound, the same with every standard library.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : bits_(seed) {}
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(bits_() % bound); }

 private:
  std::mt19937_64 bits_;
};

/// Lines of text that say nothing: at least so many bytes.
inline std::string filler_text(std::size_t bytes, std::uint64_t seed) {
  static constexpr std::array<std::string_view, 12> who{
      "The miller",      "An old sailor", "My neighbour",  "The clock maker", "A young painter", "The ferryman",
      "Her grandmother", "The baker",     "A tired clerk", "The gardener",    "Our teacher",     "The lamplighter"};
  static constexpr std::array<std::string_view, 12> did{
      "walked slowly past",    "wrote a long letter about", "had often dreamed of", "never spoke of",
      "carefully repaired",    "told the children about",   "was looking for",      "sold a drawing of",
      "remembered the day of", "complained about",          "waited near",          "kept a record of"};
  static constexpr std::array<std::string_view, 12> what{"the stone bridge",  "the autumn market", "the empty theatre",
                                                         "a broken violin",   "the northern road", "the river in flood",
                                                         "the apple orchard", "an unfinished map", "the harbour wall",
                                                         "the winter storm",  "the silent bell",   "a box of tools"};
  static constexpr std::array<std::string_view, 8> when{
      "before the rain came",   "while the others slept",   "as the lamps were lit",     "in the first week of spring",
      "after the long journey", "when nobody was watching", "on the way to the village", "late in the evening"};
  Dice dice(seed);
  std::string text;
  while (text.size() < bytes)
    for (std::size_t s = 0, sentences = 2 + dice.below(3); s <= sentences; ++s)
      text.append(who[dice.below(who.size())])
          .append(" ")
          .append(did[dice.below(did.size())])
          .append(" ")
          .append(what[dice.below(what.size())])
          .append(" ")
          .append(when[dice.below(when.size())])
          .append(s == sentences ? ".\n" : ". ");
  return text;
}

/// A text of about so many tokens into which facts are planted, one in every part of it.
struct Haystack {
  std::string text;
  std::vector<Fact> facts;
};

/// Takes lines of `source` from the start and plants `count` facts, at most 16, at depths drawn from the seed.
/// Requires: a source that is long enough (coterie::ValueError).
inline Haystack plant_facts(const std::string& source, std::size_t bytes, std::size_t count, std::uint64_t seed) {
  std::vector<std::string> names{"Marlow",  "Edith",     "Tobias",    "Quentin",  "Rosalind", "Viktor",
                                 "Harriet", "Leopold",   "Beatrix",   "Casper",   "Delphine", "Ignatius",
                                 "Ottilie", "Ferdinand", "Gwendolen", "Sylvester"};
  Dice dice(seed);
  for (std::size_t i = names.size(); i > 1; --i) std::swap(names[i - 1], names[dice.below(i)]);
  Haystack result;
  std::vector<std::string> lines;
  for (std::size_t at = 0, size = 0; size < bytes;) {
    const std::size_t end = source.find('\n', at);
    if (end == std::string::npos)
      throw coterie::ValueError("plant_facts: source: expected lines of " + std::to_string(bytes) +
                                " bytes at least, got " + std::to_string(size));
    lines.push_back(source.substr(at, end + 1 - at));
    size += end + 1 - at;
    at = end + 1;
  }
  std::vector<std::pair<std::size_t, std::string>> planted;  // before which line
  for (std::size_t i = 0; i < std::min(count, names.size()); ++i) {
    Fact fact{names[i], {}};
    for (int digit = 0; digit < 5; ++digit) fact.number += static_cast<char>('0' + dice.below(10));
    const double depth = (double(i) + double(dice.below(1000)) / 1000) / double(count) * 0.96 + 0.01;
    planted.emplace_back(static_cast<std::size_t>(depth * double(lines.size())),
                         "The secret number of " + fact.name + " is " + fact.number + ".\n");
    result.facts.push_back(std::move(fact));
  }
  for (std::size_t i = 0, p = 0; i <= lines.size(); ++i) {
    for (; p < planted.size() && planted[p].first <= i; ++p) result.text += planted[p].second;
    if (i < lines.size()) result.text += lines[i];
  }
  return result;
}

/// What was found of the facts.
struct Found {
  double all_right = 0;        ///< share of the facts whose digits are all the likeliest tokens
  double digits_right = 0;     ///< share of the digits
  double log_probability = 0;  ///< of a fact's digits, mean over facts
};

/// Asks for every fact after the text that the session has read, and forgets the question again.
///
/// Digits are given, not drawn: each counts as right if it is the likeliest after the right ones before it.
template <class Report>
Found find_facts(Session& session, const Tokenizer& tokenizer, const std::vector<Fact>& facts, Context& context,
                 Report&& progress) {
  Found found;
  const Index before = session.tokens();
  RowMatrix<float> logits;
  for (std::size_t f = 0; f < facts.size(); ++f) {
    const std::string question = "\nQuestion: What is the secret number of " + facts[f].name +
                                 "?\nAnswer: The secret number of " + facts[f].name + " is ";
    const std::vector<std::int32_t> ids = tokenizer.encode(question + facts[f].number, false);
    // Tokenizers of this kind cut numbers into digits.
    const std::size_t asked = tokenizer.encode(question, false).size();
    const std::size_t digits = ids.size() > asked ? ids.size() - asked : 1;
    logits.resize(static_cast<Index>(digits), session.model().config.vocabulary);
    session.read(std::span(ids).first(ids.size() - 1), logits, context);
    session.rollback(before, context);
    std::size_t right = 0;
    for (std::size_t i = 0; i < digits; ++i) {
      const std::int32_t expected = ids[ids.size() - digits + i];
      const auto row = logits.row(static_cast<Index>(i)).array().cast<double>();
      const double highest = row.maxCoeff();
      right += likeliest(view(logits).rows(static_cast<Index>(i), 1)) == expected ? 1 : 0;
      found.log_probability += (row(expected) - highest - std::log((row - highest).exp().sum())) / double(facts.size());
    }
    found.all_right += (right == digits ? 1.0 : 0.0) / double(facts.size());
    found.digits_right += double(right) / double(digits) / double(facts.size());
    progress(double(f + 1) / double(facts.size()));
  }
  return found;
}

}  // namespace pretrained
