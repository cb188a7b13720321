/* Elementwise parts of the fast path, each one pass over its arrays with fp32 inside.
 *
 * compiled.py includes this file twice, for values of float and of bf16 (T, LOAD, STORE, NAME), and compiles it with
 * the machine's own instructions. Rows are shared between threads and never split, so that results do not depend on
 * their number. Arrays are contiguous unless a stride is given; strides count values.
 *
 * N tokens, C width, F width of the MLP, T queries, S keys, K positions, V columns of a block of the vocabulary.
 */

#ifndef LORA_KIT_ONCE
#define LORA_KIT_ONCE

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef ptrdiff_t size;
#define SHARE _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")

static inline float bits_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t float_as_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

static inline float load_bf16(uint16_t value) { return bits_as_float((uint32_t)value << 16); }

/* To the nearest, halves to even; NaN stays NaN. */
static inline uint16_t store_bf16(float value) {
    uint32_t bits = float_as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

#define ROUNDED 12582912.0f /* 1.5 * 2^23: adding it leaves no place for a fraction */

/* exp with a relative error below 3e-7: 2^n times a polynomial in the rest (coefficients of Cephes' expf).
 * Below -87 it gives exp(-87), above 88 exp(88); NaN stays NaN. */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504088896341f + ROUNDED; /* its last bits are the nearest whole number */
    float n = shifted - ROUNDED;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * bits_as_float((float_as_bits(shifted) << 23) + 0x3f800000u);
}

/* 1 / d for d from 1 to 2^120, with a relative error below 3e-7, without the slow division: from the bits, d's
 * exponent negated, then three times Newton's step. NaN stays NaN. */
static inline float inverse_of(float d) {
    float r = bits_as_float(0x7ef311c7u - float_as_bits(d));
    r = r * (2.0f - d * r);
    r = r * (2.0f - d * r);
    return r + r * (1.0f - d * r);
}

/* Below -80 it gives that of -80, 2e-35. */
static inline float sigmoid_of(float x) { return inverse_of(1.0f + exp_of(x < -80.0f ? 80.0f : -x)); }

/* tanh form of gelu: x times the sigmoid of 2·sqrt(2/pi)·(x + 0.044715 x³). */
#define GELU_SLOPE 1.5957691216057308f
#define GELU_CUBE 0.044715f

#endif

/* y = x · scale · factor with scale = 1 / sqrt(mean of squares + eps), one of scale for each row. */
void NAME(norm_forward)(const T *x, const float *factor, T *y, float *scale, size N, size C, float eps) {
    SHARE
    for (size n = 0; n < N; n++) {
        const T *in = x + n * C;
        T *out = y + n * C;
        float sum = 0.0f;
        _Pragma("omp simd reduction(+ : sum)")
        for (size c = 0; c < C; c++) sum += LOAD(in[c]) * LOAD(in[c]);
        float by = 1.0f / sqrtf(sum / (float)C + eps);
        scale[n] = by;
        SIMD
        for (size c = 0; c < C; c++) out[c] = STORE(LOAD(in[c]) * by * factor[c]);
    }
}

/* dx = scale · d − x · scale³ · mean(d · x), where d = dy · factor. */
void NAME(norm_backward)(const T *dy, const T *x, const float *scale, const float *factor, T *dx, size N, size C) {
    SHARE
    for (size n = 0; n < N; n++) {
        const T *in = x + n * C, *from = dy + n * C;
        T *out = dx + n * C;
        float dot = 0.0f, by = scale[n];
        _Pragma("omp simd reduction(+ : dot)")
        for (size c = 0; c < C; c++) dot += LOAD(from[c]) * factor[c] * LOAD(in[c]);
        float along = dot * by * by * by / (float)C;
        SIMD
        for (size c = 0; c < C; c++) out[c] = STORE(LOAD(from[c]) * factor[c] * by - LOAD(in[c]) * along);
    }
}

/* out = act(gate) · up; kind 0 is silu, 1 gelu by tanh. */
void NAME(gate_forward)(const T *gate, size gate_stride, const T *up, size up_stride, T *out, size out_stride, size N,
                        size F, int kind) {
    SHARE
    for (size n = 0; n < N; n++) {
        const T *g = gate + n * gate_stride, *u = up + n * up_stride;
        T *o = out + n * out_stride;
        if (kind == 0) {
            SIMD
            for (size f = 0; f < F; f++) {
                float x = LOAD(g[f]);
                o[f] = STORE(x * sigmoid_of(x) * LOAD(u[f]));
            }
        } else {
            SIMD
            for (size f = 0; f < F; f++) {
                float x = LOAD(g[f]);
                o[f] = STORE(x * sigmoid_of(GELU_SLOPE * (x + GELU_CUBE * x * x * x)) * LOAD(u[f]));
            }
        }
    }
}

/* From dm, the gradient of act(gate)·up: the gradients of gate and up, and act(gate)·up once more. */
void NAME(gate_backward)(const T *dm, const T *gate, size gate_stride, const T *up, size up_stride, T *dgate, T *dup,
                         size grad_stride, T *again, size N, size F, int kind) {
    SHARE
    for (size n = 0; n < N; n++) {
        const T *d = dm + n * F, *g = gate + n * gate_stride, *u = up + n * up_stride;
        T *dg = dgate + n * grad_stride, *du = dup + n * grad_stride, *m = again + n * F;
        if (kind == 0) {
            SIMD
            for (size f = 0; f < F; f++) {
                float x = LOAD(g[f]), y = LOAD(u[f]), dz = LOAD(d[f]), s = sigmoid_of(x), act = x * s;
                m[f] = STORE(act * y);
                du[f] = STORE(dz * act);
                dg[f] = STORE(dz * y * (s + act * (1.0f - s)));
            }
        } else {
            SIMD
            for (size f = 0; f < F; f++) {
                float x = LOAD(g[f]), y = LOAD(u[f]), dz = LOAD(d[f]);
                float s = sigmoid_of(GELU_SLOPE * (x + GELU_CUBE * x * x * x)), act = x * s;
                m[f] = STORE(act * y);
                du[f] = STORE(dz * act);
                dg[f] = STORE(dz * y * (s + act * (1.0f - s) * GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * x * x)));
            }
        }
    }
}

/* Of every head: p = exp(scale·score − log) and ds = p · (dp − delta) · scale, in place of score and dp, and 0 where
 * a query does not see a key: query t sees the keys up to before + t. Rows are heads times queries; log and delta
 * of a head begin log_stride and delta_stride after those of the head before. */
void NAME(attention_backward)(T *score, T *dp, const float *log, size log_stride, const float *delta,
                              size delta_stride, size heads, size T_, size S, size before, float scale) {
    SHARE
    for (size row = 0; row < heads * T_; row++) {
        size head = row / T_, t = row % T_, seen = before + t + 1 < S ? before + t + 1 : S;
        float less = log[head * log_stride + t], minus = delta[head * delta_stride + t];
        T *s = score + row * S, *d = dp + row * S;
        SIMD
        for (size k = 0; k < seen; k++) {
            float p = exp_of(scale * LOAD(s[k]) - less);
            s[k] = STORE(p);
            d[k] = STORE(p * (LOAD(d[k]) - minus) * scale);
        }
        memset(s + seen, 0, (size_t)(S - seen) * sizeof(T));
        memset(d + seen, 0, (size_t)(S - seen) * sizeof(T));
    }
}

/* out[h, t] = sum over d of a[t, h, d] · b[t, h, d]. */
void NAME(dot_of_heads)(const T *a, const T *b, float *out, size T_, size heads, size D) {
    SHARE
    for (size row = 0; row < T_ * heads; row++) {
        const T *x = a + row * D, *y = b + row * D;
        float sum = 0.0f;
        _Pragma("omp simd reduction(+ : sum)")
        for (size d = 0; d < D; d++) sum += LOAD(x[d]) * LOAD(y[d]);
        out[(row % heads) * T_ + row / heads] = sum;
    }
}

/* Take a block of logits, whose first column is column `first`, into the running largest value and sum of
 * exp(logit − largest) of each row, and the target's logit where it lies in the block. */
void NAME(loss_of_block)(const T *logits, const int64_t *target, size first, float *largest, float *sum, float *hit,
                         size K, size V) {
    SHARE
    for (size k = 0; k < K; k++) {
        const T *row = logits + k * V;
        float most = largest[k];
        _Pragma("omp simd reduction(max : most)")
        for (size v = 0; v < V; v++) most = LOAD(row[v]) > most ? LOAD(row[v]) : most;
        float total = 0.0f;
        _Pragma("omp simd reduction(+ : total)")
        for (size v = 0; v < V; v++) total += exp_of(LOAD(row[v]) - most);
        sum[k] = sum[k] * exp_of(largest[k] - most) + total;
        largest[k] = most;
        if (target[k] >= first && target[k] < first + V) hit[k] = LOAD(row[target[k] - first]);
    }
}

/* The gradient of the loss in place of a block of logits: exp(logit − log), less 1 at the target. */
void NAME(gradient_of_block)(T *logits, const int64_t *target, size first, const float *log, size K, size V) {
    SHARE
    for (size k = 0; k < K; k++) {
        T *row = logits + k * V;
        size at = target[k] - first;
        float there = at >= 0 && at < V ? exp_of(LOAD(row[at]) - log[k]) - 1.0f : 0.0f, less = log[k];
        SIMD
        for (size v = 0; v < V; v++) row[v] = STORE(exp_of(LOAD(row[v]) - less));
        if (at >= 0 && at < V) row[at] = STORE(there);
    }
}

/* Rotary positions: the two halves of every head, turned by the angles of its token, or back with sign -1. */
void NAME(rotate)(const T *x, size token_stride, size head_stride, const T *cosine, const T *sine, T *out, size N,
                  size heads, size D, float sign) {
    size half = D / 2;
    SHARE
    for (size row = 0; row < N * heads; row++) {
        size n = row / heads, h = row % heads;
        const T *in = x + n * token_stride + h * head_stride, *c = cosine + n * D, *s = sine + n * D;
        T *to = out + row * D;
        SIMD
        for (size d = 0; d < half; d++) {
            float one = LOAD(in[d]), other = LOAD(in[d + half]);
            to[d] = STORE(one * LOAD(c[d]) - sign * other * LOAD(s[d]));
            to[d + half] = STORE(other * LOAD(c[d + half]) + sign * one * LOAD(s[d + half]));
        }
    }
}
