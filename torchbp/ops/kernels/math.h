// The elementary functions of a float that formulas call, as straight lines without branch, table or call: a compiler makes
// vectors of a loop over them. Needed: -O3 -fno-math-errno -fno-trapping-math; never -ffast-math, which takes away NaN, inf and
// the order in which sums are written. Nothing is assumed of the machine; it is fast where there is a fused multiply-add
// (-mfma), and the bits are the same with vectors of any length.
//
// Error in units in the last place of the true value. max: the greatest of all 2³² floats for exp, expm1, log and log1p, for
// the others of all with 2^-30 <= |x| < 2^8 and of one in 61 beyond; mean: of those with 1/128 <= |x| < 8, where rounding
// alone makes 0.25. Edge values are exact: the sign of zero, ±inf, NaN, subnormal numbers. test_math.py reads this table.
//
//   function   max    mean   max and mean without fma
//   exp        1.02   0.262  1.00   0.263
//   exp2       0.89   0.255  1.09   0.263
//   expm1      1.43   0.258  1.40   0.259  at 16.9 < x < 18.4, where 1 is half a unit; else 1.0
//   log        0.95   0.259  1.08   0.260
//   log1p      1.27   0.258  1.27   0.259  at 0.49999997; else 0.95, without fma 1.1
//   log2       0.97   0.259  1.92   0.272
//   tanh       0.99   0.255  1.05   0.256
//   erf        1.13   0.245  1.20   0.248
//   erfc       2.15   0.277  3.41   0.371
//   sinh       1.45   0.261  1.45   0.264
//   cosh       2.03   0.260  1.85   0.262
//   atan       1.26   0.279  1.33   0.279
//   sqrt       0.50   0.252  0.50   0.252
//   pow        1.00   0.260  1.20   0.272  of pairs drawn by lot
//
// The coefficients were computed for these files: Remez's exchange algorithm in 40 digits, on the function and the weight that
// the comment beside them states; then each coefficient is rounded to a float, lowest first, and those above are fitted again;
// those of erfc and pow are rounded at once.
#pragma once

#include "math/atan.h"
#include "math/erf.h"
#include "math/exp.h"
#include "math/hyperbolic.h"
#include "math/log.h"
#include "math/power.h"
