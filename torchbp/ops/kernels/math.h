#pragma once
#include "math/erf.h"
#include "math/exp.h"
#include "math/hyperbolic.h"
#include "math/log.h"
