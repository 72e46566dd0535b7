// Weight: the decoder of the format this file is compiled for (-DFORMAT=Q4_K ...).
//
// A decoder holds one tile of 16 rows as stored, 32 lanes together: `load` fetches it, or with `half` 1 half a tile (lane
// 4 g + quad: rows g and g + 8, inputs 32 quad to 32 quad + 31 of each 128), `prepare(chunk)` works out the scales of one
// 128-wide chunk, `expand(chunk, pair, even, odd)` gives the bf16 operands of MMAs 2 pair and 2 pair + 1 of that chunk,
// 0 <= pair < 4. The layout is defined in quant/repack_bits.
//
// Integers need no conversion: bf16 with exponent field 0 or 1 is evenly spaced, so the bits v < 256 read as bf16 mean
// v 2^-133, exactly. One fma(bits, scale 2^117, offset 2^-16) gives the weight times 2^-16, rounded once; sums are
// multiplied by SCALE = 2^16 at the end, which is exact. Holds for |scale| < 2^10.
#pragma once
#include "kquant.cuh"
#include "plain.cuh"

using Weight = FORMAT;
constexpr int CHUNKS = Weight::TILE_K / 128;   // of one tile
constexpr int STAGES_X = Weight::TILE_K / 64;  // pieces of 64 inputs in one tile
constexpr int GROUP_BYTES = 1024;              // 8 tokens x 64 inputs of the x image

// With HALF_END strips end with half a tile: of each plane the parts of lanes 4 g and 4 g + 1, who have the first 64
// inputs. The other lanes read the same once more: their inputs are zeros. No branch, or loads would not be ahead.
template <class Weight>
DEVICE void load_tile(Weight& r, const char* tile, int lane, bool is_half) {
  const int half = HALF_END && is_half;
  r.load(tile, half ? lane / 4 * 2 + lane % 2 : lane, half);
}
// of `depth` tiles
template <class Weight>
DEVICE u64 strip_bytes(int depth) { return (u64)depth * Weight::TILE_BYTES - (HALF_END ? Weight::TILE_BYTES / 2 : 0); }
