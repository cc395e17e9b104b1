#pragma once

#include <cstdint>

namespace vllm_cpu {

// A run of bytes of every unit: from `source` past the unit's start there to `target` past its
// start here.
struct Piece {
  int64_t source;
  int64_t target;
  int64_t length;
};

struct MoveArgs {
  const char* source;
  char* target;
  const int64_t* source_starts;  // of each unit
  const int64_t* target_starts;
  int64_t units;
  const Piece* pieces;
  int64_t num_pieces;
  bool streams;  // what is written is not read soon: go past the caches
};

void move_pieces(const MoveArgs& a);

}  // namespace vllm_cpu
