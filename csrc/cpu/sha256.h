#pragma once

#include <cstdint>

namespace vllm_cpu {

constexpr int64_t kDigestBytes = 32;

// This processor has instructions for SHA-256.
bool has_sha256();

// A chain of digests: each is SHA-256 of the digest before it (first `parent`) and of `words`
// little-endian 32-bit words. `digests` gets `count` times 32 bytes. Only where has_sha256().
void sha256_chain(const uint8_t* parent, const uint32_t* tokens, int64_t words, int64_t count,
                  uint8_t* digests);

}  // namespace vllm_cpu
