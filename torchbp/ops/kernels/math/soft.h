// What the formulas of activations and losses are made of, each cheaper than the functions that it stands for.
#pragma once

#include "exp.h"
#include "log.h"

namespace torchbp {

// log(1 + e^x) for x ≤ 0, which softplus, log-sigmoid and the losses of logits are made of: u = e^x is in [0, 1], so that
// the logarithm has no exponent to look for. It is u + u (u q(u)); q minimax for its relative error, 2^-27.5. Where u has
// larger units than the logarithm, what it lost when it was rounded counts: u (1 + lost) stands for it. 1.7 ulp at most, 0.29
// in the mean.
inline __attribute__((always_inline)) float log1p_exp(float x) {
    const int32_t i = bits(fma(x, 0x1.715476p0f, ROUND + 254.f));
    const float p = exp_tail(exp_remainder(x, from_bits(i) - (ROUND + 254.f)));
    const float rounded = 1.f + p;
    const float lost = p - (rounded - 1.f);
    const float u = scaled(rounded, i);
    const float q = polynomial(u, -0x1.ffffd2p-2f, 0x1.554ddp-2f, -0x1.ff23e8p-3f, 0x1.934b6ep-3f, -0x1.3a43ep-3f,
                               0x1.b4b094p-4f, -0x1.d6b75ep-5f, 0x1.49211cp-6f, -0x1.af5e2p-9f);
    return x < -104.f ? 0.f : fma(u, fma(u, q, lost), u);
}

// exp for x ≤ 0, which a softmax is made of, in two thirds of the time: 2^n is a float. The bits are those of exp down to -87.5,
// and 0 from there on, where exp is a subnormal number.
inline __attribute__((always_inline)) float exp_below_0(float x) {
    const int32_t i = bits(fma(x, 0x1.715476p0f, ROUND + 127.f));
    const float p = exp_tail(exp_remainder(x, from_bits(i) - (ROUND + 127.f)));
    const float s = power_of_two(i);
    return x < -87.5f ? 0.f : fma(p, s, s);
}

// erfcx(x) = exp(x²) erfc(x) for x ≥ 0: t p(q), as in erfc, which has twice the digits. So a normal distribution and its
// density share one exponential.
inline __attribute__((always_inline)) float erfcx(float x) {
    const float t = 1.f / (1.f + x);
    const float q = fma(t, -2.f, 1.f);
    return t * polynomial(q, 0x1.b5d878p-1f, -0x1.e6c536p-3f, -0x1.87661ep-4f, 0x1.c7b064p-7f, 0x1.a01312p-6f,
                          0x1.39882cp-7f, -0x1.40025p-10f, -0x1.ecc2dcp-9f, -0x1.3553e4p-9f, -0x1.72efp-12f,
                          0x1.358fep-11f, 0x1.b8a9e8p-12f, 0x1.65a9fep-14f);
}

}  // namespace torchbp
