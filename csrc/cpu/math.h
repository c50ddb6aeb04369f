// Elementary functions on vectors, beside the `exp` of simd.h. The polynomials are minimax fits
// (weighted least squares, reweighted until the error is level); the errors given are theirs alone.
#pragma once

#include "cpu/simd.h"
#include "kernel_args.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Coefficients from the highest power down.
template <int kCount>
static inline Vec polynomial(Vec x, const float (&coefficients)[kCount]) {
    Vec sum = splat(coefficients[0]);
    for (int i = 1; i < kCount; ++i) sum = fma(sum, x, splat(coefficients[i]));
    return sum;
}

static inline Vec absolute(Vec x) { return max(x, splat(0.0f) - x); }

// 2^x for x <= 0 (or NaN); exactly 1 at 0, and 0 far below. With n the nearest whole number to x,
// 2^n times a polynomial in x - n (error 2e-9).
static inline Vec exp2_nonpositive(Vec x) {
    constexpr float kPowers[] = {0.00015353360504377633f,
                                 0.0013398875016719103f,
                                 0.00961843691766262f,
                                 0.055503323674201965f,
                                 0.24022647738456726f,
                                 0.6931471824645996f,
                                 1.0f};
#if defined(__AVX512F__)
    const Vec clamped = max(splat(-160.0f), x);
    const Vec n = round_to_int(clamped);
    return scale_by_power_of_two(polynomial(clamped - n, kPowers), n);
#else
    const Vec clamped = max(splat(-126.0f), x);
    const Vec n = round_to_int(clamped);
    return select_less(x, splat(-126.0f), splat(0.0f),
                       scale_by_power_of_two(polynomial(clamped - n, kPowers), n));
#endif
}

// Below 0.625 an odd polynomial (error 5e-9), above it 1 - 2 / (e^(2|x|) + 1).
static inline Vec tanh(Vec x) {
    constexpr float kPowers[] = {-0.005704978480935097f, 0.020639078691601753f,
                                 -0.05373971164226532f, 0.13331441581249237f, -0.3333328068256378f};
    const Vec size = absolute(x), square = x * x;
    const Vec near = fma(x * square, polynomial(square, kPowers), x);
    const Vec far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
    return select_less(size, splat(0.625f), near,
                       select_less(x, splat(0.0f), splat(0.0f) - far, far));
}

// x / (1 + e^-x). (Elfwing et al., 2017; Hendrycks and Gimpel, 2016)
static inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// x Phi(x), Phi the normal distribution function. The tail Phi(-|x|) comes directly, as
// e^(-x^2/2) times a polynomial in 1 / (1 + 0.35 |x|) (error 3e-8), so that large negative x loses
// nothing to cancellation. (Hendrycks and Gimpel, 2016)
static inline Vec gelu(Vec x) {
    constexpr float kTail[] = {-0.028987687081098557f, 0.14318516850471497f,
                               -0.2540508210659027f,   0.15722432732582092f,
                               -0.021728480234742165f, 0.10490427166223526f,
                               0.11999130994081497f,   0.13983911275863647f,
                               0.139622762799263f,     0.0f};
    const Vec t = splat(1.0f) / fma(splat(0.35f), absolute(x), splat(1.0f));
    const Vec tail = exp(x * x * splat(-0.5f)) * polynomial(t, kTail);
    return x * select_less(x, splat(0.0f), tail, splat(1.0f) - tail);
}

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2u)).
static inline Vec gelu_tanh(Vec x) {
    const Vec u = splat(0.7978845608028654f) * fma(splat(0.044715f) * x * x, x, x);
    return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

// Calls body(function) with the activation as a function on vectors.
template <typename Body>
static inline void visit_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::kSilu:
            return body([](Vec x) { return silu(x); });
        case Activation::kGelu:
            return body([](Vec x) { return gelu(x); });
        case Activation::kGeluTanh:
            return body([](Vec x) { return gelu_tanh(x); });
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
