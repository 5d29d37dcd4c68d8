#pragma once

// A cache of keys and values, and queries, for the tests of KeyIndex.

#include <cstring>

#include "coterie/attention/reference.hpp"
#include "coterie/retrieval/key_index.hpp"
#include "random.hpp"

namespace test {

inline bool same_bits(const RowMatrix<float>& a, const RowMatrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
}

/// kv_heads heads of keys of width d and values of width dv.
struct KeyCache {
  RowMatrix<float> q, k, v;
  Index heads, kv_heads, d, dv;

  KeyCache(Index tokens, Index queries, Index query_heads, Index key_heads, std::uint64_t seed, Index width = 6,
           Index value_width = 5)
      : heads(query_heads), kv_heads(key_heads), d(width), dv(value_width) {
    Random random(seed);
    q = 3 * random.matrix<float>(queries, heads * d);
    k = 3 * random.matrix<float>(tokens, kv_heads * d);
    v = random.matrix<float>(tokens, kv_heads * dv);
  }

  coterie::AttentionConfig attention(double scale = 0) const {
    return {.heads = heads, .kv_heads = kv_heads, .scale = scale};
  }
  RowMatrix<float> attend(const coterie::KeyIndex<float>& index, coterie::KeyIndexQuery query,
                          coterie::Context& context, coterie::KeyIndexReport* report = nullptr) const {
    RowMatrix<float> out = RowMatrix<float>::Constant(q.rows(), heads * dv, 99);
    query.heads = heads;
    index.attend(q, k, v, out, query, context, report);
    return out;
  }
  /// By plain loops in double, along plans.
  RowMatrix<double> reference(const coterie::Plans& plans, double scale = 0) const {
    RowMatrix<double> out(q.rows(), heads * dv), lse(q.rows(), heads);
    coterie::reference_forward(plans, RowMatrix<double>(q.cast<double>()), RowMatrix<double>(k.cast<double>()),
                               RowMatrix<double>(v.cast<double>()), coterie::view(out), coterie::view(lse),
                               attention(scale));
    return out;
  }
};

inline double difference(const RowMatrix<float>& got, const RowMatrix<double>& want) {
  return got.size() == 0 ? 0 : (got.cast<double>() - want).cwiseAbs().maxCoeff();
}

}  // namespace test
