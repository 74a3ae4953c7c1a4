// The tile registers of AMX: 8 of up to 16 rows of 64 bytes. tdpbusd multiplies 16 rows x 64 int8 by 64 x 16, tdpbf16ps
// 16 x 32 bf16 by 32 x 16; the second operand holds 4, or 2, consecutive k of a column side by side.
#pragma once

#include "cpu/kernels/fp8_bf16.h"

#if SQ_X86

#define SQ_AMX_FEATURES SQ_BF16_FEATURES ",amx-tile,amx-int8,amx-bf16"
#define SQ_AMX __attribute__((target(SQ_AMX_FEATURES)))
#define SQ_AMX_INLINE inline __attribute__((always_inline, target(SQ_AMX_FEATURES)))

namespace sq {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles of a thread, all of them whole, while it lives.
class Tiles {
 public:
  SQ_AMX_INLINE Tiles() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  SQ_AMX_INLINE ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Between stores and the tile loads that read them: gcc does not know that a tile load reads memory.
inline __attribute__((always_inline)) void finish_stores() { __asm__ volatile("" ::: "memory"); }

}  // namespace sq

#endif
