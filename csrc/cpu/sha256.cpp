// Chains of SHA-256 digests over blocks of token ids, by the processor's own instructions.
//
// One digest of a block of 16 tokens is two compressions, about 0.1 us; a call of a general library
// costs several times that before it begins. Processors without the instructions are left to one.
#include "sha256.h"

#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace vllm_cpu {

#if defined(__x86_64__)

namespace {

constexpr int64_t kChunk = 64;

// FIPS 180-4, 4.2.2 and 5.3.3.
alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
alignas(16) constexpr uint32_t kStart[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

#define SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))

// SHA-256 of a message that is padded already, as 32 bytes.
SHA_TARGET void digest_padded(const uint8_t* message, int64_t chunks, uint8_t* digest) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const auto words = [](const void* at) { return static_cast<const __m128i*>(at); };
  // The instructions want the eight words as ABEF and CDGH, highest first.
  __m128i low = _mm_shuffle_epi32(_mm_load_si128(words(kStart)), 0xB1);
  __m128i high = _mm_shuffle_epi32(_mm_load_si128(words(kStart + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(low, high, 8);
  __m128i cdgh = _mm_blend_epi16(high, low, 0xF0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      // Four words of the schedule, by four rounds.
      if (i < 4) {
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128(words(message + chunk * kChunk + 16 * i)), swap);
      } else {
        const __m128i newest = w[(i + 3) % 4];
        const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[i % 4], w[(i + 1) % 4]),
                                          _mm_alignr_epi8(newest, w[(i + 2) % 4], 4));
        w[i % 4] = _mm_sha256msg2_epu32(sum, newest);
      }
      const __m128i input = _mm_add_epi32(w[i % 4], _mm_load_si128(words(kRound + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, input);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(input, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  low = _mm_shuffle_epi32(abef, 0x1B);
  high = _mm_shuffle_epi32(cdgh, 0xB1);
  const __m128i abcd = _mm_blend_epi16(low, high, 0xF0);
  const __m128i efgh = _mm_alignr_epi8(high, low, 8);
  auto* out = reinterpret_cast<__m128i*>(digest);
  _mm_storeu_si128(out, _mm_shuffle_epi8(abcd, swap));
  _mm_storeu_si128(out + 1, _mm_shuffle_epi8(efgh, swap));
}

}  // namespace

bool has_sha256() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kSha = 1u << 29, kSse41 = 1u << 19, kSsse3 = 1u << 9;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & kSha)) return false;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & kSse41) && (c & kSsse3);
  }();
  return has;
}

void sha256_chain(const uint8_t* parent, const uint32_t* tokens, int64_t words, int64_t count,
                  uint8_t* digests) {
  const int64_t size = kDigestBytes + 4 * words;
  // A one bit, zeros, and the length in bits as eight bytes, big endian.
  const int64_t chunks = (size + 1 + 8 + kChunk - 1) / kChunk;
  std::vector<uint8_t> message(chunks * kChunk, 0);
  message[size] = 0x80;
  for (int i = 0; i < 8; ++i) {
    message[message.size() - 1 - i] = static_cast<uint8_t>(static_cast<uint64_t>(size) * 8 >> 8 * i);
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(message.data(), parent, kDigestBytes);
    std::memcpy(message.data() + kDigestBytes, tokens + i * words, 4 * words);
    uint8_t* digest = digests + i * kDigestBytes;
    digest_padded(message.data(), chunks, digest);
    parent = digest;
  }
}

#else

bool has_sha256() { return false; }

void sha256_chain(const uint8_t*, const uint32_t*, int64_t, int64_t, uint8_t*) {}

#endif

}  // namespace vllm_cpu
