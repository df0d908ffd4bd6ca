// The gradient of a table of v rows of d: for each the sum of those of g, n rows, that have its index.
//
// Sorted by index first, so that a row is summed in one place, in float32, and written once; in the order of g, whatever the
// threads. Of rows nobody asked for nothing is read.
#pragma once

#include <memory>

#include "lanes.h"

namespace torchbp {

// The row `padding` is 0; with `mean` a sum is divided by how many it has.
template <class T>
inline void embedding_gradient(int64_t n, int64_t v, int64_t d, int64_t padding, int64_t mean, int threads, const T* g,
                               const int64_t* index, T* grad_w) {
    std::unique_ptr<int64_t[]> start(new int64_t[v + 2]()), order(new int64_t[n]);
    for (int64_t i = 0; i < n; ++i)
        if (index[i] >= 0 && index[i] < v) ++start[index[i] + 2];
    for (int64_t k = 2; k < v + 2; ++k) start[k] += start[k - 1];
    for (int64_t i = 0; i < n; ++i)
        if (index[i] >= 0 && index[i] < v) order[start[index[i] + 1]++] = i;  // then start[k] is where k begins
    const int64_t rows = std::max<int64_t>(1, CHUNK / d);
    in_parallel((v + rows - 1) / rows, threads, [&](int64_t chunk) {
        std::unique_ptr<float[]> room(new float[d]);
        float* sum = room.get();
        for (int64_t k = chunk * rows; k < std::min(v, (chunk + 1) * rows); ++k) {
            const int64_t from = start[k], to = k == padding ? from : start[k + 1];
            if (from == to) {
                std::memset(grad_w + k * d, 0, d * sizeof(T));
                continue;
            }
            for (int64_t j = from; j < to; ++j) {
                const T* row = g + order[j] * d;
                if (j + 1 < to) __builtin_prefetch(g + order[j + 1] * d);
                each(d, [&](int64_t i, auto at) { at(sum + i, j == from ? at(row + i) : at(sum + i) + at(row + i)); });
            }
            const Lanes count = all(mean ? static_cast<float>(to - from) : 1.0f);
            each(d, [&](int64_t i, auto at) { at(grad_w + k * d + i, at(sum + i) / count); });
        }
    });
}

}  // namespace torchbp
