/* Passes over memory that torch has no single operator for, for `layers.fast_cpu`, which says what each computes.

   Rows (n, d) are contiguous, d is a multiple of 16. A type is float or bfloat16; whatever it is, arithmetic is in float.
   Sums over rows are taken of BLOCK rows at a time, so that they do not depend on the number of threads.
   Vectors are those of GCC and Clang, one register long; the compiler knows the processor.

   A kernel takes its arguments in a row, and computes the units `first` to `end` of its work. `start` shares these among
   threads, by the functions of GCC's OpenMP, which the libraries of Intel and LLVM have too. What `#pragma omp` becomes in
   Clang they do not all have, and a library of the compiler's own would bring threads beside torch's. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define BLOCK 64
#define GROUP 16 /* numbers that a plain activation is shared by */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t bfloat16;

/* ---- threads -------------------------------------------------------------------------------------------------------- */

typedef union {
    void *p;
    int64_t i;
    float f;
} arg;
typedef void kernel(const arg *a, int64_t first, int64_t end);
typedef struct {
    kernel *run;
    const arg *args;
    int64_t units;
} job;

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static void share(void *data) {
    const job *j = data;
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    j->run(j->args, j->units * thread / threads, j->units * (thread + 1) / threads);
}

void start(kernel *run, const arg *args, int64_t units, int threads) {
    job j = {run, args, units};
    GOMP_parallel(share, &j, threads, 0);
}

/* ---- vectors -------------------------------------------------------------------------------------------------------- */

INLINE vec load_float(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec load_bfloat16(const bfloat16 *p) {
#ifdef __AVX512F__
    uvec u = (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
#else
    uvec u = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
#endif
    return (vec)(u << 16);
}

INLINE vec choose(ivec where, vec a, vec b) {
#ifdef __AVX512F__
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
#else
    return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)where);
#endif
}

INLINE void store_bfloat16(bfloat16 *p, vec v) { /* to the nearest, to even */
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    uvec u = (uvec)v, r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    r = (uvec)choose(v != v, (vec)((uvec){0} + 0x7fc0), (vec)r);
#ifdef __AVX512F__
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16((__m512i)r));
#else
    __m128i low = _mm256_castsi256_si128((__m256i)r), high = _mm256_extracti128_si256((__m256i)r, 1);
    _mm_storeu_si128((void *)p, _mm_packus_epi32(low, high));
#endif
#endif
}

INLINE vec all(float x) { return (vec){0} + x; }

#ifdef __AVX512F__
INLINE float total(vec v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float highest(vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float total(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
INLINE float highest(vec v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}
#endif

/* x where a comparison, such as _CMP_LT_OQ, of a with b holds, else y */
#ifdef __AVX512F__
#define PICK(a, compare, b, x, y)                                                                                      \
    ((vec)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), compare), (__m512)(y), (__m512)(x)))
INLINE vec larger(vec x, vec y) { return (vec)_mm512_max_ps((__m512)x, (__m512)y); } /* y if one is NaN */
#else
#define PICK(a, compare, b, x, y)                                                                                      \
    ((vec)_mm256_blendv_ps((__m256)(y), (__m256)(x), _mm256_cmp_ps((__m256)(a), (__m256)(b), compare)))
INLINE vec larger(vec x, vec y) { return (vec)_mm256_max_ps((__m256)x, (__m256)y); }
#endif

#ifdef __AVX512F__
INLINE vec exp2_of(vec x) { /* for x <= 0, to 1e-7; far below 0 it is 0 */
    vec f = (vec)_mm512_reduce_ps((__m512)x, 0x09), p = all(1.877576490e-03f); /* x - floor(x) */
    p = p * f + 8.989340538e-03f;
    p = p * f + 5.582631768e-02f;
    p = p * f + 2.401536172e-01f;
    p = p * f + 6.931530732e-01f;
    p = p * f + 9.999999251e-01f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x); /* by 2^floor(x) */
}
#else
INLINE vec exp2_of(vec x) { /* for x <= 0, to 1e-7; below 2^-126 it is 0 */
    const vec magic = all(12582912.0f), least = all(-126.0f); /* 1.5 * 2^23, which rounds what is added to it */
    vec bounded = larger(least, x), n = bounded + magic, f = bounded - (n - magic), p = all(0.00132764888f);
    p = p * f + 0.00967555188f;
    p = p * f + 0.05550713317f;
    p = p * f + 0.24022119533f;
    p = p * f + 0.69314696698f;
    p = p * f + 1.00000007169f;
    p *= (vec)(((ivec)n - 0x4b400000 + 127) << 23);
    return PICK(x, _CMP_LT_OQ, least, all(0), p);
}
#endif

/* ---- activations: value and derivative ------------------------------------------------------------------------------ */

/* share of a normal distribution below -u, times e^(u^2 / 2), for u >= 0: a fit in t = 1 / (1 + 0.21 u), with errors of
   the share below 4e-8 */
static const float TAIL[] = {0.07377775386f, 0.18457374765f, -0.32221629242f, 0.89230856650f, -0.82488278504f, 0.49643900017f};

INLINE void gelu(vec x, vec *y, vec *dy) {
    vec exponential = exp2_of(-0.7213475204f * (x * x)), t = 1.0f / (1.0f + 0.21f * (vec)((ivec)x & INT32_MAX));
    vec p = t * TAIL[5] + TAIL[4];
    p = p * t + TAIL[3];
    p = p * t + TAIL[2];
    p = p * t + TAIL[1];
    p = p * t + TAIL[0];
    vec tail = p * t * exponential, below = PICK(x, _CMP_LT_OQ, all(0), tail, 1.0f - tail);
    *y = x * below;
    *dy = below + x * (0.3989422804f * exponential);
}

#ifdef __AVX512F__
/* The same for bfloat16, with less to do: that share around u = 0, 1/4, 2/4, ... as polynomials, whose coefficients lie in
   pairs of vectors. Errors of the share are below 3e-8, of its derivative below 5e-6. */
#define STEPS 32
#define DEGREE 4
static float TAILS[DEGREE + 1][STEPS] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tails(void) {
    const double half = 0.125, square = half * half; /* of a step */
    for (int i = 0; i < STEPS - 1; i++) {            /* the last share is 0 */
        double u = 0.25 * i, density = 0.3989422804014327 * exp(-0.5 * u * u);
        double fifth = density * (6 * u * u - u * u * u * u - 3) / 120; /* f^5 is nearly 5/4 half^2 f^3 - 5/16 half^4 f */
        TAILS[0][i] = 0.5 * erfc(0.7071067811865476 * u);
        TAILS[1][i] = -density - fifth * square * square * 5 / 16;
        TAILS[2][i] = density * u / 2;
        TAILS[3][i] = density * (1 - u * u) / 6 + fifth * square * 5 / 4;
        TAILS[4][i] = density * (u * u * u - 3 * u) / 24;
    }
}

INLINE vec tail_of(int power, vec step) { /* of the low five bits of each number */
    const float *table = TAILS[power];
    return (vec)_mm512_permutex2var_ps((__m512)load_float(table), (__m512i)step, (__m512)load_float(table + LANES));
}

INLINE void short_gelu(vec x, vec *y, vec *dy) {
    const vec magic = all(12582912.0f);                                                          /* as above */
    vec u = (vec)_mm512_min_ps((__m512)all(7.75f), (__m512)((ivec)x & INT32_MAX)); /* NaN stays */
    vec step = u * 4.0f + magic, f = u - (step - magic) * 0.25f, p = tail_of(DEGREE, step), slope = all(0);
#pragma GCC unroll 4
    for (int power = DEGREE - 1; power >= 0; power--) {
        slope = slope * f + p;
        p = p * f + tail_of(power, step);
    }
    vec below = PICK(x, _CMP_LT_OQ, all(0), p, 1.0f - p);
    *y = x * below;
    *dy = below - x * slope;
}

void has_short_gelu(void) {}
#else
#define short_gelu gelu
#endif

INLINE void relu(vec x, vec *y, vec *dy) {
    *y = larger(all(0), x);
    *dy = PICK(x, _CMP_LE_OQ, all(0), all(0), all(1));
}

INLINE void squared_relu(vec x, vec *y, vec *dy) {
    vec part = larger(all(0), x);
    *y = part * part;
    *dy = part + part;
}

INLINE void silu(vec x, vec *y, vec *dy) {
    vec less = exp2_of(-1.4426950409f * (vec)((ivec)x & INT32_MAX)); /* e^-|x| */
    vec share = PICK(x, _CMP_LT_OQ, all(0), less, all(1)) / (1.0f + less);
    *y = x * share;
    *dy = share * (1.0f + x * (1.0f - share));
}

/* of d channels, the rows of a block, and its place in sums, set to 0 */
#define ROWS(block, n) for (int64_t row = block * BLOCK; row < n && row < (block + 1) * BLOCK; row++)
INLINE float *cleared(float *sums, int64_t block, int64_t d) { return memset(sums + block * d, 0, d * sizeof(float)); }

#define ACTIVATION(ACT, T, FORM)                                                                                       \
    /* x, y; unit: GROUP numbers */                                                                                    \
    void ACT##_##T(const arg *a, int64_t first, int64_t end) {                                                         \
        const T *x = a[0].p;                                                                                           \
        T *y = a[1].p;                                                                                                 \
        for (int64_t i = first * GROUP; i < end * GROUP; i += LANES) {                                                 \
            vec value, unused;                                                                                         \
            FORM(load_##T(x + i), &value, &unused);                                                                    \
            store_##T(y + i, value);                                                                                   \
        }                                                                                                              \
    }                                                                                                                  \
    /* x, grad, y, sums, n, d: y = act(x); grad *= act'(x); sums (blocks, d) of grad; unit: a block */                 \
    void ACT##_backward_##T(const arg *a, int64_t first, int64_t end) {                                                \
        const T *x = a[0].p;                                                                                           \
        T *grad = a[1].p, *y = a[2].p;                                                                                 \
        const int64_t n = a[4].i, d = a[5].i;                                                                          \
        for (int64_t block = first; block < end; block++) {                                                            \
            float *sum = cleared(a[3].p, block, d);                                                                    \
            ROWS(block, n) for (int64_t i = 0; i < d; i += LANES) {                                                    \
                vec value, slope;                                                                                      \
                FORM(load_##T(x + row * d + i), &value, &slope);                                                       \
                slope *= load_##T(grad + row * d + i);                                                                 \
                store_##T(y + row * d + i, value);                                                                     \
                store_##T(grad + row * d + i, slope);                                                                  \
                store_float(sum + i, load_float(sum + i) + slope);                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }

#define ACTIVATIONS(T, GELU)                                                                                           \
    ACTIVATION(gelu, T, GELU)                                                                                          \
    ACTIVATION(relu, T, relu)                                                                                          \
    ACTIVATION(squared_relu, T, squared_relu)                                                                          \
    ACTIVATION(silu, T, silu)
ACTIVATIONS(float, gelu)
ACTIVATIONS(bfloat16, short_gelu)

#define STAR_RELU(T)                                                                                                   \
    /* x, y = scale * relu(x)^2 + shift, scale, shift; unit: GROUP numbers */                                          \
    void star_relu_##T(const arg *a, int64_t first, int64_t end) {                                                     \
        const T *x = a[0].p;                                                                                           \
        T *y = a[1].p;                                                                                                 \
        for (int64_t i = first * GROUP; i < end * GROUP; i += LANES) {                                                 \
            vec value, unused;                                                                                         \
            squared_relu(load_##T(x + i), &value, &unused);                                                            \
            store_##T(y + i, value * a[2].f + a[3].f);                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    /* x, grad *= 2 * scale * relu(x), sums (blocks, 2) of grad * relu(x)^2 and of grad, n, d, scale; unit: a block */ \
    void star_relu_backward_##T(const arg *a, int64_t first, int64_t end) {                                            \
        const T *x = a[0].p;                                                                                           \
        T *grad = a[1].p;                                                                                              \
        float *sums = a[2].p;                                                                                          \
        const int64_t n = a[3].i, d = a[4].i;                                                                          \
        for (int64_t block = first; block < end; block++) {                                                            \
            vec of_scale = all(0), of_shift = all(0);                                                                  \
            ROWS(block, n) for (int64_t i = row * d; i < (row + 1) * d; i += LANES) {                                  \
                vec value, slope, each = load_##T(grad + i);                                                           \
                squared_relu(load_##T(x + i), &value, &slope);                                                         \
                of_scale += each * value;                                                                              \
                of_shift += each;                                                                                      \
                store_##T(grad + i, each * slope * a[5].f);                                                            \
            }                                                                                                          \
            sums[2 * block] = total(of_scale);                                                                         \
            sums[2 * block + 1] = total(of_shift);                                                                     \
        }                                                                                                              \
    }
STAR_RELU(float)
STAR_RELU(bfloat16)

/* ---- sums over rows ------------------------------------------------------------------------------------------------- */

#define COLUMN_SUMS(T)                                                                                                 \
    /* x, sums, n, d; unit: a block */                                                                                 \
    void column_sums_##T(const arg *a, int64_t first, int64_t end) {                                                   \
        const T *x = a[0].p;                                                                                           \
        const int64_t n = a[2].i, d = a[3].i;                                                                          \
        for (int64_t block = first; block < end; block++) {                                                            \
            float *sum = cleared(a[1].p, block, d);                                                                    \
            ROWS(block, n) for (int64_t i = 0; i < d; i += LANES)                                                      \
                store_float(sum + i, load_float(sum + i) + load_##T(x + row * d + i));                                 \
        }                                                                                                              \
    }
COLUMN_SUMS(float)
COLUMN_SUMS(bfloat16)

/* ---- layer norm ----------------------------------------------------------------------------------------------------- */

#define LAYER_NORM(T, OUT)                                                                                             \
    /* x, weight, bias, y, mean, rstd, d, eps; unit: a row */                                                          \
    void layer_norm_##T##_##OUT(const arg *a, int64_t first, int64_t end) {                                            \
        const float *weight = a[1].p, *bias = a[2].p;                                                                  \
        float *mean = a[4].p, *rstd = a[5].p;                                                                          \
        const int64_t d = a[6].i;                                                                                      \
        for (int64_t row = first; row < end; row++) {                                                                  \
            const T *in = (const T *)a[0].p + row * d;                                                                 \
            OUT *y = (OUT *)a[3].p + row * d;                                                                          \
            vec sum = all(0), squares = all(0);                                                                        \
            for (int64_t i = 0; i < d; i += LANES) sum += load_##T(in + i);                                            \
            float centre = total(sum) / d;                                                                             \
            for (int64_t i = 0; i < d; i += LANES) {                                                                   \
                vec off = load_##T(in + i) - centre;                                                                   \
                squares += off * off;                                                                                  \
            }                                                                                                          \
            float scale = 1.0f / sqrtf(total(squares) / d + a[7].f);                                                   \
            mean[row] = centre;                                                                                        \
            rstd[row] = scale;                                                                                         \
            for (int64_t i = 0; i < d; i += LANES) {                                                                   \
                vec v = (load_##T(in + i) - centre) * scale;                                                           \
                if (weight) v *= load_float(weight + i);                                                               \
                if (bias) v += load_float(bias + i);                                                                   \
                store_##OUT(y + i, v);                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    /* grad, x, weight, mean, rstd, of_x or none, sums (2, blocks, d) of grad * x^ and of grad, n, d; unit: a block */ \
    void layer_norm_backward_##T##_##OUT(const arg *a, int64_t first, int64_t end) {                                   \
        const float *weight = a[2].p, *mean = a[3].p, *rstd = a[4].p;                                                  \
        T *of_x = a[5].p;                                                                                              \
        const int64_t n = a[7].i, d = a[8].i, blocks = (n + BLOCK - 1) / BLOCK;                                        \
        for (int64_t block = first; block < end; block++) {                                                            \
            float *of_weight = cleared(a[6].p, block, d), *of_bias = cleared(a[6].p, blocks + block, d);               \
            ROWS(block, n) {                                                                                           \
                const OUT *g = (const OUT *)a[0].p + row * d;                                                          \
                const T *in = (const T *)a[1].p + row * d;                                                             \
                float centre = mean[row], scale = rstd[row];                                                           \
                vec sum = all(0), inner = all(0);                                                                      \
                for (int64_t i = 0; i < d; i += LANES) {                                                               \
                    vec v = (load_##T(in + i) - centre) * scale, each = load_##OUT(g + i);                             \
                    store_float(of_weight + i, load_float(of_weight + i) + each * v);                                  \
                    store_float(of_bias + i, load_float(of_bias + i) + each);                                          \
                    if (weight) each *= load_float(weight + i);                                                        \
                    sum += each;                                                                                       \
                    inner += each * v;                                                                                 \
                }                                                                                                      \
                float shift = total(sum) / d, slope = total(inner) / d;                                                \
                for (int64_t i = 0; of_x && i < d; i += LANES) {                                                       \
                    vec v = (load_##T(in + i) - centre) * scale, each = load_##OUT(g + i);                             \
                    if (weight) each *= load_float(weight + i);                                                        \
                    store_##T(of_x + row * d + i, (each - shift - v * slope) * scale);                                 \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
LAYER_NORM(float, float)
LAYER_NORM(float, bfloat16)
LAYER_NORM(bfloat16, bfloat16)
LAYER_NORM(bfloat16, float)

/* ---- softmax over rows of m numbers, any m from LANES on ------------------------------------------------------------ */

/* The last vector of a row overlaps the one before it. */
#define SOFTMAX(T, OUT)                                                                                                \
    /* x, bias (period, m) of rows in turn or none, y = softmax(scale * x + bias), m, period, scale; unit: a row */    \
    void softmax_##T##_##OUT(const arg *a, int64_t first, int64_t end) {                                               \
        const float *bias = a[1].p, scale = a[5].f, log2_e = 1.4426950409f;                                            \
        const int64_t m = a[3].i, period = a[4].i, last = m - LANES, full = (m - 1) / LANES * LANES;                   \
        ivec rest; /* lanes of the last vector that no other has */                                                    \
        for (int k = 0; k < LANES; k++) rest[k] = last + k >= full ? -1 : 0;                                           \
        for (int64_t row = first; row < end; row++) {                                                                  \
            const T *in = (const T *)a[0].p + row * m;                                                                 \
            const float *add = bias ? bias + row % period * m : 0;                                                     \
            OUT *y = (OUT *)a[2].p + row * m;                                                                          \
            float buffer[full + LANES];                                                                                \
            vec top = all(-INFINITY), sum = all(0), v;                                                                 \
            for (int64_t i = 0; i <= full; i += LANES) {                                                               \
                int64_t at = i < full ? i : last;                                                                      \
                v = load_##T(in + at) * scale;                                                                         \
                if (add) v += load_float(add + at);                                                                    \
                store_float(buffer + i, v);                                                                            \
                top = larger(v, top); /* a NaN is found by the sum */                                                 \
            }                                                                                                          \
            float peak = highest(top);                                                                                 \
            for (int64_t i = 0; i <= full; i += LANES) {                                                               \
                v = exp2_of((load_float(buffer + i) - peak) * log2_e);                                                 \
                store_float(buffer + i, v);                                                                            \
                sum += i < full ? v : choose(rest, v, all(0));                                                         \
            }                                                                                                          \
            float factor = 1.0f / total(sum);                                                                          \
            for (int64_t i = 0; i <= full; i += LANES)                                                                 \
                store_##OUT(y + (i < full ? i : last), load_float(buffer + i) * factor);                               \
        }                                                                                                              \
    }
SOFTMAX(float, float)
SOFTMAX(float, bfloat16)
SOFTMAX(bfloat16, bfloat16)

/* ---- average pooling minus the input -------------------------------------------------------------------------------- */

/* Images (b, h, w, c), windows of 2 * reach + 1 whose part inside of the image counts.
   Backward: y = sums over windows of x / count, - x. */
INLINE float share_of(int64_t at, int64_t size, int64_t reach) { /* 1 / positions of the window around one */
    int64_t first = at > reach ? at - reach : 0, end = at + reach + 1 < size ? at + reach + 1 : size;
    return 1.0f / (end - first);
}

#define MEAN_MINUS_SELF(T)                                                                                             \
    /* x, y, h, w, c, reach, backward; unit: a line of an image */                                                     \
    void mean_minus_self_##T(const arg *a, int64_t first, int64_t end) {                                               \
        const T *x = a[0].p;                                                                                           \
        T *y = a[1].p;                                                                                                 \
        const int64_t h = a[2].i, w = a[3].i, c = a[4].i, reach = a[5].i, backward = a[6].i;                           \
        float sums[w * c], shares[w]; /* of columns, and of their windows */                                           \
        for (int64_t k = 0; k < w; k++) shares[k] = share_of(k, w, reach);                                             \
        for (int64_t line = first; line < end; line++) {                                                               \
            int64_t at = line % h, top = at > reach ? at - reach : 0, under = at + reach + 1 < h ? at + reach + 1 : h; \
            for (int64_t i = 0; i < w * c; i += LANES) store_float(sums + i, all(0));                                  \
            for (int64_t row = top; row < under; row++) {                                                              \
                const T *in = x + (line - at + row) * w * c;                                                           \
                float share = share_of(backward ? row : at, h, reach);                                                 \
                for (int64_t k = 0; k < w; k++) {                                                                      \
                    float factor = backward ? share * shares[k] : share;                                               \
                    for (int64_t i = k * c; i < (k + 1) * c; i += LANES)                                               \
                        store_float(sums + i, load_float(sums + i) + load_##T(in + i) * factor);                       \
                }                                                                                                      \
            }                                                                                                          \
            for (int64_t column = 0; column < w; column++) {                                                           \
                int64_t left = column > reach ? column - reach : 0;                                                    \
                int64_t right = column + reach + 1 < w ? column + reach + 1 : w;                                       \
                for (int64_t i = 0; i < c; i += LANES) {                                                               \
                    vec sum = all(0);                                                                                  \
                    for (int64_t k = left; k < right; k++) sum += load_float(sums + k * c + i);                        \
                    int64_t place = (line * w + column) * c + i;                                                       \
                    store_##T(y + place, sum * (backward ? 1.0f : shares[column]) - load_##T(x + place));              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
MEAN_MINUS_SELF(float)
MEAN_MINUS_SELF(bfloat16)

#include "cpu_attention.c"
#include "cpu_depthwise.c"
#ifdef __AVX512BF16__
#include "cpu_attention_bfloat16.c"
#ifdef __AMX_BF16__
#include "cpu_products.c"
#endif
#endif
