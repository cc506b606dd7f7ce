/* Attention over a few hundred tokens, forward and backward: part of `cpu_kernels.c`, whose words hold here too.

   torch's form computes in small tiles, and wants its gradients stacked, moved and cleared around it. Here the
   products of one head of one sample stand in a core's second cache, blocks of queries after another; queries, keys and
   values are read where the linear layer left them, and their gradients are written where it wants them. */

#define TILE_ROWS 6
#ifdef __AVX512F__
#define TILE_VECTORS 4
#else
#define TILE_VECTORS 2
#endif
#define LOG2_E 1.4426950409f
#define QUERIES 96 /* of a block; a multiple of TILE_ROWS */

INLINE int64_t up_to(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

/* c[i][j] = sum over k of a[i * ai + k * ak] * b[k][j], or added to c[i][j]; i < TILE_ROWS, j < WIDTH vectors.
   All sums stand in registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define TILE(WIDTH)                                                                                                    \
    INLINE void tile_##WIDTH(int64_t depth, const float *a, int64_t ai, int64_t ak, const float *b, int64_t bk,        \
                             float *c, int64_t ci, int add) {                                                          \
        vec sums[TILE_ROWS][WIDTH], row[WIDTH];                                                                        \
        EACH(i, TILE_ROWS) EACH(j, WIDTH) sums[i][j] = add ? load_float(c + i * ci + j * LANES) : all(0);              \
        for (int64_t k = 0; k < depth; k++, a += ak, b += bk) {                                                        \
            EACH(j, WIDTH) row[j] = load_float(b + j * LANES);                                                         \
            EACH(i, TILE_ROWS) EACH(j, WIDTH) sums[i][j] += a[i * ai] * row[j];                                        \
        }                                                                                                              \
        EACH(i, TILE_ROWS) EACH(j, WIDTH) store_float(c + i * ci + j * LANES, sums[i][j]);                             \
    }
TILE(1)
TILE(2)
#if TILE_VECTORS == 4
TILE(3)
TILE(4)
#endif

/* As a tile, of rows (a multiple of TILE_ROWS) and columns (a multiple of LANES). */
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t ai, int64_t ak, const float *b,
                    int64_t bk, float *c, int64_t ci, int add) {
    int64_t vectors = columns / LANES, panels = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
    for (int64_t panel = 0; panel < panels; panel++) {
        int64_t from = vectors * panel / panels, width = vectors * (panel + 1) / panels - from;
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            const float *left = a + i * ai, *right = b + from * LANES;
            float *into = c + i * ci + from * LANES;
            switch (width) {
#if TILE_VECTORS == 4
            case 4: tile_4(depth, left, ai, ak, right, bk, into, ci, add); break;
            case 3: tile_3(depth, left, ai, ak, right, bk, into, ci, add); break;
#endif
            case 2: tile_2(depth, left, ai, ak, right, bk, into, ci, add); break;
            default: tile_1(depth, left, ai, ak, right, bk, into, ci, add);
            }
        }
    }
}

/* Rows of width d, `step` apart, without gaps, and zeros up to `padded` rows. */
static void gather_rows(const float *x, int64_t step, int64_t n, int64_t padded, int64_t d, float *y) {
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < d; i += LANES) store_float(y + row * d + i, load_float(x + row * step + i));
    memset(y + n * d, 0, (padded - n) * d * sizeof(float));
}

/* The same as columns, times a factor, (d, padded). */
static void gather_columns(const float *x, int64_t step, int64_t n, int64_t padded, int64_t d, float factor, float *y) {
    for (int64_t i = 0; i < d; i++) store_float(y + (i + 1) * padded - LANES, all(0));
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < d; i++) y[i * padded + row] = x[row * step + i] * factor;
}

INLINE void stream_float(float *p, vec v) { /* past the caches; p is a multiple of 64 bytes */
#ifdef __AVX512F__
    _mm512_stream_ps(p, (__m512)v);
#else
    _mm256_stream_ps(p, (__m256)v);
#endif
}

/* Rows to places `step` apart, each times its factor. */
static void scatter_rows(const float *x, int64_t n, int64_t d, const float *factors, float *y, int64_t step) {
    for (int64_t row = 0; row < n; row++) {
        float factor = factors ? factors[row] : 1.0f;
        for (int64_t i = 0; i < d; i += LANES) stream_float(y + row * step + i, load_float(x + row * d + i) * factor);
    }
}

/* lanes of the last vector of a row that hold one of n numbers */
INLINE ivec held(int64_t n, int64_t padded) {
    ivec lanes;
    for (int k = 0; k < LANES; k++) lanes[k] = padded - LANES + k < n ? -1 : 0;
    return lanes;
}

int64_t attention_room_float(int64_t n, int64_t d) { /* bytes that a thread works in */
    int64_t rows = up_to(n, TILE_ROWS), columns = up_to(n, LANES), blocks = QUERIES * (columns + d);
    /* 64: the last tile of rows reads past the last of columns */
    return up_to(5 * rows * d + 2 * columns * d + 2 * blocks + 64, 16) * sizeof(float);
}

/* Strides are those of samples, heads and tokens; out and grad have the same, and of_q, of_k and of_v.
   logs (b, heads, n) are logarithms to base 2 of sums of e^score. */
typedef struct {
    int64_t sample, head, token;
} strides;

INLINE strides strides_at(const arg *a) { return (strides){a[0].i, a[1].i, a[2].i}; }
INLINE float *head_of(const arg *x, strides s, int64_t unit, int64_t heads) {
    return (float *)x->p + unit / heads * s.sample + unit % heads * s.head;
}

/* q, k, v, out, logs, n, heads, d, scale, room, bytes of a thread, strides of q, k, v and out; unit: a head of a sample */
void attention_float(const arg *a, int64_t first, int64_t end) {
    const int64_t n = a[5].i, heads = a[6].i, d = a[7].i, rows = up_to(n, TILE_ROWS), columns = up_to(n, LANES);
    const strides of_q = strides_at(a + 11), of_k = strides_at(a + 14), of_v = strides_at(a + 17), to = strides_at(a + 20);
    const ivec last = held(n, columns);
    float *q = (float *)((char *)a[9].p + omp_get_thread_num() * a[10].i), *v = q + rows * d, *k = v + rows * d; /* k: columns */
    float *weights = k + columns * d, *result = weights + QUERIES * columns, factors[QUERIES];
    for (int64_t unit = first; unit < end; unit++) {
        float *out = head_of(a + 3, to, unit, heads), *logs = (float *)a[4].p + unit * n;
        gather_rows(head_of(a, of_q, unit, heads), of_q.token, n, rows, d, q);
        gather_columns(head_of(a + 1, of_k, unit, heads), of_k.token, n, columns, d, a[8].f * LOG2_E, k);
        gather_rows(head_of(a + 2, of_v, unit, heads), of_v.token, n, n, d, v);
        for (int64_t from = 0; from < n; from += QUERIES) {
            int64_t count = n - from < QUERIES ? n - from : QUERIES, padded = up_to(count, TILE_ROWS);
            product(padded, columns, d, q + from * d, d, 1, k, columns, weights, columns, 0);
            for (int64_t row = 0; row < count; row++) {
                float *w = weights + row * columns;
                vec top = all(-INFINITY), sum = all(0);
                store_float(w + columns - LANES, choose(last, load_float(w + columns - LANES), top));
                for (int64_t i = 0; i < columns; i += LANES) {
                    vec x = load_float(w + i);
                    top = larger(x, top); /* a NaN is found by the sum */
                }
                float peak = highest(top);
                for (int64_t i = 0; i < columns; i += LANES) {
                    vec x = exp2_of(load_float(w + i) - peak);
                    store_float(w + i, x);
                    sum += x;
                }
                float of_row = total(sum);
                factors[row] = 1.0f / of_row;
                logs[from + row] = peak + log2f(of_row);
            }
            product(padded, d, n, weights, columns, 1, v, d, result, d, 0);
            scatter_rows(result, count, d, factors, out + from * to.token, to.token);
        }
    }
    _mm_sfence();
}

/* grad, q, k, v, out, logs, of_q, of_k, of_v, n, heads, d, scale, room, bytes of a thread, strides of q, k, v, out and of_q;
   unit: a head of a sample */
void attention_backward_float(const arg *a, int64_t first, int64_t end) {
    const int64_t n = a[9].i, heads = a[10].i, d = a[11].i, rows = up_to(n, TILE_ROWS), columns = up_to(n, LANES);
    const strides at_q = strides_at(a + 15), at_k = strides_at(a + 18), at_v = strides_at(a + 21);
    const strides behind = strides_at(a + 24), to = strides_at(a + 27);
    const ivec last = held(n, columns);
    const float scale = a[12].f;
    float *q = (float *)((char *)a[13].p + omp_get_thread_num() * a[14].i), *k = q + rows * d, *grad = k + rows * d;
    float *keys = grad + rows * d, *values = keys + columns * d; /* as columns */
    float *of_k = values + columns * d, *of_v = of_k + rows * d, *of_q = of_v + rows * d;
    float *weights = of_q + QUERIES * d, *of_scores = weights + QUERIES * columns;
    for (int64_t unit = first; unit < end; unit++) {
        const float *out = head_of(a + 4, behind, unit, heads), *logs = (const float *)a[5].p + unit * n;
        const float *in_k = head_of(a + 2, at_k, unit, heads);
        gather_rows(head_of(a, behind, unit, heads), behind.token, n, rows, d, grad);
        gather_rows(head_of(a + 1, at_q, unit, heads), at_q.token, n, rows, d, q);
        gather_rows(in_k, at_k.token, n, n, d, k);
        gather_columns(in_k, at_k.token, n, columns, d, scale * LOG2_E, keys);
        gather_columns(head_of(a + 3, at_v, unit, heads), at_v.token, n, columns, d, 1.0f, values);
        for (int64_t from = 0; from < n; from += QUERIES) {
            int64_t count = n - from < QUERIES ? n - from : QUERIES, padded = up_to(count, TILE_ROWS);
            product(padded, columns, d, q + from * d, d, 1, keys, columns, weights, columns, 0);
            product(padded, columns, d, grad + from * d, d, 1, values, columns, of_scores, columns, 0);
            for (int64_t row = 0; row < count; row++) {
                float *w = weights + row * columns, *s = of_scores + row * columns, log = logs[from + row];
                vec inner = all(0);
                for (int64_t i = 0; i < d; i += LANES)
                    inner += load_float(out + (from + row) * behind.token + i) * load_float(grad + (from + row) * d + i);
                float mean = total(inner);
                store_float(w + columns - LANES, choose(last, load_float(w + columns - LANES), all(-INFINITY)));
                for (int64_t i = 0; i < columns; i += LANES) {
                    vec x = exp2_of(load_float(w + i) - log);
                    store_float(w + i, x);
                    store_float(s + i, x * (load_float(s + i) - mean) * scale);
                }
            }
            product(padded, d, n, of_scores, columns, 1, k, d, of_q, d, 0);
            scatter_rows(of_q, count, d, 0, head_of(a + 6, to, unit, heads) + from * to.token, to.token);
            product(rows, d, count, of_scores, 1, columns, q + from * d, d, of_k, d, from > 0);
            product(rows, d, count, weights, 1, columns, grad + from * d, d, of_v, d, from > 0);
        }
        scatter_rows(of_k, n, d, 0, head_of(a + 7, to, unit, heads), to.token);
        scatter_rows(of_v, n, d, 0, head_of(a + 8, to, unit, heads), to.token);
    }
    _mm_sfence();
}
