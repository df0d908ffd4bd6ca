// The flags that an operation of floating point raises, of the threads that share a kernel's work: each has its own.
#pragma once

#include <cfenv>

namespace torchbp {

// How many of the threads have one of `flags` up; they are taken down.
inline int raised(int threads, int flags) {
    int count = 0;
#pragma omp parallel num_threads(threads) reduction(+ : count)
    if (std::fetestexcept(flags)) {
        std::feclearexcept(flags);
        ++count;
    }
    return count;
}

}  // namespace torchbp
