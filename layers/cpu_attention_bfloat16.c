/* Attention in bfloat16, forward and backward: part of `cpu_kernels.c`, whose words hold here too, as `cpu_attention.c`'s.

   Products take pairs of neighbouring numbers: a processor's matrix tiles (AMX), or else its dot products (AVX512-BF16).
   A left factor's pairs lie along its rows; a right factor's, of two rows, lie side by side, so that it is an array of
   pairs. Scores and sums are in float32. Backward computes scores transposed, a block of keys after another: what the
   rows of queries share are vectors then, and no matrix of scores is turned. */

#define AMX_SIDE 16  /* rows of a tile, and numbers of float32 in one */
#define AMX_DEPTH 32 /* of numbers that a tile's row holds; what a depth is a multiple of */
#define SOME 64      /* rows of a block of scores */
#define IMAGES 16    /* whose gradients of a bias are summed at a time */

typedef uint32_t pair; /* of bfloat16, the first in the lower half */

INLINE void store_pairs(pair *p, __m512i v) { _mm512_storeu_si512((void *)p, v); }
INLINE __m512i as_pairs(const bfloat16 *low, const bfloat16 *high) {
    __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)low));
    if (!high) return first;
    return _mm512_or_si512(first, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)high)), 16));
}

/* ---- products: c (rows, columns) = a (rows, depth) b (depth / 2, columns), or added to c; rows and columns are multiples
   of AMX_SIDE, depth of AMX_DEPTH; steps from row to row are in units of the arrays --------------------------------------- */

#define DOT_ROWS 8
#define DOT(WIDTH)                                                                                                     \
    INLINE void dot_##WIDTH(int64_t depth, const bfloat16 *a, int64_t ai, const pair *b, int64_t bk, float *c,         \
                            int64_t ci, int add) {                                                                     \
        __m512 sums[DOT_ROWS][WIDTH];                                                                                  \
        __m512i row[WIDTH];                                                                                            \
        EACH(i, DOT_ROWS) EACH(j, WIDTH) sums[i][j] = add ? _mm512_loadu_ps(c + i * ci + j * LANES) : (__m512)all(0);  \
        for (int64_t k = 0; k < depth / 2; k++, b += bk) {                                                             \
            EACH(j, WIDTH) row[j] = _mm512_loadu_si512((const void *)(b + j * LANES));                                 \
            EACH(i, DOT_ROWS) {                                                                                        \
                int32_t both;                                                                                          \
                memcpy(&both, a + i * ai + 2 * k, sizeof both);                                                        \
                __m512i left = _mm512_set1_epi32(both);                                                                \
                EACH(j, WIDTH) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)left, (__m512bh)row[j]);            \
            }                                                                                                          \
        }                                                                                                              \
        EACH(i, DOT_ROWS) EACH(j, WIDTH) _mm512_storeu_ps(c + i * ci + j * LANES, sums[i][j]);                         \
    }
DOT(1)
DOT(2)
DOT(3)

static void dot_product(int64_t rows, int64_t columns, int64_t depth, const bfloat16 *a, int64_t ai, const pair *b,
                        int64_t bk, float *c, int64_t ci, int add) {
    for (int64_t from = 0, width; from < columns; from += width * LANES) {
        int64_t left = (columns - from) / LANES;
        width = left == 4 ? 2 : left < 3 ? left : 3;
        for (int64_t i = 0; i < rows; i += DOT_ROWS) {
            if (width == 3) dot_3(depth, a + i * ai, ai, b + from, bk, c + i * ci + from, ci, add);
            else if (width == 2) dot_2(depth, a + i * ai, ai, b + from, bk, c + i * ci + from, ci, add);
            else dot_1(depth, a + i * ai, ai, b + from, bk, c + i * ci + from, ci, add);
        }
    }
}

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, first_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles;

/* Compilers do not know all that instructions for tiles read and write: memory is as the source says here. */
#define SETTLE __asm__ volatile("" ::: "memory")

/* Whether the system lets this process use tiles. */
static int has_tiles(void) {
    static int answer; /* 1: yes, -1: no; threads that ask at once are told the same */
    if (!answer) answer = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) ? -1 : 1;
    return answer > 0;
}

/* Two by two tiles of c, or fewer. */
INLINE void tile_product(int tall, int wide, int64_t depth, const bfloat16 *a, int64_t ai, const pair *b, int64_t bk,
                         float *c, int64_t ci, int add) {
    float *under = c + AMX_SIDE * ci;
    if (add) {
        _tile_loadd(0, c, 4 * ci);
        if (wide) _tile_loadd(1, c + AMX_SIDE, 4 * ci);
        if (tall) _tile_loadd(2, under, 4 * ci);
        if (tall && wide) _tile_loadd(3, under + AMX_SIDE, 4 * ci);
    } else {
        _tile_zero(0);
        if (wide) _tile_zero(1);
        if (tall) _tile_zero(2);
        if (tall && wide) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += AMX_DEPTH, a += AMX_DEPTH, b += AMX_DEPTH / 2 * bk) {
        _tile_loadd(4, a, 2 * ai);
        _tile_loadd(6, b, 4 * bk);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, b + AMX_SIDE, 4 * bk);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            _tile_loadd(5, a + AMX_SIDE * ai, 2 * ai);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (tall && wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * ci);
    if (wide) _tile_stored(1, c + AMX_SIDE, 4 * ci);
    if (tall) _tile_stored(2, under, 4 * ci);
    if (tall && wide) _tile_stored(3, under + AMX_SIDE, 4 * ci);
}

static void pair_product(int64_t rows, int64_t columns, int64_t depth, const bfloat16 *a, int64_t ai, const pair *b,
                         int64_t bk, float *c, int64_t ci, int add) {
    if (!has_tiles()) {
        dot_product(rows, columns, depth, a, ai, b, bk, c, ci, add);
        return;
    }
    SETTLE;
    for (int64_t from = 0; from < columns; from += 2 * AMX_SIDE)
        for (int64_t i = 0; i < rows; i += 2 * AMX_SIDE) {
            int tall = rows - i > AMX_SIDE, wide = columns - from > AMX_SIDE;
            const bfloat16 *left = a + i * ai;
            float *into = c + i * ci + from;
            if (tall && wide) tile_product(1, 1, depth, left, ai, b + from, bk, into, ci, add);
            else if (tall) tile_product(1, 0, depth, left, ai, b + from, bk, into, ci, add);
            else if (wide) tile_product(0, 1, depth, left, ai, b + from, bk, into, ci, add);
            else tile_product(0, 0, depth, left, ai, b + from, bk, into, ci, add);
        }
    SETTLE;
}

/* A thread's tiles as products want them, and as they were: other libraries may rely on theirs. */
static void set_tiles(tiles *before) {
    if (!has_tiles()) return;
    tiles all_alike = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        all_alike.bytes[i] = 4 * AMX_SIDE;
        all_alike.rows[i] = AMX_SIDE;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(*before));
    __asm__ volatile("ldtilecfg %0" : : "m"(all_alike));
}

static void reset_tiles(const tiles *before) {
    if (!has_tiles()) return;
    if (before->palette) __asm__ volatile("ldtilecfg %0" : : "m"(*before));
    else _tile_release();
}
#else
typedef int tiles;
#define pair_product dot_product
INLINE void set_tiles(tiles *before) { *before = 0; }
INLINE void reset_tiles(const tiles *before) { (void)before; }
#endif

/* ---- into the forms that products take ------------------------------------------------------------------------------ */

/* Rows of d numbers, `step` apart, one behind another, with zeros up to `wide` numbers and `padded` rows. */
static void copy_rows(const bfloat16 *x, int64_t step, int64_t n, int64_t padded, int64_t d, int64_t wide, bfloat16 *y) {
    for (int64_t row = 0; row < n; row++, y += wide) {
        for (int64_t i = 0; i < d; i += LANES) memcpy(y + i, x + row * step + i, LANES * sizeof *y);
        if (wide > d) memset(y + d, 0, (wide - d) * sizeof *y);
    }
    memset(y, 0, (padded - n) * wide * sizeof *y);
}

/* Pairs of neighbouring rows, (padded / 2, d), with zeros behind n rows. */
static void pair_rows(const bfloat16 *x, int64_t step, int64_t n, int64_t padded, int64_t d, pair *y) {
    for (int64_t row = 0; row < n; row += 2, y += d)
        for (int64_t i = 0; i < d; i += LANES) {
            const bfloat16 *low = x + row * step + i;
            store_pairs(y + i, as_pairs(low, row + 1 < n ? low + step : 0));
        }
    memset(y, 0, (padded / 2 - (n + 1) / 2) * d * sizeof *y);
}

/* 16 rows of 16 to columns. */
INLINE void turn_16(__m512i *r) {
    __m512i t[16];
    EACH(i, 8) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    EACH(i, 4) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    EACH(i, 4) { /* 0x88: the first and third quarters of both; 0xdd: the others */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    EACH(i, 4) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* (rows, columns), both multiples of 16, to (columns, rows). */
static void turn(const pair *x, int64_t rows, int64_t columns, pair *y) {
    for (int64_t row = 0; row < rows; row += 16)
        for (int64_t column = 0; column < columns; column += 16) {
            __m512i r[16];
            const pair *in = x + row * columns + column;
            pair *out = y + column * rows + row;
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((const void *)(in + i * columns));
            turn_16(r);
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) store_pairs(out + i * rows, r[i]);
        }
}

/* Rows of float32 to places `step` apart, each times its factor. */
static void put_rows(const float *x, int64_t n, int64_t d, const float *factors, bfloat16 *y, int64_t step) {
    for (int64_t row = 0; row < n; row++) {
        float factor = factors ? factors[row] : 1.0f;
        for (int64_t i = 0; i < d; i += LANES) store_bfloat16(y + row * step + i, load_float(x + row * d + i) * factor);
    }
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t n, d, wide, columns, depth; /* tokens, channels, and what they are padded to: channels, tokens, tokens */
} sizes;

INLINE sizes sizes_of(int64_t n, int64_t d) {
    return (sizes){n, d, up_to(d, AMX_DEPTH), up_to(n, AMX_SIDE), up_to(n, AMX_DEPTH)};
}

/* A thread's room, cut into arrays. */
typedef struct {
    bfloat16 *q, *k, *v, *weights, *of_scores;                          /* left factors */
    pair *q_turned, *k_turned, *grad_turned, *q_pairs, *v_pairs, *grad_pairs, *score_pairs; /* right ones */
    pair *spare;
    float *scores, *products, *result, *of_q, *means, *logs;
} room;

INLINE char *cut(char **from, int64_t bytes) {
    char *at = *from;
    *from += up_to(bytes, 64);
    return at;
}

/* Returns where the room ends. Of a forward pass what only backward wants is left out. */
static char *divide(sizes s, int backward, char *at, room *r) {
    int64_t of_rows = s.depth * s.wide * 2, of_weights = SOME * s.depth * 2, of_scores = SOME * s.columns * 4;
    r->q = (void *)cut(&at, of_rows);
    r->k_turned = (void *)cut(&at, of_rows);
    r->v_pairs = (void *)cut(&at, of_rows);
    r->spare = (void *)cut(&at, of_rows > s.columns * s.d * 4 ? of_rows : s.columns * s.d * 4);
    r->weights = (void *)cut(&at, of_weights);
    r->scores = (void *)cut(&at, of_scores);
    r->result = (void *)cut(&at, SOME * s.d * 4);
    if (!backward) return at;
    r->k = (void *)cut(&at, of_rows);
    r->v = (void *)cut(&at, of_rows);
    r->q_turned = (void *)cut(&at, of_rows);
    r->grad_turned = (void *)cut(&at, of_rows);
    r->q_pairs = (void *)cut(&at, of_rows);
    r->grad_pairs = (void *)cut(&at, of_rows);
    r->of_scores = (void *)cut(&at, of_weights);
    r->score_pairs = (void *)cut(&at, SOME / 2 * s.columns * 4);
    r->products = (void *)cut(&at, of_scores);
    r->of_q = (void *)cut(&at, s.d * s.columns * 4);
    r->means = (void *)cut(&at, s.columns * 4);
    r->logs = (void *)cut(&at, s.columns * 4);
    return at;
}

int64_t attention_room_bfloat16(int64_t n, int64_t d) { /* bytes that a thread works in */
    room unused;
    return divide(sizes_of(n, d), 1, 0, &unused) - (char *)0;
}

INLINE bfloat16 *place(const arg *x, strides s, int64_t unit, int64_t heads) {
    return (bfloat16 *)x->p + unit / heads * s.sample + unit % heads * s.head;
}

/* q, k, v, bias or none, out, logs, n, heads, d, scale, entries of the bias, room, bytes of a thread, strides of q, k, v and
   out; unit: a head of a sample. The bias is (entries, n, columns), times log2(e), entry unit % entries. */
void attention_bfloat16(const arg *a, int64_t first, int64_t end) {
    const int64_t heads = a[7].i, entries = a[10].i;
    const sizes s = sizes_of(a[6].i, a[8].i);
    const int64_t n = s.n, d = s.d, columns = s.columns;
    const strides of_q = strides_at(a + 13), of_k = strides_at(a + 16), of_v = strides_at(a + 19), to = strides_at(a + 22);
    const ivec last = held(n, columns);
    const float scale = a[9].f * LOG2_E, *bias = a[3].p;
    float factors[SOME];
    room r;
    tiles before;
    divide(s, 0, (char *)a[11].p + omp_get_thread_num() * a[12].i, &r);
    set_tiles(&before);
    for (int64_t unit = first; unit < end; unit++) {
        bfloat16 *out = place(a + 4, to, unit, heads);
        float *logs = (float *)a[5].p + unit * n;
        copy_rows(place(a + 1, of_k, unit, heads), of_k.token, n, columns, d, s.wide, (bfloat16 *)r.spare);
        turn(r.spare, columns, s.wide / 2, r.k_turned);
        copy_rows(place(a, of_q, unit, heads), of_q.token, n, columns, d, s.wide, r.q);
        pair_rows(place(a + 2, of_v, unit, heads), of_v.token, n, s.depth, d, r.v_pairs);
        for (int64_t from = 0; from < n; from += SOME) {
            int64_t count = n - from < SOME ? n - from : SOME, padded = up_to(count, AMX_SIDE);
            pair_product(padded, columns, s.wide, r.q + from * s.wide, s.wide, r.k_turned, columns, r.scores, columns, 0);
            for (int64_t row = 0; row < count; row++) {
                float *w = r.scores + row * columns;
                const float *added = bias ? bias + (unit % entries * n + from + row) * columns : 0;
                bfloat16 *to_row = r.weights + row * s.depth;
                vec top = all(-INFINITY), sum = all(0);
                for (int64_t i = 0; i < columns; i += LANES) {
                    vec x = load_float(w + i) * scale;
                    if (added) x += load_float(added + i);
                    if (i + LANES == columns) x = choose(last, x, all(-INFINITY));
                    store_float(w + i, x);
                    top = larger(x, top); /* a NaN is found by the sum */
                }
                float peak = highest(top);
                for (int64_t i = 0; i < columns; i += LANES) {
                    vec x = exp2_of(load_float(w + i) - peak);
                    store_bfloat16(to_row + i, x);
                    sum += x;
                }
                if (s.depth > columns) memset(to_row + columns, 0, (s.depth - columns) * sizeof *to_row);
                float of_row = total(sum);
                factors[row] = 1.0f / of_row;
                logs[from + row] = peak + log2f(of_row);
            }
            pair_product(padded, d, s.depth, r.weights, s.depth, r.v_pairs, d, r.result, d, 0);
            put_rows(r.result, count, d, factors, out + from * to.token, to.token);
        }
    }
    reset_tiles(&before);
}

/* Two rows of weights and of gradients of scores, transposed, of a block's scores and products: the gradients also as pairs
   and, if wanted, unscaled added to the bias's. */
INLINE void weigh(const room *r, sizes s, int64_t row, int64_t count, ivec last, float scale, const float *bias,
                  float *of_bias) {
    bfloat16 *weights[2], *of_scores[2];
    for (int k = 0; k < 2; k++) {
        weights[k] = r->weights + (row + k) * s.depth;
        of_scores[k] = r->of_scores + (row + k) * s.depth;
    }
    for (int64_t i = 0; i < s.columns; i += LANES) {
        vec log = load_float(r->logs + i), mean = load_float(r->means + i);
        for (int k = 0; k < 2; k++) {
            vec weight = all(0), slope = all(0);
            if (row + k < count) {
                int64_t at = (row + k) * s.columns + i;
                vec x = load_float(r->scores + at) * (scale * LOG2_E);
                if (bias) x += load_float(bias + at);
                weight = exp2_of(x - log);
                slope = weight * (load_float(r->products + at) - mean);
                if (i + LANES == s.columns) {
                    weight = choose(last, weight, all(0));
                    slope = choose(last, slope, all(0));
                }
                if (of_bias) store_float(of_bias + at, load_float(of_bias + at) + slope);
            }
            store_bfloat16(weights[k] + i, weight);
            store_bfloat16(of_scores[k] + i, slope * scale);
        }
        store_pairs(r->score_pairs + row / 2 * s.columns + i, as_pairs(of_scores[0] + i, of_scores[1] + i));
    }
    for (int k = 0; k < 2 && s.depth > s.columns; k++) {
        memset(weights[k] + s.columns, 0, (s.depth - s.columns) * sizeof(bfloat16));
        memset(of_scores[k] + s.columns, 0, (s.depth - s.columns) * sizeof(bfloat16));
    }
}

/* grad, q, k, v, bias or none, out, logs, of_q, of_k, of_v, of_bias or none, n, heads, d, scale, entries of the bias, room,
   bytes of a thread, heads of all samples, strides of q, k, v, out and of_q; unit: a head of a sample, or, with a bias, of
   IMAGES samples those of an entry. The bias is as forward, but transposed, (entries, n of keys, columns of queries); its
   gradient likewise, one for each unit. */
void attention_backward_bfloat16(const arg *a, int64_t first, int64_t end) {
    const int64_t heads = a[12].i, entries = a[15].i, of_all = a[18].i;
    const sizes s = sizes_of(a[11].i, a[13].i);
    const int64_t n = s.n, d = s.d, columns = s.columns;
    const strides at_q = strides_at(a + 19), at_k = strides_at(a + 22), at_v = strides_at(a + 25);
    const strides behind = strides_at(a + 28), to = strides_at(a + 31);
    const ivec last = held(n, columns);
    const float scale = a[14].f, *bias = a[4].p;
    float *of_bias = a[10].p;
    room r;
    tiles before;
    divide(s, 1, (char *)a[16].p + omp_get_thread_num() * a[17].i, &r);
    set_tiles(&before);
    for (int64_t work = first; work < end; work++) {
        int64_t unit = work, behind_last = work + 1, step = 1;
        if (bias) {
            step = entries;
            unit = work / entries * IMAGES * entries + work % entries;
            behind_last = unit + IMAGES * entries < of_all ? unit + IMAGES * entries : of_all;
            if (of_bias) memset(of_bias + work * n * columns, 0, n * columns * sizeof *of_bias);
        }
        for (; unit < behind_last; unit += step) {
            const bfloat16 *grad = place(a, behind, unit, heads), *out = place(a + 5, behind, unit, heads);
            const bfloat16 *q = place(a + 1, at_q, unit, heads), *k = place(a + 2, at_k, unit, heads);
            bfloat16 *of_k = place(a + 8, to, unit, heads), *of_v = place(a + 9, to, unit, heads);
            copy_rows(k, at_k.token, n, columns, d, s.wide, r.k);
            copy_rows(place(a + 3, at_v, unit, heads), at_v.token, n, columns, d, s.wide, r.v);
            copy_rows(q, at_q.token, n, columns, d, s.wide, (bfloat16 *)r.spare);
            turn(r.spare, columns, s.wide / 2, r.q_turned);
            pair_rows(q, at_q.token, n, s.depth, d, r.q_pairs);
            copy_rows(grad, behind.token, n, columns, d, s.wide, (bfloat16 *)r.spare);
            turn(r.spare, columns, s.wide / 2, r.grad_turned);
            pair_rows(grad, behind.token, n, s.depth, d, r.grad_pairs);
            pair_rows(k, at_k.token, n, s.depth, d, r.spare);
            turn(r.spare, s.depth / 2, d, r.k_turned); /* (d, depth) as a left factor */
            for (int64_t row = 0; row < columns; row++) {
                vec inner = all(0);
                for (int64_t i = 0; row < n && i < d; i += LANES)
                    inner += load_bfloat16(out + row * behind.token + i) * load_bfloat16(grad + row * behind.token + i);
                r.means[row] = total(inner);
                r.logs[row] = row < n ? ((const float *)a[6].p)[unit * n + row] : 0;
            }
            for (int64_t from = 0; from < n; from += SOME) {
                int64_t count = n - from < SOME ? n - from : SOME, padded = up_to(count, AMX_SIDE);
                int64_t deep = up_to(count, AMX_DEPTH), of_entry = from * columns;
                pair_product(padded, columns, s.wide, r.k + from * s.wide, s.wide, r.q_turned, columns, r.scores, columns, 0);
                pair_product(padded, columns, s.wide, r.v + from * s.wide, s.wide, r.grad_turned, columns, r.products,
                             columns, 0);
                for (int64_t row = 0; row < deep; row += 2)
                    weigh(&r, s, row, count, last, scale, bias ? bias + unit % entries * n * columns + of_entry : 0,
                          of_bias ? of_bias + work * n * columns + of_entry : 0);
                pair_product(padded, d, s.depth, r.weights, s.depth, r.grad_pairs, d, r.result, d, 0);
                put_rows(r.result, count, d, 0, of_v + from * to.token, to.token);
                pair_product(padded, d, s.depth, r.of_scores, s.depth, r.q_pairs, d, r.result, d, 0);
                put_rows(r.result, count, d, 0, of_k + from * to.token, to.token);
                pair_product(d, columns, deep, (bfloat16 *)r.k_turned + from, s.depth, r.score_pairs, columns, r.of_q,
                             columns, from > 0);
            }
            turn((pair *)r.of_q, d, columns, r.spare);
            put_rows((float *)r.spare, n, d, 0, place(a + 7, to, unit, heads), to.token);
        }
    }
    reset_tiles(&before);
}
