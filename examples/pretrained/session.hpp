// A model at work on one sequence: its key/value cache, read token by token or in blocks, densely or through an index.
#pragma once

#include <algorithm>
#include <coterie/attention/attention.hpp>
#include <coterie/plan/dense.hpp>
#include <coterie/retrieval/key_index.hpp>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "head_errors.hpp"
#include "llama.hpp"

namespace pretrained {

/// How queries read the cache; designated initialisers in this order.
struct AttentionChoice {
  bool index = false;                 ///< through a KeyIndex per block; false: densely
  double budget = 0.1;                ///< share, up to 1, or number of the keys that a query sees
  coterie::KeyIndexConfig keys = {};  ///< kv_heads is the model's
  double least_keys = 0;              ///< of a share: a query sees so many keys at least, if there are
  double prompt_budget = 0;  ///< of calls that read many tokens: as budget, at least 1024 keys; 0: as single ones

  static AttentionChoice dense() { return {}; }
  static AttentionChoice with_index(double budget, Index keys_per_cluster) {
    return {.index = true, .budget = budget, .keys = {.keys_per_cluster = keys_per_cluster}};
  }
};

/// Means over the queries and heads that an index has served.
struct IndexUse {
  double queries = 0;         ///< queries times heads times layers
  double keys_seen = 0;       ///< sum of the shares of the visible keys that were seen exactly
  double estimated_mass = 0;  ///< sum of the shares of the weight that only means stand for
};

/// Keys and values of a block, a row per token. Memory doubles where it has to grow.
class HeadCache {
 public:
  ConstView<float> k(Index tokens) const { return view(k_).rows(0, tokens); }
  ConstView<float> v(Index tokens) const { return view(v_).rows(0, tokens); }
  View<float> k_rows(Index first, Index count) { return view(k_).rows(first, count); }
  View<float> v_rows(Index first, Index count) { return view(v_).rows(first, count); }

  /// Makes room for so many rows; the first `used` stay.
  void reserve(Index rows, Index used, Index cols) {
    if (rows <= k_.rows()) return;
    const Index capacity = std::max(rows, 2 * k_.rows());
    for (RowMatrix<float>* m : {&k_, &v_}) {
      RowMatrix<float> grown(capacity, cols);
      if (used > 0) grown.topRows(used) = m->topRows(used);
      m->swap(grown);
    }
  }

 private:
  RowMatrix<float> k_, v_;
};

/// A sequence that a model reads. Reading is bit-identical however tokens are cut into calls; with a prompt_budget it
/// is not, for a block of a prompt sees the index of the keys before the block.
///
///     Session session(model);                                // dense attention
///     session.read(prompt, logits, context);                 // logits 1 x vocabulary: of the last token
///     session.read({&token, 1}, logits, context);            // one token more
///     session.rollback(prompt.size());                       // forgets the later ones
///     session.choose(AttentionChoice::with_index(0.05, 64), context);   // from here on; the cache stays
class Session {
 public:
  /// Refers to the model.
  explicit Session(const Llama& model) : model_(model), caches_(model.blocks.size()) {}

  const Llama& model() const { return model_; }
  Index tokens() const { return tokens_; }
  const AttentionChoice& choice() const { return choice_; }
  const IndexUse& use() const { return use_; }

  /// Sets how later tokens read the cache. An index is built of the tokens so far.
  void choose(const AttentionChoice& choice, Context& context) {
    choice_ = choice;
    use_ = {};
    indexes_.clear();
    budgets_.clear();
    errors_.clear();
    if (!choice.index) return;
    choice_.keys.kv_heads = model_.config.kv_heads;
    for (const HeadCache& cache : caches_) {
      indexes_.emplace_back(choice_.keys);
      if (tokens_ > 0) indexes_.back().build(cache.k(tokens_), cache.v(tokens_), context);
    }
  }

  /// Another budget for the index that is there. Requires a session that reads through one.
  void set_budget(double budget) { choice_.budget = budget; }

  /// Has dense reading attend through indexes as well, with each of these budgets, and compare the outputs. They are
  /// those of `choice` and of the tokens so far; ends with the next choose(). Requires a dense session.
  void compare_heads(const AttentionChoice& choice, std::vector<double> budgets, Context& context) {
    choose(choice, context);
    choice_.index = false;
    budgets_ = std::move(budgets);
    errors_.assign(budgets_.size(), HeadErrors(model_.config.layers, model_.config.heads));
  }
  /// What compare_heads found since, by budget.
  const std::vector<HeadErrors>& head_errors() const { return errors_; }

  /// Has read() count what the index looks at; costs a little time.
  void count_use(bool count) { counts_ = count; }

  /// Reads the next tokens. logits: of the last logits.rows() of them.
  /// Shapes: logits rows x vocabulary, at most as many rows as tokens; no rows: none are computed.
  /// Requires: tokens of the vocabulary (coterie::ValueError), that shape (coterie::ShapeError); then nothing is read.
  /// Cost: 2 operations per weight and token, and attention.
  void read(std::span<const std::int32_t> tokens, View<float> logits, Context& context) {
    const Index count = static_cast<Index>(tokens.size()), wanted = logits.rows();
    if (wanted > count || (wanted > 0 && logits.cols() != model_.config.vocabulary))
      throw coterie::ShapeError("Session::read: logits: expected at most " + std::to_string(count) + " x " +
                                std::to_string(model_.config.vocabulary) + ", got " + std::to_string(wanted) + " x " +
                                std::to_string(logits.cols()));
    x_.resize(count, model_.config.model_dim);
    embed(model_, tokens, x_);
    reserve(tokens_ + count);
    for (Index first = 0; first < count; first += block_rows) {
      const Index rows = std::min(block_rows, count - first);
      read_block(view(x_).rows(first, rows), context);
      const Index skipped = std::clamp<Index>(count - wanted - first, 0, rows);  // rows without logits
      if (skipped < rows)
        read_out(model_, view(x_).rows(first + skipped, rows - skipped),
                 logits.rows(first + skipped - (count - wanted), rows - skipped), context);
    }
  }
  /// The same without logits.
  void read(std::span<const std::int32_t> tokens, Context& context) { read(tokens, View<float>(), context); }

  /// Forgets the tokens from `tokens` on. Requires: at most tokens() (coterie::ValueError).
  void rollback(Index tokens, Context& context) {
    if (tokens < 0 || tokens > tokens_)
      throw coterie::ValueError("Session::rollback: tokens: expected 0 to " + std::to_string(tokens_) + ", got " +
                                std::to_string(tokens));
    for (std::size_t l = 0; l < indexes_.size(); ++l)
      indexes_[l].rollback(tokens, caches_[l].k(tokens), caches_[l].v(tokens), context);
    tokens_ = tokens;
  }

  /// Makes the cache one of `tokens` tokens by repeating its rows: for measurements of time alone.
  void repeat_to(Index tokens, Context& context) {
    const Index known = tokens_;
    if (known < 1 || tokens < known) return;
    reserve(tokens);
    for (HeadCache& cache : caches_)
      for (Index i = known; i < tokens; ++i) {
        cache.k_rows(i, 1).eigen() = cache.k(tokens).rows(i % known, 1).eigen();
        cache.v_rows(i, 1).eigen() = cache.v(tokens).rows(i % known, 1).eigen();
      }
    tokens_ = tokens;
    for (std::size_t l = 0; l < indexes_.size(); ++l)
      indexes_[l].append(caches_[l].k(tokens), caches_[l].v(tokens), context);
  }

  /// Bytes of the cache's rows in use, and of the indexes.
  std::size_t cache_bytes() const {
    return caches_.size() * static_cast<std::size_t>(2 * tokens_ * model_.config.kv_dim()) * sizeof(float);
  }
  std::size_t index_bytes() const {
    std::size_t sum = 0;
    for (const auto& index : indexes_) sum += index.bytes();
    return sum;
  }

 private:
  static constexpr Index block_rows = 256;  // tokens whose products share a reading of the weights

  void reserve(Index tokens) {
    for (HeadCache& cache : caches_) cache.reserve(tokens, tokens_, model_.config.kv_dim());
  }

  // x, the rows of the next tokens, through all blocks.
  void read_block(View<float> x, Context& context) {
    const Index rows = x.rows(), end = tokens_ + rows;
    if (!choice_.index) coterie::plan_dense({.tokens = rows, .keys = end, .causal = true}, plan_, &plan_scratch_);
    normed_.resize(rows, x.cols());
    q_.resize(rows, model_.config.q_dim());
    attended_.resize(rows, q_.cols());
    for (std::size_t l = 0; l < caches_.size(); ++l) {
      const LlamaBlock& block = model_.blocks[l];
      HeadCache& cache = caches_[l];
      // x += attention(norm(x))
      rms_norm(x, block.attention_norm, model_.config.epsilon, normed_, context);
      block.attention.project(normed_, tokens_, q_, cache.k_rows(tokens_, rows), cache.v_rows(tokens_, rows), context);
      if (choice_.index)
        attend_by_index(l, rows, context);
      else
        coterie::attention_forward(plan_, view(q_), cache.k(end), cache.v(end), attended_, attention_heads(), context);
      if (!budgets_.empty()) compare_outputs(l, rows, context);
      block.attention.output(attended_, normed_, context);
      x.eigen() += normed_;
      add_feed_forward(block, model_.config.epsilon, x, context);
    }
    tokens_ = end;
  }

  coterie::AttentionConfig attention_heads() const {
    return {.heads = model_.config.heads, .kv_heads = model_.config.kv_heads};
  }

  void attend_by_index(std::size_t l, Index rows, Context& context) {
    if (choice_.prompt_budget > 0 && rows > choice_.keys.page) {
      // Clusters seen whole: the queries of the block that chose one attend to it together. Short caches are seen
      // whole.
      double budget = choice_.prompt_budget;
      if (budget <= 1) budget = std::max(1024.0, budget * static_cast<double>(tokens_ + rows));
      const ConstView<float> k = caches_[l].k(tokens_ + rows), v = caches_[l].v(tokens_ + rows);
      indexes_[l].attend(view(q_), k, v, view(attended_),
                         {.heads = model_.config.heads, .budget = budget, .causal = true, .rank = 0}, context,
                         counts_ ? &report_ : nullptr);
      if (counts_) add_use(tokens_);
      indexes_[l].append(k, v, context);
      return;
    }
    each_piece(l, rows, context, [&](Index first, Index count, Index piece, ConstView<float> k, ConstView<float> v) {
      const bool few = choice_.budget <= 1 && choice_.budget * static_cast<double>(piece) < choice_.least_keys;
      const double budget = few ? std::max(choice_.least_keys, 2.0) : choice_.budget;
      indexes_[l].attend(view(q_).rows(first, count), k, v, view(attended_).rows(first, count),
                         {.heads = model_.config.heads, .budget = budget, .causal = true}, context,
                         counts_ ? &report_ : nullptr);
      if (counts_) add_use(tokens_ + first);
    });
  }

  // Outputs through the index beside the dense ones.
  void compare_outputs(std::size_t l, Index rows, Context& context) {
    each_piece(l, rows, context, [&](Index first, Index count, Index, ConstView<float> k, ConstView<float> v) {
      compared_.resize(count, attended_.cols());
      for (std::size_t b = 0; b < budgets_.size(); ++b) {
        indexes_[l].attend(view(q_).rows(first, count), k, v, compared_,
                           {.heads = model_.config.heads, .budget = budgets_[b], .causal = true}, context);
        errors_[b].add(static_cast<Index>(l), compared_, view(attended_).rows(first, count));
      }
    });
  }

  // Calls f(first row, rows, end of the piece, keys, values) for pieces of the new rows during which no key joins a
  // page or a cluster, and then takes the rows into the index: each query sees the index as when it is read alone.
  template <class F>
  void each_piece(std::size_t l, Index rows, Context& context, F&& f) {
    for (Index first = 0; first < rows;) {
      const Index at = tokens_ + first, piece = piece_end(at);
      const Index count = std::min(rows - first, piece - at), end = at + count;
      const ConstView<float> k = caches_[l].k(end), v = caches_[l].v(end);
      f(first, count, piece, k, v);
      indexes_[l].append(k, v, context);
      first += count;
    }
  }

  // The first token after `at` that completes a page: there (tokens - sinks - recent) is a multiple of the page.
  Index piece_end(Index at) const {
    const Index page = choice_.keys.page, begin = choice_.keys.sinks + choice_.keys.recent;
    return at < begin ? begin + page : at + page - (at - begin) % page;
  }

  void add_use(Index first) {
    for (Index i = 0; i < report_.keys_seen.rows(); ++i)
      for (Index h = 0; h < report_.keys_seen.cols(); ++h) {
        use_.queries += 1;
        use_.keys_seen += report_.keys_seen(i, h) / static_cast<double>(first + i + 1);
        use_.estimated_mass += report_.estimated_mass(i, h);
      }
  }

  const Llama& model_;
  AttentionChoice choice_;
  Index tokens_ = 0;
  std::vector<HeadCache> caches_;                  // by block
  std::vector<coterie::KeyIndex<float>> indexes_;  // by block, of the first tokens_ rows; empty where dense
  RowMatrix<float> x_, normed_, q_, attended_;     // of a call
  RowMatrix<float> compared_;                      // attended_ through an index
  std::vector<double> budgets_;                    // of compare_heads
  std::vector<HeadErrors> errors_;                 // by budget
  coterie::AttentionPlan plan_;
  coterie::PlanScratch plan_scratch_;
  coterie::KeyIndexReport report_;
  IndexUse use_;
  bool counts_ = false;
};

}  // namespace pretrained
