// What the functions are made of: bits of a float, fused multiply-add, polynomials, rounding to an integer.
#pragma once

#include <cstdint>

#define TORCHBP_INLINE inline __attribute__((always_inline))

namespace torchbp {

constexpr float INF = __builtin_inff();
constexpr float NOT_A_NUMBER = __builtin_nanf("");

TORCHBP_INLINE int32_t bits(float x) {
    int32_t i;
    __builtin_memcpy(&i, &x, sizeof i);
    return i;
}

TORCHBP_INLINE float from_bits(int32_t i) {
    float x;
    __builtin_memcpy(&x, &i, sizeof x);
    return x;
}

TORCHBP_INLINE float fabs(float x) { return __builtin_fabsf(x); }

TORCHBP_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }

// |x| with the sign of s, for x ≥ 0.
TORCHBP_INLINE float with_sign(float x, float s) { return from_bits(bits(x) | (bits(s) & INT32_MIN)); }

// a·b + c. Every sum of a product is written with it: what a compiler contracts by itself depends on where it finds the
// sum, and the vectors of a loop would then differ from its last elements. Without the instruction it is two roundings.
TORCHBP_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// c0 + c1·x + c2·x² + …, by Horner's rule: within a loop other elements fill the time in which it waits for itself.
TORCHBP_INLINE float polynomial(float, float c0) { return c0; }
template <class... More>
TORCHBP_INLINE float polynomial(float x, float c0, float c1, More... more) {
    return fma(polynomial(x, c1, more...), x, c0);
}

// Added to |x| < 2²², it leaves x rounded to an integer in the last bits: ROUND + n is a float whose bits are
// bits(ROUND) + n.
constexpr float ROUND = 0x1.8p23f;
constexpr int32_t ROUND_BITS = 0x4b400000;

// 2^(i - 127), where the last 9 bits of i are in 1 … 254.
TORCHBP_INLINE float power_of_two(int32_t i) { return from_bits(int32_t(uint32_t(i) << 23)); }

}  // namespace torchbp
