/* Reads a buffer once with all OpenMP threads and sums it: the machine's streaming-read rate. */
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>

static uint64_t read_part(const uint64_t *data, size_t count) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i + 32 <= count; i += 32) {
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 8));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 16));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(data + i + 24));
    }
    a = _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d));
    return (uint64_t)_mm512_reduce_add_epi64(a);
}
#else
static uint64_t read_part(const uint64_t *data, size_t count) {
    uint64_t sum[8] = {0};
    for (size_t i = 0; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += data[i + j];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}
#endif

uint64_t stream_read(const uint64_t *data, size_t count, int threads) {
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int part = 0; part < threads; part++) {
        size_t per = count / (size_t)threads;
        total += read_part(data + per * (size_t)part, per);
    }
    return total;
}
