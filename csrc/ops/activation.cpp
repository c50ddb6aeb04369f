#include "ops/activation.h"

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

void gated_activation(const char* op, const Tensor& out, const Tensor& x, Activation activation) {
    Check(op, "x", x).ndim(2).dtype_in(kFloatTypes).dense_rows();
    const int64_t rows = x.size(0), width = x.size(1) / 2;
    if (x.size(1) % 2) Check(op, "x", x).fail("an even number of columns (gate, then up)");
    Check(op, "out", out).dtype(x.dtype).shape({rows, width}).dense_rows().same_device(x);
    const GatedActivationArgs args{
        .out = out.data,
        .x = x.data,
        .rows = rows,
        .width = width,
        .out_stride = out.stride(0),
        .x_stride = x.stride(0),
        .activation = activation,
        .dtype = x.dtype,
    };
    if (x.device == DeviceType::kCUDA) {
        return cuda::kernels(op).gated_activation(args, cuda::stream_of(x));
    }
    cpu::kernels().gated_activation(args);
}

Activation activation_named(const char* op, const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    throw std::invalid_argument(
        std::string(op) + ": activation: expected \"silu\", \"gelu\" or \"gelu_tanh\", got \"" +
        name + "\"");
}

void silu_and_mul(const Tensor& out, const Tensor& x) {
    gated_activation("silu_and_mul", out, x, Activation::kSilu);
}

void gelu_and_mul(const Tensor& out, const Tensor& x, const std::string& approximate) {
    constexpr const char* kOp = "gelu_and_mul";
    if (approximate == "none") return gated_activation(kOp, out, x, Activation::kGelu);
    if (approximate == "tanh") return gated_activation(kOp, out, x, Activation::kGeluTanh);
    throw std::invalid_argument(std::string(kOp) +
                                ": approximate: expected \"none\" or \"tanh\", got \"" +
                                approximate + "\"");
}

}  // namespace sglite::ops
