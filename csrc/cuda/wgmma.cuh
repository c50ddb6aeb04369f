// Hopper's warpgroup matrix instructions (PTX: wgmma), by their bare PTX. Only code compiled for
// sm_90a has them: SGLITE_HAS_WGMMA says whether this pass of the compiler is for it, and a kernel
// that uses them must have another body, or none, in all other passes.
//
// A warpgroup is four warps, the first of which has an index divisible by 4. With w = warp % 4,
// g = lane / 4 and t = lane % 4, a lane holds of a result [64 x N], for every j < N / 8,
//   d[4 j] = D[16 w + g][8 j + 2 t],         d[4 j + 1] = D[16 w + g][8 j + 2 t + 1],
//   d[4 j + 2] = D[16 w + g + 8][8 j + 2 t], d[4 j + 3] = D[16 w + g + 8][8 j + 2 t + 1].
#pragma once

#include "cuda/primitives.cuh"

#ifdef __CUDACC__

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SGLITE_HAS_WGMMA 1
#endif

namespace sglite::cuda {

// Where the 16 bytes `chunk` (0 to 7) of a row lie, in bytes from the start of a tile whose rows
// are 128 bytes, swizzled: the bank conflicts of reading a column are gone. The tile starts at a
// multiple of 1024 bytes.
__device__ inline int swizzled(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Names an operand in shared memory that is cut into tiles like that, each 64 elements wide.
// With the summed index along rows (Q and K) only `address` counts; a tile is entered at a multiple
// of 32 bytes for each 16 elements. With the summed index across rows (V), tiles of neighbouring
// columns are `tile_bytes` apart; a tile is entered at a multiple of 16 rows.
__device__ inline uint64_t wgmma_operand(uint32_t address, uint32_t tile_bytes = 16) {
    constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * 128;
    return kSwizzle128 << 62 | (kEightRows >> 4) << 32 |
           static_cast<uint64_t>(tile_bytes >> 4) << 16 | address >> 4;
}

// Orders this warpgroup's earlier accesses of registers before the matrix instructions that follow.
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of matrix instructions.
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all groups but the last `kLeft` are done.
template <int kLeft>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving uses of registers across this point.
template <int kCount>
__device__ inline void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Eight accumulators each: their names in the instruction, and the variables.
#define SGLITE_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SGLITE_R1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SGLITE_R2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define SGLITE_R3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define SGLITE_R4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define SGLITE_R5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define SGLITE_R6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define SGLITE_R7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define SGLITE_R8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define SGLITE_R9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define SGLITE_R10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define SGLITE_R11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define SGLITE_R12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define SGLITE_R13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define SGLITE_R14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define SGLITE_R15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define SGLITE_D(i)                                                             \
    "+f"(d[i * 8]), "+f"(d[i * 8 + 1]), "+f"(d[i * 8 + 2]), "+f"(d[i * 8 + 3]), \
        "+f"(d[i * 8 + 4]), "+f"(d[i * 8 + 5]), "+f"(d[i * 8 + 6]), "+f"(d[i * 8 + 7])

#define SGLITE_R_24 SGLITE_R0 SGLITE_R1 SGLITE_R2
#define SGLITE_R_32 SGLITE_R_24 SGLITE_R3
#define SGLITE_R_40 SGLITE_R_32 SGLITE_R4
#define SGLITE_R_48 SGLITE_R_40 SGLITE_R5
#define SGLITE_R_64 SGLITE_R_48 SGLITE_R6 SGLITE_R7
#define SGLITE_R_80 SGLITE_R_64 SGLITE_R8 SGLITE_R9
#define SGLITE_R_88 SGLITE_R_80 SGLITE_R10
#define SGLITE_R_128 SGLITE_R_88 SGLITE_R11 SGLITE_R12 SGLITE_R13 SGLITE_R14 SGLITE_R15
#define SGLITE_D_24 SGLITE_D(0), SGLITE_D(1), SGLITE_D(2)
#define SGLITE_D_32 SGLITE_D_24, SGLITE_D(3)
#define SGLITE_D_40 SGLITE_D_32, SGLITE_D(4)
#define SGLITE_D_48 SGLITE_D_40, SGLITE_D(5)
#define SGLITE_D_64 SGLITE_D_48, SGLITE_D(6), SGLITE_D(7)
#define SGLITE_D_80 SGLITE_D_64, SGLITE_D(8), SGLITE_D(9)
#define SGLITE_D_88 SGLITE_D_80, SGLITE_D(10)
#define SGLITE_D_128 \
    SGLITE_D_88, SGLITE_D(11), SGLITE_D(12), SGLITE_D(13), SGLITE_D(14), SGLITE_D(15)

// d[64 x kN] = a[64 x 16] * b[16 x kN] (+ d), in float32. The product of two operands in shared
// memory sums along the rows of both; with `a` in registers it sums along the rows of `a` (as
// mma_16x8x16 takes them, each warp 16 rows) and across the rows of `b`.
template <typename T, int kN>
struct Wgmma {
    static_assert(kN == 0, "no such width");
};

#define SGLITE_WGMMA_SHARED(N, TYPE, REGISTERS, VARIABLES, A, B, P)                             \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N \
                 "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B ", p, 1, 1, 0, 0; }"    \
                 : VARIABLES                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define SGLITE_WGMMA_REGISTERS(N, TYPE, REGISTERS, VARIABLES, A0, A1, A2, A3, B)               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
                 "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 1;"                     \
                 : VARIABLES                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define SGLITE_WGMMA(N, HALF_N, I0, I1, I2, I3, I4)                                                \
    template <typename T>                                                                          \
    struct Wgmma<T, N> {                                                                           \
        static constexpr bool kBrain = FormatOf<T>::value == DType::kBFloat16;                     \
        __device__ static void shared(float (&d)[HALF_N], uint64_t a, uint64_t b, bool add) {      \
            if constexpr (kBrain) {                                                                \
                SGLITE_WGMMA_SHARED(#N, "bf16", SGLITE_R_##HALF_N, SGLITE_D_##HALF_N, I0, I1, I2); \
            } else {                                                                               \
                SGLITE_WGMMA_SHARED(#N, "f16", SGLITE_R_##HALF_N, SGLITE_D_##HALF_N, I0, I1, I2);  \
            }                                                                                      \
        }                                                                                          \
        __device__ static void registers(float (&d)[HALF_N], const uint32_t (&a)[4], uint64_t b) { \
            if constexpr (kBrain) {                                                                \
                SGLITE_WGMMA_REGISTERS(#N, "bf16", SGLITE_R_##HALF_N, SGLITE_D_##HALF_N, I0, I1,   \
                                       I2, I3, I4);                                                \
            } else {                                                                               \
                SGLITE_WGMMA_REGISTERS(#N, "f16", SGLITE_R_##HALF_N, SGLITE_D_##HALF_N, I0, I1,    \
                                       I2, I3, I4);                                                \
            }                                                                                      \
        }                                                                                          \
    }

SGLITE_WGMMA(48, 24, "%24", "%25", "%26", "%27", "%28");
SGLITE_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36");
SGLITE_WGMMA(80, 40, "%40", "%41", "%42", "%43", "%44");
SGLITE_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52");
SGLITE_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68");
SGLITE_WGMMA(160, 80, "%80", "%81", "%82", "%83", "%84");
SGLITE_WGMMA(176, 88, "%88", "%89", "%90", "%91", "%92");
SGLITE_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132");

}  // namespace sglite::cuda

#endif
