// rows16.cuh - 5 to 32 rows in f16, as gemm_batch.cu multiplies them: whoever makes a product's x leaves it so, if it can.
//
// A product needs g x in f16 (g: the norm's weights, or 1) and the squares of x.  The kernel that makes x has all of it, in other thread
// blocks; if the next one had to make it, they would meet once more, 3 to 6 us a product.  An op leaves rows for the op right after it,
// and says whose they are; whatever happens on the device in between (cuda::launches) makes them worthless.
#pragma once
#include "mma.cuh"

namespace cuda {

constexpr int BATCH_ROWS = 32;
constexpr int ROW_STEP = 64;      // inputs; rows end with zeros after so many
constexpr int ROW_BLOCK = 32;     // of two mma
constexpr int SQUARES = 16;       // inputs whose squares are added up first

// Rows go by eights, groups of them: 1, 2 or 4.  Numbers lie as the tensor core takes them: [ROW_BLOCK inputs][group][row][t], 16 bytes each,
// the inputs 2t, 2t + 1 of every 8; where weights are codes (fours) 4t ... 4t + 3 of every 16, which are a word of codes.
HD constexpr int row16_bytes(int groups) { return ROW_STEP / ROW_BLOCK * groups * 32 * 16; }    // of ROW_STEP inputs
struct Rows16 {
    uint4 *x = nullptr;           // null: not wanted
    float *squares = nullptr;     // [SQUARES inputs][row]
    int groups = 0;
    bool fours = false;
    // Pair i of lane t begins with this input of ROW_BLOCK.
    __device__ static int input(bool fours, int t, int i) { return fours ? i / 2 * 16 + t * 4 + i % 2 * 2 : i * 8 + t * 2; }
    // Inputs k and k + 1 of row n, k even.
    __device__ unsigned *pair(int n, int k) const {
        const int t = fours ? k % 16 / 4 : k % 8 / 2, i = fours ? k % ROW_BLOCK / 16 * 2 + k % 4 / 2 : k % ROW_BLOCK / 8;
        return (unsigned *)(x + (k / ROW_BLOCK * groups + n / 8) * 32 + n % 8 * 4 + t) + i;
    }
};

// Where the op that is about to be launched may leave N rows of `in`; rows of their own if those before it are read.
Rows16 leave_rows(int N, int in);
// It was launched, and the next op will read x (N, in) under a norm with that gain (null: none).
void rows_left(const float *x, const float *gain, int N, int in);
int64_t rows16_bytes(int N);    // of a step's memory, Step::rows16
}    // namespace cuda
