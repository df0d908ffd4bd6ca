// tanh, sinh, cosh.
#pragma once

#include "exp.h"

namespace torchbp {

// tanh, from |x|. Up to 0.9: x + x (z p(z)), z = x²; p minimax, relative error of the whole 2^-25.9.
// From there: 1 - 2 / (e^2x + 1), where what is taken off is at most 0.3, so that its error counts so much less. At n = 30 the
// difference is 1. NaN takes the first way.
TORCHBP_INLINE float tanh(float x) {
  const float size = fabs(x);
  const float z = x * x;
  const float p = polynomial(z, -0x1.555504p-2f, 0x1.11017ap-3f, -0x1.b81622p-5f, 0x1.567e5ap-6f, -0x1.c19542p-8f, 0x1.55d486p-10f);
  const float small = fma(z * p, size, size);
  const Exponential e = exponential<127, 30>(size + size);
  const float s = power_of_two(e.exponent);
  const float large = 1.f - 2.f / fma(e.p, s, s + 1.f);
  return with_sign(size >= 0.9f ? large : small, x);
}

}  // namespace torchbp
