// erf, erfc.
#pragma once

#include "exp.h"

namespace torchbp {

// erf, from |x|. Up to 0.9: x + x p(x²); p minimax, relative error of the whole 2^-26.0.
// From there: 1 - exp(-x q(x)); q minimax for the error of the whole, 2^-28.3, up to 3.95, where erf is 1 when rounded.
// The bound is taken as an integer, which is one instruction; NaN takes the first way.
TORCHBP_INLINE float erf(float x) {
    const float size = fabs(x);
    const float p = polynomial(x * x, 0x1.06eba6p-3f, -0x1.8126ecp-2f, 0x1.ce1b82p-4f, -0x1.b69b34p-6f, 0x1.4799b6p-8f,
                               -0x1.3b9be4p-11f);
    const float small = fma(p, size, size);
    const float t = from_bits(bits(size) < bits(3.95f) ? bits(size) : bits(3.95f));
    const float q =
        polynomial(t, 0x1.20e6a2p+0f, 0x1.457accp-1f, 0x1.af3c4ap-4f, -0x1.773c7cp-6f, 0x1.a5e4f2p-9f, -0x1.c1b6fp-13f);
    const Exponential e = exponential<127, 30>(-t * q);
    const float s = power_of_two(e.exponent);
    const float large = 1.f - fma(e.p, s, s);
    return with_sign(size >= 0.9f ? large : small, x);
}

// erfc, from |x|: exp(-x²) t p(q), t = 1 / (1 + x), q = 1 - 2t in [-1, 0.82]; p minimax for the relative error,
// 2^-27.4. x² = h² + (x - h) (x + h), h the first 12 bits of x: h² is exact, and so in the tail no digit of x² is lost
// to the exponential. Beyond 10.1 all is 0 when rounded. For x < 0 it is 2 - erfc(-x).
TORCHBP_INLINE float erfc(float x) {
    const float size = fabs(x);
    const float d = 1.f + size;
    const float t = 1.f / d;
    const float lost = fma(-t, size - (d - 1.f), fma(-t, d, 1.f));
    const float q = fma(t, -2.f, 1.f);
    const float rest =
        polynomial(q, -0x1.e6c536p-3f, -0x1.87661ep-4f, 0x1.c7b064p-7f, 0x1.a01312p-6f, 0x1.39882cp-7f, -0x1.40025p-10f,
                   -0x1.ecc2dcp-9f, -0x1.3553e4p-9f, -0x1.72efp-12f, 0x1.358fep-11f, 0x1.b8a9e8p-12f, 0x1.65a9fep-14f);
    const float p = fma(rest, q, 0x1.b5d878p-1f);
    const float p_low = fma(rest, q, 0x1.b5d878p-1f - p);
    const float scale = t * p;
    const float scale_low = fma(t, p_low, fma(t, p, -scale));
    const float h = from_bits(bits(size) & int32_t(0xfffff000));
    const int32_t i = bits(fma(size * size, -0x1.715476p0f, ROUND + 254.f));
    const float n = from_bits(i) - (ROUND + 254.f);
    const float e = exp_tail(fma(n, -LN_2_HIGH, -(h * h)) + fma(n, -LN_2_LOW, fma(size - h, -(size + h), lost)));
    const float y = size > 10.1f ? 0.f : scaled(scale + fma(e, scale, scale_low), i);
    return x < 0.f ? 2.f - y : y;
}

}  // namespace torchbp
