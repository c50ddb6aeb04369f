// What a kernel takes, on any device: raw pointers, sizes and strides (in elements, unless said
// otherwise), checked in ops/. Fields that one kind of device alone reads say so.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace sglite {

struct RmsNormArgs {
    void* out;           // [rows, width]
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    void* residual;      // [rows, width] or null
    int64_t rows, width;
    int64_t out_stride, x_stride, residual_stride;
    float epsilon;
    float weight_offset;  // the scale is weight + weight_offset
    DType dtype;
};

struct LayerNormArgs {
    void* out;           // [rows, width]
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    const void* bias;    // [width] or null
    int64_t rows, width;
    int64_t out_stride, x_stride;
    float epsilon;
    DType dtype;
};

// Rows of a weight [N, K] going into packed panels or coming out of them.
struct PackRowsArgs {
    void* packed;      // the panels of the whole weight
    const void* rows;  // [count, k]; written to when unpacking
    int64_t row_stride;
    int64_t start, count, k;
    DType dtype;
};

// Some rows of a plain weight: `rows` rows of K elements each.
struct WeightSegment {
    const void* data;
    int64_t rows, stride;
};

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh };

struct LinearArgs {
    void* out;             // [m, n]; see is_gated
    const void* x;         // [m, k]
    const void* bias;      // [n] or null
    const void* residual;  // [m, n] of out_dtype or null; may be `out`
    const void* packed;    // panels, or null: then the weight is the segments, one after the other
    const WeightSegment* segments;
    int64_t num_segments;
    void* workspace;  // linear_workspace() bytes; null where that is 0
    int64_t m, n, k;
    int64_t out_stride, x_stride, residual_stride;
    DType dtype;      // of x, weight and bias
    DType out_dtype;  // dtype or float32
    // On the CPU (a GPU has LinearFusion): the rounded sums are gate, then up, each half of them
    // whole panels, and out is activation(gate) * up, [m, n / 2].
    bool is_gated;
    Activation activation;
};

// A linear layer over a quantised weight (cpu/quantized_panels.h); `linear` says all but the
// weight.
struct QuantizedLinearArgs {
    LinearArgs linear;
    const void* codes;    // panels
    const void* scales;   // [panels][groups][32]
    const int8_t* zeros;  // like scales, or null
    DType scale_dtype;
    int bits;                    // 4 or 8
    int64_t groups, group_size;  // several groups: a multiple of 8, at most kLargestGroup
};

// So many neighbouring k share a scale at most, unless all of them do.
constexpr int64_t kLargestGroup = 256;

// Codes of some rows, going into panels.
struct PackCodesArgs {
    void* packed;         // the panels of the whole weight
    const int8_t* codes;  // [count, k], between -8 and 7 where there are 4 bits
    int64_t row_stride, k_stride;
    int64_t start, count, k;
    int bits;
};

// Rows that are rounded to codes and scales, which go into panels.
struct QuantizeRowsArgs {
    void* packed;      // panels
    void* scales;      // [panels][groups][32]
    const void* rows;  // [count, k]
    int64_t row_stride;
    int64_t start, count, k;
    int64_t groups, group_size;
    int bits;
    DType scale_dtype, dtype;  // dtype: of rows
};

// Rows of a quantised weight as numbers: those from `start` on, or those in `ids`.
struct QuantizedRowsArgs {
    void* out;           // [count, k]
    const int64_t* ids;  // [count] or null
    const void* codes;   // panels
    const void* scales;
    const int8_t* zeros;  // or null
    int64_t start, count, k, out_stride;
    int64_t groups, group_size;
    int bits;
    DType scale_dtype, dtype;  // dtype: of out
};

struct EmbeddingArgs {
    void* out;           // [count, width]
    const int64_t* ids;  // [count], all within the table
    const void* table;   // plain rows, or panels where `packed`
    bool packed;
    int64_t count, width;
    int64_t out_stride, table_stride;
    DType dtype;
};

struct RopeArgs {
    // Queries and keys, each [tokens, heads, head_dim], rotated in place.
    struct Heads {
        void* data;
        int64_t count, token_stride, head_stride;
    } heads[2];
    const int64_t* positions;  // [tokens], rows of cos_sin
    const float* cos_sin;      // [table_rows, rotary_dim]: cosines, then sines
    int64_t table_rows, tokens, head_dim, rotary_dim;
    bool interleaved;
    DType dtype;
};

struct RopeAndWriteKvArgs {
    void* qkv;      // [tokens, q_heads + 2 * kv_heads, head_dim]; queries are changed in place
    void* k_cache;  // [slots, kv_heads, head_dim]
    void* v_cache;
    const void* q_weight;  // [head_dim], of RMSNorm, or both null
    const void* k_weight;
    const int64_t* positions;  // [tokens], rows of cos_sin
    const int64_t* slots;      // [tokens]
    const float* cos_sin;      // [table_rows, rotary_dim]: cosines, then sines
    int64_t tokens, q_heads, kv_heads, head_dim, token_stride;
    int64_t table_rows, rotary_dim;
    float epsilon, weight_offset;  // of the norm
    bool interleaved;
    DType dtype;
};

// What a linear layer does beside its product, on CUDA alone.
struct LinearFusion {
    const void* norm_weight;  // [k] or null: else x is normalised first, as RmsNormArgs has it
    float epsilon, weight_offset;
    bool is_gated;  // weight and bias have 2 * n rows, gate, then up; out = activation(gate) * up
    Activation activation;
};

struct GatedActivationArgs {
    void* out;      // [rows, width]
    const void* x;  // [rows, 2 * width]: gate, then up
    int64_t rows, width;
    int64_t out_stride, x_stride;
    Activation activation;
    DType dtype;
};

struct RouteArgs {
    float* weights;       // [rows, top_k]
    int64_t* experts;     // [rows, top_k]
    const float* logits;  // [rows, num_experts]
    int64_t rows, num_experts, top_k;
    int64_t logits_stride;
    bool normalize;  // whether weights are divided by their sum
};

// total[rows[i]] += factors[i] * x[i]
struct AddRowsArgs {
    float* total;         // [any, width]
    const void* x;        // [count, width]
    const int64_t* rows;  // [count], all different
    const float* factors;
    int64_t count, width;
    DType dtype;  // of x
};

struct RoundValuesArgs {
    void* out;
    const float* x;
    int64_t count;
    DType dtype;  // of out
};

// A mixture of experts on a GPU, whose weights are plain and dense, of the type of x.
struct ExpertMixArgs {
    void* out;                   // [rows, hidden]
    const void* x;               // [rows, hidden]
    const float* weights;        // [rows, top_k]
    const int64_t* experts;      // [rows, top_k]
    const void* const* gate_up;  // [num_experts], in the host's memory: each [2 * width, hidden]
    const void* const* down;     // likewise: each [hidden, width]
    void* workspace;             // expert_mix_workspace() bytes
    int64_t rows, hidden, width, num_experts, top_k;
    int64_t x_stride;
    Activation activation;
    DType dtype;  // of 16 bits
};

// So many experts at most: pointers to their weights are arguments of the kernel.
constexpr int64_t kMostKernelExperts = 128;

struct WriteKvArgs {
    // Keys and values: [tokens, row_bytes] to [slots, row_bytes].
    struct Side {
        const char* from;
        char* cache;
        int64_t token_stride, head_stride;  // of `from`, in bytes
    } sides[2];
    const int64_t* slots;  // [tokens]
    int64_t tokens, heads, head_bytes;
};

struct CopyKvSlotsArgs {
    struct Part {
        char* data;  // [slots, row_bytes]
        int64_t row_bytes;
    };
    const Part* parts;            // keys and values of each layer
    const int64_t* sources;       // [count]
    const int64_t* destinations;  // [count], all different
    char* workspace;              // [count, largest row_bytes]; the CPU's alone
    int64_t num_parts, count;
};

enum class SampleStatus : int32_t { kSampled = 0, kNotANumber = 1, kNothingLeft = 2 };

// Columns of SampleArgs' parameters.
enum SampleReal { kTemperature, kTopP, kMinP, kRepetition, kFrequency, kPresence, kSampleReals };
enum SampleInteger { kTopK, kSeed, kSampleIndex, kPosition, kSampleIntegers };

struct SampleArgs {
    int64_t* token_ids;            // [count], -1 where the status is not kSampled
    int32_t* status;               // [count]
    const float* logits;           // [any, vocab]
    const int64_t* logits_rows;    // [count], or null: row i of `logits` is row i
    const float* reals;            // [count, kSampleReals]
    const int64_t* integers;       // [count, kSampleIntegers]
    const int64_t* seen_start;     // [count + 1] into `seen`; null where no row has edits
    const int64_t* bias_start;     // [count + 1] into `bias_ids` and `bias_values`
    const int64_t* allowed_start;  // [count + 1] into `allowed_ids`; an empty range allows all
    const int32_t* seen;           // [any, 3]: token id, count in the output, whether in the prompt
    const int32_t* bias_ids;
    const float* bias_values;
    const int32_t* allowed_ids;
    char* workspace;  // on the CPU one for each worker
    int64_t count, vocab, logits_stride;
    int workers;  // threads; read on the CPU
};

struct LogProbsArgs {
    float* logprobs;             // [count]
    int64_t* ranks;              // [count]
    int64_t* top_ids;            // [count, top_n]
    float* top_logprobs;         // [count, top_n]
    const float* logits;         // [any, vocab]
    const int64_t* logits_rows;  // [count], or null: row i of `logits` is row i
    const int64_t* token_ids;    // [count]
    char* workspace;             // on the CPU one for each worker
    int64_t count, vocab, top_n, logits_stride;
    int workers;  // threads; read on the CPU
};

// The CUDA kernel finds so many of the most probable tokens at most.
constexpr int64_t kMostTopTokensOnGpu = 256;

struct GatherTokensArgs {
    int64_t* input_ids;       // [count]
    const int64_t* previous;  // [any]
    const void* sources;      // [count] int32 or int64: a row of `previous`, negative for none
    bool wide;                // whether sources are int64
    int64_t count;
};

// The rows of decode steps; see sglite/ops/advance.py.
struct AdvanceArgs {
    const int64_t* token_ids;   // [rows]
    int64_t* input_ids;         // [rows]
    int64_t* positions;         // [rows]
    int32_t* kv_lens;           // [rows]
    int32_t* kv_end;            // [rows]
    int64_t* slots;             // [rows]
    int64_t* integers;          // [rows, kSampleIntegers]
    const int32_t* page_table;  // [rows, max_pages]
    int64_t rows, max_pages, page_table_stride, page_size;
};

}  // namespace sglite
