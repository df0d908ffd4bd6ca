// atan.
#pragma once

#include "floats.h"

namespace torchbp {

// atan, from |x|: above 1, π/2 - atan(1/|x|). atan z = z + z (z² p(z²)) up to 1; p minimax, relative error of the whole
// 2^-28.3. π/2 has a second part, which its rounding to a float lacks.
TORCHBP_INLINE float atan(float x) {
    const float size = fabs(x);
    const bool far = size > 1.f;
    const float z = far ? -1.f / size : size;
    const float p = polynomial(z * z, -0x1.555548p-2f, 0x1.9993dep-3f, -0x1.243328p-3f, 0x1.c13e76p-4f, -0x1.59ee5cp-4f,
                               0x1.e04d0ep-5f, -0x1.0496dap-5f, 0x1.703b24p-7f, -0x1.e84ecp-10f);
    const float rest = fma(z * z * p, z, far ? -0x1.777a5cp-25f : 0.f);
    const float y = far ? (z + 0x1.921fb6p0f) + rest : z + rest;
    return with_sign(y, x);
}

}  // namespace torchbp
