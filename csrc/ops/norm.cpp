#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double epsilon,
              double weight_offset, const std::optional<Tensor>& residual) {
    constexpr const char* kOp = "rms_norm";
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense_rows();
    const int64_t rows = x.size(0), width = x.size(1);
    Check(kOp, "weight", weight).dtype(x.dtype).shape({width}).dense().same_device(x);
    Check(kOp, "out", out).dtype(x.dtype).shape({rows, width}).dense_rows().same_device(x);
    if (residual) {
        Check(kOp, "residual", *residual)
            .dtype(x.dtype)
            .shape({rows, width})
            .dense_rows()
            .same_device(x);
    }
    const RmsNormArgs args{
        .out = out.data,
        .x = x.data,
        .weight = weight.data,
        .residual = residual ? residual->data : nullptr,
        .rows = rows,
        .width = width,
        .out_stride = out.stride(0),
        .x_stride = x.stride(0),
        .residual_stride = residual ? residual->stride(0) : 0,
        .epsilon = static_cast<float>(epsilon),
        .weight_offset = static_cast<float>(weight_offset),
        .dtype = x.dtype,
    };
    if (x.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).rms_norm(args, cuda::stream_of(x));
    }
    cpu::kernels().rms_norm(args);
}

void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias, double epsilon) {
    constexpr const char* kOp = "layer_norm";
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense_rows();
    cpu::require_cpu(kOp, x);
    const int64_t rows = x.size(0), width = x.size(1);
    Check(kOp, "weight", weight).dtype(x.dtype).shape({width}).dense().same_device(x);
    if (bias) Check(kOp, "bias", *bias).dtype(x.dtype).shape({width}).dense().same_device(x);
    Check(kOp, "out", out).dtype(x.dtype).shape({rows, width}).dense_rows().same_device(x);
    cpu::kernels().layer_norm({
        .out = out.data,
        .x = x.data,
        .weight = weight.data,
        .bias = bias ? bias->data : nullptr,
        .rows = rows,
        .width = width,
        .out_stride = out.stride(0),
        .x_stride = x.stride(0),
        .epsilon = static_cast<float>(epsilon),
        .dtype = x.dtype,
    });
}

}  // namespace sglite::ops
