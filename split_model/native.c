/* Products, rotation and attention, for x86-64 with AVX-512 VNNI and BF16.
 *
 * native.py calls these, and says what is laid out how. Threads are those of the OpenMP library that torch has loaded:
 * this file is not linked with one of its own. Each number is computed by one thread in one order, whatever the other
 * rows are. No contraction of floating-point operations (-ffp-contract=off): what is fused here says so.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef uint16_t bf16;

enum { LAYOUT = 6 }; /* of the two records and of what is called: to be changed with native.py's */

typedef struct {
    const uint8_t *values; /* int8 + 128: [rows / 16][columns / 4][16][4]. int4: [rows / 16][columns / 32][4][16][4],
                              where a byte has column c of its 32 in the low half and c + 16 in the high one.
                              bfloat16: [rows / 16][columns / 2][16][2] */
    const float *scale;    /* int8: [rows] */
    const bf16 *scales;    /* int4: [rows / 16][columns / group][16] */
    const float *bias;     /* [rows], or NULL */
    int64_t rows, columns, group;
} Matrix;

typedef struct {
    const int64_t *slots;           /* [count]: each one's place in the memory */
    const int64_t *starts, *stops;  /* [count * width]: the keys that a query sees */
    int64_t count, heads, rows;     /* sessions, key heads, query rows of each */
    int64_t width, keys, head_dim;  /* query positions among the rows, keys, channels */
    int64_t slot_stride, head_stride;
    int64_t most;                   /* keys whose sum is rounded at a time */
    int64_t page;                   /* keys of a page, where only some are read */
} Reading;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) FAST
#define EACH_SIZE(R, CASE) \
    switch (R) { case 1: CASE(1); break; case 2: CASE(2); break; case 3: CASE(3); break; case 4: CASE(4); break; \
                 case 5: CASE(5); break; case 6: CASE(6); break; case 7: CASE(7); break; default: CASE(8); }

/* Rows; multiplications that are not worth waking other threads for; channels of a key, or of bounds of keys. */
/* Rows of x: as few parts of at most 8 as there can be, all about as long. */
#define EACH_PART(r, size, n) \
    for (long r = 0, left = ((n) + AT_ONCE - 1) / AT_ONCE, size; \
         left && (size = ((n) - r + left - 1) / left); r += size, left--)

enum { AT_ONCE = 8, ALONE = 1 << 15, MOST_CHANNELS = 512 };

int tandem_layout(void) { /* 0 on a processor that does not run this */
    __builtin_cpu_init();
    const int runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                     __builtin_cpu_supports("fma");
    return runs ? LAYOUT : 0;
}

INLINE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

INLINE __m512 load(const bf16 *x) { return widened(_mm256_loadu_si256((const void *)x)); }

INLINE __m256i narrowed(__m512 x) { /* to the nearest, ties to even */
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0)));
}

/* The same with 0 for what is too small for a normal number, as oneDNN's products give it. */
INLINE __m256i flushed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE void store(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, narrowed(x)); }

/* ---- Activations as integers: each row by its largest value ---- */

INLINE float largest(const bf16 *x, long columns) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (long i = 0; i < columns; i += 16) {
        __m512 here = load(x + i);
        nan |= _mm512_cmp_ps_mask(here, here, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(here));
    }
    return nan ? NAN : _mm512_reduce_max_ps(most);
}

/* Divides and rounds as `integers._int8` has fbgemm do. `sum`: of the row, times 128. */
FAST static float to_int8(const bf16 *x, long columns, int8_t *to, int32_t *sum) {
    float by = largest(x, columns);
    __m512 steps = _mm512_set1_ps(127), zero = _mm512_set1_ps(128);
    __m512i total = _mm512_setzero_si512();
    for (long i = 0; i < columns; i += 16) {
        __m512 share = _mm512_div_ps(load(x + i), _mm512_set1_ps(by));
        __m512i found = _mm512_cvtps_epi32(_mm512_fmadd_ps(share, steps, zero));
        found = _mm512_sub_epi32(found, _mm512_set1_epi32(128));
        _mm_storeu_si128((void *)(to + i), _mm512_cvtsepi32_epi8(found));
        total = _mm512_add_epi32(total, found);
    }
    *sum = 128 * _mm512_reduce_add_epi32(total);
    return by;
}

/* `sums`: of each group, times 8. */
FAST static float to_int8_by_groups(const bf16 *x, long columns, long group, int8_t *to, int32_t *sums) {
    float step = largest(x, columns) / 127;
    __m512 by = _mm512_set1_ps(step > 0 ? 1 / step : 0);
    for (long at = 0; at < columns; at += group) {
        __m512i sum = _mm512_setzero_si512();
        for (long i = at; i < at + group; i += 16) {
            __m512i steps_of = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i), by));
            _mm_storeu_si128((void *)(to + i), _mm512_cvtsepi32_epi8(steps_of));
            sum = _mm512_add_epi32(sum, steps_of);
        }
        *sums++ = 8 * _mm512_reduce_add_epi32(sum);
    }
    return step;
}

/* ---- Products: up to 8 rows by 16 rows of the weight, of which the first 8 fetch what comes `ahead` bytes on ---- */

INLINE long sum_block(long count) { return count <= 1024 ? 512 : 1024; } /* of a bfloat16 product of oneDNN's */

typedef struct {
    const bf16 *before; /* NULL, or [n][2 * rows]: what the product is added to, of which the first half is read */
    bf16 *out;          /* [n][rows], or [n][2 * rows]: the sum and its negative side by side */
    long rows;
} Target;

INLINE void put(const Target *t, const Matrix *m, long r, long row, const int flush, __m512 y) {
    if (m->bias) y = _mm512_add_ps(y, _mm512_loadu_ps(m->bias + row));
    if (flush) y = widened(flushed(y));
    if (!t->before) {
        store(t->out + r * t->rows + row, y);
        return;
    }
    const long at = 2 * r * t->rows + row;
    __m256i sum = narrowed(_mm512_add_ps(load(t->before + at), widened(narrowed(y))));
    _mm256_storeu_si256((void *)(t->out + at), sum);
    _mm256_storeu_si256((void *)(t->out + at + t->rows), _mm256_xor_si256(sum, _mm256_set1_epi16((short)0x8000)));
}

INLINE void tile8(const Matrix *m, const int8_t *x, const int32_t *sums, const float *by, long first, long row,
                  long ahead, const int R, const Target *to) {
    const long columns = m->columns;
    const uint8_t *values = m->values + row * columns;
    __m512i sum[AT_ONCE];
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_si512();
    for (long i = 0; i < columns; i += 4) {
        __m512i weight = _mm512_loadu_si512(values + 16 * i);
        _mm_prefetch((const void *)(values + 16 * i + ahead), _MM_HINT_T0);
        for (int r = 0; r < R; r++)
            sum[r] = _mm512_dpbusd_epi32(sum[r], weight, _mm512_set1_epi32(*(const int32_t *)(x + r * columns + i)));
    }
    __m512 scale = _mm512_loadu_ps(m->scale + row);
    for (int r = 0; r < R; r++) {
        __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r], _mm512_set1_epi32(sums[r])));
        put(to, m, first + r, row, 0, _mm512_mul_ps(_mm512_mul_ps(y, scale), _mm512_set1_ps(by[r])));
    }
}

INLINE void tile4(const Matrix *m, const int8_t *x, const int32_t *sums, const float *by, long first, long row,
                  long ahead, const int R, const Target *to) {
    const long columns = m->columns, group = m->group, groups = columns / group;
    const uint8_t *values = m->values + row * columns / 2;
    const bf16 *scales = m->scales + row * groups;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 y[AT_ONCE];
    for (int r = 0; r < R; r++) y[r] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i sum[AT_ONCE], apart[AT_ONCE]; /* the latter so that few rows wait less for each other's sums */
        for (int r = 0; r < R; r++) sum[r] = apart[r] = _mm512_setzero_si512();
        for (long at = g * group; at < (g + 1) * group; at += 32)
            for (long i = 0; i < 4; i++, values += 64) {
                _mm_prefetch((const void *)(values + ahead), _MM_HINT_T0);
                __m512i pair = _mm512_loadu_si512(values), first = _mm512_and_si512(pair, low);
                __m512i second = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low), *other = R < 4 ? apart : sum;
                for (int r = 0; r < R; r++) {
                    const int8_t *own = x + r * columns + at + 4 * i;
                    sum[r] = _mm512_dpbusd_epi32(sum[r], first, _mm512_set1_epi32(*(const int32_t *)own));
                    other[r] = _mm512_dpbusd_epi32(other[r], second, _mm512_set1_epi32(*(const int32_t *)(own + 16)));
                }
            }
        __m512 scale = load(scales + 16 * g);
        for (int r = 0; r < R; r++) {
            __m512i found = R < 4 ? _mm512_add_epi32(sum[r], apart[r]) : sum[r];
            found = _mm512_sub_epi32(found, _mm512_set1_epi32(sums[r * groups + g]));
            y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(found), scale, y[r]);
        }
    }
    for (int r = 0; r < R; r++) put(to, m, first + r, row, 0, _mm512_mul_ps(y[r], _mm512_set1_ps(by[r])));
}

/* x: [n][columns] bfloat16; before and out as in Target. 0, or -1 where there is no memory. */
FAST int tandem_int8(const Matrix *m, const bf16 *x, int64_t n, const bf16 *before, bf16 *out) {
    const long columns = m->columns, rows = m->rows;
    const Target to = {before, out, rows};
    float *by = malloc(n * (sizeof *by + sizeof(int32_t) + columns));
    if (!by) return -1;
    int32_t *sums = (int32_t *)(by + n);
    int8_t *steps = (int8_t *)(sums + n);
#pragma omp parallel for if (n * columns > ALONE)
    for (long r = 0; r < n; r++) by[r] = to_int8(x + r * columns, columns, steps + r * columns, sums + r);
#pragma omp parallel for if (n * rows * columns > ALONE)
    for (long row = 0; row < rows; row += 16)
        EACH_PART(r, size, n) {
#define AHEAD 16 * columns
#define TILE(R) tile8(m, steps + r * columns, sums + r, by + r, r, row, r ? 0 : AHEAD, R, &to)
            EACH_SIZE(size, TILE)
#undef TILE
#undef AHEAD
        }
    free(by);
    return 0;
}

FAST int tandem_int4(const Matrix *m, const bf16 *x, int64_t n, const bf16 *before, bf16 *out) {
    const long columns = m->columns, rows = m->rows, groups = columns / m->group;
    const Target to = {before, out, rows};
    float *by = malloc(n * (sizeof *by + groups * sizeof(int32_t) + columns));
    if (!by) return -1;
    int32_t *sums = (int32_t *)(by + n);
    int8_t *steps = (int8_t *)(sums + n * groups);
#pragma omp parallel for if (n * columns > ALONE)
    for (long r = 0; r < n; r++)
        by[r] = to_int8_by_groups(x + r * columns, columns, m->group, steps + r * columns, sums + r * groups);
#pragma omp parallel for if (n * rows * columns > ALONE)
    for (long row = 0; row < rows; row += 16)
        EACH_PART(r, size, n) {
#define AHEAD 8 * columns
#define TILE(R) tile4(m, steps + r * columns, sums + r * groups, by + r, r, row, r ? 0 : AHEAD, R, &to)
            EACH_SIZE(size, TILE)
#undef TILE
#undef AHEAD
        }
    free(by);
    return 0;
}

/* Rows of an int8 table that lies as in Matrix, to [n][columns]. -1 for an index that it does not have. */
FAST int tandem_lookup(const uint8_t *values, const float *scale, int64_t rows, int64_t columns, const int64_t *index,
                       int64_t n, bf16 *out) {
    for (long r = 0; r < n; r++) {
        if (index[r] < 0 || index[r] >= rows) return -1;
        const uint8_t *own = values + (index[r] / 16 * columns * 16) + index[r] % 16 * 4;
        const __m128 by = _mm_set1_ps(scale[index[r]]);
        for (long i = 0; i < columns; i += 4) {
            const __m128i four = _mm_cvtepu8_epi32(_mm_loadu_si32(own + 16 * i));
            const __m128 y = _mm_mul_ps(_mm_cvtepi32_ps(_mm_sub_epi32(four, _mm_set1_epi32(128))), by);
            const __m256i found = narrowed(_mm512_castps128_ps512(y));
            _mm_storel_epi64((void *)(out + r * columns + i), _mm256_castsi256_si128(found));
        }
    }
    return 0;
}

/* Sums of bfloat16 in oneDNN's order: pair by pair, in blocks. Up to 8 rows by 16 * J of the weight. */
INLINE void tile16(const Matrix *m, const bf16 *x, long first, long row, const int R, const int J, const Target *to) {
    const long columns = m->columns, block = sum_block(columns);
    const bf16 *values = (const bf16 *)m->values + row * columns;
    __m512 total[AT_ONCE][2] = {0}, sum[AT_ONCE][2];
    for (long from = 0; from < columns; from += block) {
        const long end = columns - from < block ? columns : from + block;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) sum[r][j] = _mm512_setzero_ps();
        for (long i = from; i < end; i += 2) {
            __m512bh weight[2];
            for (int j = 0; j < J; j++) {
                weight[j] = (__m512bh)_mm512_loadu_si512(values + 16 * (j * columns + i));
                if (J == 1) _mm_prefetch((const void *)(values + 16 * (columns + i)), _MM_HINT_T0);
            }
            for (int r = 0; r < R; r++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + r * columns + i));
                for (int j = 0; j < J; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], weight[j], pair);
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) total[r][j] = _mm512_add_ps(total[r][j], sum[r][j]);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) put(to, m, first + r, row + 16 * j, 1, total[r][j]);
}

FAST int tandem_bf16(const Matrix *m, const bf16 *x, int64_t n, const bf16 *before, bf16 *out) {
    const long columns = m->columns, rows = m->rows;
    const Target to = {before, out, rows};
#pragma omp parallel for if (n * rows * columns > ALONE)
    for (long row = 0; row < rows; row += 32)
        EACH_PART(r, size, n) {
#define TILE(R) \
    if (R > AT_ONCE / 2 && rows - row >= 32) tile16(m, x + r * columns, r, row, R, 2, &to); \
    else for (long one = row; one < row + 32 && one < rows; one += 16) tile16(m, x + r * columns, r, one, R, 1, &to)
            EACH_SIZE(size, TILE)
#undef TILE
        }
    return 0;
}

/* ---- Attention: the sums of oneDNN's bfloat16 products, in its order, on keys and values where they lie ---- */

INLINE void transposed(__m512i a[16]) { /* 16 x 16 numbers of 32 bits */
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i first = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        __m512i second = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        __m512i third = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i fourth = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        b[i] = _mm512_shuffle_i32x4(first, second, 0x88);
        b[i + 8] = _mm512_shuffle_i32x4(first, second, 0xdd);
        b[i + 4] = _mm512_shuffle_i32x4(third, fourth, 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(third, fourth, 0xdd);
    }
    for (int i = 0; i < 16; i++) a[i] = b[i];
}

/* Turns `mixed` [n][width] by complex `turns` [n][width / 2]: queries where they lie, what is behind them, by heads of
 * `head_dim`, to `places` [n][(width - queries) / head_dim] of the memory. Nothing is fused: as torch multiplies. */
FAST void tandem_turn(bf16 *mixed, const float *turns, const int64_t *places, bf16 *memory, int64_t n, int64_t width,
                      int64_t queries, int64_t head_dim) {
    const long stored = (width - queries) / head_dim;
#pragma omp parallel for if (n * width > ALONE)
    for (long row = 0; row < n; row++)
        for (long i = 0; i < width; i += 16) {
            const long behind = i - queries;
            __m512 own = load(mixed + row * width + i), by = _mm512_loadu_ps(turns + row * width + i);
            __m512 same = _mm512_mul_ps(own, by), other = _mm512_mul_ps(own, _mm512_permute_ps(by, 0xb1));
            __m512 real = _mm512_sub_ps(same, _mm512_permute_ps(same, 0xb1));
            __m512 imaginary = _mm512_add_ps(other, _mm512_permute_ps(other, 0xb1));
            bf16 *to = behind < 0 ? mixed + row * width + i
                                  : memory + places[row * stored + behind / head_dim] * head_dim + behind % head_dim;
            store(to, _mm512_mask_mov_ps(real, 0xaaaa, imaginary));
        }
}

/* 16 keys, of which `left` exist and the last one stands in for the others: pair by pair of channels. */
INLINE void by_pairs(const bf16 *keys, long left, long head_dim, __m512i pairs[]) {
    for (long at = 0; at < head_dim; at += 32, pairs += 16) {
        for (int i = 0; i < 16; i++) pairs[i] = _mm512_loadu_si512(keys + (i < left ? i : left - 1) * head_dim + at);
        transposed(pairs);
    }
}

INLINE void score(const bf16 *queries, const __m512i pairs[], long head_dim, const int R, __m512 sum[]) {
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (long i = 0; i < head_dim / 2; i++)
        for (int r = 0; r < R; r++) {
            __m512i query = _mm512_set1_epi32(*(const int32_t *)(queries + r * head_dim + 2 * i));
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)query, (__m512bh)pairs[i]);
        }
}

/* Where the key at `at` lies, in keys: `pages` are those that are read, or NULL for all of them. */
INLINE long place(const Reading *a, const int64_t *pages, long at) {
    return pages ? pages[at / a->page] * a->page + at % a->page : at;
}

INLINE long last_seen(const Reading *a, long slot) { /* behind the last key that any of its queries sees */
    long last = 0;
    for (long i = slot * a->width; i < (slot + 1) * a->width; i++)
        if (a->stops[i] > last) last = a->stops[i];
    return last;
}

/* queries [count * heads][rows][head_dim] to scores [count * heads][rows][keys]: minus infinity for hidden keys.
 * `pages`: [count * heads][keys / page], or NULL. */
FAST void tandem_scores(const Reading *a, const bf16 *queries, const bf16 *keys, const int64_t *pages, bf16 *scores) {
    const long step = 64, steps = (a->keys + step - 1) / step, each = a->rows / a->width;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma omp parallel for collapse(2) if (a->count * a->heads * a->rows * a->keys * a->head_dim > ALONE)
    for (long one = 0; one < a->count * a->heads; one++)
        for (long part = 0; part < steps; part++) {
            const long slot = one / a->heads, end = (part + 1) * step < a->keys ? (part + 1) * step : a->keys;
            const long last = last_seen(a, slot);
            const int64_t *own_pages = pages ? pages + one * (a->keys / a->page) : NULL;
            const bf16 *own = keys + a->slots[slot] * a->slot_stride + one % a->heads * a->head_stride;
            for (long at = part * step; at < end; at += 16) {
                __m512i pairs[MOST_CHANNELS / 2];
                const int seen_at_all = at < last;
                const bf16 *here = own + place(a, own_pages, at) * a->head_dim;
                if (seen_at_all) by_pairs(here, end - at, a->head_dim, pairs);
                for (long r = 0; r < a->rows; r += AT_ONCE) {
                    const bf16 *query = queries + (one * a->rows + r) * a->head_dim;
                    const long count = a->rows - r < AT_ONCE ? a->rows - r : AT_ONCE;
                    __m512 sum[AT_ONCE] = {0};
#define SCORE(R) score(query, pairs, a->head_dim, R, sum)
                    if (seen_at_all) EACH_SIZE(count, SCORE)
#undef SCORE
                    for (long i = 0; i < count; i++) {
                        const long seen = slot * a->width + (r + i) / each;
                        const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(at), lanes);
                        const __mmask16 hidden = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(a->starts[seen])) |
                                                 _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(a->stops[seen]));
                        const __m512 found = _mm512_mask_mov_ps(sum[i], hidden, _mm512_set1_ps(-INFINITY));
                        const __mmask16 there = end - at < 16 ? (1 << (end - at)) - 1 : 0xffff;
                        bf16 *to = scores + (one * a->rows + r + i) * a->keys + at;
                        _mm256_mask_storeu_epi16(to, there, flushed(found));
                    }
                }
            }
        }
}

/* R rows of weights by 32 channels of values `[from, to)`. */
INLINE void mix(const Reading *a, const bf16 *weights, const bf16 *values, const int64_t *pages, long from, long to,
                const int R, __m512 sum[][2]) {
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const bf16 *here = NULL;
    for (long at = from; at < to; at += 2, here += 2 * a->head_dim) {
        if (at % 16 == 0) here = values + place(a, pages, at) * a->head_dim; /* so `from` is, and no page is shorter */
        __m512i first = _mm512_loadu_si512(here), second = _mm512_loadu_si512(here + a->head_dim);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
        __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
        for (int r = 0; r < R; r++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(weights + r * a->keys + at));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], weight, low);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], weight, high);
        }
    }
}

INLINE void mixed(const Reading *a, const bf16 *weights, const bf16 *values, const int64_t *pages, long last,
                  const int R, bf16 *out) {
    const __m512i in_order[2] = {_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                                 _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
    __m512 total[AT_ONCE][2], sum[AT_ONCE][2], part[AT_ONCE][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (long from = 0; from < last; from += a->most) {
        const long piece = a->keys - from < a->most ? a->keys - from : a->most;
        const long block = a->rows == 1 ? 512 : sum_block(piece);
        const long stop = from + piece < last ? from + piece : last;
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (long at = from; at < stop; at += block) {
            mix(a, weights, values, pages, at, stop - at < block ? stop : at + block, R, part);
            for (int r = 0; r < R; r++)
                for (int h = 0; h < 2; h++) sum[r][h] = _mm512_add_ps(sum[r][h], part[r][h]);
        }
        for (int r = 0; r < R; r++)
            for (int h = 0; h < 2; h++) total[r][h] = _mm512_add_ps(total[r][h], widened(flushed(sum[r][h])));
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++)
            store(out + r * a->head_dim + 16 * h, _mm512_permutex2var_ps(total[r][0], in_order[h], total[r][1]));
}

/* weights [count * heads][rows][keys] to [count * heads][rows][head_dim]. */
FAST void tandem_mix(const Reading *a, const bf16 *weights, const bf16 *values, const int64_t *pages, bf16 *out) {
#pragma omp parallel for collapse(2) if (a->count * a->heads * a->rows * a->keys * a->head_dim > ALONE)
    for (long one = 0; one < a->count * a->heads; one++)
        for (long channel = 0; channel < a->head_dim; channel += 32) {
            const long slot = one / a->heads;
            const int64_t *own_pages = pages ? pages + one * (a->keys / a->page) : NULL;
            const bf16 *own = values + a->slots[slot] * a->slot_stride + one % a->heads * a->head_stride + channel;
            const long seen = last_seen(a, slot), last = seen + (seen & 1); /* hidden keys have no weight */
            for (long r = 0; r < a->rows; r += AT_ONCE) {
                const bf16 *weight = weights + (one * a->rows + r) * a->keys;
                bf16 *to = out + (one * a->rows + r) * a->head_dim + channel;
#define MIX(R) mixed(a, weight, own, own_pages, last, R, to)
                EACH_SIZE(a->rows - r, MIX)
#undef MIX
            }
        }
}

#else
int tandem_layout(void) { return 0 * LAYOUT; }
#endif
