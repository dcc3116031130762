// Attention of a decoding step: a few rows of one or more sequences, each over its own past in a static cache.
//
// A library's kernel is made for many rows that all sequences have as many of, and wants a mask with a column for every
// token. Here each sequence has its own number of rows, which see all of its past and of its new rows those that a
// layout says; and what comes before, norms of heads, rotary positions and the cache's new rows, is done on the way.
//
// The past is gone through in chunks that begin at fixed columns, each by itself, and then put together: a regular row
// gets the same bits whatever other rows there are, in its own sequence or others.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

// What all layers of a step have in common; attended.py has the same. Rows are N "together", whatever their sequence.
struct Step {
  long sequences, rows;             // B, N
  long heads, shared, size;         // query heads, heads of keys and values, numbers of each
  long stride, capacity;            // numbers of a row of `made`; columns of the cache
  const int64_t* lengths;           // (B,) tokens kept
  const int64_t* counts;            // (B,) rows of each sequence
  const int64_t* order;             // (N,) its rows, sequence after sequence, by their place together
  const uint8_t* visible;           // counts x counts of each sequence: which of its new rows a row sees
  const void* cosine;               // (N, size), and the sine with the sign that the half has that changes places
  const void* sine;
  float scale, epsilon;             // of scores; of the norms
  long half;                        // whether all numbers are bfloat16, else float32
};

namespace {

constexpr long CHUNK = 128;     // columns
constexpr long LARGEST = 1024;  // numbers of a head
constexpr long SMALL = 1 << 14;  // multiplications that are not worth a second thread
constexpr float NOTHING = -INFINITY;

template <class T>
inline Floats as_kept(Floats values) {  // as they are once they were written down
  if constexpr (sizeof(T) == 2) return (Floats)(rounded(values) << 16);
  else return values;
}

// A head of a row, normed if there are weights for it and turned by its position, with the base's own roundings.
template <class T, class Out>
void turned(const Step& step, const T* head, const T* norm, long row, Out* out) {
  const long size = step.size, half = size / 2;
  float values[2 * LARGEST];  // twice one behind the other, so that halves change places by where one begins
  if (norm) {
    Floats squares{};
    for (long i = 0; i < size; i += LANES) squares += load(head + i) * load(head + i);
    const float factor = 1.0f / std::sqrt(total(squares) / size + step.epsilon);
    for (long i = 0; i < size; i += LANES) {
      store(values + i, as_kept<T>(as_kept<T>(load(head + i) * factor) * load(norm + i)));
    }
  } else {
    for (long i = 0; i < size; i += LANES) store(values + i, load(head + i));
  }
  std::memcpy(values + size, values, size * sizeof(float));
  const T* cosine = static_cast<const T*>(step.cosine) + row * size;
  const T* sine = static_cast<const T*>(step.sine) + row * size;
  for (long i = 0; i < size; i += LANES) {
    const Floats other = load(values + i + half);
    const Floats own = as_kept<T>(load(values + i) * load(cosine + i));
    store(out + i, as_kept<T>(own + as_kept<T>(other * load(sine + i))));
  }
}

// Scores of ROWS rows (ROWS, size) with LANES keys, numbers by numbers.
template <int ROWS>
void scored(const float* queries, const Floats* keys, long size, float scale, float* scores) {
  Floats even[ROWS], odd[ROWS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) even[row] = odd[row] = Floats{};
  for (long i = 0; i < size; i += 2) {
    const Floats first = keys[i], second = keys[i + 1];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      even[row] += first * queries[row * size + i];
      odd[row] += second * queries[row * size + i + 1];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) store(scores + row * CHUNK, (even[row] + odd[row]) * scale);
}

// Values (count, size), PARTS registers' worth of each, weighed by the chances (ROWS, CHUNK) of ROWS rows.
template <class T, int ROWS, int PARTS>
void weighed(const float* chances, const T* values, long count, long size, float* out) {
  Floats sums[ROWS][PARTS];
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) sums[row][part] = Floats{};
  }
  for (long column = 0; column < count; column++) {
    Floats parts[PARTS];
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) parts[part] = load(values + column * size + part * LANES);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
      const float chance = chances[row * CHUNK + column];
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) sums[row][part] += parts[part] * chance;
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) store(out + row * size + part * LANES, sums[row][part]);
  }
}

template <int ROWS>
void scored_most(const float* queries, const Floats* keys, long size, float scale, float* scores, long rows) {
  if (rows >= ROWS) {
    for (; rows >= ROWS; rows -= ROWS, queries += ROWS * size, scores += ROWS * CHUNK) {
      scored<ROWS>(queries, keys, size, scale, scores);
    }
  }
  if constexpr (ROWS > 1) {
    if (rows) scored_most<ROWS / 2>(queries, keys, size, scale, scores, rows);
  }
}

template <class T, int ROWS, int PARTS>
void weighed_most(const float* chances, const T* values, long count, long size, float* out, long rows) {
  for (; rows >= ROWS; rows -= ROWS, chances += ROWS * CHUNK, out += ROWS * size) {
    weighed<T, ROWS, PARTS>(chances, values, count, size, out);
  }
  if constexpr (ROWS > 1) {
    if (rows) weighed_most<T, ROWS / 2, PARTS>(chances, values, count, size, out, rows);
  }
}

// What a chunk of the past gives: of every row the largest score, the sum of the chances and what they weigh.
struct Part {
  float *most, *sum, *weighed;  // (rows,), (rows,), (rows, size)
};

// One head of keys and values, one sequence, columns from `first` on; rows are those of its group of query heads.
template <class T>
void chunk_of(const Step& step, long length, long count, const uint8_t* visible, const float* queries, const T* keys,
              const T* values, long first, const Part& part) {
  const long size = step.size, groups = step.heads / step.shared, rows = count * groups;
  const long columns = std::min(CHUNK, length + count - first);
  static thread_local std::vector<float> scores, chances;
  static thread_local std::vector<Floats> block;
  if (static_cast<long>(scores.size()) < rows * CHUNK) scores.resize(rows * CHUNK);
  if (static_cast<long>(block.size()) < size) block.resize(size);
  for (long column = 0; column < columns; column += LANES) {
    for (long i = 0; i < size; i += LANES) {
      Floats square[LANES];
#pragma GCC unroll 16
      for (long lane = 0; lane < LANES; lane++) {
        const long at = std::min(column + lane, columns - 1);
        square[lane] = load(keys + (first + at) * size + i);
      }
      transposed<1>(square);
#pragma GCC unroll 16
      for (long lane = 0; lane < LANES; lane++) block[i + lane] = square[lane];
    }
    scored_most<8>(queries, block.data(), size, step.scale, scores.data() + column, rows);
  }
  const long end = (columns + LANES - 1) / LANES * LANES;
  for (long row = 0; row < rows; row++) {
    float* own = scores.data() + row * CHUNK;
    const uint8_t* sees = visible + row / groups * count;
    for (long column = std::max(0L, length - first); column < columns; column++) {
      if (!sees[first + column - length]) own[column] = NOTHING;
    }
    for (long column = columns; column < end; column++) own[column] = NOTHING;
    Floats most = all(NOTHING), sum{};
    for (long column = 0; column < end; column += LANES) {
      const Floats found = load(own + column);
      most = found > most ? found : most;
    }
    const float top = largest(most);
    for (long column = 0; column < end; column += LANES) {
      const Floats found = load(own + column);
      const Floats chance = found > all(NOTHING) ? exponential(found - top) : Floats{};
      store(own + column, chance);
      sum += chance;
    }
    part.most[row] = top;
    part.sum[row] = total(sum);
  }
  for (long i = 0; i < size;) {
    const T* from = values + first * size + i;
    if (i + 4 * LANES <= size) {
      weighed_most<T, 4, 4>(scores.data(), from, columns, size, part.weighed + i, rows);
      i += 4 * LANES;
    } else {
      weighed_most<T, 4, 1>(scores.data(), from, columns, size, part.weighed + i, rows);
      i += LANES;
    }
  }
}

// A row's parts put together, (size,).
template <class T>
void combined(const std::vector<Part>& parts, long begin, long end, long row, long size, T* out) {
  float most = NOTHING, sum = 0.0f;
  for (long part = begin; part < end; part++) most = std::max(most, parts[part].most[row]);
  static thread_local std::vector<float> factors;
  factors.resize(end - begin);
  for (long part = begin; part < end; part++) {
    const float share = parts[part].most[row];
    factors[part - begin] = share > NOTHING ? std::exp(share - most) : 0.0f;
    sum += parts[part].sum[row] * factors[part - begin];
  }
  for (long i = 0; i < size; i += LANES) {
    Floats found{};
    for (long part = begin; part < end; part++) {
      found += load(parts[part].weighed + row * size + i) * factors[part - begin];
    }
    store(out + i, found / sum);
  }
}

template <class T>
void attend(const Step& step, const T* made, const T* query_norm, const T* key_norm, T* keys, T* values, T* out) {
  const long size = step.size, groups = step.heads / step.shared, all_heads = step.heads + 2 * step.shared;
  static thread_local std::vector<float> own_queries, own_memory;
  static thread_local std::vector<Part> own_parts;
  static thread_local std::vector<long> own_firsts;  // of every sequence, its first part
  static thread_local std::vector<int64_t> own_sequence;
  // Workers have others of these by name.
  auto &queries = own_queries, &memory = own_memory;
  auto& parts = own_parts;
  auto& firsts = own_firsts;
  auto& owner = own_sequence;  // (N,) by `order`
  queries.resize(step.rows * step.heads * size);
  owner.resize(step.rows);
  firsts.assign(1, 0);
  long needed = 0, work = 0;
  for (long b = 0, row = 0; b < step.sequences; b++) {
    const long chunks = (step.lengths[b] + step.counts[b] + CHUNK - 1) / CHUNK;
    firsts.push_back(firsts[b] + chunks * step.shared);
    needed += chunks * step.heads * step.counts[b] * (size + 2);
    work += step.heads * step.counts[b] * (step.lengths[b] + step.counts[b]) * size;
    for (long i = 0; i < step.counts[b]; i++) owner[row++] = b;
  }
  memory.resize(needed);
  parts.resize(firsts.back());
  float* next = memory.data();
  for (long b = 0; b < step.sequences; b++) {
    const long rows = step.counts[b] * groups;
    for (long part = firsts[b]; part < firsts[b + 1]; part++) {
      parts[part] = {next, next + rows, next + 2 * rows};
      next += rows * (size + 2);
    }
  }
  std::vector<long> begins(step.sequences + 1, 0), squares(step.sequences + 1, 0);
  for (long b = 0; b < step.sequences; b++) {
    begins[b + 1] = begins[b] + step.counts[b];
    squares[b + 1] = squares[b] + step.counts[b] * step.counts[b];
  }
#pragma omp parallel if (work > SMALL)
  {
    // Queries as (sequence, head of keys, row, head of the group, size); keys and values into the cache.
#pragma omp for schedule(static)
    for (long item = 0; item < step.rows * all_heads; item++) {
      const long place = item / all_heads, head = item % all_heads, b = owner[place], row = step.order[place];
      const T* from = made + row * step.stride + head * size;
      const long own = place - begins[b];
      if (head < step.heads) {
        const long at = (begins[b] * step.shared + head / groups * step.counts[b] + own) * groups + head % groups;
        turned(step, from, query_norm, row, queries.data() + at * size);
        continue;
      }
      const bool key = head < step.heads + step.shared;
      const long shared = head - step.heads - (key ? 0 : step.shared);
      T* to = (key ? keys : values) + ((b * step.shared + shared) * step.capacity + step.lengths[b] + own) * size;
      if (key) turned(step, from, key_norm, row, to);
      else std::memcpy(to, from, size * sizeof(T));
    }
#pragma omp for schedule(dynamic)
    for (long item = 0; item < static_cast<long>(parts.size()); item++) {
      const long b = std::upper_bound(firsts.begin(), firsts.end(), item) - firsts.begin() - 1;
      const long chunks = (firsts[b + 1] - firsts[b]) / step.shared, head = (item - firsts[b]) / chunks;
      const long first = (item - firsts[b]) % chunks * CHUNK, past = (b * step.shared + head) * step.capacity * size;
      const long at = (begins[b] * step.shared + head * step.counts[b]) * groups * size;
      chunk_of(step, step.lengths[b], step.counts[b], step.visible + squares[b], queries.data() + at, keys + past,
               values + past, first, parts[item]);
    }
#pragma omp for schedule(static)
    for (long item = 0; item < step.rows * step.heads; item++) {
      const long place = item / step.heads, head = item % step.heads, b = owner[place];
      const long chunks = (firsts[b + 1] - firsts[b]) / step.shared, begin = firsts[b] + head / groups * chunks;
      const long row = (place - begins[b]) * groups + head % groups;
      combined(parts, begin, begin + chunks, row, size, out + (step.order[place] * step.heads + head) * size);
    }
  }
}

}  // namespace

extern "C" {

// made (N, stride): heads of queries, keys and values of every row. keys, values (B or more, shared, capacity, size).
// Norms (size,) or null. out (N, heads, size).
void foretell_attend(const Step* step, const void* made, const void* query_norm, const void* key_norm, void* keys,
                     void* values, void* out) {
  const auto run = [&](auto number) {
    using T = decltype(number);
    attend(*step, static_cast<const T*>(made), static_cast<const T*>(query_norm), static_cast<const T*>(key_norm),
           static_cast<T*>(keys), static_cast<T*>(values), static_cast<T*>(out));
  };
  if (step->half) run(uint16_t{});
  else run(float{});
}
}
