// Rotation of heads that are loaded in chunks of 16 bytes.
#pragma once

#include <initializer_list>

#include "cuda/norm.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

// Products and sums are rounded one by one, as torch rounds them.
template <typename T>
__device__ inline void rotate(T& first, T& second, float cosine, float sine) {
    const float a = to_float(first), b = to_float(second);
    first = from_float<T>(subtract(multiply(a, cosine), multiply(b, sine)));
    second = from_float<T>(add(multiply(b, cosine), multiply(a, sine)));
}

// Which two chunks of a head each of its lanes takes: channels that rotate together meet in one
// lane.
struct HeadLayout {
    int lanes;   // of a head
    int pairs;   // lanes whose first chunk rotates against their second; all where interleaved
    int rotary;  // chunks that rotate

    __device__ int first(int lane) const { return lane < pairs ? lane : lane + pairs; }
    __device__ int second(int lane) const { return lane < pairs ? lane + pairs : lane + lanes; }

    // Whether heads can be dealt out like this. Where they are also normalised, as many lanes as a
    // power of two, so that the sum of squares is the one of rms_norm.
    template <typename T>
    static bool fits(int64_t head_dim, int64_t rotary_dim, bool interleaved, bool normed,
                     const float* cos_sin) {
        const int64_t lanes = head_dim / (2 * kChunk<T>);
        const bool whole = rotary_dim == head_dim || interleaved;
        return head_dim % (2 * kChunk<T>) == 0 && lanes <= kWarp &&
               rotary_dim % (interleaved ? kChunk<T> : 2 * kChunk<T>) == 0 &&
               reinterpret_cast<uintptr_t>(cos_sin) % 16 == 0 &&
               (!normed || (whole && (lanes & (lanes - 1)) == 0));
    }
    template <typename T>
    static HeadLayout of(int64_t head_dim, int64_t rotary_dim, bool interleaved) {
        const int lanes = static_cast<int>(head_dim) / (2 * kChunk<T>);
        const int rotary = static_cast<int>(rotary_dim) / kChunk<T>;
        return {lanes, interleaved ? lanes : rotary / 2, rotary};
    }
};

// Cosines and sines of a lane's pairs, and the rotation of its two chunks.
template <typename T, bool kInterleaved>
class Rotation {
  public:
    static constexpr int kHalf = kChunk<T> / 2;

    // `row` is that of the token's position: cosines, then sines.
    __device__ void load(const float* row, const HeadLayout& layout, int lane) {
        const int half = layout.rotary * kHalf;
        const int first = layout.first(lane), second = layout.second(lane);
        if constexpr (kInterleaved) {
            if (first < layout.rotary) load_half(row + first * kHalf, half, 0);
            if (second < layout.rotary) load_half(row + second * kHalf, half, kHalf);
        } else if (lane < layout.pairs) {
            load_half(row + first * kChunk<T>, half, 0);
            load_half(row + first * kChunk<T> + kHalf, half, kHalf);
        }
    }

    __device__ void apply(Chunk<T>& first, Chunk<T>& second, const HeadLayout& layout,
                          int lane) const {
        if constexpr (kInterleaved) {
            if (layout.first(lane) < layout.rotary) apply_within(first, 0);
            if (layout.second(lane) < layout.rotary) apply_within(second, kHalf);
        } else if (lane < layout.pairs) {
            for (int j = 0; j < kChunk<T>; ++j) rotate(first[j], second[j], cosines_[j], sines_[j]);
        }
    }

  private:
    __device__ void load_half(const float* cosines, int half, int at) {
        const auto cosine = load_vector<kHalf>(cosines), sine = load_vector<kHalf>(cosines + half);
        for (int j = 0; j < kHalf; ++j) {
            cosines_[at + j] = cosine[j];
            sines_[at + j] = sine[j];
        }
    }
    __device__ void apply_within(Chunk<T>& chunk, int at) const {
        for (int j = 0; j < kHalf; ++j) {
            rotate(chunk[2 * j], chunk[2 * j + 1], cosines_[at + j], sines_[at + j]);
        }
    }

    float cosines_[kChunk<T>] = {}, sines_[kChunk<T>] = {};
};

}  // namespace sglite::cuda
