// tanh, sinh, cosh.
#pragma once

#include "exp.h"

namespace torchbp {

// tanh, from |x|. Up to 0.9: x + x (z p(z)), z = x²; p minimax, relative error of the whole 2^-29.6.
// From there: 1 - 2 / (e^2x + 1), where what is taken off is at most 0.3, so that its error counts so much less. At n =
// 30 the difference is 1. NaN takes the first way.
TORCHBP_INLINE float tanh(float x) {
    const float size = fabs(x);
    const float z = x * x;
    const float p = polynomial(z, -0x1.55555p-2f, 0x1.110f82p-3f, -0x1.b9d214p-5f, 0x1.63243ap-6f, -0x1.0f8228p-7f,
                               0x1.54dfd8p-9f, -0x1.e3ed4cp-12f);
    const float small = fma(z * p, size, size);
    const Exponential e = exponential<127, 30>(size + size);
    const float s = power_of_two(e.exponent);
    const float large = 1.f - 2.f / fma(e.p, s, s + 1.f);
    return with_sign(size >= 0.9f ? large : small, x);
}

// e^|x| = 2^n e^r. What sinh and cosh are made of: cosh r - 1 and sinh r, minimax polynomials in r² (2^-33 and 2^-34),
// and cosh(n ln 2) / 2 and sinh(n ln 2) / 2, which are exact up to n = 11. With them no digit cancels and nothing is
// divided.
struct Hyperbolic {
    float cosh_r_1, sinh_r, cosh_n, sinh_n;
};

TORCHBP_INLINE Hyperbolic hyperbolic(float size) {
    int32_t i = bits(fma(size < 0.5f ? 0.f : size, 0x1.715476p0f, ROUND + 125.f));
    i = i < ROUND_BITS + 125 + 129 ? i : ROUND_BITS + 125 + 129;
    const float r = exp_remainder(size, from_bits(i) - (ROUND + 125.f));
    const float z = r * r;
    const float c = polynomial(z, 0x1.000002p-1f, 0x1.5551fap-5f, 0x1.6f2154p-10f);
    const float s = polynomial(z, 0x1.555556p-3f, 0x1.110fbcp-7f, 0x1.a2b294p-13f);
    const float up = power_of_two(i);                                 // 2^(n - 2)
    const int32_t down = bits(0x1p-2f) - (bits(up) - bits(0x1p-2f));  // 2^(-n - 2); 0 where that is no float
    const float back = from_bits(down < 0 ? 0 : down);
    return {c * z, fma(r * z, s, r), up + back, up - back};
}

TORCHBP_INLINE float cosh(float x) {
    const Hyperbolic h = hyperbolic(fabs(x));
    const float half = h.cosh_n + fma(h.sinh_r, h.sinh_n, h.cosh_r_1 * h.cosh_n);
    return half + half;
}

// At n = 0, the half of a subnormal number may be none.
TORCHBP_INLINE float sinh(float x) {
    const float size = fabs(x);
    const Hyperbolic h = hyperbolic(size);
    const float half = h.sinh_n + fma(h.sinh_r, h.cosh_n, h.cosh_r_1 * h.sinh_n);
    return size < 0x1p-60f ? x : with_sign(half + half, x);
}

}  // namespace torchbp
