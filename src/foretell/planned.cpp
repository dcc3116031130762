// A round of the planner's policy iteration (docs/planner.md), which a small model waits for: the same as `Problem` in
// decoding/problem.py does with arrays, without a pass over memory for each of its two dozen operations.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

// What there is to choose from; problem.py has the same. Layouts are in the order of the drafts that they verify.
struct Choices {
  long layouts, states;     // L, k + 1
  const int64_t* verified;  // (L,)
  const int64_t* blocks;    // (k + 1, L): masks after each token
  const int64_t* starts;    // (k + 1,): the first layout of those that verify d drafts
  const int64_t* ends;      // and what comes behind the last
};

namespace {

// Scores (L,) of the layouts, for the chances (k + 1,) that the first drafts hold.
void score(const Choices& from, const double* seconds, const double* worth, const double* chances, double* scores) {
  std::copy(seconds, seconds + from.layouts, scores);
  for (long r = 0; r < from.states; r++) {
    const double chance = chances[r], *own = worth + r * from.layouts;
    for (long l = from.starts[r]; l < from.layouts; l++) scores[l] += chance * own[l];
  }
}

// The first of the least scores of these layouts.
long least_of(const double* scores, long first, long end) {
  double least = scores[first];
#pragma omp simd reduction(min : least)
  for (long l = first; l < end; l++) least = std::min(least, scores[l]);
  const long found = std::find(scores + first, scores + end, least) - scores;
  return found == end ? first : found;  // NaN is found nowhere
}

}  // namespace

extern "C" {

// reach, found (N, k + 1), value and drafting (k + 1,), seconds (L,). The best layouts (N, k + 1) for 0..k drafts at
// hand, and on average over the N, by that: seconds, rows and tokens of a step, (k + 1,) each, and moves
// (k + 1, k + 1) to as many drafts at hand.
void foretell_improve(const Choices* choices, long n, const double* reach, const double* found, const double* value,
                      double per_token, const double* seconds, const double* drafting, int64_t* chosen,
                      double* step_seconds, double* rows, double* tokens, double* moves) {
  const Choices& from = *choices;
  const long layouts = from.layouts, states = from.states;
  std::vector<double> worth(states * layouts), scores(layouts), text(layouts), left(states), exactly(states);
  for (long m = 0; m < states; m++) left[m] = value[m] + drafting[m];
  for (long r = 0; r < states; r++) {
    const int64_t *own = from.blocks + r * layouts, *before = own - layouts;
    for (long l = from.starts[r]; l < layouts; l++) {
      worth[r * layouts + l] = left[own[l]] - (r ? left[before[l]] : 0.0) - per_token;
    }
  }
  for (double* sums : {step_seconds, rows, tokens}) std::fill(sums, sums + states, 0.0);
  std::fill(moves, moves + states * states, 0.0);
  for (long i = 0; i < n; i++) {
    const double *own = reach + i * states, *of_text = found + i * states;
    score(from, seconds, worth.data(), own, scores.data());
    double instead = std::numeric_limits<double>::infinity(), lowest = instead;
    long other = 0, best = 0;
    if (of_text[1] != 0) {
      score(from, seconds, worth.data(), of_text, text.data());
      other = least_of(text.data(), 0, layouts);
      instead = text[other];
    }
    for (long state = 0; state < states; state++) {
      const long least = least_of(scores.data(), from.starts[state], from.ends[state]);
      if (scores[least] <= lowest) {
        lowest = scores[least];
        best = least;
      }
      const bool text_better = instead < lowest;
      const long l = text_better ? other : best;
      const double* chances = text_better ? of_text : own;
      chosen[i * states + state] = l;
      double spent = seconds[l], said = 0.0, width = 1.0 + from.verified[l];
      for (long r = 0; r <= from.verified[l]; r++) {
        const int64_t block = from.blocks[r * layouts + l];
        const double exact = chances[r] - (r < from.verified[l] ? chances[r + 1] : 0.0);
        said += chances[r];
        width += block;
        spent += exact * drafting[block];
        moves[state * states + block] += exact / n;
      }
      step_seconds[state] += spent / n;
      rows[state] += width / n;
      tokens[state] += said / n;
    }
  }
}
}
