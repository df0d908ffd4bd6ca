// pow.
#pragma once

#include "exp.h"
#include "log.h"

namespace torchbp {

namespace doubles {

TORCHBP_INLINE double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

TORCHBP_INLINE double polynomial(double, double c0) { return c0; }
template <class... More>
TORCHBP_INLINE double polynomial(double x, double c0, double c1, More... more) {
    return fma(polynomial(x, c1, more...), x, c0);
}

}  // namespace doubles

// pow: 2^(y log2|x|). The logarithm and its product with y, up to 150, are doubles, so that the eight digits after the
// point are right, with which 2 is raised: log2(1 + f) = f p(f); p minimax, relative error 2^-35.8. What follows is
// exp2, in floats.
//   x < 0: an odd y gives the sign; NaN where y is no integer. From 2²⁵ on, every y is an even integer.
//   x^0, 1^y and (-1)^±inf are 1, even where the other argument is NaN, as in C.
TORCHBP_INLINE float pow(float x, float y) {
    const float size = fabs(x);
    const bool subnormal = size < 0x1p-126f;
    const Split s = split(subnormal ? size * 0x1p24f : size, SQRT_HALF);
    const float k = fma(float(s.exponent), 0x1p-23f, subnormal ? -24.f : 0.f);
    const float k_at_edges = size == 0.f ? -INF : (size < INF ? k : size);
    const double f = s.f;
    const double p = doubles::polynomial(
        f, 0x1.71547652a1d1bp+0, -0x1.715476565f8f8p-1, 0x1.ec709ebc7a669p-2, -0x1.7154709541b99p-2,
        0x1.277651a4872d8p-2, -0x1.ec72b5c5392a6p-3, 0x1.a63f5b8113893p-3, -0x1.7141878d44c9dp-3, 0x1.4527e349fecfdp-3,
        -0x1.252cf3eb7a034p-3, 0x1.2876d5cd3fbfap-3, -0x1.2497a1144cf37p-3, 0x1.3cf94a81550c3p-4);
    const double exact = doubles::fma(f, p, double(k_at_edges)) * double(y);
    const float high = float(exact);

    int32_t i = bits(high + (ROUND + 254.f));
    i = i < ROUND_BITS + 254 + 129 ? i : ROUND_BITS + 254 + 129;
    const float r = float(exact - double(from_bits(i) - (ROUND + 254.f)));
    float z = scaled(exp2_near_0(r), i);
    z = high < -151.f ? 0.f : z;
    z = high > 129.f ? INF : z;

    const int32_t size_y = bits(fabs(y));
    const float bounded = from_bits(size_y < bits(0x1p25f) ? size_y : bits(0x1p25f));
    const int32_t integer = int32_t(bounded);
    const bool whole = float(integer) == bounded;
    const float negative = from_bits(bits(z) | int32_t(uint32_t(whole ? integer : 0) << 31));
    z = bits(x) < 0 ? (whole || size == 0.f || size == INF ? negative : NOT_A_NUMBER) : z;
    const bool one = y == 0.f || x == 1.f || (x == -1.f && size_y == bits(INF));
    return one ? 1.f : z;
}

}  // namespace torchbp
