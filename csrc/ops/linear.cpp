#include "ops/linear.h"

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"
#include "ops/activation.h"
#include "ops/packed_weight.h"

namespace sglite::ops {

namespace {

constexpr int64_t kMaxSegments = 16;

// [..., width] as rows that are all one stride apart.
struct Rows {
    int64_t count, stride;
};

Rows rows_of(const Check& check, const Tensor& tensor) {
    if (tensor.ndim == 0) check.fail("at least 1 dimension");
    check.dense_rows();
    Rows rows{1, 0};
    for (int axis = tensor.ndim - 2; axis >= 0; --axis) {
        const int64_t size = tensor.shape[axis], stride = tensor.strides[axis];
        if (size != 1 && rows.count != 0) {
            if (rows.count == 1) {
                rows.stride = stride;
            } else if (stride != rows.count * rows.stride) {
                check.fail("rows that are evenly apart");
            }
        }
        rows.count *= size;
    }
    return rows;
}

Rows rows_like(const char* op, const char* name, const Tensor& tensor, DType dtype, const Tensor& x,
               int64_t width) {
    const Check check(op, name, tensor);
    check.dtype(dtype).same_device(x);
    bool same = tensor.ndim == x.ndim && tensor.size(-1) == width;
    for (int axis = 0; same && axis < x.ndim - 1; ++axis) same = tensor.size(axis) == x.size(axis);
    if (!same) {
        check.fail("the leading dimensions of x and " + std::to_string(width) + " columns");
    }
    return rows_of(check, tensor);
}

}  // namespace

LinearArgs checked_linear(const char* op, const Tensor& out, const Tensor& x, int64_t n,
                          int64_t weight_rows, DType weight_dtype,
                          const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
    const Check check(op, "x", x);
    check.dtype_in(kFloatTypes);
    if (x.dtype != weight_dtype) {
        check.fail(std::string("the weight's dtype, ") + dtype_name(weight_dtype));
    }
    const Rows x_rows = rows_of(check, x);
    const int64_t k = x.size(-1);
    if (out.dtype != DType::kFloat32) Check(op, "out", out).dtype(x.dtype);
    const Rows out_rows = rows_like(op, "out", out, out.dtype, x, n);
    Rows residual_rows{0, 0};
    if (residual) residual_rows = rows_like(op, "residual", *residual, out.dtype, x, n);
    if (bias) Check(op, "bias", *bias).dtype(x.dtype).shape({weight_rows}).dense().same_device(x);
    return {
        .out = out.data,
        .x = x.data,
        .bias = bias ? bias->data : nullptr,
        .residual = residual ? residual->data : nullptr,
        .packed = nullptr,
        .segments = nullptr,
        .num_segments = 0,
        .workspace = nullptr,
        .m = x_rows.count,
        .n = n,
        .k = k,
        .out_stride = out_rows.stride,
        .x_stride = x_rows.stride,
        .residual_stride = residual_rows.stride,
        .dtype = x.dtype,
        .out_dtype = out.dtype,
        .is_gated = false,
        .activation = Activation::kSilu,
    };
}

LinearArgs checked_cpu_linear(const char* op, const Tensor& out, const Tensor& x, int64_t n,
                              DType weight_dtype, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual,
                              const std::optional<std::string>& activation) {
    cpu::require_cpu(op, x);
    if (!activation) return checked_linear(op, out, x, n, n, weight_dtype, bias, residual);
    if (!can_be_gated(n)) {
        throw std::invalid_argument(std::string(op) +
                                    ": weight: expected a multiple of 64 rows for an activation, "
                                    "got " +
                                    std::to_string(n));
    }
    if (residual) Check(op, "residual", *residual).fail("none beside an activation");
    Check(op, "out", out).dtype(x.dtype);
    LinearArgs args = checked_linear(op, out, x, n / 2, n, weight_dtype, bias, std::nullopt);
    args.n = n;
    args.is_gated = true;
    args.activation = activation_named(op, *activation);
    return args;
}

void attach_workspace(const char* op, LinearArgs& args, int64_t wanted,
                      const std::optional<Tensor>& workspace, const Tensor& x) {
    if (!wanted) return;
    if (!workspace) {
        throw std::invalid_argument(std::string(op) + ": workspace: expected uint8[" +
                                    std::to_string(wanted) + "], got None");
    }
    const Check check(op, "workspace", *workspace);
    check.dtype(DType::kUInt8).ndim(1).dense().same_device(x);
    if (workspace->numel() < wanted) check.fail(std::to_string(wanted) + " bytes");
    args.workspace = workspace->data;
}

static void attach_linear_workspace(LinearArgs& args, const std::optional<Tensor>& workspace,
                                    const Tensor& x) {
    if (x.device != DeviceType::kCPU) return;
    const int64_t wanted = cpu::kernels().linear_workspace(args.m, args.k, args.dtype);
    attach_workspace("linear", args, wanted, workspace, x);
}

int64_t linear_workspace(const Tensor& x) {
    const Check check("linear", "x", x);
    check.dtype_in(kFloatTypes);
    if (x.device != DeviceType::kCPU) return 0;
    if (x.ndim == 0) check.fail("at least 1 dimension");
    const int64_t k = x.size(-1);
    return cpu::kernels().linear_workspace(k ? x.numel() / k : 0, k, x.dtype);
}

void linear_packed(const Tensor& out, const Tensor& x, const Tensor& storage, int64_t n, int64_t k,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& workspace,
                   const std::optional<std::string>& activation) {
    constexpr const char* kOp = "linear";
    LinearArgs args = checked_cpu_linear(kOp, out, x, n, storage.dtype, bias, residual, activation);
    if (args.k != k) Check(kOp, "x", x).fail(std::to_string(k) + " columns");
    check_packed(kOp, "weight", storage, n, k);
    Check(kOp, "weight", storage).same_device(x);
    args.packed = storage.data;
    attach_linear_workspace(args, workspace, x);
    cpu::kernels().linear(args);
}

namespace {

constexpr const char* kLinear = "linear";

// The segments of a weight, checked against each other.
struct Segments {
    WeightSegment list[kMaxSegments];
    int64_t rows = 0, k = 0;
    DType dtype{};

    Segments(const std::vector<Tensor>& segments, const Tensor& x) {
        if (segments.empty() || segments.size() > kMaxSegments) {
            throw std::invalid_argument("linear: weight: expected 1 to " +
                                        std::to_string(kMaxSegments) + " tensors, got " +
                                        std::to_string(segments.size()));
        }
        for (size_t i = 0; i < segments.size(); ++i) {
            const Tensor& segment = segments[i];
            const Check check(kLinear, "weight", segment);
            check.dtype(segments[0].dtype)
                .shape({-1, segments[0].ndim == 2 ? segments[0].size(1) : -1});
            check.dense_rows().same_device(x);
            list[i] = {segment.data, segment.size(0), segment.stride(0)};
            rows += segment.size(0);
        }
        k = segments[0].size(1);
        dtype = segments[0].dtype;
    }
};

LinearArgs plain_arguments(const Segments& segments, size_t count, const Tensor& out,
                           const Tensor& x, int64_t n, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual,
                           const std::optional<Tensor>& workspace) {
    LinearArgs args =
        checked_linear(kLinear, out, x, n, segments.rows, segments.dtype, bias, residual);
    if (args.k != segments.k) {
        Check(kLinear, "x", x).fail(std::to_string(segments.k) + " columns");
    }
    args.segments = segments.list;
    args.num_segments = static_cast<int64_t>(count);
    attach_linear_workspace(args, workspace, x);
    return args;
}

}  // namespace

void linear_plain(const Tensor& out, const Tensor& x, const std::vector<Tensor>& segments,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& workspace) {
    const Segments rows(segments, x);
    const LinearArgs args =
        plain_arguments(rows, segments.size(), out, x, rows.rows, bias, residual, workspace);
    if (x.device == DeviceType::kCUDA) {
        return cuda::kernels(kLinear).linear(args, LinearFusion{}, cuda::stream_of(x));
    }
    cpu::kernels().linear(args);
}

bool linear_takes(const Tensor& x, const std::vector<Tensor>& segments) {
    const Segments rows(segments, x);
    if (x.device != DeviceType::kCUDA) return false;
    LinearArgs args{};
    args.x = x.data;
    args.x_stride = x.numel() ? rows_of(Check(kLinear, "x", x), x).stride : 0;
    args.k = rows.k;
    args.dtype = rows.dtype;
    args.segments = rows.list;
    args.num_segments = static_cast<int64_t>(segments.size());
    return cuda::kernels(kLinear).linear_takes(args);
}

void linear_fused(const Tensor& out, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& norm_weight, double epsilon, double weight_offset,
                  const std::optional<std::string>& activation) {
    if (x.device != DeviceType::kCUDA) {
        Check(kLinear, "x", x).fail("a tensor on a CUDA device");
    }
    const Segments rows({weight}, x);
    if (activation && rows.rows % 2) {
        Check(kLinear, "weight", weight).fail("an even number of rows (gate, then up)");
    }
    const int64_t n = activation ? rows.rows / 2 : rows.rows;
    const LinearArgs args = plain_arguments(rows, 1, out, x, n, bias, residual, std::nullopt);
    if (norm_weight) {
        Check(kLinear, "norm_weight", *norm_weight)
            .dtype(x.dtype)
            .shape({rows.k})
            .dense()
            .same_device(x);
    }
    if (activation) Check(kLinear, "out", out).dtype(x.dtype);
    const LinearFusion fusion{
        .norm_weight = norm_weight ? norm_weight->data : nullptr,
        .epsilon = static_cast<float>(epsilon),
        .weight_offset = static_cast<float>(weight_offset),
        .is_gated = activation.has_value(),
        .activation = activation ? activation_named(kLinear, *activation) : Activation::kSilu,
    };
    cuda::kernels(kLinear).linear(args, fusion, cuda::stream_of(x));
}

}  // namespace sglite::ops
