// A sweep of the sampler head over the masks of a block: which tokens fit their latents behind these tokens.
//
// It is a chain of a dozen small operations, each of which takes a library longer to begin than to do. All numbers are
// float32 here, whatever the model's are; drafts hang on them, the output never does.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "products.h"
#include "vectors.h"

// A sampler head, its base's unembedding, and what they are given; sampled.py has the same. D is a multiple of LANES.
// Of weights that are null there is none, of a norm both are there or none.
struct Sweep {
  long width, vocabulary, tokens;      // D, V, T
  const void* first;                   // (D, D): what the MLP makes of a latent
  const void* second;                  // (D, D)
  const void* unembedding;             // (V, D); null: what is to be unembedded is asked for
  const float *first_bias, *second_bias, *unembedding_bias;
  const float *first_gain, *first_shift, *second_gain, *second_shift;  // (D,) of the norms
  float first_epsilon, second_epsilon;
  long residual, bigram, half;         // whether the latent is added, a table is, and numbers given are bfloat16
  long latents;                        // N
  const void* latent;                  // (N, D)
  float* prepared;                     // (N, D): of the MLP, made where all drafts are
};

namespace {

constexpr long SMALL = 1 << 14;  // numbers that are not worth a second thread

inline Floats silu(Floats x) {
  const Floats none{}, e = exponential(x < none ? x : -x), share = 1.0f / (1.0f + e);
  return x * (x < none ? e * share : share);
}

// x (width,) to its silu, normed.
void activate(float* x, long width, const float* gain, const float* shift, float epsilon) {
  Floats sum{}, squares{};
  for (long d = 0; d < width; d += LANES) {
    const Floats value = silu(load(x + d));
    store(x + d, value);
    sum += value;
  }
  const Floats mean = all(total(sum) / width);
  for (long d = 0; d < width; d += LANES) {
    const Floats away = load(x + d) - mean;
    squares += away * away;
  }
  const Floats scale = all(1.0f / std::sqrt(total(squares) / width + epsilon));
  for (long d = 0; d < width; d += LANES) {
    store(x + d, (load(x + d) - mean) * scale * load(gain + d) + load(shift + d));
  }
}

template <class T>
float size_of(const T* x, long width) {
  Floats squares{};
  for (long d = 0; d < width; d += LANES) squares += load(x + d) * load(x + d);
  return std::sqrt(total(squares) / width);
}

// The first of the largest scores (n,), and its probability.
int64_t likeliest(const float* scores, long n, float& sure) {
  const long whole = n / LANES * LANES;
  Floats most = all(-INFINITY), sums{};
  for (long at = 0; at < whole; at += LANES) {
    const Floats value = load(scores + at);
    most = value > most ? value : most;
  }
  float top = largest(most);
  for (long at = whole; at < n; at++) top = std::max(top, scores[at]);
  for (long at = 0; at < whole; at += LANES) sums += exponential(load(scores + at) - top);
  float sum = total(sums);
  for (long at = whole; at < n; at++) sum += std::exp(scores[at] - top);
  sure = 1.0f / sum;
  const float* found = std::find(scores, scores + n, top);
  return found == scores + n ? 0 : found - scores;  // NaN is found nowhere
}

template <class T>
void sweep(const Sweep& head, long rows, const int64_t* numbers, const int64_t* places, const T* terms, float* sampled,
           float* scores, int64_t* index, float* sure) {
  const T* latents = static_cast<const T*>(head.latent);
  const long width = head.width, stride = ((head.second != nullptr) + (head.bigram != 0)) * width;
  const auto latent = [&](long row) { return latents + (numbers ? numbers[row] : row) * width; };
  // What the tokens before draft `row` add in numbers d, ... of their terms.
  const auto term = [&](long row, long d) {
    Floats sum = load(terms + places[row] * stride + d);
    for (long token = 1; token < head.tokens; token++) sum += load(terms + places[token * rows + row] * stride + d);
    return sum;
  };
  if (head.second) {
    if (!numbers) {
      std::vector<float> wide;
      const float* given = reinterpret_cast<const float*>(latents);
      if (head.half) {
        wide.resize(head.latents * width);
        for (long at = 0; at < head.latents * width; at += LANES) store(wide.data() + at, load(latents + at));
        given = wide.data();
      }
      foretell_rough_product(given, head.latents, width, head.first, head.first_bias, head.prepared, width);
    }
    std::vector<float> hidden(rows * width);
#pragma omp parallel for if (rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
      float* own = hidden.data() + row * width;
      const float* prepared = head.prepared + (numbers ? numbers[row] : row) * width;
      for (long d = 0; d < width; d += LANES) store(own + d, load(prepared + d) + term(row, d));
      activate(own, width, head.first_gain, head.first_shift, head.first_epsilon);
    }
    foretell_rough_product(hidden.data(), rows, width, head.second, head.second_bias, sampled, width);
  }
#pragma omp parallel for if (rows * width > SMALL)
  for (long row = 0; row < rows; row++) {
    float* own = sampled + row * width;
    if (head.second) activate(own, width, head.second_gain, head.second_shift, head.second_epsilon);
    else std::fill(own, own + width, 0.0f);
    const Floats size = all(head.bigram ? size_of(latent(row), width) : 0.0f);
    for (long d = 0; d < width; d += LANES) {
      Floats value = load(own + d);
      if (head.residual) value += load(latent(row) + d);
      if (head.bigram) value += size * term(row, stride - width + d);
      store(own + d, value);
    }
  }
  if (!head.unembedding || !scores) return;
  foretell_rough_product(sampled, rows, width, head.unembedding, head.unembedding_bias, scores, head.vocabulary);
  if (!index) return;
#pragma omp parallel for if (rows * head.vocabulary > SMALL)
  for (long row = 0; row < rows; row++) {
    index[row] = likeliest(scores + row * head.vocabulary, head.vocabulary, sure[row]);
  }
}

}  // namespace

extern "C" {

// For the drafts with these numbers (rows,), or for all N: places (T, rows) of the terms of the tokens before them, the
// latest first, among terms (., Q). sampled (rows, D), to be unembedded; if they are asked for, scores (rows, V), and
// which of those is the largest, index (rows,), and how likely that is, sure (rows,).
void foretell_sweep(const Sweep* head, long rows, const int64_t* numbers, const int64_t* places, const void* terms,
                    float* sampled, float* scores, int64_t* index, float* sure) {
  if (head->half) sweep(*head, rows, numbers, places, static_cast<const uint16_t*>(terms), sampled, scores, index, sure);
  else sweep(*head, rows, numbers, places, static_cast<const float*>(terms), sampled, scores, index, sure);
}
}
