// Bits per byte of a text under a byte-level transformer::Model, in windows that overlap.
#pragma once

#include "model.hpp"

namespace transformer {

/// A window of a text that the model sees at once, and its end, which is scored.
struct ScoredWindow {
  Index begin, length;  // in positions of the text with a newline in front
  Index unscored;       // number of its first predictions, which the window before has scored
};

/// The windows of a text. A newline goes before the text, so that its first byte is predicted too. Windows of `window`
/// positions begin every `stride` positions, up to the window that reaches the end.
///
/// A window predicts the byte after each of its positions, and is scored for the bytes that no earlier window was
/// scored for. So every byte is scored once, from at least min(window - stride + 1, all before it) positions.
/// Requires: 1 <= stride <= window (ValueError).
inline std::vector<ScoredWindow> scored_windows(Index bytes, Index window, Index stride) {
  if (stride < 1 || stride > window)
    throw coterie::ValueError("scored_windows: stride: expected 1 to window = " + std::to_string(window) + ", got " +
                              std::to_string(stride));
  std::vector<ScoredWindow> windows;
  Index scored = 0;
  for (Index begin = 0; scored < bytes; begin += stride) {
    const Index length = std::min(window, bytes - begin);
    windows.push_back({begin, length, scored - begin});
    scored = begin + length;
  }
  return windows;
}

/// The mean over the bytes of a text of -log2 of their probability, by scored_windows. `at_once`: about how many
/// tokens a batch has. progress(share done) is called after each batch. Random routing draws as in Batch::step 0.
/// Requires: as scored_windows, a text of at least one byte (ValueError).
template <class T, class Progress>
double bits_per_byte(const Model<T>& model, std::span<const std::uint8_t> text, Index window, Index stride,
                     Index at_once, typename Model<T>::Tape& tape, Context& context, Progress&& progress) {
  const std::vector<ScoredWindow> windows = scored_windows(static_cast<Index>(text.size()), window, stride);
  if (windows.empty()) throw coterie::ValueError("bits_per_byte: text: expected at least one byte, got none");
  std::vector<std::int32_t> tokens, targets;
  std::vector<Index> offsets{0};
  std::vector<T> losses;
  double sum = 0;
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const ScoredWindow& w = windows[i];
    for (Index t = w.begin; t < w.begin + w.length; ++t) {
      tokens.push_back(t == 0 ? '\n' : text[static_cast<std::size_t>(t - 1)]);
      targets.push_back(t < w.begin + w.unscored ? -1 : text[static_cast<std::size_t>(t)]);
    }
    offsets.push_back(static_cast<Index>(tokens.size()));
    if (i + 1 < windows.size() && offsets.back() + window <= at_once) continue;
    losses.resize(tokens.size());
    model.evaluate({tokens, targets, offsets, 0}, losses, tape, context);
    for (const T loss : losses) sum += static_cast<double>(loss);
    tokens.clear();
    targets.clear();
    offsets.resize(1);
    progress(static_cast<double>(i + 1) / static_cast<double>(windows.size()));
  }
  return sum * std::numbers::log2e / static_cast<double>(text.size());
}

}  // namespace transformer
