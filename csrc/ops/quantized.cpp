#include "cpu/kernels.h"
#include "ops.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/packed_weight.h"

namespace sglite::ops {

namespace {

// The sizes that a quantised weight's tensors have among themselves.
struct Layout {
    int bits;
    int64_t groups, group_size;
};

Layout checked_weight(const char* op, const QuantizedTensors& weight) {
    constexpr int64_t kDepth = 8;
    const Tensor& codes = weight.codes;
    const Check check(op, "codes", codes);
    cpu::require_cpu(op, codes);
    check.dtype_in({DType::kInt8, DType::kInt32});
    const int64_t panels = (weight.n + kPanelColumns - 1) / kPanelColumns;
    const int64_t steps = (weight.k + kDepth - 1) / kDepth;
    const int bits = codes.dtype == DType::kInt8 ? 8 : 4;
    if (bits == 8) {
        check.shape({panels, steps, kDepth, kPanelColumns});
    } else {
        check.shape({panels, steps, kPanelColumns});
    }
    check.dense();
    if (weight.k < 1 || weight.group_size < 1) {
        throw std::invalid_argument(std::string(op) + ": expected k and group_size of 1 or more");
    }
    const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
    if (groups > 1 && (weight.group_size % kDepth || weight.group_size > kLargestGroup)) {
        throw std::invalid_argument(std::string(op) + ": group_size: expected a multiple of " +
                                    std::to_string(kDepth) + ", at most " +
                                    std::to_string(kLargestGroup) + ", got " +
                                    std::to_string(weight.group_size));
    }
    Check(op, "scales", weight.scales)
        .dtype_in(kFloatTypes)
        .shape({panels, groups, kPanelColumns})
        .dense()
        .same_device(codes);
    if (weight.zeros) {
        Check(op, "zeros", *weight.zeros)
            .dtype(DType::kInt8)
            .shape({panels, groups, kPanelColumns})
            .dense()
            .same_device(codes);
    }
    return {bits, groups, weight.group_size};
}

void check_rows(const char* op, int64_t start, int64_t count, int64_t n) {
    if (start < 0 || start + count > n) {
        throw std::invalid_argument(std::string(op) + ": rows " + std::to_string(start) + " to " +
                                    std::to_string(start + count) + " of a weight with " +
                                    std::to_string(n) + " rows");
    }
}

QuantizedRowsArgs rows_arguments(const char* op, const QuantizedTensors& weight,
                                 const Tensor& out) {
    const Layout layout = checked_weight(op, weight);
    Check(op, "out", out).dtype_in(kFloatTypes).shape({-1, weight.k}).dense_rows();
    cpu::require_cpu(op, out);
    return {
        .out = out.data,
        .ids = nullptr,
        .codes = weight.codes.data,
        .scales = weight.scales.data,
        .zeros = weight.zeros ? weight.zeros->ptr<const int8_t>() : nullptr,
        .start = 0,
        .count = out.size(0),
        .k = weight.k,
        .out_stride = out.stride(0),
        .groups = layout.groups,
        .group_size = layout.group_size,
        .bits = layout.bits,
        .scale_dtype = weight.scales.dtype,
        .dtype = out.dtype,
    };
}

}  // namespace

void pack_codes(const QuantizedTensors& weight, int64_t start, const Tensor& codes) {
    constexpr const char* kOp = "QuantizedWeight";
    const Layout layout = checked_weight(kOp, weight);
    Check(kOp, "codes", codes).dtype(DType::kInt8).shape({-1, weight.k}).same_device(weight.codes);
    check_rows(kOp, start, codes.size(0), weight.n);
    cpu::kernels().pack_codes({
        .packed = weight.codes.data,
        .codes = codes.ptr<const int8_t>(),
        .row_stride = codes.stride(0),
        .k_stride = codes.stride(1),
        .start = start,
        .count = codes.size(0),
        .k = weight.k,
        .bits = layout.bits,
    });
}

QuantizeRowsArgs quantize_arguments(const QuantizedTensors& weight, int64_t start,
                                    const Tensor& rows) {
    constexpr const char* kOp = "QuantizedWeight";
    const Layout layout = checked_weight(kOp, weight);
    Check(kOp, "rows", rows)
        .dtype_in(kFloatTypes)
        .shape({-1, weight.k})
        .dense_rows()
        .same_device(weight.codes);
    check_rows(kOp, start, rows.size(0), weight.n);
    return {
        .packed = weight.codes.data,
        .scales = weight.scales.data,
        .rows = rows.data,
        .row_stride = rows.stride(0),
        .start = start,
        .count = rows.size(0),
        .k = weight.k,
        .groups = layout.groups,
        .group_size = layout.group_size,
        .bits = layout.bits,
        .scale_dtype = weight.scales.dtype,
        .dtype = rows.dtype,
    };
}

void quantize_rows(const QuantizedTensors& weight, int64_t start, const Tensor& rows) {
    cpu::kernels().quantize_rows(quantize_arguments(weight, start, rows));
}

void read_quantized_rows(const QuantizedTensors& weight, int64_t start, const Tensor& out) {
    constexpr const char* kOp = "QuantizedWeight";
    QuantizedRowsArgs args = rows_arguments(kOp, weight, out);
    check_rows(kOp, start, args.count, weight.n);
    args.start = start;
    cpu::kernels().read_quantized_rows(args);
}

void embedding_quantized(const Tensor& out, const Tensor& ids, const QuantizedTensors& weight) {
    constexpr const char* kOp = "embedding";
    QuantizedRowsArgs args = rows_arguments(kOp, weight, out);
    Check(kOp, "ids", ids).dtype(DType::kInt64).shape({args.count}).dense().same_device(out);
    args.ids = ids.ptr<const int64_t>();
    check_ids(args.ids, args.count, weight.n);
    cpu::kernels().read_quantized_rows(args);
}

int64_t quantized_workspace(const char* op, const QuantizedTensors& weight, int64_t rows,
                            DType dtype) {
    const Layout layout = checked_weight(op, weight);
    return cpu::kernels().linear_quantized_workspace(rows, weight.k, layout.groups, dtype);
}

int64_t linear_quantized_workspace(const Tensor& x, int64_t group_size) {
    const Check check("linear", "x", x);
    check.dtype_in(kFloatTypes);
    if (x.ndim == 0) check.fail("at least 1 dimension");
    const int64_t k = x.size(-1), groups = (k + group_size - 1) / group_size;
    return cpu::kernels().linear_quantized_workspace(k ? x.numel() / k : 0, k, groups, x.dtype);
}

void linear_quantized(const Tensor& out, const Tensor& x, const QuantizedTensors& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& workspace,
                      const std::optional<std::string>& activation) {
    constexpr const char* kOp = "linear";
    const Layout layout = checked_weight(kOp, weight);
    LinearArgs args =
        checked_cpu_linear(kOp, out, x, weight.n, x.dtype, bias, residual, activation);
    if (args.k != weight.k) Check(kOp, "x", x).fail(std::to_string(weight.k) + " columns");
    const int64_t wanted =
        cpu::kernels().linear_quantized_workspace(args.m, args.k, layout.groups, args.dtype);
    attach_workspace(kOp, args, wanted, workspace, x);
    cpu::kernels().linear_quantized({
        .linear = args,
        .codes = weight.codes.data,
        .scales = weight.scales.data,
        .zeros = weight.zeros ? weight.zeros->ptr<const int8_t>() : nullptr,
        .scale_dtype = weight.scales.dtype,
        .bits = layout.bits,
        .groups = layout.groups,
        .group_size = layout.group_size,
    });
}

}  // namespace sglite::ops
