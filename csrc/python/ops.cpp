// The ops as Python functions.
#include "ops.h"

#include <array>

#include "cpu/kernels.h"
#include "ops/attention.h"
#include "ops/attention_cuda.h"
#include "ops/system_memory.h"
#include "python/bindings.h"
#include "python/quantized.h"
#include "python/torch_tensor.h"

namespace sglite {

static void bind_norm(py::module_& m) {
    m.def(
        "rms_norm",
        [](const Tensor& out, const Tensor& x, const Tensor& weight, double epsilon,
           double weight_offset, const std::optional<Tensor>& residual) {
            ReleaseGilIfLong release(static_cast<double>(x.numel()) * 4);
            ops::rms_norm(out, x, weight, epsilon, weight_offset, residual);
        },
        py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("epsilon"),
        py::arg("weight_offset"), py::arg("residual"));
    m.def(
        "layer_norm",
        [](const Tensor& out, const Tensor& x, const Tensor& weight,
           const std::optional<Tensor>& bias, double epsilon) {
            ReleaseGilIfLong release(static_cast<double>(x.numel()) * 6);
            ops::layer_norm(out, x, weight, bias, epsilon);
        },
        py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"));
}

static void bind_linear(py::module_& m) {
    m.def(
        "pack_rows",
        [](const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows) {
            ReleaseGilIfLong release(static_cast<double>(rows.numel()) * 4);
            ops::pack_rows(storage, n, k, start, rows);
        },
        py::arg("storage"), py::arg("n"), py::arg("k"), py::arg("start"), py::arg("rows"));
    m.def(
        "unpack_rows",
        [](const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows) {
            ReleaseGilIfLong release(static_cast<double>(rows.numel()) * 4);
            ops::unpack_rows(storage, n, k, start, rows);
        },
        py::arg("storage"), py::arg("n"), py::arg("k"), py::arg("start"), py::arg("rows"));
    m.def("advise_huge_pages", &ops::advise_huge_pages, py::arg("storage"));
    m.def(
        "map_pages",
        [](const Tensor& contents) {
            const py::gil_scoped_release release;
            ops::map_pages(contents);
        },
        py::arg("contents"));
    m.def("linear_workspace", &ops::linear_workspace, py::arg("x"));
    m.def(
        "linear_packed",
        [](const Tensor& out, const Tensor& x, const Tensor& storage, int64_t n, int64_t k,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& workspace, const std::optional<std::string>& activation) {
            ReleaseGilIfLong release(2.0 * static_cast<double>(x.numel()) * static_cast<double>(n));
            ops::linear_packed(out, x, storage, n, k, bias, residual, workspace, activation);
        },
        py::arg("out"), py::arg("x"), py::arg("storage"), py::arg("n"), py::arg("k"),
        py::arg("bias"), py::arg("residual"), py::arg("workspace"), py::arg("activation"));
    m.def(
        "linear_plain",
        [](const Tensor& out, const Tensor& x, const std::vector<Tensor>& segments,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& workspace) {
            double weights = 0;
            for (const Tensor& segment : segments) weights += static_cast<double>(segment.numel());
            const double rows =
                x.ndim && x.size(-1) ? static_cast<double>(x.numel() / x.size(-1)) : 0;
            ReleaseGilIfLong release(2.0 * rows * weights);
            ops::linear_plain(out, x, segments, bias, residual, workspace);
        },
        py::arg("out"), py::arg("x"), py::arg("segments"), py::arg("bias"), py::arg("residual"),
        py::arg("workspace"));
}

static void bind_fused_linear(py::module_& m) {
    m.def("linear_takes", &ops::linear_takes, py::arg("x"), py::arg("segments"));
    m.def("linear_fused", &ops::linear_fused, py::arg("out"), py::arg("x"), py::arg("weight"),
          py::arg("bias"), py::arg("residual"), py::arg("norm_weight"), py::arg("epsilon"),
          py::arg("weight_offset"), py::arg("activation"));
}

static void bind_embedding(py::module_& m) {
    m.def(
        "embedding_packed",
        [](const Tensor& out, const Tensor& ids, const Tensor& storage, int64_t n, int64_t k) {
            ReleaseGilIfLong release(static_cast<double>(out.numel()) * 4);
            ops::embedding_packed(out, ids, storage, n, k);
        },
        py::arg("out"), py::arg("ids"), py::arg("storage"), py::arg("n"), py::arg("k"));
    m.def(
        "embedding_plain",
        [](const Tensor& out, const Tensor& ids, const Tensor& weight) {
            ReleaseGilIfLong release(static_cast<double>(out.numel()) * 4);
            ops::embedding_plain(out, ids, weight);
        },
        py::arg("out"), py::arg("ids"), py::arg("weight"));
}

static void bind_quantized(py::module_& m) {
    m.def(
        "pack_codes",
        [](const QuantizedWeight& weight, int64_t start, const Tensor& codes) {
            ReleaseGilIfLong release(static_cast<double>(codes.numel()) * 4);
            ops::pack_codes(named(weight), start, codes);
        },
        py::arg("weight"), py::arg("start"), py::arg("codes"));
    m.def(
        "quantize_rows",
        [](const QuantizedWeight& weight, int64_t start, const Tensor& rows) {
            ReleaseGilIfLong release(static_cast<double>(rows.numel()) * 4);
            ops::quantize_rows(named(weight), start, rows);
        },
        py::arg("weight"), py::arg("start"), py::arg("rows"));
    m.def(
        "read_quantized_rows",
        [](const QuantizedWeight& weight, int64_t start, const Tensor& out) {
            ReleaseGilIfLong release(static_cast<double>(out.numel()) * 4);
            ops::read_quantized_rows(named(weight), start, out);
        },
        py::arg("weight"), py::arg("start"), py::arg("out"));
    m.def(
        "embedding_quantized",
        [](const Tensor& out, const Tensor& ids, const QuantizedWeight& weight) {
            ReleaseGilIfLong release(static_cast<double>(out.numel()) * 4);
            ops::embedding_quantized(out, ids, named(weight));
        },
        py::arg("out"), py::arg("ids"), py::arg("weight"));
    m.def("linear_quantized_workspace", &ops::linear_quantized_workspace, py::arg("x"),
          py::arg("group_size"));
    m.def(
        "linear_quantized",
        [](const Tensor& out, const Tensor& x, const QuantizedWeight& weight,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& workspace, const std::optional<std::string>& activation) {
            const ops::QuantizedTensors tensors = named(weight);
            ReleaseGilIfLong release(2.0 * static_cast<double>(x.numel()) *
                                     static_cast<double>(tensors.n));
            ops::linear_quantized(out, x, tensors, bias, residual, workspace, activation);
        },
        py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("workspace"), py::arg("activation"));
}

static void bind_rope(py::module_& m) {
    m.def(
        "apply_rope",
        [](const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin,
           bool interleaved) {
            ReleaseGilIfLong release(static_cast<double>(q.numel() + k.numel()) * 4);
            ops::apply_rope(q, k, positions, cos_sin, interleaved);
        },
        py::arg("q"), py::arg("k"), py::arg("positions"), py::arg("cos_sin"),
        py::arg("interleaved"));
    m.def(
        "rope_and_write_kv",
        [](const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin, const Tensor& k_cache,
           const Tensor& v_cache, const Tensor& slots, const std::optional<Tensor>& q_norm,
           const std::optional<Tensor>& k_norm, double epsilon, double weight_offset,
           bool interleaved) {
            ReleaseGilIfLong release(static_cast<double>(qkv.numel()) * 4);
            ops::rope_and_write_kv(qkv, positions, cos_sin, k_cache, v_cache, slots, q_norm, k_norm,
                                   epsilon, weight_offset, interleaved);
        },
        py::arg("qkv"), py::arg("positions"), py::arg("cos_sin"), py::arg("k_cache"),
        py::arg("v_cache"), py::arg("slots"), py::arg("q_norm"), py::arg("k_norm"),
        py::arg("epsilon"), py::arg("weight_offset"), py::arg("interleaved"));
}

static void bind_activation(py::module_& m) {
    m.def(
        "silu_and_mul",
        [](const Tensor& out, const Tensor& x) {
            ReleaseGilIfLong release(static_cast<double>(x.numel()) * 16);
            ops::silu_and_mul(out, x);
        },
        py::arg("out"), py::arg("x"));
    m.def(
        "gelu_and_mul",
        [](const Tensor& out, const Tensor& x, const std::string& approximate) {
            ReleaseGilIfLong release(static_cast<double>(x.numel()) * 16);
            ops::gelu_and_mul(out, x, approximate);
        },
        py::arg("out"), py::arg("x"), py::arg("approximate"));
}

static void bind_kv_cache(py::module_& m) {
    m.def(
        "write_kv",
        [](const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& slots) {
            ReleaseGilIfLong release(static_cast<double>(k.numel() + v.numel()) * 4);
            ops::write_kv(k, v, k_cache, v_cache, slots);
        },
        py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"));
    m.def("copy_kv_slots", &ops::copy_kv_slots, py::arg("caches"), py::arg("sources"),
          py::arg("destinations"));
}

static void bind_attention(py::module_& m) {
    // The sizes of a plan: requests, tokens, table_width, page_size, num_heads, num_kv_heads,
    // head_dim, window, max_query_tokens, batch_invariant.
    using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             std::optional<int64_t>, int64_t, bool>;
    const auto named = [](const Sizes& sizes) {
        return std::make_from_tuple<ops::AttentionSizes>(sizes);
    };
    m.def(
        "attention_is_planned",
        [](const Tensor& tensor) { return tensor.device == DeviceType::kCUDA; }, py::arg("tensor"));
    m.def(
        "attention_workspace",
        [named](const Sizes& sizes) { return ops::attention_workspace(named(sizes)); },
        py::arg("sizes"));
    m.def(
        "plan_attention",
        [named](const Tensor& workspace, const Tensor& page_table, const Tensor& query_start,
                const Tensor& kv_lens, const Tensor& kv_end, const Sizes& sizes) {
            ops::plan_attention(workspace, page_table, query_start, kv_lens, kv_end, named(sizes));
        },
        py::arg("workspace"), py::arg("page_table"), py::arg("query_start"), py::arg("kv_lens"),
        py::arg("kv_end"), py::arg("sizes"));
    // `empty` makes the workspace: a uint8 tensor of the given number of bytes.
    m.def(
        "paged_attention",
        [](const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& page_table, const Tensor& query_start, const Tensor& kv_lens,
           const Tensor& kv_end, double scale, std::optional<int64_t> window,
           std::optional<double> soft_cap, const std::optional<Tensor>& sinks,
           const py::function& empty) {
            ops::PagedAttention attention({out, q, k_cache, v_cache, page_table, query_start,
                                           kv_lens, kv_end, scale, window, soft_cap,
                                           sinks ? &*sinks : nullptr});
            const py::object workspace = empty(attention.workspace_size());
            const auto view = workspace.cast<Tensor>();
            ReleaseGilIfLong release(attention.cost());
            attention.run(view);
        },
        py::arg("out"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("page_table"),
        py::arg("query_start"), py::arg("kv_lens"), py::arg("kv_end"), py::arg("scale"),
        py::arg("window"), py::arg("soft_cap"), py::arg("sinks"), py::arg("empty"));
    m.def(
        "paged_attention_cuda",
        [](const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& page_table, const Tensor& query_start, const Tensor& kv_lens,
           const Tensor& kv_end, double scale, std::optional<int64_t> window,
           std::optional<double> soft_cap, const std::optional<Tensor>& sinks,
           const Tensor& workspace, int64_t max_query_tokens, bool batch_invariant) {
            ops::paged_attention_cuda({out, q, k_cache, v_cache, page_table, query_start, kv_lens,
                                       kv_end, scale, window, soft_cap, sinks ? &*sinks : nullptr},
                                      workspace, max_query_tokens, batch_invariant);
        },
        py::arg("out"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("page_table"),
        py::arg("query_start"), py::arg("kv_lens"), py::arg("kv_end"), py::arg("scale"),
        py::arg("window"), py::arg("soft_cap"), py::arg("sinks"), py::arg("workspace"),
        py::arg("max_query_tokens"), py::arg("batch_invariant"));
}

static void bind_sampling(py::module_& m) {
    m.def("sampling_workspace_bytes", &ops::sampling_workspace_bytes, py::arg("like"),
          py::arg("vocab"), py::arg("rows"));
    m.def(
        "sample",
        [](const Tensor& token_ids, const Tensor& status, const Tensor& logits,
           const std::optional<Tensor>& rows, const Tensor& reals, const Tensor& integers,
           const std::optional<std::array<Tensor, 5>>& edits, const Tensor& workspace) {
            ReleaseGilIfLong release(static_cast<double>(logits.numel()) * 4);
            std::optional<ops::TokenEdits> named;
            if (edits) {
                const auto& [offsets, seen, bias_ids, bias_values, allowed_ids] = *edits;
                named = {offsets, seen, bias_ids, bias_values, allowed_ids};
            }
            ops::sample(token_ids, status, logits, rows, reals, integers, named, workspace);
        },
        py::arg("token_ids"), py::arg("status"), py::arg("logits"), py::arg("rows"),
        py::arg("reals"), py::arg("integers"), py::arg("edits"), py::arg("workspace"));
    m.def("most_top_tokens", &ops::most_top_tokens, py::arg("logits"));
    m.def(
        "log_probs",
        [](const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids,
           const Tensor& top_logprobs, const Tensor& logits, const std::optional<Tensor>& rows,
           const Tensor& token_ids, const Tensor& workspace) {
            ReleaseGilIfLong release(static_cast<double>(logits.numel()) * 4);
            ops::log_probs(logprobs, ranks, top_ids, top_logprobs, logits, rows, token_ids,
                           workspace);
        },
        py::arg("logprobs"), py::arg("ranks"), py::arg("top_ids"), py::arg("top_logprobs"),
        py::arg("logits"), py::arg("rows"), py::arg("token_ids"), py::arg("workspace"));
}

static void bind_advance(py::module_& m) {
    m.def("gather_tokens", &ops::gather_tokens, py::arg("input_ids"), py::arg("previous"),
          py::arg("sources"));
    m.def("advance", &ops::advance, py::arg("token_ids"), py::arg("input_ids"),
          py::arg("positions"), py::arg("kv_lens"), py::arg("kv_end"), py::arg("slots"),
          py::arg("integers"), py::arg("page_table"), py::arg("page_size"));
}

void bind_ops(py::module_& m) {
    bind_norm(m);
    bind_linear(m);
    bind_fused_linear(m);
    bind_embedding(m);
    bind_quantized(m);
    bind_rope(m);
    bind_activation(m);
    bind_kv_cache(m);
    bind_attention(m);
    bind_sampling(m);
    bind_advance(m);
}

}  // namespace sglite
