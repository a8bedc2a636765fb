/* CPU kernels of the rollout engine: all of a decoder's forward pass, but matrix products only where oneDNN is slower.
 *
 * Compiled on first use by `build.py` with the system's C compiler, once per element type (-DBF16=1 or 0); `reference.py`
 * says the same in torch. Plain C with GCC/Clang vector extensions for any CPU those compilers know, and one intrinsic, the
 * bfloat16 dot product, where the processor has it. Sums and exponentials are float32; every value that transformers
 * rounds to the model's type is rounded here too. The work for one token (or one token and key-value head) is done by
 * one thread in one order, so results depend neither on the number of threads nor on what else is in the batch. That
 * holds for `product`, too, but not where it is not used: `few_rows` sums in another order for one row than for two to
 * four, and oneDNN, which takes over from there, in another one again.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
void set_threads(int count) { omp_set_num_threads(count); }
#else
void set_threads(int count) { (void)count; }
#endif

#if BF16 && defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIRED 1 /* two tokens' values, and two dimensions of a key, side by side: what the dot-product instruction eats */
#else
#define PAIRED 0
#endif
int paired(void) { return PAIRED; }

#define V 16    /* floats a vector */
#define BLOCK 64 /* tokens a cache block: BLOCK in kv_cache.py */
#define NV (BLOCK / V)

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

#if BF16
typedef uint16_t elem;
INLINE float get(const elem *p) { uint32_t u = (uint32_t)*p << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE void put(elem *p, float f) {
  uint32_t u; memcpy(&u, &f, 4);
  *p = f != f ? 0x7FC0 : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16); /* nearest, ties to even */
}
INLINE vf load(const elem *p) { vh h; memcpy(&h, p, 32); vu u = __builtin_convertvector(h, vu) << 16; return (vf)u; }
#if PAIRED
INLINE void store(elem *p, vf x) { __m256bh h = _mm512_cvtneps_pbh((__m512)x); memcpy(p, &h, 32); } /* below 2^-126: 0 */
#else
INLINE void store(elem *p, vf x) {
  vu u = (vu)x;
  vu r = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  vi is_nan = x != x;
  r = (r & ~(vu)is_nan) | (0x7FC0 & (vu)is_nan);
  vh h = __builtin_convertvector(r, vh); memcpy(p, &h, 32);
}
#endif
INLINE vf rounded(vf x) {
  vu u = (vu)x;
  vu r = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000u;
  vi is_nan = x != x;
  return (vf)((r & ~(vu)is_nan) | (u & (vu)is_nan));
}
#else
typedef float elem;
INLINE float get(const elem *p) { return *p; }
INLINE void put(elem *p, float f) { *p = f; }
INLINE vf load(const elem *p) { vf x; memcpy(&x, p, 64); return x; }
INLINE void store(elem *p, vf x) { memcpy(p, &x, 64); }
INLINE vf rounded(vf x) { return x; }
#endif
INLINE float round1(float f) { elem e; put(&e, f); return get(&e); }
INLINE vf loadf(const float *p) { vf x; memcpy(&x, p, 64); return x; }
INLINE void storef(float *p, vf x) { memcpy(p, &x, 64); }
INLINE vf splat(float f) { return (vf){0} + f; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }
INLINE float hsum(vf x) {
  float t[V]; memcpy(t, &x, sizeof t);
  for (int width = V / 2; width; width /= 2) for (int i = 0; i < width; i++) t[i] += t[i + width];
  return t[0];
}
INLINE float hmax(vf x) { float s = x[0]; for (int i = 1; i < V; i++) s = x[i] > s ? x[i] : s; return s; }

/* e^x, relative error about 2e-7; below -87 it is 0 (so -inf gives 0), NaN stays NaN. */
INLINE vf vexp(vf x) {
  vf bounded = choose(x < -87.0f, splat(-87.0f), choose(x > 88.0f, splat(88.0f), x));
  vf n = bounded * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
  vi k = (vi)n - 0x4B400000;
  n -= 12582912.0f;
  vf r = bounded - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf scaled = (vf)((vi)p + (k << 23));
  return choose(x < -87.0f, splat(0.0f), choose(x > 88.0f, splat(INFINITY), choose(x != x, x, scaled)));
}

/* The calling thread's scratch memory, at least `bytes` long, kept between calls. */
static float *scratch(size_t bytes) {
  static __thread float *buffer = NULL;
  static __thread size_t size = 0;
  if (bytes > size) { free(buffer); size = bytes + bytes / 2; buffer = aligned_alloc(64, (size + 63) / 64 * 64); }
  return buffer;
}

/* ---- adapter ---------------------------------------------------------------------------------------------------- */

/* y += ((x A^T) R^T) B^T for the maps whose outputs lie side by side in y, all fed by x: what a kernel that reads a
 * product's output adds to it first, row by row.
 * x (n, in); y (n, out); A (maps * rank, in) float32; R (maps, rank, rank) float32, row_stride apart for each token's
 * own (0: one for all); B (rank, out) float32, that is U diag(S) transposed; bounds (maps + 1,): where each map begins
 * in y. Branch in native.py has the same fields. */
typedef struct {
  const elem *x; const float *A, *R, *B; const int64_t *bounds, *owner;
  int64_t in, out, maps, rank, row_stride;
} branch;

#define ROWS 4 /* rows that adapt_rows takes at a time */

/* y[begin to end) += B^T h, of one map; B (rank, out). */
INLINE void expand(const int64_t rank, const float *B, const float *h, elem *y, int64_t out, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + V <= end; j += V) {
    vf s = loadf(B + j) * h[0];
    for (int64_t c = 1; c < rank; c++) s += loadf(B + c * out + j) * h[c];
    store(y + j, load(y + j) + s);
  }
  for (; j < end; j++) {
    float s = B[j] * h[0];
    for (int64_t c = 1; c < rank; c++) s += B[c * out + j] * h[c];
    put(y + j, get(y + j) + s);
  }
}

/* Rows first to first + rows - 1 of y, at most ROWS. */
static void adapt_rows(const branch *b, elem *y, int64_t first, int64_t rows) {
  const int64_t in = b->in, out = b->out, rank = b->rank, kinds = b->maps * rank, padded = in + V;
  float *xs = scratch((size_t)(ROWS * padded + 2 * ROWS * kinds) * sizeof(float) + 256);
  float *h = xs + ROWS * padded, *hr = h + ROWS * kinds;
  for (int64_t a = 0; a < ROWS; a++) {
    const elem *from = b->x + (first + (a < rows ? a : 0)) * in; int64_t d = 0;
    for (; d + V <= in; d += V) storef(xs + a * padded + d, load(from + d));
    for (; d < in; d++) xs[a * padded + d] = get(from + d);
  }
  for (int64_t k = 0; k < kinds; k++) {
    const float *ak = b->A + k * in;
    vf s[ROWS] = {{0}, {0}, {0}, {0}}; float t[ROWS] = {0, 0, 0, 0}; int64_t d = 0;
    for (; d + V <= in; d += V) { vf c = loadf(ak + d); for (int a = 0; a < ROWS; a++) s[a] += c * loadf(xs + a * padded + d); }
    for (; d < in; d++) for (int a = 0; a < ROWS; a++) t[a] += ak[d] * xs[a * padded + d];
    for (int a = 0; a < ROWS; a++) h[a * kinds + k] = hsum(s[a]) + t[a];
  }
  for (int64_t a = 0; a < rows; a++) {
    const float *Ra = b->R + (b->row_stride ? b->owner[first + a] * b->row_stride : 0);
    for (int64_t k = 0; k < kinds; k++) {
      float s = 0;
      for (int64_t c = 0; c < rank; c++) s += Ra[k * rank + c] * h[a * kinds + k / rank * rank + c];
      hr[a * kinds + k] = s;
    }
    elem *ya = y + (first + a) * out;
    for (int64_t map = 0; map < b->maps; map++) {
      const float *hm = hr + a * kinds + map * rank;
      if (rank == 2) expand(2, b->B, hm, ya, out, b->bounds[map], b->bounds[map + 1]);
      else expand(rank, b->B, hm, ya, out, b->bounds[map], b->bounds[map + 1]);
    }
  }
}

/* ---- normalisation ---------------------------------------------------------------------------------------------- */

INLINE float inverse_rms(const elem *x, int64_t dim, float eps) {
  vf sum = {0}; float tail = 0; int64_t j = 0;
  for (; j + V <= dim; j += V) { vf a = load(x + j); sum += a * a; }
  for (; j < dim; j++) { float a = get(x + j); tail += a * a; }
  return 1.0f / sqrtf((hsum(sum) + tail) / (float)dim + eps);
}
/* Llama: w * round(x / rms); Gemma (adds_one): x / rms * (1 + w). */
INLINE void normalise(const elem *x, const elem *w, elem *out, int64_t dim, float eps, int adds_one) {
  float s = inverse_rms(x, dim, eps); int64_t j = 0;
  for (; j + V <= dim; j += V)
    store(out + j, adds_one ? load(x + j) * s * (1.0f + load(w + j)) : load(w + j) * rounded(load(x + j) * s));
  for (; j < dim; j++)
    put(out + j, adds_one ? get(x + j) * s * (1.0f + get(w + j)) : get(w + j) * round1(get(x + j) * s));
}

/* x += y (or x += norm(y), where post_w is given), then out = norm(x). y NULL: out = norm(x). x and y are (n, dim).
 * `adapt` (NULL: nothing) is added to y first, here and below. */
void add_norm(elem *x, elem *y, const elem *post_w, const elem *w, elem *out, int64_t n, int64_t dim, float eps,
              int adds_one, const branch *adapt) {
#pragma omp parallel for schedule(static) if (n > ROWS)
  for (int64_t first = 0; first < n; first += ROWS) {
    int64_t end = first + ROWS < n ? first + ROWS : n;
    if (adapt) adapt_rows(adapt, y, first, end - first);
    for (int64_t i = first; i < end; i++) {
      elem *xi = x + i * dim;
      if (y) {
        elem *yi = y + i * dim; int64_t j = 0;
        if (post_w) normalise(yi, post_w, yi, dim, eps, adds_one);
        for (; j + V <= dim; j += V) store(xi + j, load(xi + j) + load(yi + j));
        for (; j < dim; j++) put(xi + j, get(xi + j) + get(yi + j));
      }
      normalise(xi, w, out + i * dim, dim, eps, adds_one);
    }
  }
}

/* ---- after the q, k, v products --------------------------------------------------------------------------------- */

INLINE void rotate(elem *h, const float *cos, const float *sin, int64_t dim) {
  int64_t half = dim / 2, j = 0;
  for (; j + V <= half; j += V) {
    vf a = load(h + j), b = load(h + half + j);
    store(h + j, rounded(a * loadf(cos + j)) - rounded(b * loadf(sin + j)));
    store(h + half + j, rounded(b * loadf(cos + half + j)) + rounded(a * loadf(sin + half + j)));
  }
  for (; j < half; j++) {
    float a = get(h + j), b = get(h + half + j);
    put(h + j, round1(a * cos[j]) - round1(b * sin[j]));
    put(h + half + j, round1(b * cos[half + j]) + round1(a * sin[half + j]));
  }
}

/* Norms (where given) and rotation of q and k in place, then k and v into the cache.
 * qkv (n, (heads + 2 kv_heads) dim); cos, sin (n, dim) float32; slots (n,) = block * BLOCK + offset.
 * A block of one layer: keys (kv_heads, dim, BLOCK), then values (kv_heads, BLOCK, vdim), vdim = dim up to whole
 * vectors; blocks are block_stride elements apart. PAIRED: keys (kv_heads, dim / 2, BLOCK, 2), values (kv_heads,
 * BLOCK / 2, vdim, 2). */
void store_qkv(elem *qkv, const elem *q_w, const elem *k_w, const float *cos, const float *sin, elem *cache,
               const int64_t *slots, int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t vdim,
               int64_t block_stride, float eps, int adds_one, const branch *adapt) {
  int64_t width = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for schedule(static) if (n > ROWS)
  for (int64_t first = 0; first < n; first += ROWS) {
    int64_t end = first + ROWS < n ? first + ROWS : n;
    if (adapt) adapt_rows(adapt, qkv, first, end - first);
    for (int64_t i = first; i < end; i++) {
      elem *row = qkv + i * width;
      for (int64_t h = 0; h < heads + kv_heads; h++) {
        const elem *w = h < heads ? q_w : k_w;
        if (w) normalise(row + h * dim, w, row + h * dim, dim, eps, adds_one);
        rotate(row + h * dim, cos + i * dim, sin + i * dim, dim);
      }
      elem *block = cache + slots[i] / BLOCK * block_stride;
      int64_t at = slots[i] % BLOCK;
      for (int64_t h = 0; h < kv_heads; h++) {
        const elem *k = row + (heads + h) * dim, *v = k + kv_heads * dim;
        elem *keys = block + h * dim * BLOCK, *values = block + kv_heads * dim * BLOCK + h * BLOCK * vdim;
#if PAIRED
        for (int64_t d = 0; d < dim; d++) keys[(d / 2 * BLOCK + at) * 2 + d % 2] = k[d];
        elem *pair = values + at / 2 * vdim * 2;
        for (int64_t d = 0; d < dim; d++) pair[2 * d + at % 2] = v[d];
        /* The other half is read before its token comes, with weight 0, so it must be a number. If its token comes in
         * this very batch, right behind, another thread may be writing it. */
        if (at % 2 == 0 && !(i + 1 < n && slots[i + 1] == slots[i] + 1))
          for (int64_t d = 0; d < dim; d++) pair[2 * d + 1] = 0;
#else
        for (int64_t d = 0; d < dim; d++) keys[d * BLOCK + at] = k[d];
        memcpy(values + at * vdim, v, dim * sizeof(elem));
#endif
      }
    }
  }
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* Into the second-level cache: this block and the next one together would fill the first. */
INLINE void prefetch(const elem *p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(elem)) __builtin_prefetch(p + i, 0, 2);
}

/* The weights of the values: rounded to the model's type, as torch's SDPA does it. */
#if PAIRED
INLINE void store_weight(elem *p, vf e) { store(p, e); }
#else
INLINE void store_weight(float *p, vf e) { storef(p, rounded(e)); }
#endif

/* NQ queries against nv vectors' worth of keys of one block, by online softmax. q (NQ, dim) float32, scaled already
 * (PAIRED: each row begins with dim elements as they are in the model, and the scores are scaled).
 * Keys from `from` to `to` of the block are seen, for each query. */
INLINE void tile_queries(const int NQ, const int nv, const elem *keys, const elem *values, const elem *next_keys,
                         const elem *next_values, int64_t dim, int64_t vdim, const float *q, float scale,
                         const int *from, const int *to, float *m, float *l, float *acc) {
  (void)scale;
  vf s[4][NV];
  for (int a = 0; a < NQ; a++) for (int j = 0; j < nv; j++) s[a][j] = splat(0.0f);
#if PAIRED
  const int32_t *pairs = (const int32_t *)q; /* two dimensions of a query each, as they are in the model */
  for (int64_t d = 0; d < dim / 2; d++) {
    __m512bh k[NV];
    prefetch(next_keys + d * BLOCK * 2, BLOCK * 2);
    for (int j = 0; j < nv; j++) k[j] = (__m512bh)_mm512_loadu_si512(keys + (d * BLOCK + j * V) * 2);
    for (int a = 0; a < NQ; a++) {
      __m512bh x = (__m512bh)_mm512_set1_epi32(pairs[a * dim + d]);
      for (int j = 0; j < nv; j++) s[a][j] = (vf)_mm512_dpbf16_ps((__m512)s[a][j], k[j], x);
    }
  }
  for (int a = 0; a < NQ; a++) for (int j = 0; j < nv; j++) s[a][j] *= scale;
#else
  for (int64_t d = 0; d < dim; d++) {
    vf k[NV];
    prefetch(next_keys + d * BLOCK, BLOCK);
    for (int j = 0; j < nv; j++) k[j] = load(keys + d * BLOCK + j * V);
    for (int a = 0; a < NQ; a++) { float x = q[a * dim + d]; for (int j = 0; j < nv; j++) s[a][j] += k[j] * x; }
  }
#endif
#if PAIRED
  elem p[4][BLOCK];
#else
  float p[4][BLOCK];
#endif
  int first = BLOCK, last = 0;
  for (int a = 0; a < NQ; a++) {
    if (from[a] < first) first = from[a];
    if (to[a] > last) last = to[a];
    if (from[a] > 0 || to[a] < nv * V) { /* what is not seen may be anything, NaN included: replace, do not add */
      const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      for (int j = 0; j < nv; j++) s[a][j] = choose((lane + j * V >= from[a]) & (lane + j * V < to[a]), s[a][j], splat(-INFINITY));
    }
    vf top = s[a][0];
    for (int j = 1; j < nv; j++) top = vmax(top, s[a][j]);
    float new_m = hmax(top);
    if (new_m < m[a]) new_m = m[a];
    float shift = new_m == -INFINITY ? 0.0f : new_m; /* a query that sees nothing here */
    vf sum = {0};
    for (int j = 0; j < nv; j++) { vf e = vexp(s[a][j] - shift); sum += e; store_weight(&p[a][j * V], e); }
    float keep = m[a] == -INFINITY ? 0.0f : expf(m[a] - shift);
    l[a] = l[a] * keep + hsum(sum);
    m[a] = new_m;
    if (keep != 1.0f) for (int64_t d = 0; d < vdim; d += V) storef(acc + a * vdim + d, loadf(acc + a * vdim + d) * keep);
  }
  int64_t d = 0;
#if PAIRED
  const int before = first / 2, after = (last + 1) / 2;
  int32_t w[4][BLOCK / 2];
  memcpy(w, p, sizeof w);
  for (; d + 4 * V <= vdim; d += 4 * V) {
    vf o[4][4];
    for (int a = 0; a < NQ; a++) for (int j = 0; j < 4; j++) o[a][j] = loadf(acc + a * vdim + d + j * V);
    for (int t = before; t < after; t++) {
      __m512bh v[4];
      prefetch(next_values + (t * vdim + d) * 2, 8 * V);
      for (int j = 0; j < 4; j++) v[j] = (__m512bh)_mm512_loadu_si512(values + (t * vdim + d + j * V) * 2);
      for (int a = 0; a < NQ; a++) {
        __m512bh x = (__m512bh)_mm512_set1_epi32(w[a][t]);
        for (int j = 0; j < 4; j++) o[a][j] = (vf)_mm512_dpbf16_ps((__m512)o[a][j], v[j], x);
      }
    }
    for (int a = 0; a < NQ; a++) for (int j = 0; j < 4; j++) storef(acc + a * vdim + d + j * V, o[a][j]);
  }
  for (; d < vdim; d += V)
    for (int a = 0; a < NQ; a++) {
      vf o = loadf(acc + a * vdim + d);
      for (int t = before; t < after; t++)
        o = (vf)_mm512_dpbf16_ps((__m512)o, (__m512bh)_mm512_loadu_si512(values + (t * vdim + d) * 2),
                                 (__m512bh)_mm512_set1_epi32(w[a][t]));
      storef(acc + a * vdim + d, o);
    }
#else
  for (; d + 4 * V <= vdim; d += 4 * V) {
    vf o[4][4];
    for (int a = 0; a < NQ; a++) for (int j = 0; j < 4; j++) o[a][j] = loadf(acc + a * vdim + d + j * V);
    for (int t = first; t < last; t++) {
      vf v[4];
      prefetch(next_values + t * vdim + d, 4 * V);
      for (int j = 0; j < 4; j++) v[j] = load(values + t * vdim + d + j * V);
      for (int a = 0; a < NQ; a++) { float x = p[a][t]; for (int j = 0; j < 4; j++) o[a][j] += v[j] * x; }
    }
    for (int a = 0; a < NQ; a++) for (int j = 0; j < 4; j++) storef(acc + a * vdim + d + j * V, o[a][j]);
  }
  for (; d < vdim; d += V)
    for (int a = 0; a < NQ; a++) {
      vf o = loadf(acc + a * vdim + d);
      for (int t = first; t < last; t++) o += load(values + t * vdim + d) * p[a][t];
      storef(acc + a * vdim + d, o);
    }
#endif
}

#define CASE(NQ, NVS) case (NQ) * 8 + (NVS): tile_queries(NQ, NVS, keys, values, next_keys, next_values, dim, vdim, q, scale, from, to, m, l, acc); break;
static void tile(int nq, int nv, const elem *keys, const elem *values, const elem *next_keys, const elem *next_values,
                 int64_t dim, int64_t vdim, const float *q, float scale, const int *from, const int *to, float *m,
                 float *l, float *acc) {
  switch (nq * 8 + nv) {
    CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
    CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4) CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4)
  }
}

INLINE int clamp_block(int64_t x) { return x < 0 ? 0 : x > BLOCK ? BLOCK : (int)x; }

/* Queries of `count` tokens (their `rep` heads of one key-value head) over keys 0..most of the blocks in `table`;
 * token t sees keys low[t] <= key < high[t]. State m, l, acc by (token, head). */
static void over_blocks(const elem *cache, const int32_t *table, int64_t block_stride, int64_t kv_heads, int64_t head,
                        int64_t dim, int64_t vdim, int64_t rep, int64_t count, const int64_t *low, const int64_t *high,
                        const float *q, float scale, float *m, float *l, float *acc) {
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t t = 0; t < count; t++)
    if (low[t] < high[t]) { if (low[t] < begin) begin = low[t]; if (high[t] > end) end = high[t]; }
  if (begin >= end) return;
  for (int64_t b = begin / BLOCK; b * BLOCK < end; b++) {
    const elem *block = cache + table[b] * block_stride;
    const elem *keys = block + head * dim * BLOCK, *values = block + kv_heads * dim * BLOCK + head * BLOCK * vdim;
    /* The blocks lie apart, so the processor does not see the next one coming. */
    const elem *ahead = (b + 1) * BLOCK < end ? cache + table[b + 1] * block_stride : block;
    const elem *next_keys = ahead + (keys - block), *next_values = ahead + (values - block);
    int from[4], to[4]; int64_t first = -1, held = 0, total = count * rep;
    for (int64_t i = 0; i <= total; i++) { /* up to four queries that see something of this block at a time */
      int f = 0, u = 0;
      if (i < total) { f = clamp_block(low[i / rep] - b * BLOCK); u = clamp_block(high[i / rep] - b * BLOCK); }
      if (i < total && f < u) { if (!held) first = i; from[held] = f; to[held] = u; held++; if (held < 4) continue; }
      if (held) {
        int most = 0;
        for (int a = 0; a < held; a++) if (to[a] > most) most = to[a];
        tile((int)held, (most + V - 1) / V, keys, values, next_keys, next_values, dim, vdim, q + first * dim, scale,
             from, to, m + first, l + first, acc + first * vdim);
        held = 0;
      }
    }
  }
}

/* Attention of n tokens through the cache of one layer; out (n, heads, dim).
 * An item is a run of tokens [item_first, item_first + item_count) that share the blocks shared_table[item]; token t
 * sees the shared keys shared_low[t] <= key < shared_high[t], then its own keys own_low[t] <= key < own_high[t] in
 * the blocks own_table[t]. q rows are q_stride elements apart. */
void attend(const elem *qkv, elem *out, const elem *cache, const int64_t *item_first, const int64_t *item_count,
            int64_t items, const int32_t *shared_table, int64_t shared_width, const int64_t *shared_low,
            const int64_t *shared_high, const int32_t *own_table, int64_t own_width, const int64_t *own_low,
            const int64_t *own_high, int64_t heads, int64_t kv_heads, int64_t dim, int64_t vdim, int64_t block_stride,
            int64_t q_stride, float scale) {
  int64_t rep = heads / kv_heads;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) if (items * kv_heads > 1)
  for (int64_t item = 0; item < items; item++)
    for (int64_t head = 0; head < kv_heads; head++) {
      int64_t first = item_first[item], count = item_count[item], total = count * rep;
      float *q = scratch((size_t)total * (dim + vdim + 2) * sizeof(float) + 256);
      float *acc = q + (total * dim + V - 1) / V * V, *m = acc + total * vdim, *l = m + total;
      for (int64_t i = 0; i < total; i++) {
        const elem *from = qkv + (first + i / rep) * q_stride + (head * rep + i % rep) * dim;
#if PAIRED
        memcpy(q + i * dim, from, dim * sizeof(elem));
#else
        for (int64_t d = 0; d < dim; d++) q[i * dim + d] = get(from + d) * scale;
#endif
        for (int64_t d = 0; d < vdim; d++) acc[i * vdim + d] = 0.0f;
        m[i] = -INFINITY; l[i] = 0.0f;
      }
      if (shared_width)
        over_blocks(cache, shared_table + item * shared_width, block_stride, kv_heads, head, dim, vdim, rep, count,
                    shared_low + first, shared_high + first, q, scale, m, l, acc);
      if (own_width)
        for (int64_t t = 0; t < count; t++)
          over_blocks(cache, own_table + (first + t) * own_width, block_stride, kv_heads, head, dim, vdim, rep, 1,
                      own_low + first + t, own_high + first + t, q + t * rep * dim, scale, m + t * rep, l + t * rep,
                      acc + t * rep * vdim);
      for (int64_t i = 0; i < total; i++) {
        elem *to = out + ((first + i / rep) * heads + head * rep + i % rep) * dim;
        float inverse = 1.0f / l[i];
        for (int64_t d = 0; d < dim; d++) put(to + d, acc[i * vdim + d] * inverse);
      }
    }
}

/* ---- gated MLP -------------------------------------------------------------------------------------------------- */

/* out = round(act(gate)) * up; gate_up (n, 2 dim) -> out (n, dim). kind 0: SiLU, 1: GELU in its tanh form. */
void act_mul(elem *gate_up, elem *out, int64_t n, int64_t dim, int kind, const branch *adapt) {
#pragma omp parallel for schedule(static) if (n > ROWS)
  for (int64_t first = 0; first < n; first += ROWS) {
    int64_t end = first + ROWS < n ? first + ROWS : n;
    if (adapt) adapt_rows(adapt, gate_up, first, end - first);
    for (int64_t i = first; i < end; i++) {
      const elem *gate = gate_up + i * 2 * dim, *up = gate + dim;
      elem *to = out + i * dim;
      for (int64_t j = 0; j < dim; j += V) {
        int64_t left = dim - j; vf g = {0}, u = {0};
        if (left >= V) { g = load(gate + j); u = load(up + j); }
        else for (int64_t t = 0; t < left; t++) { g[t] = get(gate + j + t); u[t] = get(up + j + t); }
        vf z = kind ? 2.0f * 0.7978845608028654f * (g + 0.044715f * g * g * g) : g; /* tanh(a) = 2 sigmoid(2a) - 1 */
        vf y = rounded(g / (1.0f + vexp(-z))) * u;
        if (left >= V) store(to + j, y);
        else for (int64_t t = 0; t < left; t++) put(to + j + t, y[t]);
      }
    }
  }
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

#if PAIRED
#define MR 8 /* rows of x and */
#define NR 3 /* vectors of outputs whose sums stay in registers: 24 of the 32, as many as give a load for each 8 products */
#define ROW_BLOCK 32

/* Whole panels of NR * V outputs; in one, (in / 2, NR, V, 2): a pair of inputs of 16 outputs is what one instruction
 * takes. What is left of `out` at the end has a panel with fewer vectors, filled up with zeros. w (out, in); in is even. */
void pack_weight(const elem *w, elem *packed, int64_t first, int64_t count, int64_t in, int64_t out) {
  int64_t vectors = (out + V - 1) / V;
  for (int64_t o = first; o < first + count; o++) {
    int64_t panel = o / (NR * V), at = o % (NR * V), left = vectors - panel * NR, cols = left < NR ? left : NR;
    elem *to = packed + panel * NR * V * in + at * 2;
    for (int64_t p = 0; p < in / 2; p++) memcpy(to + p * cols * V * 2, w + (o - first) * in + 2 * p, 2 * sizeof(elem));
  }
}

INLINE void panel_rows(const int rows, const int cols, const elem *x, int64_t in, const elem *w, const elem *bias,
                       elem *y, int64_t out, int64_t valid, const elem *ahead, int64_t lines) {
  vf s[MR][NR];
  for (int a = 0; a < rows; a++) for (int j = 0; j < cols; j++) s[a][j] = splat(0.0f);
  for (int64_t p = 0; p < in / 2; p++) {
    __m512bh c[NR];
    if (p < lines) __builtin_prefetch(ahead + p * 32, 0, 2);
    for (int j = 0; j < cols; j++) c[j] = (__m512bh)_mm512_loadu_si512(w + (p * cols + j) * V * 2);
    for (int a = 0; a < rows; a++) {
      int32_t pair; memcpy(&pair, x + a * in + 2 * p, sizeof pair);
      __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < cols; j++) s[a][j] = (vf)_mm512_dpbf16_ps((__m512)s[a][j], c[j], b);
    }
  }
  for (int j = 0; j < cols; j++) {
    vf add = bias ? load(bias + j * V) : splat(0.0f);
    for (int a = 0; a < rows; a++) {
      elem whole[V], *to = y + a * out + j * V;
      if (valid - j * V >= V) store(to, s[a][j] + add);
      else { store(whole, s[a][j] + add); memcpy(to, whole, (valid - j * V) * sizeof(elem)); }
    }
  }
}

#define PART(R, C) case (R) * 4 + (C): panel_rows(R, C, x, in, w, bias, y, out, valid, ahead, lines); break;
#define PARTS(R) PART(R, 1) PART(R, 2) PART(R, 3)
static void panel_any(int64_t rows, int64_t cols, const elem *x, int64_t in, const elem *w, const elem *bias, elem *y,
                      int64_t out, int64_t valid, const elem *ahead, int64_t lines) {
  switch (rows * 4 + cols) { PARTS(1) PARTS(2) PARTS(3) PARTS(4) PARTS(5) PARTS(6) PARTS(7) PARTS(8) }
}

/* y (n, out) = x (n, in) W^T + bias, W as pack_weight has made it, bias filled up to whole vectors (NULL: none). An
 * output is one sum in one order, whatever n is: a row does not depend on its neighbours. While a panel is used, the
 * next one comes from memory, a part with each group of rows. */
void product(const elem *x, elem *y, const elem *packed, const elem *bias, int64_t n, int64_t in, int64_t out) {
  int64_t vectors = (out + V - 1) / V, panels = (vectors + NR - 1) / NR, blocks = (n + ROW_BLOCK - 1) / ROW_BLOCK;
  int64_t panel_size = NR * V * in, groups = (n + MR - 1) / MR;
  int64_t lines = groups > 1 ? (panel_size / 32 + groups - 1) / groups : 0;
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t f = 0; f < panels; f++)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t cols = vectors - f * NR < NR ? vectors - f * NR : NR, at = f * NR * V;
      int64_t end = (b + 1) * ROW_BLOCK < n ? (b + 1) * ROW_BLOCK : n;
      for (int64_t r = b * ROW_BLOCK; r < end; r += MR) {
        const elem *ahead = packed + (f + 1) * panel_size + r / MR * lines * 32;
        panel_any(end - r < MR ? end - r : MR, cols, x + r * in, in, packed + f * panel_size, bias ? bias + at : NULL,
                  y + r * out + at, out, out - at, ahead, f + 2 < panels ? lines : 0);
      }
    }
}
#else
void pack_weight(void) {}
void product(void) {}
#endif

/* ---- products with a row or few ---------------------------------------------------------------------------------- */

/* y (n, out) = x W^T + bias for n <= 4 rows, W (out, in) as the model holds it, given in `parts` of parts_out rows each
 * (NULL bias: none). Reading W is all that costs here, and oneDNN's packed product reads it at two thirds of the speed. */
void few_rows(const elem *x, elem *y, const elem *const *parts, const elem *const *biases, const int64_t *starts,
              int64_t num_parts, int64_t n, int64_t in, int64_t out) {
  float *xs = scratch((size_t)4 * (in + V) * sizeof(float) + 256);
  int64_t padded = (in + V - 1) / V * V;
  for (int64_t a = 0; a < n; a++) for (int64_t d = 0; d < padded; d++) xs[a * padded + d] = d < in ? get(x + a * in + d) : 0.0f;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < (out + 15) / 16; chunk++) {
    int64_t part = 0, end = chunk * 16 + 16 < out ? chunk * 16 + 16 : out;
    for (int64_t o = chunk * 16; o < end; o++) {
      while (part + 1 < num_parts && o >= starts[part + 1]) part++;
      const elem *w = parts[part] + (o - starts[part]) * in;
      float bias = biases[part] ? get(biases[part] + o - starts[part]) : 0.0f;
      if (n == 1) {
        vf s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}; int64_t d = 0; float tail = bias;
        for (; d + 4 * V <= in; d += 4 * V) {
          s0 += load(w + d) * loadf(xs + d); s1 += load(w + d + V) * loadf(xs + d + V);
          s2 += load(w + d + 2 * V) * loadf(xs + d + 2 * V); s3 += load(w + d + 3 * V) * loadf(xs + d + 3 * V);
        }
        for (; d + V <= in; d += V) s0 += load(w + d) * loadf(xs + d);
        for (; d < in; d++) tail += get(w + d) * xs[d];
        put(y + o, hsum((s0 + s1) + (s2 + s3)) + tail);
      } else {
        vf s[4] = {{0}, {0}, {0}, {0}}; int64_t d = 0; float tail[4] = {bias, bias, bias, bias};
        for (; d + V <= in; d += V) { vf c = load(w + d); for (int a = 0; a < 4; a++) s[a] += c * loadf(xs + (a < n ? a : 0) * padded + d); }
        for (; d < in; d++) for (int a = 0; a < n; a++) tail[a] += get(w + d) * xs[a * padded + d];
        for (int a = 0; a < n; a++) put(y + a * out + o, hsum(s[a]) + tail[a]);
      }
    }
  }
}

/* ---- drawing ---------------------------------------------------------------------------------------------------- */

#define SUM_BLOCK 256 /* tokens: BLOCK in sampler.py */

/* scores (rows, vocabulary) -> tops (rows, blocks), top (rows,), NaN where a score is, and sums (rows, blocks) of
 * exp((score - top) / temperature), blocks = vocabulary / SUM_BLOCK rounded up. */
void block_sums(const elem *scores, float *tops, float *top, double *sums, int64_t rows, int64_t vocabulary,
                float temperature) {
  int64_t blocks = (vocabulary + SUM_BLOCK - 1) / SUM_BLOCK;
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    const elem *row = scores + i * vocabulary;
    vi odd = {0}; float most = -INFINITY; int is_nan = 0;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t end = vocabulary - b * SUM_BLOCK < SUM_BLOCK ? vocabulary : (b + 1) * SUM_BLOCK, j = b * SUM_BLOCK;
      vf best = splat(-INFINITY); float tail = -INFINITY;
      for (; j + V <= end; j += V) { vf x = load(row + j); odd |= x != x; best = vmax(x, best); }
      for (; j < end; j++) { float x = get(row + j); is_nan |= x != x; if (x > tail) tail = x; }
      float one = hmax(best);
      tops[i * blocks + b] = one = tail > one ? tail : one;
      if (one > most) most = one;
    }
    for (int j = 0; j < V; j++) is_nan |= odd[j];
    top[i] = is_nan ? NAN : most;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t end = vocabulary - b * SUM_BLOCK < SUM_BLOCK ? vocabulary : (b + 1) * SUM_BLOCK, j = b * SUM_BLOCK;
      vf s = {0}; double tail = 0;
      for (; j + V <= end; j += V) s += vexp((load(row + j) - most) / temperature);
      for (; j < end; j++) tail += expf((get(row + j) - most) / temperature);
      for (int k = 0; k < V; k++) tail += s[k];
      sums[i * blocks + b] = tail;
    }
  }
}
