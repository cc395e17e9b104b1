#include <atomic>
#include <cstdlib>
#include <new>

#include "types.h"

namespace vllm_cpu {
namespace {

void* aligned(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes < 64 ? 64 : bytes) != 0) throw std::bad_alloc();
  return data;
}

// A buffer that grows and is kept. Sizes are rounded up so that it seldom grows.
struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  void* reserve(size_t wanted) {
    if (wanted > bytes) {
      free(data);
      data = nullptr;
      bytes = 0;
      const size_t size = (wanted + wanted / 4 + 65535) & ~size_t{65535};
      data = aligned(size);
      bytes = size;
    }
    return data;
  }
};

struct ThreadBuffer : Buffer {
  ~ThreadBuffer() { free(data); }
};

// Three: a decoder layer holds one while attention plans in another and merges in the last. Not
// freed at exit: helpers may be at work still.
constexpr int kKept = 3;
Buffer kept[kKept];
std::atomic<bool> in_use[kKept];

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local ThreadBuffer buffer;
  return buffer.reserve(bytes);
}

SharedScratch::SharedScratch(size_t bytes) : data_(nullptr), slot_(-1) {
  for (int i = 0; i < kKept; ++i) {
    if (in_use[i].exchange(true, std::memory_order_acquire)) continue;
    slot_ = i;
    try {
      data_ = kept[i].reserve(bytes);
    } catch (...) {
      in_use[i].store(false, std::memory_order_release);
      throw;
    }
    return;
  }
  data_ = aligned(bytes);
}

SharedScratch::~SharedScratch() {
  if (slot_ < 0) {
    free(data_);
  } else {
    in_use[slot_].store(false, std::memory_order_release);
  }
}

size_t packed_bytes(int64_t n, int64_t k, int dtype) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  if (dtype == kFloat32) return static_cast<size_t>(panels * kPanel * k) * 4;
  return static_cast<size_t>(panels * kPanel * (dtype == kBFloat16 ? (k + 1) / 2 * 2 : k)) * 2;
}

}  // namespace vllm_cpu
