// Copies runs of bytes between two places in memory: gathering blocks, and scattering them.
#include "moves.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vllm_cpu {

namespace {

#if defined(__SSE2__)
constexpr int64_t kLine = 64;
// Below this, ordering the stores costs more than the caches' fills.
constexpr int64_t kShortest = 1024;

// Whole cache lines are written without being read first, which saves a third of the traffic.
void stream(char* to, const char* from, int64_t length) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= length; i += kLine) {
    const auto* in = reinterpret_cast<const __m128i*>(from + i);
    auto* out = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  memcpy(to + i, from + i, length - i);
}
#endif

}  // namespace

void move_pieces(const MoveArgs& a) {
  for (int64_t unit = 0; unit < a.units; ++unit) {
    const char* from = a.source + a.source_starts[unit];
    char* to = a.target + a.target_starts[unit];
    for (int64_t i = 0; i < a.num_pieces; ++i) {
      const Piece& piece = a.pieces[i];
#if defined(__SSE2__)
      if (a.streams && piece.length >= kShortest) {
        stream(to + piece.target, from + piece.source, piece.length);
        continue;
      }
#endif
      memcpy(to + piece.target, from + piece.source, piece.length);
    }
  }
#if defined(__SSE2__)
  if (a.streams) _mm_sfence();
#endif
}

}  // namespace vllm_cpu
