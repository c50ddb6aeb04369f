// Every op as C++ sees it: tensors in, checks made, a kernel of the right device run. One file in
// ops/ for each; the argument structs that kernels take are in cpu/kernels.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace sglite::ops {

// out = x / rms(x) * weight, row by row; with `residual`, residual += x comes first and the sum
// takes the place of x. Shapes: x, out, residual [rows, width]; weight [width].
void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double epsilon,
              double weight_offset, const std::optional<Tensor>& residual);

// out = (x - mean(x)) / deviation(x) * weight + bias, row by row, on the CPU. Shapes: x, out
// [rows, width]; weight, bias [width].
void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias, double epsilon);

// Rows [start, start + count) of a weight [n, k] into its packed storage, and out of it.
void pack_rows(const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows);
void unpack_rows(const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows);

// Bytes that linear wants as its workspace (uint8) for this x; often 0.
int64_t linear_workspace(const Tensor& x);

// out = x W^T + bias, rounded to out's dtype, + residual, rounded again. Shapes: x [..., k]; W
// [n, k], packed or in segments of rows; bias [n]; out and residual [..., n]. With an activation
// ("silu", "gelu", "gelu_tanh"), for which n is a multiple of 64, the rounded sums are gate, then
// up, and out = activation(gate) * up, [..., n / 2]; there is no residual then.
void linear_packed(const Tensor& out, const Tensor& x, const Tensor& storage, int64_t n, int64_t k,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& workspace,
                   const std::optional<std::string>& activation = std::nullopt);
void linear_plain(const Tensor& out, const Tensor& x, const std::vector<Tensor>& segments,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& workspace);

// Whether the CUDA kernel for few rows takes these: a dtype of 16 bits, rows that start at
// multiples of 16 bytes. For others, and for many rows, there is torch.
bool linear_takes(const Tensor& x, const std::vector<Tensor>& segments);

// On CUDA: linear_plain of one weight with x normalised first (see rms_norm), where there is a
// norm_weight; with an activation ("silu", "gelu", "gelu_tanh") the weight is [2 * n, k], gate,
// then up, and out = activation(gate) * up, both rounded before.
void linear_fused(const Tensor& out, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& norm_weight, double epsilon, double weight_offset,
                  const std::optional<std::string>& activation);

// A quantised weight [n, k] in panels; see sglite/ops/quantized_weight.py.
struct QuantizedTensors {
    Tensor codes;   // int8 [panels, steps, 8, 32], or int32 [panels, steps, 32] for 4 bits
    Tensor scales;  // [panels, groups, 32]
    std::optional<Tensor> zeros;  // int8, like scales
    int64_t n, k, group_size;
};

// Codes [count, k], int8, of the rows from `start` on into the panels.
void pack_codes(const QuantizedTensors& weight, int64_t start, const Tensor& codes);

// Rows [count, k], rounded to codes and scales, into the panels; without zero points.
void quantize_rows(const QuantizedTensors& weight, int64_t start, const Tensor& rows);

// out[i] = weight[start + i], and weight[ids[i]], as numbers. Shapes: out [count, k]; ids [count].
void read_quantized_rows(const QuantizedTensors& weight, int64_t start, const Tensor& out);
void embedding_quantized(const Tensor& out, const Tensor& ids, const QuantizedTensors& weight);

// Bytes that linear_quantized wants as its workspace (uint8) for this x; often 0.
int64_t linear_quantized_workspace(const Tensor& x, int64_t group_size);

// As linear_packed.
void linear_quantized(const Tensor& out, const Tensor& x, const QuantizedTensors& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& workspace,
                      const std::optional<std::string>& activation = std::nullopt);

// out[i] = table[ids[i]]. Shapes: ids [count], int64; table [n, k], packed or plain; out [count,
// k].
void embedding_packed(const Tensor& out, const Tensor& ids, const Tensor& storage, int64_t n,
                      int64_t k);
void embedding_plain(const Tensor& out, const Tensor& ids, const Tensor& weight);

// Rotates the first rotary_dim channels of each head in place. Shapes: q [tokens, heads, head_dim]
// and k [tokens, kv_heads, head_dim], any strides between heads; positions [tokens] int64; cos_sin
// [positions, rotary_dim] float32.
void apply_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin,
                bool interleaved);

// The norm of queries and keys (where there is one), their rotation, and the writing of keys and
// values, of a fused projection qkv [tokens, (heads + 2 * kv_heads) * head_dim]: queries in place,
// keys and values to the caches [pages, page_size, kv_heads, head_dim]; the columns of qkv that
// held keys are unspecified afterwards. The weights of the norms are [head_dim]; the rest as for
// apply_rope and write_kv, which, after rms_norm, give the same bits.
void rope_and_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                       const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                       const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                       double epsilon, double weight_offset, bool interleaved);

// out = activation(gate) * up. Shapes: x [rows, 2 * width], gate first; out [rows, width].
void silu_and_mul(const Tensor& out, const Tensor& x);
void gelu_and_mul(const Tensor& out, const Tensor& x, const std::string& approximate);

// Copies keys and values to their slots (page * page_size + offset). Shapes: k, v [tokens, heads,
// head_dim]; k_cache, v_cache [pages, page_size, heads, head_dim]; slots [tokens] int64.
void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots);

// slot[destinations[i]] = slot[sources[i]] in every cache [pages, page_size, heads, head_dim],
// where heads and head_dim may differ. sources, destinations [count] int64. All are read before the
// first is written.
void copy_kv_slots(const std::vector<Tensor>& caches, const Tensor& sources,
                   const Tensor& destinations);

// What changes single logits before tokens are drawn; see sglite/ops/sampling.py.
struct TokenEdits {
    Tensor offsets;  // [3, count + 1] int64
    Tensor seen;     // [any, 3] int32
    Tensor bias_ids, bias_values, allowed_ids;
};

// Bytes that sampling wants as its workspace (uint8) on the device of `like`, for so many rows of
// logits. On the CPU it makes do with less: what cpu::sampling_workspace_bytes says for one thread.
int64_t sampling_workspace_bytes(const Tensor& like, int64_t vocab, int64_t rows);

// A token for each row of float32 logits [any, vocab], `rows` [count] int64 picking rows of them.
// token_ids [count] int64 and status [count] int32 are written.
void sample(const Tensor& token_ids, const Tensor& status, const Tensor& logits,
            const std::optional<Tensor>& rows, const Tensor& reals, const Tensor& integers,
            const std::optional<TokenEdits>& edits, const Tensor& workspace);

// How many of the most probable tokens `log_probs` finds at most on the device of these logits.
int64_t most_top_tokens(const Tensor& logits);

// Log-probability and rank of one token of each row, and the top_n most probable tokens.
void log_probs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids,
               const Tensor& top_logprobs, const Tensor& logits, const std::optional<Tensor>& rows,
               const Tensor& token_ids, const Tensor& workspace);

// input_ids[i] = previous[sources[i]] where sources[i] >= 0. Shapes: input_ids [count] int64;
// previous [any] int64; sources [count] int32 or int64.
void gather_tokens(const Tensor& input_ids, const Tensor& previous, const Tensor& sources);

// Moves the rows of a decode batch on by the token that each has drawn; see sglite/ops/advance.py.
void advance(const Tensor& token_ids, const Tensor& input_ids, const Tensor& positions,
             const Tensor& kv_lens, const Tensor& kv_end, const Tensor& slots,
             const Tensor& integers, const Tensor& page_table, int64_t page_size);

}  // namespace sglite::ops
