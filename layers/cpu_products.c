/* Gradients of the weights of linear layers in bfloat16 on a processor's matrix tiles (AMX): part of `cpu_kernels.c`, whose
   words hold here too, as those of the files for attention. Other libraries turn a factor in memory first.

   A core computes a panel of the result in its second cache, and packs what it needs of both factors into tiles beside it,
   a slice of the depth after another: then every tile is 1 kB of memory on end. */

#define TILE_NUMBERS 512 /* of bfloat16 in a tile, and twice those of float32 */
#define SIDE 32          /* of a block of two by two tiles */
#define SLICE 256        /* of the depth, that are packed at a time */

int has_products(void) { return has_tiles(); }

/* Tiles of two left and two right factors, `steps` of each, into a block of four tiles, or added to it. */
INLINE void block_product(int64_t steps, const bfloat16 *a, const bfloat16 *b, float *c, int add) {
    SETTLE;
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, a += 2 * TILE_NUMBERS, b += 2 * TILE_NUMBERS) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE_NUMBERS, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE_NUMBERS, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
    SETTLE;
}

/* 32 rows of 32 numbers, those behind `rows` zeros, as two tiles of pairs of rows. Of columns 8 k to 8 k + 7 the first four
   are in the first tile, the others in the second. Turned, columns are the tiles' rows. */
INLINE void pack_rows(const bfloat16 *x, int64_t step, int64_t rows, int turned, bfloat16 *y) {
    for (int half = 0; half < 2; half++) {
        __m512i r[16];
        _Pragma("GCC unroll 16") for (int p = 0; p < 16; p++) {
            __m512i zero = _mm512_setzero_si512();
            __m512i low = 2 * p < rows ? _mm512_loadu_si512((const void *)(x + 2 * p * step)) : zero;
            __m512i high = 2 * p + 1 < rows ? _mm512_loadu_si512((const void *)(x + (2 * p + 1) * step)) : zero;
            r[p] = half ? _mm512_unpackhi_epi16(low, high) : _mm512_unpacklo_epi16(low, high);
        }
        if (turned) turn_16(r);
        _Pragma("GCC unroll 16") for (int p = 0; p < 16; p++) store_pairs((pair *)(y + half * TILE_NUMBERS) + p * 16, r[p]);
    }
}

/* From the columns of a block to their places. */
INLINE void unpack_columns(const float *low, const float *high, float *y) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i a = _mm512_loadu_si512((const void *)low), b = _mm512_loadu_si512((const void *)high);
    store_pairs((pair *)y, _mm512_permutex2var_epi64(a, first, b));
    store_pairs((pair *)(y + 16), _mm512_permutex2var_epi64(a, last, b));
}

int64_t weight_gradient_room(int64_t rows, int64_t columns) { /* bytes that a thread works in, for a panel */
    return rows * columns * 4 + (rows + columns) * SLICE * 2;
}

/* grad (n, d), x (n, c), out (d, c) in float32 = grad^T x, n, d, c, panels of d, panels of c, room, bytes of a thread;
   d and c are multiples of SIDE; unit: a panel */
void weight_gradient_bfloat16(const arg *a, int64_t first, int64_t end) {
    const bfloat16 *grad = a[0].p, *x = a[1].p;
    const int64_t n = a[3].i, d = a[4].i, c = a[5].i, of_d = a[6].i, of_c = a[7].i;
    tiles before;
    set_tiles(&before);
    for (int64_t unit = first; unit < end; unit++) {
        int64_t top = d / SIDE * (unit / of_c) / of_d, rows = d / SIDE * (unit / of_c + 1) / of_d - top; /* in blocks */
        int64_t left = c / SIDE * (unit % of_c) / of_c, columns = c / SIDE * (unit % of_c + 1) / of_c - left;
        float *sums = (float *)((char *)a[8].p + omp_get_thread_num() * a[9].i);
        bfloat16 *grads = (bfloat16 *)(sums + rows * columns * SIDE * SIDE), *inputs = grads + rows * SIDE * SLICE;
        for (int64_t from = 0; from < n; from += SLICE) {
            int64_t some = n - from < SLICE ? n - from : SLICE, steps = (some + AMX_DEPTH - 1) / AMX_DEPTH;
            for (int64_t k = 0; k < steps; k++) {
                int64_t at = from + k * AMX_DEPTH, count = n - at;
                for (int64_t i = 0; i < rows; i++)
                    pack_rows(grad + at * d + (top + i) * SIDE, d, count, 1, grads + (i * steps + k) * 2 * TILE_NUMBERS);
                for (int64_t j = 0; j < columns; j++)
                    pack_rows(x + at * c + (left + j) * SIDE, c, count, 0, inputs + (j * steps + k) * 2 * TILE_NUMBERS);
            }
            for (int64_t j = 0; j < columns; j++)
                for (int64_t i = 0; i < rows; i++)
                    block_product(steps, grads + i * steps * 2 * TILE_NUMBERS, inputs + j * steps * 2 * TILE_NUMBERS,
                                  sums + (j * rows + i) * SIDE * SIDE, from > 0);
        }
        for (int64_t i = 0; i < rows; i++)
            for (int64_t row = 0; row < SIDE; row++) {
                int64_t place = (top + i) * SIDE + row % 16 / 4 * 8 + row % 4 + row / 16 * 4;
                float *y = (float *)a[2].p + place * c + left * SIDE;
                for (int64_t j = 0; j < columns; j++) {
                    const float *block = sums + (j * rows + i) * SIDE * SIDE + row / 16 * 512 + row % 16 * 16;
                    unpack_columns(block, block + 256, y + j * SIDE);
                }
            }
    }
    reset_tiles(&before);
}
