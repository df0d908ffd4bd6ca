// erf, erfc.
#pragma once

#include "exp.h"

namespace torchbp {

// erf, from |x|. Up to 0.9: x + x p(x²); p minimax, relative error of the whole 2^-26.0.
// From there: 1 - exp(-x q(x)); q minimax for the error of the whole, 2^-28.3, up to 3.95, where erf is 1 when rounded.
// The bound is taken as an integer, which is one instruction; NaN takes the first way.
TORCHBP_INLINE float erf(float x) {
  const float size = fabs(x);
  const float p = polynomial(x * x, 0x1.06eba6p-3f, -0x1.8126ecp-2f, 0x1.ce1b82p-4f, -0x1.b69b34p-6f, 0x1.4799b6p-8f, -0x1.3b9be4p-11f);
  const float small = fma(p, size, size);
  const float t = from_bits(bits(size) < bits(3.95f) ? bits(size) : bits(3.95f));
  const float q = polynomial(t, 0x1.20e6a2p+0f, 0x1.457accp-1f, 0x1.af3c4ap-4f, -0x1.773c7cp-6f, 0x1.a5e4f2p-9f, -0x1.c1b6fp-13f);
  const Exponential e = exponential<127, 30>(-t * q);
  const float s = power_of_two(e.exponent);
  const float large = 1.f - fma(e.p, s, s);
  return with_sign(size >= 0.9f ? large : small, x);
}

// erfc, from |x|: exp(-x²) t p(q), t = 1 / (1 + x), q = 1 - 2t in [-1, 0.82]; p minimax for the relative error, 2^-27.4.
// x² = h² + (x - h) (x + h), h the first 12 bits of x: h² is exact, and so in the tail no digit of x² is lost to the
// exponential. Beyond 10.1 all is 0 when rounded. For x < 0 it is 2 - erfc(-x).
TORCHBP_INLINE float erfc(float x) {
  const float size = fabs(x);
  const float t = 1.f / (1.f + size);
  const float p = polynomial(fma(t, -2.f, 1.f), 0.f);
  const float h = from_bits(bits(size) & int32_t(0xfffff000));
  const int32_t i = bits(fma(size * size, -0x1.715476p0f, ROUND + 254.f));
  const float r = fma(size - h, -(size + h), exp_remainder(-(h * h), from_bits(i) - (ROUND + 254.f)));
  const float y = size > 10.1f ? 0.f : scaled(fma(exp_tail(r), t * p, t * p), i);
  return x < 0.f ? 2.f - y : y;
}

}  // namespace torchbp
