// One call of the operator: what its stages share.
//
// B batch, T new tokens, n query heads, m KV heads, g = n / m, d head size, C capacity

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int TILE = 64;        // keys whose scores are at hand at once
constexpr int64_t CHUNK = 256;  // keys of a part in a decode step; a multiple of TILE
constexpr int ROWS = 96;        // queries of a part, about: those of as many tokens as fit
constexpr int MANY_ROWS = 192;  // the same where keys and values take long to be made ready
constexpr int WIDE = 8;         // floats in a vector; head sizes are multiples of it
constexpr int64_t MAX_HEAD = 1024;

struct Call {
    int64_t B, T, n, m, d, C, half;  // half: pairs of channels that turn with the position
    bool interleaved;
    float scale;
    const float *q, *k, *v;  // new tokens: a row of q's input has `width` floats, of k's and v's too
    int64_t q_width, kv_width;
    const void *past_k, *past_v;
    void *keys, *values;
    const float *k_scale, *v_scale;  // [m, d] for int8, else null
    const float *cosines, *sines;    // [positions, half]
    const int32_t* last;             // [B] index of each row's newest token
    float* out;                      // [B, T, n * d]

    int64_t tokens, blocks, parts;  // tokens in a block of rows; blocks; parts of the keys
    float* partial;                 // [B, m, blocks, parts, rows, d + 2] if there are several parts

    // Speculation checks 17 tokens in a step at most: their bits are those of single steps.
    bool many() const { return T > 17; }
    int64_t past(int64_t b) const { return std::max<int64_t>(0, int64_t{last[b]} + 1 - T); }
    int64_t group() const { return n / m; }
    int64_t stride() const { return tokens * group() * (d + 2); }
};
