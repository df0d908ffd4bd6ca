// exp, exp2, expm1.
#pragma once

#include "floats.h"

namespace torchbp {

// e^x = 2^n (1 + p): p, and n + BIAS in the last bits of `exponent`.
//   n = x / ln 2, rounded, at most MOST.
//   r = x - n ln 2, |r| ≤ ln(2) / 2, with ln 2 in two parts (Cody and Waite): the first has 15 bits, so that n times it
//   is exact. p = r + r² q(r); q is the minimax polynomial for the relative error of e^r, 2^-28.2 with its coefficients
//   as floats.
// Beyond MOST, r grows and p with it, to inf: all coefficients are positive. NaN stays in p.
struct Exponential {
    float p;
    int32_t exponent;
};

constexpr float LN_2_HIGH = 0x1.62e4p-1f;
constexpr float LN_2_LOW = 0x1.7f7d1cp-20f;

TORCHBP_INLINE float exp_remainder(float x, float n) { return fma(n, -LN_2_LOW, fma(n, -LN_2_HIGH, x)); }

TORCHBP_INLINE float exp_tail(float r) {
    return fma(r * r, polynomial(r, 0x1.fffffcp-2f, 0x1.55548cp-3f, 0x1.55585ap-5f, 0x1.123d5cp-7f, 0x1.6ab6bep-10f),
               r);
}

template <int32_t BIAS, int32_t MOST>
TORCHBP_INLINE Exponential exponential(float x) {
    int32_t i = bits(fma(x, 0x1.715476p0f, ROUND + BIAS));
    i = i < ROUND_BITS + BIAS + MOST ? i : ROUND_BITS + BIAS + MOST;
    return {exp_tail(exp_remainder(x, from_bits(i) - (ROUND + BIAS))), i};
}

// y 2^n, of an exponent with BIAS 254: in two steps, as neither 2^-150 nor 2^128 is a float.
TORCHBP_INLINE float scaled(float y, int32_t exponent) {
    const int32_t half = int32_t(uint32_t(exponent) >> 1);
    return y * power_of_two(half) * power_of_two(exponent - half);
}

// exp: 2^n (1 + p). Below -104 all is 0 when rounded, and n may be out of range.
TORCHBP_INLINE float exp(float x) {
    const Exponential e = exponential<254, 129>(x);
    const float y = scaled(1.f + e.p, e.exponent);
    return x < -104.f ? 0.f : y;
}

// 2^r for |r| ≤ 1/2: 1 + r q(r); q minimax, with ln 2 as its first coefficient, relative error 2^-27.7.
TORCHBP_INLINE float exp2_near_0(float r) {
    const float q =
        polynomial(r, 0x1.62e43p-1f, 0x1.ebfbdep-3f, 0x1.c6af68p-5f, 0x1.3b2b72p-7f, 0x1.5f18fep-10f, 0x1.43e10cp-13f);
    return fma(r, q, 1.f);
}

// exp2: x = n + r is exact.
TORCHBP_INLINE float exp2(float x) {
    int32_t i = bits(x + (ROUND + 254.f));
    i = i < ROUND_BITS + 254 + 129 ? i : ROUND_BITS + 254 + 129;
    const float y = scaled(exp2_near_0(x - (from_bits(i) - (ROUND + 254.f))), i);
    return x < -151.f ? 0.f : y;
}

// e^r - 1 = r + r² q(r) for |r| < 1/2: q has a degree more than that of exp, relative error of the whole 2^-27.5.
TORCHBP_INLINE float expm1_tail(float r) {
    return fma(r * r,
               polynomial(r, 0x1.000002p-1f, 0x1.55556p-3f, 0x1.5551bap-5f, 0x1.110632p-7f, 0x1.6f4accp-10f,
                          0x1.aa4dc8p-13f),
               r);
}

// expm1: 2^n p + (2^n - 1). n = 0 wherever |x| < 1/2, so that no half of the digits cancels. 2^(n-1) stands for 2^n, which
// at 128 is no float.
TORCHBP_INLINE float expm1(float x) {
    const float size = fabs(x);
    int32_t i = bits(fma(size < 0.5f ? 0.f : x, 0x1.715476p0f, ROUND + 126.f));
    i = i < ROUND_BITS + 126 + 128 ? i : ROUND_BITS + 126 + 128;
    const float p = expm1_tail(exp_remainder(x, from_bits(i) - (ROUND + 126.f)));
    const float s = power_of_two(i);
    const float half = fma(p, s, s - 0.5f);
    const float y = x < -18.f ? -1.f : half + half;
    return size < 0x1p-60f ? x : y;
}

}  // namespace torchbp
