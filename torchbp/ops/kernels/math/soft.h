// log(1 + e^x) for x ≤ 0, which softplus, log-sigmoid and the losses of logits are made of: e^x is in [0, 1], so that
// neither step has an exponent to look for, and both take two thirds of the time.
#pragma once

#include "exp.h"
#include "log.h"

namespace torchbp {

inline __attribute__((always_inline)) float log1p_exp(float x) {
    const float u = exp(x);
    const bool large = u > 0.5f;
    const float f = large ? fma(u, 0.5f, -0.5f) : u;  // (1 + u) / 2 - 1, exact
    return log_of_split(f, large ? 0x1p23f : 0.0f);
}

}  // namespace torchbp
