// Matrix products and attention for a few tokens at a time.
//
// A pass over 1 to 32 tokens is bound by reading the weights once, in order. So weights are packed into panels of 32
// outputs that are read as one stream, while the accumulators of up to 12 tokens stay in registers.
//
// Every sum runs in one fixed order, whatever else is in the pass: over inputs for products, over head channels and then
// over slots for attention, where an invisible slot adds an exact zero. A token's result therefore does not depend, to
// the last bit, on how many tokens are computed with it, on what they are, or on the gaps between its visible slots.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Vectors of the processor's own width: compilers take wider ones to pieces in memory, which is slower than scalars.
// TILE: tokens whose accumulators (TILE * VECTORS) fit into the registers: 32 of them, or 16 where vectors have 32 bytes.
constexpr int PANEL = 32;
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 3;
#else
constexpr int LANES = 4, TILE = 2;
#endif
constexpr int VECTORS = PANEL / LANES;

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
typedef float LooseLanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t IntLanes __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
typedef uint32_t WordLanes __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
typedef uint16_t HalfLanes __attribute__((vector_size(LANES * 2), aligned(2)));

int thread_count = 1;

template <typename Body>
void share(int64_t jobs, Body body) {
#ifdef _OPENMP
  if (thread_count > 1 && jobs > 1) {
#pragma omp parallel for schedule(static) num_threads(thread_count)
    for (int64_t job = 0; job < jobs; ++job) body(job);
    return;
  }
#endif
  for (int64_t job = 0; job < jobs; ++job) body(job);
}

inline Lanes load(const float* from) { return *(const LooseLanes*)from; }

inline Lanes load(const at::BFloat16* from) {
  return (Lanes)(__builtin_convertvector(*(const HalfLanes*)from, WordLanes) << 16);
}

inline Lanes broadcast(float value) { return Lanes{} + value; }

// One panel of outputs for T tokens: out[t][n] = sum_k x[t][k] * w[k][n], k ascending.
template <int T, typename S>
inline void panel(const S* x, int64_t inputs, const S* w, float* out) {
  Lanes sum[T][VECTORS];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < VECTORS; ++v) sum[t][v] = Lanes{};
  for (int64_t k = 0; k < inputs; ++k) {
    __builtin_prefetch(w + (k + 32) * PANEL);
    __builtin_prefetch((const char*)(w + (k + 33) * PANEL) - 64);
    Lanes weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = load(w + k * PANEL + v * LANES);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const float entry = (float)x[t * inputs + k];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[t][v] += weight[v] * entry;
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < VECTORS; ++v) *(LooseLanes*)(out + t * PANEL + v * LANES) = sum[t][v];
}

#ifdef __AVX512BF16__
// The same for weights packed in pairs of inputs, which the processor multiplies and adds two at a time.
template <int T>
inline void panel(const at::BFloat16* x, int64_t inputs, const at::BFloat16* w, float* out) {
  __m512 sum[T][VECTORS];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < VECTORS; ++v) sum[t][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += 2) {
    __builtin_prefetch(w + (k + 64) * PANEL);
    __builtin_prefetch(w + (k + 65) * PANEL);
    __m512bh weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = (__m512bh)_mm512_loadu_si512(w + k * PANEL + v * LANES * 2);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * inputs + k, sizeof pair);
      const __m512bh entries = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], weight[v], entries);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(out + t * PANEL + v * LANES, sum[t][v]);
}
constexpr bool PAIRED = true;
#else
constexpr bool PAIRED = false;
#endif

template <typename S, int T>
void tile(const S* x, int64_t inputs, int64_t outputs, int64_t first, const S* w, const S* bias, S* y) {
  alignas(64) float out[T * PANEL];
  panel<T>(x, inputs, w + first * inputs, out);
  const int64_t count = std::min<int64_t>(PANEL, outputs - first);
  for (int t = 0; t < T; ++t)
    for (int64_t n = 0; n < count; ++n)
      y[t * outputs + first + n] = (S)(bias ? out[t * PANEL + n] + (float)bias[first + n] : out[t * PANEL + n]);
}

template <typename S>
void multiply(const S* x, int64_t tokens, int64_t inputs, int64_t outputs, const S* w, const S* bias, S* y) {
  share((outputs + PANEL - 1) / PANEL, [=](int64_t job) {
    const int64_t first = job * PANEL, tiles = (tokens + TILE - 1) / TILE;
    for (int64_t index = 0, done = 0; index < tiles; ++index) {
      const int64_t count = (tokens - done) / (tiles - index);
      const S* from = x + done * inputs;
      S* to = y + done * outputs;
      switch (count) {
#define RESTPOINT_TILE(T)                                                           \
  case T:                                                                           \
    if constexpr (T <= TILE) tile<S, T>(from, inputs, outputs, first, w, bias, to); \
    break;
        RESTPOINT_TILE(1) RESTPOINT_TILE(2) RESTPOINT_TILE(3) RESTPOINT_TILE(4)
        RESTPOINT_TILE(5) RESTPOINT_TILE(6) RESTPOINT_TILE(7) RESTPOINT_TILE(8)
        RESTPOINT_TILE(9) RESTPOINT_TILE(10) RESTPOINT_TILE(11) RESTPOINT_TILE(12)
#undef RESTPOINT_TILE
      }
      done += count;
    }
  });
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, int64_t outputs) {
  const at::Tensor from = x.contiguous();
  auto sizes = from.sizes().vec();
  const int64_t inputs = sizes.back(), tokens = from.numel() / inputs;
  sizes.back() = outputs;
  at::Tensor y = at::empty(sizes, from.options());
  auto run = [&](auto zero) {
    using S = decltype(zero);
    multiply<S>(from.const_data_ptr<S>(), tokens, inputs, outputs, packed.const_data_ptr<S>(),
                bias ? bias->const_data_ptr<S>() : nullptr, y.mutable_data_ptr<S>());
  };
  if (x.scalar_type() == at::kFloat) run(float{});
  else run(at::BFloat16{});
  return y;
}

// e^x for x <= 0, zero below -87; Cephes' polynomial.
inline Lanes exponential(Lanes x) {
  const IntLanes gone = x < broadcast(-87.0f);
  x = gone ? broadcast(-87.0f) : x;
  const Lanes magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes whole = (x * 1.44269504088896341f + magic) - magic;
  Lanes rest = x - whole * 0.693359375f;
  rest = rest - whole * -2.12194440e-4f;
  Lanes value = broadcast(1.9875691500e-4f);
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  const IntLanes power = (__builtin_convertvector(whole, IntLanes) + 127) << 23;
  return gone ? Lanes{} : value * (Lanes)power;
}

// (Token, head) pairs that share a key head, one per lane.
struct Group {
  int64_t batch, head, first, count;
};

template <typename S>
void attend_group(const Group& group, const S* q, const S* keys, const S* values, const bool* visible, S* y, int64_t tokens,
                  int64_t heads, int64_t key_heads, int64_t slots, int64_t size, int64_t value_size, float scale,
                  float softcap) {
  const int64_t per_key = heads / key_heads;
  constexpr int AHEAD = 8;
  thread_local std::vector<float> scratch;
  thread_local std::vector<uint32_t> seen;
  const bool* rows = visible + group.batch * tokens * slots;

  int64_t start = slots, stop = 0;
  seen.assign(slots, 0);
  for (int64_t lane = 0; lane < group.count;) {
    const int64_t token = (group.first + lane) / per_key;
    uint32_t bits = 0;
    for (; lane < group.count && (group.first + lane) / per_key == token; ++lane) bits |= 1u << lane;
    const bool* row = rows + token * slots;
    const auto* begin = (const bool*)std::memchr(row, 1, slots);
    if (!begin) continue;
    int64_t end = slots;
    for (uint64_t eight = 0; end >= 8; end -= 8) {
      std::memcpy(&eight, row + end - 8, 8);
      if (eight) break;
    }
    while (!row[end - 1]) --end;
    start = std::min<int64_t>(start, begin - row);
    stop = std::max(stop, end);
    uint32_t* __restrict__ marks = seen.data();
    for (int64_t slot = begin - row; slot < end; ++slot) marks[slot] |= bits & -(uint32_t)row[slot];
  }
  const int64_t span = std::max<int64_t>(0, stop - start);
  scratch.resize(LANES * (size + span + 2) + AHEAD * size);
  float* base = (float*)(((uintptr_t)scratch.data() + LANES * 4 - 1) & ~(uintptr_t)(LANES * 4 - 1));
  float* queries = base;                     // (size, LANES)
  float* scores = queries + size * LANES;    // (span, LANES)
  float* sums = scores + span * LANES;       // (LANES)
  float* key_rows = sums + LANES;            // (AHEAD, size)

  std::memset(queries, 0, size * LANES * sizeof(float));
  for (int64_t lane = 0; lane < group.count; ++lane) {
    const int64_t token = (group.first + lane) / per_key, head = group.head * per_key + (group.first + lane) % per_key;
    const S* row = q + ((group.batch * heads + head) * tokens + token) * size;
    for (int64_t d = 0; d < size; ++d) queries[d * LANES + lane] = (float)row[d];
  }

  const S* key = keys + (group.batch * key_heads + group.head) * slots * size;
  Lanes highest = broadcast(-std::numeric_limits<float>::infinity());
  IntLanes lane_bits = {};
  for (int lane = 0; lane < LANES; ++lane) lane_bits[lane] = 1 << lane;
  for (int64_t slot = start; slot < stop; slot += AHEAD) {
    const int64_t count = std::min<int64_t>(AHEAD, stop - slot);
    const float* rows_ahead[AHEAD];
    for (int64_t j = 0; j < AHEAD; ++j) {
      const S* row = key + (slot + std::min(j, count - 1)) * size;
      if constexpr (std::is_same_v<S, float>) {
        rows_ahead[j] = row;
      } else {
        for (int64_t d = 0; d < size; ++d) key_rows[j * size + d] = (float)row[d];
        rows_ahead[j] = key_rows + j * size;
      }
    }
    Lanes dot[AHEAD] = {};
    for (int64_t d = 0; d < size; ++d) {
      const Lanes query = *(const Lanes*)(queries + d * LANES);
#pragma GCC unroll 8
      for (int j = 0; j < AHEAD; ++j) dot[j] += query * rows_ahead[j][d];
    }
    for (int64_t j = 0; j < count; ++j) {
      Lanes score = dot[j] * scale;
      if (softcap > 0)
        for (int lane = 0; lane < LANES; ++lane) score[lane] = std::tanh(score[lane] / softcap) * softcap;
      const IntLanes shown = ((IntLanes{} + (int32_t)seen[slot + j]) & lane_bits) != 0;
      score = shown ? score : broadcast(-std::numeric_limits<float>::infinity());
      *(Lanes*)(scores + (slot + j - start) * LANES) = score;
      highest = score > highest ? score : highest;
    }
  }

  Lanes total = {};
  for (int64_t slot = 0; slot < span; ++slot) {
    Lanes* place = (Lanes*)(scores + slot * LANES);
    const IntLanes shown = ((IntLanes{} + (int32_t)seen[start + slot]) & lane_bits) != 0;
    const Lanes weight = shown ? exponential(*place - highest) : Lanes{};
    *place = weight;
    total += weight;
  }
  *(Lanes*)sums = total;

  const S* value = values + (group.batch * key_heads + group.head) * slots * value_size;
  constexpr int ROWS = 4, COLUMNS = TILE * VECTORS < 16 ? 2 : 4;  // as many accumulators
  for (int64_t column = 0; column < value_size; column += COLUMNS * LANES) {
    const int64_t width = std::min<int64_t>(COLUMNS * LANES, value_size - column);
    const bool whole = width == COLUMNS * LANES;
    for (int64_t lane = 0; lane < group.count; lane += ROWS) {
      Lanes sum[ROWS][COLUMNS] = {};
      alignas(64) S edge[COLUMNS * LANES] = {};
      for (int64_t slot = 0; slot < span; ++slot) {
        const S* row = value + (start + slot) * value_size + column;
        if (!whole) {
          std::copy(row, row + width, edge);
          row = edge;
        }
        Lanes part[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) part[c] = load(row + c * LANES);
        const float* weight = scores + slot * LANES + lane;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int c = 0; c < COLUMNS; ++c) sum[r][c] += part[c] * weight[r];
      }
      for (int64_t r = 0; r < std::min<int64_t>(ROWS, group.count - lane); ++r) {
        const int64_t pair = group.first + lane + r;
        const int64_t token = pair / per_key, head = group.head * per_key + pair % per_key;
        S* to = y + ((group.batch * tokens + token) * heads + head) * value_size + column;
        for (int64_t d = 0; d < width; ++d) to[d] = (S)(sum[r][d / LANES][d % LANES] / sums[lane + r]);
      }
    }
  }
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& visible,
                     double scale, double softcap) {
  const at::Tensor queries = q.contiguous(), k = keys.contiguous(), v = values.contiguous(), shown = visible.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), key_heads = k.size(1);
  at::Tensor y = at::empty({batch, tokens, heads, v.size(3)}, q.options());
  std::vector<Group> groups;
  const int64_t pairs = tokens * (heads / key_heads);
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t head = 0; head < key_heads; ++head)
      for (int64_t first = 0; first < pairs; first += LANES)
        groups.push_back({row, head, first, std::min<int64_t>(LANES, pairs - first)});
  auto run = [&](auto zero) {
    using S = decltype(zero);
    share((int64_t)groups.size(), [&](int64_t job) {
      attend_group<S>(groups[job], queries.const_data_ptr<S>(), k.const_data_ptr<S>(), v.const_data_ptr<S>(),
                      shown.const_data_ptr<bool>(), y.mutable_data_ptr<S>(), tokens, heads, key_heads, k.size(2), k.size(3),
                      v.size(3), (float)scale, (float)softcap);
    });
  };
  if (q.scalar_type() == at::kFloat) run(float{});
  else run(at::BFloat16{});
  return y;
}

int64_t threads(int64_t count) {
  const int64_t before = thread_count;
  if (count > 0) thread_count = (int)count;
  return before;
}

bool paired() { return PAIRED; }

}  // namespace

TORCH_LIBRARY(restpoint, library) {
  library.def("narrow_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  library.def("narrow_attention(Tensor q, Tensor keys, Tensor values, Tensor visible, float scale, float softcap) -> Tensor");
  library.def("narrow_threads(int count) -> int", &threads);
  library.def("narrow_paired() -> bool", &paired);
}

TORCH_LIBRARY_IMPL(restpoint, CPU, library) {
  library.impl("narrow_linear", &linear);
  library.impl("narrow_attention", &attention);
}
