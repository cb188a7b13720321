/* Causal attention of packed rows in bf16 with a CPU's matrix units (AMX), forward and backward.
 *
 * Rows are taken apart by their starts; each row and key head is one piece of work, whose results only it writes, so
 * they do not depend on the number of threads. Scores and probabilities exist for a block of 32 queries and 32 keys
 * at a time, in fp32 until they enter a product as bf16. Rows are filled up with zeros to whole blocks, in scratch.
 *
 * The units multiply tiles of 16 rows and 64 bytes. A left factor is read as it lies; a right factor has two
 * neighbours of the summed dimension side by side ("pairs"). The backward pass works on transposed scores (keys by
 * queries), which then are left factors as they are.
 *
 * compiled.py appends this file to kernels.c for values of bf16. T tokens of a row, P tokens with zeros, D head size
 * (a multiple of 32), H heads, G key heads; strides count values.
 */

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <immintrin.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 32
#define REQUEST_PERMISSION 0x1023
#define TILE_DATA 18

extern long syscall(long number, ...); /* POSIX hides it from -std=c11 */

int matrix_units(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

typedef struct { uint8_t palette, first, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } Tiles;

static void begin_tiles(void) {
    Tiles tiles;
    memset(&tiles, 0, sizeof tiles);
    tiles.palette = 1;
    for (int tile = 0; tile < 8; tile++) tiles.bytes[tile] = 64, tiles.rows[tile] = 16;
    _tile_loadconfig(&tiles);
}

/* c, 32 by 32, (+)= the sum over `steps` of a, 32 by 32, times b, 16 pairs by 32. Strides in bytes. */
static inline void product(float *c, size c_stride, int adds, const uint16_t *a, size a_stride, size a_step,
                           const uint32_t *b, size b_stride, size b_step, size steps) {
    float *below = (float *)((char *)c + 16 * c_stride);
    if (adds) {
        _tile_loadd(0, c, c_stride);
        _tile_loadd(1, c + 16, c_stride);
        _tile_loadd(2, below, c_stride);
        _tile_loadd(3, below + 16, c_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size step = 0; step < steps; step++, a += a_step, b += b_step) {
        _tile_loadd(4, a, a_stride);
        _tile_loadd(5, (const char *)a + 16 * a_stride, a_stride);
        _tile_loadd(6, b, b_stride);
        _tile_loadd(7, b + 16, b_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 16, c_stride);
    _tile_stored(2, below, c_stride);
    _tile_stored(3, below + 16, c_stride);
}

/* The formula of exp_of. */
static inline __m512 exp_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

static inline __m512i both_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* Rows of D values below each other: `before` of the prefix (zeros where it is NULL), T, then zeros up to P. */
static void copy_rows(const uint16_t *prefix, size before, const uint16_t *from, size stride, uint16_t *to, size T_,
                      size P, size D) {
    for (size t = 0; prefix && t < before; t++) memcpy(to + t * D, prefix + t * stride, (size_t)D * 2);
    if (!prefix) memset(to, 0, (size_t)(before * D) * 2);
    for (size t = 0; t < T_; t++) memcpy(to + (before + t) * D, from + t * stride, (size_t)D * 2);
    memset(to + (before + T_) * D, 0, (size_t)((P - before - T_) * D) * 2);
}

/* Pairs of tokens: (P/2, D), from rows of copy_rows. */
static void pair_tokens(const uint16_t *rows, uint32_t *to, size P, size D) {
    for (size pair = 0; pair < P / 2; pair++) {
        const uint16_t *one = rows + 2 * pair * D, *other = one + D;
        SIMD
        for (size d = 0; d < D; d++) to[pair * D + d] = (uint32_t)one[d] | (uint32_t)other[d] << 16;
    }
}

/* Pairs of dimensions, transposed: (D/2, P), from rows of copy_rows. */
static void pair_dimensions(const uint16_t *rows, uint32_t *to, size P, size D) {
    __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32((int)(D / 2)));
    for (size t = 0; t < P; t += 16)
        for (size pair = 0; pair < D / 2; pair++)
            _mm512_storeu_si512(to + pair * P + t,
                                _mm512_i32gather_epi32(places, (const int *)(rows + t * D) + pair, 4));
}

/* A piece of scratch of `bytes`, after those that were taken before. */
static void *take(char **rest, size bytes) {
    void *piece = *rest;
    *rest += (bytes + 63) / 64 * 64;
    return piece;
}

static size filled_up(size T_) { return (T_ + BLOCK - 1) / BLOCK * BLOCK; }

static size most_filled_up(const int64_t *starts, size rows, size before) {
    size most = 0;
    for (size row = 0; row < rows; row++) {
        size P = filled_up((row ? before : 0) + starts[row + 1] - starts[row]);
        most = P > most ? P : most;
    }
    return most;
}

/* One row and key head of attend_forward: pointers at its first token, of query, out and log at its first head; those
 * of the prefix at its keys and values, of which there are `before`. */
static void forward_of(const uint16_t *query, size query_token, size query_head, const uint16_t *prefix_key,
                       const uint16_t *key, size key_token, const uint16_t *prefix_value, const uint16_t *value,
                       size value_token, uint16_t *out, size out_token, float *log_, size log_head, size before,
                       size T_, size shared, size D, float scale, char *scratch) {
    size P = filled_up(before + T_);
    uint16_t *rows = take(&scratch, P * D * 2), *p = take(&scratch, BLOCK * P * 2);
    uint32_t *keys = take(&scratch, P * D * 2), *values = take(&scratch, P * D * 2);
    float *s = take(&scratch, BLOCK * P * 4), *o = take(&scratch, BLOCK * BLOCK * 4);
    copy_rows(prefix_key, before, key, key_token, rows, T_, P, D);
    pair_dimensions(rows, keys, P, D);
    copy_rows(prefix_value, before, value, value_token, rows, T_, P, D);
    pair_tokens(rows, values, P, D);
    __m512 scale_16 = _mm512_set1_ps(scale);
    __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size head = 0; head < shared; head++) {
        copy_rows(NULL, before, query + head * query_head, query_token, rows, T_, P, D);
        for (size q = before / BLOCK * BLOCK; q < P; q += BLOCK) {
            size num_keys = q + BLOCK, first = before > q ? before - q : 0;
            size last = before + T_ - q < BLOCK ? before + T_ - q : BLOCK;
            float inverse[BLOCK];
            for (size k = 0; k < num_keys; k += BLOCK)
                product(s + k, P * 4, 0, rows + q * D, D * 2, 32, keys + k, P * 4, 16 * P, D / 32);
            for (size i = 0; i < BLOCK; i++) {
                const float *row = s + i * P;
                uint16_t *to = p + i * P;
                __m512i seen = _mm512_set1_epi32((int)(q + i));
                __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
                for (size k = 0; k < num_keys; k += 16) {
                    __mmask16 mask = _mm512_cmple_epi32_mask(_mm512_add_epi32(count, _mm512_set1_epi32((int)k)), seen);
                    most = _mm512_mask_max_ps(most, mask, most, _mm512_loadu_ps(row + k));
                }
                float largest = scale * _mm512_reduce_max_ps(most);
                __m512 less = _mm512_set1_ps(largest);
                for (size k = 0; k < num_keys; k += 32) {
                    __m512 parts[2];
                    for (int half = 0; half < 2; half++) {
                        size at = k + 16 * half;
                        __mmask16 mask = _mm512_cmple_epi32_mask(
                            _mm512_add_epi32(count, _mm512_set1_epi32((int)at)), seen);
                        parts[half] = _mm512_maskz_mov_ps(mask, exp_16(
                            _mm512_fmsub_ps(scale_16, _mm512_loadu_ps(row + at), less)));
                        sum = _mm512_add_ps(sum, parts[half]);
                    }
                    _mm512_storeu_si512(to + k, both_bf16(parts[0], parts[1]));
                }
                float total = _mm512_reduce_add_ps(sum);
                inverse[i] = 1.0f / total;
                if (i >= first && i < last) log_[head * log_head + q + i - before] = largest + logf(total);
            }
            for (size d = 0; d < D; d += BLOCK) {
                product(o, BLOCK * 4, 0, p, P * 2, 32, values + d, D * 4, 16 * D, num_keys / 32);
                for (size i = first; i < last; i++) {
                    __m512 by = _mm512_set1_ps(inverse[i]);
                    _mm512_storeu_si512(out + (q + i - before) * out_token + head * D + d, both_bf16(
                        _mm512_mul_ps(_mm512_load_ps(o + i * BLOCK), by),
                        _mm512_mul_ps(_mm512_load_ps(o + i * BLOCK + 16), by)));
                }
            }
        }
    }
}

/* Gradients in fp32 to where they go, from the token `first` on. */
static void give(const float *from, uint16_t *to, size stride, size first, size T_, size D) {
    for (size t = 0; t < T_; t++)
        for (size d = 0; d < D; d += BLOCK)
            _mm512_storeu_si512(to + t * stride + d, both_bf16(_mm512_loadu_ps(from + (first + t) * D + d),
                                                               _mm512_loadu_ps(from + (first + t) * D + d + 16)));
}

/* One row and key head of attend_backward. The gradients of the first `num_prefix` keys and values, be they of a prefix
 * or the row's own, go to dprefix_key and dprefix_value. */
static void backward_of(const uint16_t *query, size query_token, size query_head, const uint16_t *prefix_key,
                        const uint16_t *key, size key_token, const uint16_t *prefix_value, const uint16_t *value,
                        size value_token, const uint16_t *out, const uint16_t *dout, size out_token, const float *log_,
                        size log_head, uint16_t *dquery, uint16_t *dkey, uint16_t *dvalue, size key_out,
                        float *dprefix_key, float *dprefix_value, size num_prefix, size before, size T_, size shared,
                        size D, float scale, char *scratch) {
    size P = filled_up(before + T_);
    uint16_t *keys = take(&scratch, P * D * 2), *values = take(&scratch, P * D * 2);
    uint16_t *across = take(&scratch, P * D * 2), *rows = take(&scratch, P * D * 2);
    uint32_t *query_tokens = take(&scratch, P * D * 2), *query_sizes = take(&scratch, P * D * 2);
    uint32_t *dout_tokens = take(&scratch, P * D * 2), *dout_sizes = take(&scratch, P * D * 2);
    float *dk = take(&scratch, P * D * 4), *dv = take(&scratch, P * D * 4), *dq = take(&scratch, P * D * 4);
    float *logs = take(&scratch, P * 4), *deltas = take(&scratch, P * 4);
    float *s = take(&scratch, BLOCK * BLOCK * 4), *dp = take(&scratch, BLOCK * BLOCK * 4);
    uint16_t *p = take(&scratch, BLOCK * BLOCK * 2), *ds = take(&scratch, BLOCK * BLOCK * 2);
    uint32_t *ds_pairs = take(&scratch, BLOCK * BLOCK * 2);
    copy_rows(prefix_key, before, key, key_token, keys, T_, P, D);
    copy_rows(prefix_value, before, value, value_token, values, T_, P, D);
    pair_dimensions(keys, query_sizes, P, D);
    for (size pair = 0; pair < D / 2; pair++) {
        const uint32_t *from = query_sizes + pair * P;
        uint16_t *one = across + 2 * pair * P, *other = one + P;
        SIMD
        for (size t = 0; t < P; t++) one[t] = (uint16_t)from[t], other[t] = (uint16_t)(from[t] >> 16);
    }
    memset(dk, 0, (size_t)(P * D) * 4);
    memset(dv, 0, (size_t)(P * D) * 4);
    __m512 scale_16 = _mm512_set1_ps(scale);
    __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                   23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (size head = 0; head < shared; head++) {
        copy_rows(NULL, before, query + head * query_head, query_token, rows, T_, P, D);
        pair_tokens(rows, query_tokens, P, D);
        pair_dimensions(rows, query_sizes, P, D);
        copy_rows(NULL, before, dout + head * D, out_token, rows, T_, P, D);
        pair_tokens(rows, dout_tokens, P, D);
        pair_dimensions(rows, dout_sizes, P, D);
        memset(deltas, 0, (size_t)P * 4); /* for what is no query, as logs: p is 1 there, and meets a dout of zero */
        memset(logs, 0, (size_t)P * 4);
        for (size t = 0; t < T_; t++) {
            const uint16_t *one = out + t * out_token + head * D, *other = rows + (before + t) * D;
            float sum = 0.0f;
            _Pragma("omp simd reduction(+ : sum)")
            for (size d = 0; d < D; d++) sum += LOAD(one[d]) * LOAD(other[d]);
            deltas[before + t] = sum;
            logs[before + t] = log_[head * log_head + t];
        }
        memset(dq, 0, (size_t)(P * D) * 4);
        for (size k = 0; k < P; k += BLOCK) {
            size first = before / BLOCK * BLOCK;
            for (size q = k > first ? k : first; q < P; q += BLOCK) {
                product(s, BLOCK * 4, 0, keys + k * D, D * 2, 32, query_sizes + q, P * 4, 16 * P, D / 32);
                product(dp, BLOCK * 4, 0, values + k * D, D * 2, 32, dout_sizes + q, P * 4, 16 * P, D / 32);
                __m512 less[2] = {_mm512_loadu_ps(logs + q), _mm512_loadu_ps(logs + q + 16)};
                __m512 minus[2] = {_mm512_loadu_ps(deltas + q), _mm512_loadu_ps(deltas + q + 16)};
                for (size i = 0; i < BLOCK; i += 2) {
                    __m512 part[2][2], grad[2][2];
                    for (int row = 0; row < 2; row++) {
                        uint32_t seen = q == k ? 0xffffffffu << (i + row) : 0xffffffffu;
                        for (int half = 0; half < 2; half++) {
                            size at = (i + row) * BLOCK + 16 * half;
                            __m512 e = exp_16(_mm512_fmsub_ps(scale_16, _mm512_load_ps(s + at), less[half]));
                            e = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * half), e);
                            part[row][half] = e;
                            grad[row][half] = _mm512_mul_ps(_mm512_mul_ps(e, scale_16), _mm512_sub_ps(
                                _mm512_load_ps(dp + at), minus[half]));
                        }
                        _mm512_store_si512(p + (i + row) * BLOCK, both_bf16(part[row][0], part[row][1]));
                        _mm512_store_si512(ds + (i + row) * BLOCK, both_bf16(grad[row][0], grad[row][1]));
                    }
                    for (int half = 0; half < 2; half++)
                        _mm512_store_si512(ds_pairs + i / 2 * BLOCK + 16 * half, _mm512_permutexvar_epi16(
                            zip, both_bf16(grad[0][half], grad[1][half])));
                }
                for (size d = 0; d < D; d += BLOCK) {
                    product(dv + k * D + d, D * 4, 1, p, BLOCK * 2, 0, dout_tokens + q / 2 * D + d, D * 4, 0, 1);
                    product(dk + k * D + d, D * 4, 1, ds, BLOCK * 2, 0, query_tokens + q / 2 * D + d, D * 4, 0, 1);
                    product(dq + d * P + q, P * 4, 1, across + d * P + k, P * 2, 0, ds_pairs, BLOCK * 4, 0, 1);
                }
            }
        }
        __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32((int)P));
        for (size t = 0; t < T_; t++)
            for (size d = 0; d < D; d += BLOCK)
                _mm512_storeu_si512(dquery + t * out_token + head * D + d, both_bf16(
                    _mm512_i32gather_ps(places, dq + d * P + before + t, 4),
                    _mm512_i32gather_ps(places, dq + (d + 16) * P + before + t, 4)));
    }
    give(dk, dkey, key_out, before, T_, D);
    give(dv, dvalue, key_out, before, T_, D);
    memcpy(dprefix_key, dk, (size_t)(num_prefix * D) * 4);
    memcpy(dprefix_value, dv, (size_t)(num_prefix * D) * 4);
}

#else

int matrix_units(void) { return 0; }

#endif

/* out (N, H, D) and log (H, N), the logarithm of each query's sum, of rows that begin at starts[0] to starts[rows - 1];
 * starts[rows] is N. Rows but the first also see the first `prefix` tokens, which begin the first row. */
void NAME(attend_forward)(const T *query, size query_token, size query_head, const T *key, size key_token,
                          size key_head, const T *value, size value_token, size value_head, T *out, float *log,
                          const int64_t *starts, size rows, size prefix, size H, size G, size D, float scale) {
#ifdef BLOCK
    size most = most_filled_up(starts, rows, prefix), shared = H / G, N = starts[rows];
    _Pragma("omp parallel")
    {
        char *scratch = aligned_alloc(64, (size_t)(most * D * 6 + BLOCK * most * 6 + 8192));
        begin_tiles();
        _Pragma("omp for schedule(dynamic)")
        for (size piece = 0; piece < rows * G; piece++) {
            size row = piece / G, first = starts[row], group = piece % G, head = group * shared;
            const T *its_key = key + group * key_head, *its_value = value + group * value_head;
            forward_of(query + first * query_token + head * query_head, query_token, query_head, its_key,
                       its_key + first * key_token, key_token, its_value, its_value + first * value_token, value_token,
                       out + (first * H + head) * D, H * D, log + head * N + first, N, row ? prefix : 0,
                       starts[row + 1] - first, shared, D, scale, scratch);
        }
        _tile_release();
        free(scratch);
    }
#endif
}

/* From dout (N, H, D): dquery (N, H, D), dkey and dvalue (N, G, D). Of the prefix each row gives its own part of the
 * gradients: dprefix (rows, 2, G, prefix, D). */
void NAME(attend_backward)(const T *query, size query_token, size query_head, const T *key, size key_token,
                           size key_head, const T *value, size value_token, size value_head, const T *out,
                           const T *dout, const float *log, T *dquery, T *dkey, T *dvalue, float *dprefix,
                           const int64_t *starts, size rows, size prefix, size H, size G, size D, float scale) {
#ifdef BLOCK
    size most = most_filled_up(starts, rows, prefix), shared = H / G, N = starts[rows];
    _Pragma("omp parallel")
    {
        char *scratch = aligned_alloc(64, (size_t)(most * D * 28 + most * 8 + 32768));
        begin_tiles();
        _Pragma("omp for schedule(dynamic)")
        for (size piece = 0; piece < rows * G; piece++) {
            size row = piece / G, first = starts[row], group = piece % G, head = group * shared;
            const T *its_key = key + group * key_head, *its_value = value + group * value_head;
            backward_of(query + first * query_token + head * query_head, query_token, query_head, its_key,
                        its_key + first * key_token, key_token, its_value, its_value + first * value_token, value_token,
                        out + (first * H + head) * D, dout + (first * H + head) * D, H * D, log + head * N + first, N,
                        dquery + (first * H + head) * D, dkey + (first * G + group) * D,
                        dvalue + (first * G + group) * D, G * D, dprefix + ((row * 2) * G + group) * prefix * D,
                        dprefix + ((row * 2 + 1) * G + group) * prefix * D, prefix, row ? prefix : 0,
                        starts[row + 1] - first, shared, D, scale, scratch);
        }
        _tile_release();
        free(scratch);
    }
#endif
}
