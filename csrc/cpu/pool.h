// The threads that the kernels share.
//
// A region hands out items; each thread first takes those of its own range, then helps the others.
// The caller takes part and never waits for a thread that has not started: on a machine whose cores
// are shared with other processes, a helper that the kernel has put aside costs its work, not a
// time slice of everybody. (A team barrier, as OpenMP has, would cost that.) No OpenMP runtime is
// linked, so torch's is the only one in the process.
#pragma once

#include <cstdint>

namespace vllm_cpu {

// Runs item `item`; `context` is the caller's.
using ItemFn = void (*)(void* context, int64_t item);

// Use `count` threads from now on (the caller is one of them). Helper i is bound to cores[i] if
// num_cores > 0. Not to be called while a region runs.
void set_num_threads(int count, const int* cores, int num_cores);

int num_threads();

// How long an idle helper spins before it sleeps, in microseconds.
void set_spin_us(int64_t microseconds);

// Runs fn(context, i) for every i in [0, items), then returns. Called from two threads at once, or
// from inside an item, it runs the items in the calling thread.
void parallel_items(int64_t items, ItemFn fn, void* context);

template <typename Body>
void parallel_for(int64_t items, const Body& body) {
  parallel_items(
      items, [](void* context, int64_t item) { (*static_cast<const Body*>(context))(item); },
      const_cast<Body*>(&body));
}

}  // namespace vllm_cpu
