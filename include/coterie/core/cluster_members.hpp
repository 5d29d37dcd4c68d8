// Which rows belong to which clusters, where a row may be in several or in none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie {

/// The rows of every (sequence, cluster), as a router writes them and a plan builder reads them. Flat lists, kept from
/// call to call: nothing allocates once they have grown.
struct ClusterMembers {
  Index tokens = 0;     ///< all rows, members or not
  Index clusters = 0;   ///< of each sequence
  Index sequences = 1;  ///< of a ragged batch
  /// Where a slice of `rows` begins, sequence by sequence: sequences * clusters + 1 numbers.
  std::vector<std::int32_t> begin = {};
  std::vector<std::int32_t> rows = {};  ///< ascending inside a slice, without repetition

  /// The members of a cluster in a sequence.
  std::span<const std::int32_t> of(Index cluster, Index sequence = 0) const {
    const auto i = static_cast<std::size_t>(sequence * clusters + cluster);
    return std::span<const std::int32_t>(rows).subspan(static_cast<std::size_t>(begin[i]),
                                                       static_cast<std::size_t>(begin[i + 1] - begin[i]));
  }
};

/// Tokens by the number of clusters that they are in.
struct MembershipCoverage {
  Index in_none = 0, in_one = 0, in_several = 0;
};

/// Counts how the tokens are covered: those in no cluster get no output from routed attention.
/// Requires: rows from 0 to tokens - 1; otherwise ValueError.
/// Allocates: a count for each token.
/// Cost: linear in tokens and memberships.
inline MembershipCoverage coverage(const ClusterMembers& members) {
  if (members.tokens < 0) detail::fail<ValueError>("coverage", "members.tokens", "at least 0", members.tokens);
  std::vector<std::int32_t> count(static_cast<std::size_t>(members.tokens), 0);
  for (const std::int32_t row : members.rows) {
    if (row < 0 || row >= members.tokens)
      detail::fail<ValueError>("coverage", "members.rows", detail::join("rows from 0 to ", members.tokens - 1), row);
    ++count[static_cast<std::size_t>(row)];
  }
  MembershipCoverage result;
  for (const std::int32_t n : count) ++(n == 0 ? result.in_none : n == 1 ? result.in_one : result.in_several);
  return result;
}

}  // namespace coterie
