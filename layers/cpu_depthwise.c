/* Depthwise convolutions with stride 1 that keep the size, and the gradients of their weights, for `layers.fast_cpu`;
   included by cpu_kernels.c.

   Images (b, h, w, d) are read LANES channels at a time: the K lines that a line of the result meets lie in a core's first
   cache, as floats and with zeros on both sides, and each is read from the image once. */

#define PIECE 7 /* results of a line at a time, in registers */
#define WIDE(K, w) ((((w) + PIECE - 1) / PIECE * PIECE + (K) - 1) * LANES)
#define ALIGNED __attribute__((aligned(64)))

#define FILL_LINE(T)                                                                                                   \
    /* star: scale and shift of a StarReLU that is taken of x, or 0 */                                                 \
    INLINE void fill_line_##T(float *line, const T *x, int64_t w, int64_t d, const float *star) {                      \
        for (int64_t at = 0; at < w; at++) {                                                                           \
            vec v = load_##T(x + at * d), unused;                                                                      \
            if (star) {                                                                                                \
                squared_relu(v, &v, &unused);                                                                          \
                v = v * star[0] + star[1];                                                                             \
            }                                                                                                          \
            store_float(line + at * LANES, v);                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
    /* the first lines of an image in their places */                                                                  \
    INLINE void begin_lines_##T(int K, float *lines, const T *x, int64_t h, int64_t w, int64_t d,                      \
                                 const float *star) {                                                                  \
        for (int64_t row = 0; row < K / 2 && row < h; row++)                                                           \
            fill_line_##T(lines + row * WIDE(K, w) + K / 2 * LANES, x + row * w * d, w, d, star);                      \
    }                                                                                                                  \
    /* the last line that a line of the result meets, in the place of one that none meets any more */                  \
    INLINE void next_line_##T(int K, float *lines, const T *x, int64_t at, int64_t h, int64_t w, int64_t d,            \
                               const float *star) {                                                                    \
        int64_t row = at + K / 2;                                                                                      \
        if (row < h) fill_line_##T(lines + row % K * WIDE(K, w) + K / 2 * LANES, x + row * w * d, w, d, star);         \
    }
FILL_LINE(float)
FILL_LINE(bfloat16)

#define DEPTHWISE(K, T)                                                                                                \
    /* x, weight (K * K, d) and bias (d) in float, or no bias, y, h, w, d, star; unit: GROUP channels of an image */   \
    void depthwise_##K##_##T(const arg *a, int64_t first, int64_t end) {                                               \
        const int64_t h = a[4].i, w = a[5].i, d = a[6].i, per = d / LANES, wide = WIDE(K, w), reach = K / 2;           \
        const float *weights = a[1].p, *bias = a[2].p, *star = a[7].p;                                                 \
        float lines[K * wide] ALIGNED, weight[K * K * LANES] ALIGNED;                                                  \
        memset(lines, 0, sizeof lines);                                                                                \
        for (int64_t part = first * (GROUP / LANES); part < end * (GROUP / LANES); part++) {                           \
            const int64_t c = part % per * LANES, from = part / per * h * w * d + c;                                   \
            const T *x = (const T *)a[0].p + from;                                                                     \
            T *y = (T *)a[3].p + from;                                                                                 \
            const vec start = bias ? load_float(bias + c) : all(0);                                                    \
            for (int k = 0; k < K * K; k++) store_float(weight + k * LANES, load_float(weights + k * d + c));          \
            begin_lines_##T(K, lines, x, h, w, d, star);                                                               \
            for (int64_t at = 0; at < h; at++) {                                                                       \
                const int64_t top = at < reach ? reach - at : 0, under = at + reach < h ? K : h - at + reach;          \
                next_line_##T(K, lines, x, at, h, w, d, star);                                                         \
                for (int64_t p = 0; p < w; p += PIECE) {                                                               \
                    vec sum[PIECE];                                                                                    \
                    EACH(i, PIECE) sum[i] = start;                                                                     \
                    for (int64_t k = top; k < under; k++) {                                                            \
                        const float *line = lines + (at + k - reach) % K * wide + p * LANES;                           \
                        EACH(j, K) {                                                                                   \
                            vec each = load_float(weight + (k * K + j) * LANES);                                       \
                            EACH(i, PIECE) sum[i] += each * load_float(line + (i + j) * LANES);                        \
                        }                                                                                              \
                    }                                                                                                  \
                    EACH(i, PIECE) if (p + i < w) store_##T(y + (at * w + p + i) * d, sum[i]);                         \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

#define DEPTHWISE_WEIGHT(K, T)                                                                                         \
    /* x, grad, sums (b, K * K + 1, d), h, w, d, star: gradients of weights and bias; unit: GROUP channels of an image */\
    void depthwise_weight_##K##_##T(const arg *a, int64_t first, int64_t end) {                                        \
        const int64_t h = a[3].i, w = a[4].i, d = a[5].i, per = d / LANES, wide = WIDE(K, w), reach = K / 2;           \
        const float *star = a[6].p;                                                                                    \
        float lines[K * wide] ALIGNED, grads[w * LANES] ALIGNED, sums[K * K * LANES] ALIGNED;                          \
        memset(lines, 0, sizeof lines);                                                                                \
        for (int64_t part = first * (GROUP / LANES); part < end * (GROUP / LANES); part++) {                           \
            const int64_t c = part % per * LANES, from = part / per * h * w * d + c;                                   \
            const T *x = (const T *)a[0].p + from, *grad = (const T *)a[1].p + from;                                   \
            float *into = (float *)a[2].p + part / per * (K * K + 1) * d + c;                                          \
            vec total = all(0);                                                                                        \
            memset(sums, 0, sizeof sums);                                                                              \
            begin_lines_##T(K, lines, x, h, w, d, star);                                                               \
            for (int64_t at = 0; at < h; at++) {                                                                       \
                const int64_t top = at < reach ? reach - at : 0, under = at + reach < h ? K : h - at + reach;          \
                next_line_##T(K, lines, x, at, h, w, d, star);                                                         \
                fill_line_##T(grads, grad + at * w * d, w, d, 0);                                                      \
                for (int64_t p = 0; p < w; p++) total += load_float(grads + p * LANES);                                \
                for (int64_t k = top; k < under; k++) {                                                                \
                    const float *line = lines + (at + k - reach) % K * wide;                                           \
                    float *of = sums + k * K * LANES;                                                                  \
                    vec sum[K];                                                                                        \
                    EACH(j, K) sum[j] = load_float(of + j * LANES);                                                    \
                    for (int64_t p = 0; p < w; p++) {                                                                  \
                        vec each = load_float(grads + p * LANES);                                                      \
                        EACH(j, K) sum[j] += each * load_float(line + (p + j) * LANES);                                \
                    }                                                                                                  \
                    EACH(j, K) store_float(of + j * LANES, sum[j]);                                                    \
                }                                                                                                      \
            }                                                                                                          \
            for (int k = 0; k < K * K; k++) store_float(into + k * d, load_float(sums + k * LANES));                   \
            store_float(into + K * K * d, total);                                                                      \
        }                                                                                                              \
    }

DEPTHWISE(5, bfloat16)
DEPTHWISE(7, bfloat16)
DEPTHWISE_WEIGHT(3, bfloat16)
DEPTHWISE_WEIGHT(5, bfloat16)
DEPTHWISE_WEIGHT(7, bfloat16)
DEPTHWISE_WEIGHT(5, float)
DEPTHWISE_WEIGHT(7, float)
