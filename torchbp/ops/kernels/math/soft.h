// What the formulas of activations and losses are made of, each cheaper than the functions that it stands for.
//
// Error as in math.h; max: with fma of all floats of the domain with 2^-30 <= |x| < 2^8, without of one in 61. NaN stays NaN.
// test_math.py reads this table.
//
//   function            max    mean   max and mean without fma
//   exp_below_0         1.02   0.262  1.00   0.263  x <= 0
//   normal_exp_below_0  1.02   0.262  1.00   0.263  -87.3 <= x <= 0
//   expm1_below_0       0.85   0.256  0.87   0.256  x <= 0
//   log1p_exp           1.79   0.299  1.97   0.346  x <= 0
//   sigmoid             2.49   0.427  2.49   0.428  -87.3 <= x
//   erfcx               2.95   0.591  3.20   0.605  0 <= x <= 10
#pragma once

#include "exp.h"
#include "log.h"

namespace torchbp {

// Where x ≤ 0, no n is too large. 2^n may be no normal number, but 2^(n + 64) is, and a product with 2^-64 rounds what is
// subnormal, once. From -104 on all is 0 when rounded, and has to be 0 before that product: to make a subnormal number, or to
// underflow, takes a processor twenty times as long as all else here.
constexpr int32_t RAISED = 127 + 64;
constexpr float LOWERED = 0x1p-64f;

template <int32_t BIAS>
TORCHBP_INLINE Exponential exponential_below_0(float x) {
    const int32_t i = bits(fma(x, 0x1.715476p0f, ROUND + BIAS));
    return {exp_tail(exp_remainder(x, from_bits(i) - (ROUND + BIAS))), i};
}

// exp for x ≤ 0, with its bits.
TORCHBP_INLINE float exp_below_0(float x) {
    const Exponential e = exponential_below_0<RAISED>(x);
    const float s = power_of_two(e.exponent);
    const float raised = fma(e.p, s, s);
    return (x < -104.f ? 0.f : raised) * LOWERED;
}

// The same, which a softmax is made of, but 0 where exp is a subnormal number, from -87.5 on.
TORCHBP_INLINE float normal_exp_below_0(float x) {
    const Exponential e = exponential_below_0<127>(x);
    const float s = power_of_two(e.exponent);
    return x < -87.5f ? 0.f : fma(e.p, s, s);
}

// expm1 for x ≤ 0, in two thirds of its time. Nothing cancels where n is -1: 2^n - 1 and p / 2 are -1/2 and at most 0.21. ±0 is 0.
TORCHBP_INLINE float expm1_below_0(float x) {
    const int32_t i = bits(fma(x, 0x1.715476p0f, ROUND + 127.f));
    const float p = expm1_tail(exp_remainder(x, from_bits(i) - (ROUND + 127.f)));
    const float s = power_of_two(i);
    return x < -18.f ? -1.f : fma(p, s, s - 1.f);
}

// log(1 + e^x) for x ≤ 0, which softplus, log-sigmoid and the losses of logits are made of: u = e^x is in [0, 1], so that
// the logarithm has no exponent to look for. It is u + u (u q(u)); q minimax for its relative error, 2^-27.5. Where u has
// larger units than the logarithm, what it lost when it was rounded counts: u (1 + lost) stands for it.
TORCHBP_INLINE float log1p_exp(float x) {
    const Exponential e = exponential_below_0<RAISED>(x);
    const float rounded = 1.f + e.p;
    const float lost = e.p - (rounded - 1.f);
    const float raised = rounded * power_of_two(e.exponent);
    const float u = (x < -104.f ? 0.f : raised) * LOWERED;
    const float q = polynomial(u, -0x1.ffffd2p-2f, 0x1.554ddp-2f, -0x1.ff23e8p-3f, 0x1.934b6ep-3f, -0x1.3a43ep-3f,
                               0x1.b4b094p-4f, -0x1.d6b75ep-5f, 0x1.49211cp-6f, -0x1.af5e2p-9f);
    return x < -104.f ? 0.f : fma(u, fma(u, q, lost), u);
}

// σ(x) = 1 / (1 + e^-x): below 2^-30, e^-x does not count beside 1. From n = 128 on σ is a subnormal number or 0.
TORCHBP_INLINE float sigmoid(float x) {
    const float z = -x;
    const Exponential e = exponential<127, 127>(z < -30.f ? -30.f : z);
    const float s = power_of_two(e.exponent);
    return 1.f / (1.f + fma(e.p, s, s));
}

// erfcx(x) = exp(x²) erfc(x) for x ≥ 0: t p(q), as in erfc, which has twice the digits. So a normal distribution and its
// density share one exponential.
TORCHBP_INLINE float erfcx(float x) {
    const float t = 1.f / (1.f + x);
    const float q = fma(t, -2.f, 1.f);
    return t * polynomial(q, 0x1.b5d878p-1f, -0x1.e6c536p-3f, -0x1.87661ep-4f, 0x1.c7b064p-7f, 0x1.a01312p-6f,
                          0x1.39882cp-7f, -0x1.40025p-10f, -0x1.ecc2dcp-9f, -0x1.3553e4p-9f, -0x1.72efp-12f,
                          0x1.358fep-11f, 0x1.b8a9e8p-12f, 0x1.65a9fep-14f);
}

}  // namespace torchbp
