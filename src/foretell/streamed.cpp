// Products of a few rows with a weight of 16-bit numbers, as fast as the weight comes from memory.
//
// Decoding multiplies each weight with a handful of rows. Memory is slow and arithmetic is not, so a second row should
// cost nothing; but a library that goes over a part of the weight once for every few rows, or leaves the next part to
// be fetched when it is needed, does one after the other. Here every number of the weight is read once for up to
// MOST_ROWS rows, in the order in which it lies, and is asked for AHEAD of its use.
//
// A row's sum runs over its numbers in their order, whatever other rows there are: it has the same bits in any company.

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>

#include "products.h"
#include "vectors.h"

// So many rows pass together, each with a sum in a register.
#if defined(__AVX512F__)
#define MOST_ROWS 28
#else
#define MOST_ROWS 12
#endif

namespace {

constexpr long AHEAD = 4096;     // bytes of a stream
constexpr long SMALL = 1 << 15;  // multiplications that are not worth a second thread
constexpr long MOST_AT_ONCE = 1024;  // rows: those of a long prompt are not all put in order at the same time
constexpr long NEAR = 1 << 18;   // bytes of a weight that two kinds of rows go over in turn
constexpr long CHUNK = 64;       // pairs of numbers of the rows that one thread reorders at a time

#if defined(__AVX512BF16__)
// bfloat16 rows: the processor's own products of pairs, which it sums in float32.
struct Dot {
  using Number = uint32_t;             // a pair
  static constexpr long per_pair = 1;  // numbers of a row

  template <int ROWS, int STREAMS>
  static inline void add(Floats (&sums)[ROWS][STREAMS], const Words (&weights)[STREAMS], const Number* x) {
#pragma GCC unroll 32
    for (int row = 0; row < ROWS; row++) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[row]));
#pragma GCC unroll 8
      for (int stream = 0; stream < STREAMS; stream++) {
        Floats& sum = sums[row][stream];
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights[stream], (__m512bh)pair);
      }
    }
  }
};
#endif

// float32 rows: a bfloat16 number is a float32 whose lower half is zero.
struct Widen {
  using Number = float;
  static constexpr long per_pair = 2;

  template <int ROWS, int STREAMS>
  static inline void add(Floats (&sums)[ROWS][STREAMS], const Words (&weights)[STREAMS], const Number* x) {
    Floats even[STREAMS], odd[STREAMS];
#pragma GCC unroll 8
    for (int stream = 0; stream < STREAMS; stream++) {
      even[stream] = (Floats)(weights[stream] << 16);
      odd[stream] = (Floats)(weights[stream] & 0xffff0000u);
    }
    add(sums, even, x);
    add(sums, odd, x + ROWS);
  }

  template <int ROWS, int STREAMS>
  static inline void add(Floats (&sums)[ROWS][STREAMS], const Floats (&weights)[STREAMS], const Number* x) {
#pragma GCC unroll 32
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 8
      for (int stream = 0; stream < STREAMS; stream++) {
        sums[row][stream] = fused(weights[stream], all(x[row]), sums[row][stream]);
      }
    }
  }
};

// Numbers in rows (n, d), as they are given or asked for: float32, or bfloat16.
struct Rows {
  void* data;
  bool half;
  long width;
};

// A weight (d_out, d_in) in tiles of LANES columns of its product, each a stream of pairs of the numbers behind it:
// (tiles, pairs, LANES, 2), filled up with zeros.
struct Weight {
  const Words* tiles;
  long pairs;
};

// What low-rank rows get beyond: B's (d_out, rank) part of it, of what A (rank, d_in) makes of them. B is zero but in
// `spans` (tiles of B, 2) of its pairs, where several linears are one product and each has an A and B of its own.
struct LowRank {
  Weight a, b;
  const int64_t* spans;
  long rank, first, width;  // of every `width` rows those from `first` on
  float scale;
};

// Rows pass in groups of up to MOST_ROWS, as equal as can be.
struct Groups {
  long rows, count;

  explicit Groups(long rows) : rows(rows), count((rows + MOST_ROWS - 1) / MOST_ROWS) {}
  long first(long group) const { return rows * group / count; }
  long size(long group) const { return first(group + 1) - first(group); }
  long largest() const { return (rows + count - 1) / count; }
};

// Rows as a pass reads them: (groups, pairs, rows of the group) pairs, or (groups, 2 pairs, rows of the group) numbers.
// `get` gives the number of a row in a column; which pairs, and of which group.
template <class Kind, class Get>
void order(const Groups& groups, long group, long from, long to, long pairs, const Get& get,
           typename Kind::Number* out) {
  const long first = groups.first(group), size = groups.size(group);
  out += first * pairs * Kind::per_pair;
  for (long row = 0; row < size; row++) {
    for (long pair = from; pair < to; pair++) {
      const auto even = get(first + row, 2 * pair), odd = get(first + row, 2 * pair + 1);
      if constexpr (Kind::per_pair == 1) {
        out[pair * size + row] = even | static_cast<uint32_t>(odd) << 16;
      } else {
        out[2 * pair * size + row] = even;
        out[(2 * pair + 1) * size + row] = odd;
      }
    }
  }
}

inline long tiles_of(long columns) { return (columns + LANES - 1) / LANES; }

template <class Kind>
struct Product {
  using Number = typename Kind::Number;
  Weight weight;
  const Number* x;  // in order
  const float* bias;
  Rows out;
  const LowRank* low;    // whose B's product with `narrow` is added, if that is there
  const Number* narrow;

  // LANES columns of STREAMS tiles each, for the ROWS rows of a group.
  template <int ROWS, int STREAMS>
  static void pass(const Product& product, long tile, long first) {
    const long pairs = product.weight.pairs, ahead = std::min(pairs, AHEAD / static_cast<long>(sizeof(Words)));
    Floats sums[ROWS][STREAMS];
    for (int stream = 0; stream < STREAMS; stream++) {
      Floats start{};
      if (product.bias) std::memcpy(&start, product.bias + (tile + stream) * LANES, sizeof start);
#pragma GCC unroll 32
      for (int row = 0; row < ROWS; row++) sums[row][stream] = start;
    }
    const Words* streams = product.weight.tiles + tile * pairs;
    const Number* x = product.x + first * pairs * Kind::per_pair;
    run(sums, streams, pairs, streams + ahead, x, 0, pairs - ahead);
    // Behind the last numbers of these streams come the first of the next.
    run(sums, streams, pairs, streams + STREAMS * pairs - (pairs - ahead), x, pairs - ahead, pairs);
    if (product.narrow) {
      const long more = product.low->b.pairs;
      const int64_t* spans = product.low->spans + 2 * tile;
      long from = spans[0], to = spans[1];
      for (int stream = 1; stream < STREAMS; stream++) {
        from = std::min<long>(from, spans[2 * stream]);
        to = std::max<long>(to, spans[2 * stream + 1]);
      }
      streams = product.low->b.tiles + tile * more;
      run(sums, streams, more, streams + STREAMS * more, product.narrow + first * more * Kind::per_pair, from, to);
    }
    for (int stream = 0; stream < STREAMS; stream++) {
      const long column = (tile + stream) * LANES, count = std::min<long>(LANES, product.out.width - column);
      for (int row = 0; row < ROWS; row++) write(product.out, first + row, column, count, sums[row][stream]);
    }
  }

  template <int ROWS, int STREAMS>
  static inline void run(Floats (&sums)[ROWS][STREAMS], const Words* streams, long apart, const Words* ahead,
                         const Number* x, long from, long to) {
    for (long pair = from; pair < to; pair++) {
      Words weights[STREAMS];
#pragma GCC unroll 8
      for (int stream = 0; stream < STREAMS; stream++) {
        weights[stream] = streams[stream * apart + pair];
        __builtin_prefetch(ahead + stream * apart + pair);
      }
      Kind::add(sums, weights, x + pair * Kind::per_pair * ROWS);
    }
  }

  static inline void write(const Rows& out, long row, long column, long count, Floats values) {
    const long at = row * out.width + column;
    if (out.half) {
      const Words bits = rounded(values);
      for (long lane = 0; lane < count; lane++) {
        static_cast<uint16_t*>(out.data)[at + lane] = static_cast<uint16_t>(bits[lane]);
      }
    } else {
      std::memcpy(static_cast<float*>(out.data) + at, &values, sizeof(float) * count);
    }
  }

  using Pass = void (*)(const Product&, long, long);

  template <int ROWS, int STREAMS>
  static constexpr Pass pass_of() {
    constexpr int needed = (ROWS + 2) * STREAMS + 1;  // sums, numbers of the weight and one of a row
    if constexpr (STREAMS == 1 || needed <= REGISTERS) return &pass<ROWS, STREAMS>;
    return nullptr;
  }

  template <int... I>
  static constexpr std::array<std::array<Pass, 4>, MOST_ROWS> table(std::integer_sequence<int, I...>) {
    return {{{pass_of<I + 1, 1>(), pass_of<I + 1, 2>(), pass_of<I + 1, 4>(), pass_of<I + 1, 8>()}...}};
  }

  // These tiles, as many side by side as there are registers for.
  void range(const Groups& groups, long tile, long end) const {
    static constexpr auto passes = table(std::make_integer_sequence<int, MOST_ROWS>{});
    while (tile < end) {
      int doublings = 3;
      while (!passes[groups.largest() - 1][doublings] || tile + (1L << doublings) > end) doublings--;
      for (long group = 0; group < groups.count; group++) {
        passes[groups.size(group) - 1][doublings](*this, tile, groups.first(group));
      }
      tile += 1L << doublings;
    }
  }

  // Those that fall to one of so many threads.
  void part(const Groups& groups, long thread, long threads) const {
    const long tiles = tiles_of(out.width);
    range(groups, tiles * thread / threads, tiles * (thread + 1) / threads);
  }
};

template <class Kind, class Get>
void multiply(long rows, const Get& get, const void* ordered, long d_in, const Weight& weight, const float* bias,
              const Rows& out, const LowRank* low) {
  using Number = typename Kind::Number;
  const Groups groups(rows);
  const long pairs = weight.pairs, chunks = (pairs + CHUNK - 1) / CHUNK, per_pair = Kind::per_pair;
  const std::unique_ptr<Number[]> own(ordered ? nullptr : new Number[rows * pairs * per_pair]);
  const Number* x = ordered ? static_cast<const Number*>(ordered) : own.get();
  const std::unique_ptr<float[]> low_rows(low ? new float[rows * low->rank] : nullptr);
  const std::unique_ptr<Number[]> narrow(low ? new Number[rows * low->b.pairs * per_pair] : nullptr);
  // What A's make is rounded as the rows are; regular rows have none of it.
  const auto get_low = [&](long row, long column) {
    const bool there = column < low->rank && row % low->width >= low->first;
    const float value = there ? low_rows[row * low->rank + column] * low->scale : 0.0f;
    if constexpr (Kind::per_pair == 1) return rounded(value);
    else return value;
  };
#pragma omp parallel if (rows * d_in * out.width > SMALL)
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!ordered) {
#pragma omp for schedule(static)
      for (long item = 0; item < groups.count * chunks; item++) {
        const long from = item % chunks * CHUNK;
        order<Kind>(groups, item / chunks, from, std::min(pairs, from + CHUNK), pairs, get, own.get());
      }
    }
    if (low) {
      Product<Kind>{low->a, x, nullptr, {low_rows.get(), false, low->rank}, nullptr, nullptr}.part(groups, thread, threads);
#pragma omp barrier
#pragma omp for schedule(static)
      for (long group = 0; group < groups.count; group++) {
        order<Kind>(groups, group, 0, low->b.pairs, low->b.pairs, get_low, narrow.get());
      }
    }
    Product<Kind>{weight, x, bias, out, low, narrow.get()}.part(groups, thread, threads);
  }
}

#if defined(__AVX512BF16__)
// float32 rows of which those from `first` on are low-rank ones, whose numbers are rounded to bfloat16: drafts hang on
// them, the output never does, and they take half the time. Both go over a part of the weight while it is near.
void multiply_apart(const float* numbers, long first, long rows, long d_in, const Weight& weight, const float* bias,
                    const Rows& out, const LowRank& low) {
  const Groups exact(first), rough(rows - first);
  const long pairs = weight.pairs, chunks = (pairs + CHUNK - 1) / CHUNK, narrow_pairs = low.b.pairs;
  const std::unique_ptr<float[]> own(new float[first * pairs * 2]), low_rows(new float[rough.rows * low.rank]);
  const std::unique_ptr<uint32_t[]> halves(new uint32_t[rough.rows * pairs]);
  const std::unique_ptr<uint32_t[]> narrow(new uint32_t[rough.rows * narrow_pairs]);
  const auto get = [=](long row, long column) { return column < d_in ? numbers[row * d_in + column] : 0.0f; };
  const auto get_rounded = [&](long row, long column) { return rounded(get(first + row, column)); };
  const auto get_low = [&](long row, long column) {
    return column < low.rank ? rounded(low_rows[row * low.rank + column] * low.scale) : 0u;
  };
  const Rows behind{static_cast<float*>(out.data) + first * out.width, false, out.width};
  const Product<Widen> regular{weight, own.get(), bias, out, nullptr, nullptr};
  const Product<Dot> masks{weight, halves.get(), bias, behind, &low, narrow.get()};
  const long together = std::max(1L, NEAR / (pairs * static_cast<long>(sizeof(Words))));  // tiles
#pragma omp parallel if (rows * d_in * out.width > SMALL)
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (long item = 0; item < (exact.count + rough.count) * chunks; item++) {
      const long group = item / chunks, from = item % chunks * CHUNK, to = std::min(pairs, from + CHUNK);
      if (group < rough.count) order<Dot>(rough, group, from, to, pairs, get_rounded, halves.get());
      else order<Widen>(exact, group - rough.count, from, to, pairs, get, own.get());
    }
    Product<Dot>{low.a, halves.get(), nullptr, {low_rows.get(), false, low.rank}, nullptr, nullptr}.part(
        rough, thread, threads);
#pragma omp barrier
#pragma omp for schedule(static)
    for (long group = 0; group < rough.count; group++) {
      order<Dot>(rough, group, 0, narrow_pairs, narrow_pairs, get_low, narrow.get());
    }
    const long tiles = tiles_of(out.width), end = tiles * (thread + 1) / threads;
    for (long tile = tiles * thread / threads; tile < end; tile += together) {
      if (exact.count) regular.range(exact, tile, std::min(end, tile + together));
      masks.range(rough, tile, std::min(end, tile + together));
    }
  }
}
#endif

}  // namespace

void foretell_rough_product(const float* x, long rows, long d_in, const void* weight, const float* bias, float* out,
                            long d_out) {
  const Weight whole{static_cast<const Words*>(weight), (d_in + 1) / 2};
  const Rows to{out, false, d_out};
  const auto get = [=](long row, long column) { return column < d_in ? x[row * d_in + column] : 0.0f; };
#if defined(__AVX512BF16__)
  const auto halves = [=](long row, long column) { return rounded(get(row, column)); };
  multiply<Dot>(rows, halves, nullptr, d_in, whole, bias, to, nullptr);
#else
  multiply<Widen>(rows, get, nullptr, d_in, whole, bias, to, nullptr);
#endif
}

extern "C" {

// Columns of a tile.
long foretell_lanes() { return LANES; }

// out (rows, d_out) = x (rows, d_in) W^T + bias; both in bfloat16 if `half`, else in float32. The bias is float32, one
// number for every column of the tiles, or null. Without low-rank rows `a` is null.
void foretell_product(const void* x, long half, long rows, long d_in, const void* weight, const float* bias, void* out,
                      long d_out, const void* a, const void* b, const int64_t* spans, long rank, long first, long width,
                      float scale) {
  const auto laid_out = [](const void* tiles, long d) { return Weight{static_cast<const Words*>(tiles), (d + 1) / 2}; };
  const LowRank low{laid_out(a, d_in), laid_out(b, rank), spans, rank, first, width, scale};
  const LowRank* with = a ? &low : nullptr;
  const Weight whole = laid_out(weight, d_in);
  const Rows to{out, half != 0, d_out};
  const long slab = std::max(1L, MOST_AT_ONCE / width) * width;
  if (rows > slab) {
    const long bytes = half ? 2 : 4;
    for (long row = 0; row < rows; row += slab) {
      foretell_product(static_cast<const char*>(x) + row * d_in * bytes, half, std::min(slab, rows - row), d_in, weight,
                       bias, static_cast<char*>(out) + row * d_out * bytes, d_out, a, b, spans, rank, first, width,
                       scale);
    }
    return;
  }
  if (rows == 0) return;
  // A single row is in order as it is.
  const void* ordered = rows == 1 && d_in % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0 ? x : nullptr;
  if (!half) {
    const auto get = [=](long row, long column) {
      return column < d_in ? static_cast<const float*>(x)[row * d_in + column] : 0.0f;
    };
#if defined(__AVX512BF16__)
    if (with && rows == width && first < rows) {
      multiply_apart(static_cast<const float*>(x), first, rows, d_in, whole, bias, to, low);
      return;
    }
#endif
    multiply<Widen>(rows, get, ordered, d_in, whole, bias, to, with);
    return;
  }
  const uint16_t* numbers = static_cast<const uint16_t*>(x);
#if defined(__AVX512BF16__)
  const auto get = [=](long row, long column) -> uint32_t { return column < d_in ? numbers[row * d_in + column] : 0; };
  multiply<Dot>(rows, get, ordered, d_in, whole, bias, to, with);
#else
  const auto get = [=](long row, long column) { return column < d_in ? widened(numbers[row * d_in + column]) : 0.0f; };
  multiply<Widen>(rows, get, nullptr, d_in, whole, bias, to, with);
#endif
}
}
