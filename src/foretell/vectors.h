// Numbers in the processor's registers, LANES at a time, of float32 and of bfloat16, which is its upper half.

#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace
