#include "cpu/kernels.h"
#include "ops.h"
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

LinearArgs checked_arguments(const char* op, const Tensor& out, const Tensor& x, int64_t n,
                             DType weight_dtype, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& residual,
                             const std::optional<Tensor>& workspace) {
    const Check check(op, "x", x);
    check.dtype_in(kFloatTypes);
    cpu::require_cpu(op, x);
    if (x.dtype != weight_dtype) {
        check.fail(std::string("the weight's dtype, ") + dtype_name(weight_dtype));
    }
    const Rows x_rows = rows_of(check, x);
    const int64_t k = x.size(-1);
    if (out.dtype != DType::kFloat32) Check(op, "out", out).dtype(x.dtype);
    const Rows out_rows = rows_like(op, "out", out, out.dtype, x, n);
    Rows residual_rows{0, 0};
    if (residual) residual_rows = rows_like(op, "residual", *residual, out.dtype, x, n);
    if (bias) Check(op, "bias", *bias).dtype(x.dtype).shape({n}).dense().same_device(x);
    const int64_t wanted = cpu::kernels().linear_workspace(x_rows.count, k, x.dtype);
    if (wanted) {
        if (!workspace) {
            throw std::invalid_argument(std::string(op) + ": workspace: expected uint8[" +
                                        std::to_string(wanted) + "], got None");
        }
        const Check check(op, "workspace", *workspace);
        check.dtype(DType::kUInt8).ndim(1).dense().same_device(x);
        if (workspace->numel() < wanted) check.fail(std::to_string(wanted) + " bytes");
    }
    return {
        .out = out.data,
        .x = x.data,
        .bias = bias ? bias->data : nullptr,
        .residual = residual ? residual->data : nullptr,
        .packed = nullptr,
        .segments = nullptr,
        .num_segments = 0,
        .workspace = wanted ? workspace->data : nullptr,
        .m = x_rows.count,
        .n = n,
        .k = k,
        .out_stride = out_rows.stride,
        .x_stride = x_rows.stride,
        .residual_stride = residual_rows.stride,
        .dtype = x.dtype,
        .out_dtype = out.dtype,
    };
}

}  // namespace

int64_t linear_workspace(const Tensor& x) {
    const Check check("linear", "x", x);
    check.dtype_in(kFloatTypes);
    cpu::require_cpu("linear", x);
    if (x.ndim == 0) check.fail("at least 1 dimension");
    const int64_t k = x.size(-1);
    return cpu::kernels().linear_workspace(k ? x.numel() / k : 0, k, x.dtype);
}

void linear_packed(const Tensor& out, const Tensor& x, const Tensor& storage, int64_t n, int64_t k,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& workspace) {
    constexpr const char* kOp = "linear";
    LinearArgs args = checked_arguments(kOp, out, x, n, storage.dtype, bias, residual, workspace);
    if (args.k != k) Check(kOp, "x", x).fail(std::to_string(k) + " columns");
    check_packed(kOp, "weight", storage, n, k);
    Check(kOp, "weight", storage).same_device(x);
    args.packed = storage.data;
    cpu::kernels().linear(args);
}

void linear_plain(const Tensor& out, const Tensor& x, const std::vector<Tensor>& segments,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& workspace) {
    constexpr const char* kOp = "linear";
    if (segments.empty() || segments.size() > kMaxSegments) {
        throw std::invalid_argument("linear: weight: expected 1 to " +
                                    std::to_string(kMaxSegments) + " tensors, got " +
                                    std::to_string(segments.size()));
    }
    WeightSegment rows[kMaxSegments];
    int64_t n = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const Tensor& segment = segments[i];
        const Check check(kOp, "weight", segment);
        check.dtype(segments[0].dtype)
            .shape({-1, segments[0].ndim == 2 ? segments[0].size(1) : -1});
        check.dense_rows().same_device(x);
        rows[i] = {segment.data, segment.size(0), segment.stride(0)};
        n += segment.size(0);
    }
    LinearArgs args =
        checked_arguments(kOp, out, x, n, segments[0].dtype, bias, residual, workspace);
    const int64_t k = segments[0].size(1);
    if (args.k != k) Check(kOp, "x", x).fail(std::to_string(k) + " columns");
    args.segments = rows;
    args.num_segments = static_cast<int64_t>(segments.size());
    cpu::kernels().linear(args);
}

}  // namespace sglite::ops
