// log, log1p, log2.
#pragma once

#include "floats.h"

namespace torchbp {

// x = 2^k (1 + f), 1 + f in [least, 2 least): near 1, k is 0. `exponent` is k 2²³, as it stands in the bits of x.
struct Split {
    float f;
    int32_t exponent;
};

TORCHBP_INLINE Split split(float x, float least) {
    const int32_t exponent = (bits(x) - bits(least)) & int32_t(0xff800000);
    return {from_bits(bits(x) - exponent) - 1.f, exponent};
}

// Where y, a logarithm of x, holds for 0 < x < inf only.
TORCHBP_INLINE float at_the_edges(float y, float x) {
    y = x < INF ? y : x;
    return x > 0.f ? y : (x == 0.f ? -INF : NOT_A_NUMBER);
}

constexpr float SQRT_HALF = 0x1.6a09e6p-1f;
constexpr float LN_2 = 0x1.62e43p-1f;

// log(1 + f) + k ln 2, log(1 + f) = f + f (f q(f)); q minimax for its relative error, 2^-27.4.
TORCHBP_INLINE float log_of_split(float f, float exponent) {
    const float q = polynomial(f, -0.5f, 0x1.5555acp-2f, -0x1.000082p-2f, 0x1.996712p-3f, -0x1.54d6d2p-3f,
                               0x1.2877c4p-3f, -0x1.0e9402p-3f, 0x1.b1fb92p-4f, -0x1.7951f4p-5f);
    return fma(exponent, LN_2 * 0x1p-23f, fma(f * q, f, f));
}

// log: a subnormal x is made normal first.
TORCHBP_INLINE float log(float x) {
    const bool subnormal = x < 0x1p-126f;
    const Split s = split(subnormal ? x * 0x1p24f : x, 0.75f);
    const float exponent = float(s.exponent) - (subnormal ? 24.f * 0x1p23f : 0.f);
    return at_the_edges(log_of_split(s.f, exponent), x);
}

// log2: k + f log2(e) + f (f q(f) + what log2(e) lacks as a float); q minimax, relative error 2^-27.5. f is in
// [√½ - 1, √2 - 1], so that no digit cancels at k = -1.
TORCHBP_INLINE float log2(float x) {
    const bool subnormal = x < 0x1p-126f;
    const Split s = split(subnormal ? x * 0x1p24f : x, SQRT_HALF);
    const float k = fma(float(s.exponent), 0x1p-23f, subnormal ? -24.f : 0.f);
    const float rest = polynomial(s.f, 0x1.4ae0cp-26f, -0x1.71547p-1f, 0x1.ec70a2p-2f, -0x1.715b1ep-2f, 0x1.277bap-2f,
                                  -0x1.ea9396p-3f, 0x1.a353fap-3f, -0x1.891032p-3f, 0x1.7c083ep-3f, -0x1.b627dap-4f);
    return at_the_edges(fma(s.f, 0x1.715476p0f, s.f * rest) + k, x);
}

// log1p: 1 + x is u + c, u rounded and c what the rounding lost. u = 2^k (1 + f) as above, and f + c 2^-k is exact
// again: it is 2^-k x + (2^-k - 1), whose last digit is no finer than a float's (but for x = 0.49999997, where u
// is rounded up to 1.5). At k > 60, c says nothing, and 2^-k
// may be no float.
TORCHBP_INLINE float log1p(float x) {
    const float u = 1.f + x;
    const Split s = split(u, 0.75f);
    const int32_t bounded = s.exponent < (60 << 23) ? s.exponent : 60 << 23;
    const float f = fma(x - (u - 1.f), from_bits(bits(1.f) - bounded), s.f);
    return with_sign(at_the_edges(log_of_split(f, float(s.exponent)), u), x);
}

}  // namespace torchbp
