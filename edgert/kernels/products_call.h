// One call of the operator: what its stages share.
//
// M rows of K activations, N columns; codes lie in blocks along K, which have a scale each and are
// made of groups of 32

#pragma once

#include <cstdint>

constexpr int LINE = 64;          // bytes of a line of memory
constexpr int WIDE = 8;           // floats in a vector
constexpr int GROUP = 32;         // codes that are taken at once
constexpr int ROWS_AT_ONCE = 8;   // rows that share what is read of the weights
constexpr int64_t MAX_BLOCK = 1024;

struct Call {
    int64_t M, N, K, each, blocks, groups;  // each: groups of a block
    const float* x;                         // [M, K]
    const uint8_t* codes;                   // [N, groups, GROUP * bits / 8]
    const float* scales;                    // [N, blocks]
    const uint8_t* zeros;                   // [N, zero_bytes], or null: all are `middle`
    int64_t zero_bytes, middle;
    float* y;         // [M, N]
    void* rounded;    // [M, groups, GROUP] in the order of the codes, of a stage's own type
    float* steps;     // [M] what 1 of a row's rounded ones stands for

    int64_t panel, panels, chunk;  // columns of a piece; pieces beside each other; rows of a piece
};
