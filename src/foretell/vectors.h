// Numbers in the processor's registers, LANES at a time, of float32 and of bfloat16, which is its upper half.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

// LANES numbers are in one of the processor's REGISTERS.
#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#define REGISTERS 16
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));  // bits of floats, or pairs of bfloat16 numbers
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats widened(Halves halves) { return (Floats)(__builtin_convertvector(halves, Words) << 16); }

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Words rounded(Floats values) {  // to bfloat16, the nearest and of two the even
  const Words bits = (Words)values;
  return (values == values) ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : Words{} + 0x7fc0u;
}

inline uint32_t rounded(float value) { return rounded(Floats{value})[0]; }

inline Floats all(float value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (Floats)_mm256_set1_ps(value);
#else
  return Floats{value, value, value, value};
#endif
}

// a * b + c in one rounding wherever the processor has it: left to itself, the compiler takes it here and not there, and
// a row would have other bits in other company.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return widened(halves);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void store(uint16_t* to, Floats values) {
  const Halves halves = __builtin_convertvector(rounded(values), Halves);
  std::memcpy(to, &halves, sizeof halves);
}


inline float largest(Floats values) {
  float found = values[0];
  for (int lane = 1; lane < LANES; lane++) found = std::max(found, values[lane]);
  return found;
}

inline float total(Floats values) {
  float found = values[0];
  for (int lane = 1; lane < LANES; lane++) found += values[lane];
  return found;
}

// e^x for x <= 0, to the last bits of float32; below e^-87 the smallest normal number.
inline Floats exponential(Floats x) {
  const Floats least = all(-87.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  x = x < least ? least : x;
  const Floats shifted = x * 1.44269504f + magic, powers = shifted - magic;
  const Floats r = (x - powers * 0.693359375f) - powers * -2.12194440e-4f;
  Floats sum = all(1.9875691500e-4f);
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  const Words exponents = ((Words)shifted - (Words)magic + 127u) << 23;
  return sum * (Floats)exponents;
}

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

template <int STRIDE, int... L>
inline void exchanged(Floats& a, Floats& b, std::integer_sequence<int, L...>) {
  const Floats low = SHUFFLED(a, b, (L & STRIDE ? LANES + L - STRIDE : L)...);
  b = SHUFFLED(a, b, (L & STRIDE ? LANES + L : L + STRIDE)...);
  a = low;
}

template <int STRIDE>
inline void transposed(Floats (&square)[LANES]) {
  if constexpr (STRIDE < LANES) {
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) {
      if (!(row & STRIDE)) {
        exchanged<STRIDE>(square[row], square[row | STRIDE], std::make_integer_sequence<int, LANES>{});
      }
    }
    transposed<2 * STRIDE>(square);
  }
}

}  // namespace
