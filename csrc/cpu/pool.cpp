#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>

namespace vllm_cpu {
namespace {

constexpr int kMaxThreads = 256;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One range of items; `next` is taken by fetch_add and may run past `last`.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t last = 0;
};

struct Pool {
  // Region number in the high half; helpers inside, plus kOpen while others may enter, in the low.
  static constexpr uint64_t kOpen = 1u << 31;
  static constexpr uint64_t kInside = kOpen - 1;

  alignas(64) std::atomic<uint64_t> state{0};
  // Changes with every region; what sleeping helpers wait on.
  alignas(64) std::atomic<uint32_t> bell{0};
  alignas(64) std::atomic<bool> busy{false};
  ItemFn fn = nullptr;
  void* context = nullptr;
  int num_ranges = 0;
  int threads = 0;
  int started = 0;
  int cores[kMaxThreads] = {};
  int num_cores = 0;
  // Counts the changes of `cores`: a helper binds itself anew when it has missed one.
  int bindings = 0;
  std::atomic<int64_t> spin_us{60};
  Range ranges[kMaxThreads];
};

// Never destroyed: helpers may be asleep in it when the process ends.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

void work(Pool& p, int self) {
  if (self >= p.threads) return;
  for (int step = 0; step < p.num_ranges; ++step) {
    Range& range = p.ranges[(self + step) % p.num_ranges];
    while (range.next.load(std::memory_order_relaxed) < range.last) {
      const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= range.last) break;
      p.fn(p.context, item);
    }
  }
}

bool enter(Pool& p, uint64_t& seen) {
  uint64_t state = p.state.load(std::memory_order_acquire);
  while ((state & Pool::kOpen) && (state >> 32) != seen) {
    if (p.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      seen = state >> 32;
      return true;
    }
  }
  return false;
}

// Binds the calling thread to its core, or to every core that the process's first thread may use.
void bind_self(const Pool& p, int self) {
#if defined(__linux__)
  cpu_set_t set;
  if (self < p.num_cores) {
    CPU_ZERO(&set);
    CPU_SET(p.cores[self], &set);
  } else if (sched_getaffinity(getpid(), sizeof(set), &set) != 0) {
    return;
  }
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#else
  (void)p;
  (void)self;
#endif
}

void* helper(void* argument) {
  Pool& p = pool();
  const int self = static_cast<int>(reinterpret_cast<intptr_t>(argument));
  uint64_t seen = 0;
  int bindings = 0;
  for (;;) {
    const uint32_t bell = p.bell.load(std::memory_order_acquire);
    if (enter(p, seen)) {
      if (bindings != p.bindings) {
        bindings = p.bindings;
        bind_self(p, self);
      }
      work(p, self);
      p.state.fetch_sub(1, std::memory_order_acq_rel);
      continue;
    }
    const auto until = std::chrono::steady_clock::now() +
                       std::chrono::microseconds(p.spin_us.load(std::memory_order_relaxed));
    bool rang = false;
    do {
      for (int i = 0; i < 64 && !rang; ++i) {
        relax();
        rang = p.bell.load(std::memory_order_acquire) != bell;
      }
    } while (!rang && std::chrono::steady_clock::now() < until);
    if (!rang) p.bell.wait(bell, std::memory_order_acquire);
  }
  return nullptr;
}

void start_helpers(Pool& p) {
  while (p.started < p.threads - 1) {
    pthread_t thread;
    const intptr_t self = p.started + 1;
    if (pthread_create(&thread, nullptr, helper, reinterpret_cast<void*>(self)) != 0) {
      p.threads = p.started + 1;
      return;
    }
    pthread_detach(thread);
    ++p.started;
  }
}

// A fork leaves only the calling thread: the child's helpers are started afresh.
void after_fork() {
  Pool& p = pool();
  const int threads = p.threads;
  new (&p) Pool;
  p.threads = threads;
}

int default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const long count = sysconf(_SC_NPROCESSORS_ONLN);
  return count > 0 ? static_cast<int>(count) : 1;
}

void prepare(Pool& p) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, after_fork); });
  if (p.threads == 0) p.threads = default_threads();
  if (p.threads > kMaxThreads) p.threads = kMaxThreads;
  start_helpers(p);
}

}  // namespace

void set_num_threads(int count, const int* cores, int num_cores) {
  Pool& p = pool();
  while (p.busy.exchange(true, std::memory_order_acquire)) sched_yield();
  p.threads = count < 1 ? 1 : (count > kMaxThreads ? kMaxThreads : count);
  p.num_cores = num_cores < kMaxThreads ? num_cores : kMaxThreads;
  for (int i = 0; i < p.num_cores; ++i) p.cores[i] = cores[i];
  if (p.num_cores > 0) bind_self(p, 0);
  ++p.bindings;
  prepare(p);
  p.busy.store(false, std::memory_order_release);
}

int num_threads() {
  Pool& p = pool();
  return p.threads == 0 ? default_threads() : p.threads;
}

void set_spin_us(int64_t microseconds) {
  pool().spin_us.store(microseconds, std::memory_order_relaxed);
}

void parallel_items(int64_t items, ItemFn fn, void* context) {
  Pool& p = pool();
  if (items <= 1 || p.threads == 1 || p.busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < items; ++i) fn(context, i);
    return;
  }
  if (p.started + 1 < p.threads || p.threads == 0) prepare(p);
  const int64_t parts = items < p.threads ? items : p.threads;
  p.fn = fn;
  p.context = context;
  p.num_ranges = static_cast<int>(parts);
  for (int64_t i = 0; i < parts; ++i) {
    p.ranges[i].next.store(items * i / parts, std::memory_order_relaxed);
    p.ranges[i].last = items * (i + 1) / parts;
  }
  const uint64_t region = (p.state.load(std::memory_order_relaxed) >> 32) + 1;
  p.state.store(region << 32 | Pool::kOpen, std::memory_order_release);
  p.bell.fetch_add(1, std::memory_order_release);
  p.bell.notify_all();
  work(p, 0);
  uint64_t inside = p.state.fetch_and(~Pool::kOpen, std::memory_order_acq_rel) & Pool::kInside;
  for (int spins = 0; inside != 0; ++spins) {
    relax();
    if (spins > 4000) sched_yield();
    inside = p.state.load(std::memory_order_acquire) & Pool::kInside;
  }
  p.busy.store(false, std::memory_order_release);
}

}  // namespace vllm_cpu
