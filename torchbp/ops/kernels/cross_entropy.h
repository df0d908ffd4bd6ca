// Cross entropy along rows of logits x, each with a class t, and what is made like it. p, m and S are those of softmax.h.
#pragma once

#include <cmath>

#include "softmax.h"

namespace torchbp {

// t of each row, or nullptr where rows have none. Rows with `ignored` do not count: their values and gradients are 0.
struct Classes {
    const int64_t* of_row;
    int64_t ignored;

    bool counts(int64_t row) const { return of_row == nullptr || of_row[row] != ignored; }
    // How many rows count; -1 where a t is no class.
    int64_t counted(int64_t n, int64_t c) const {
        int64_t count = 0;
        for (int64_t row = 0; row < n; ++row) {
            if (!counts(row)) continue;
            if (of_row != nullptr && (of_row[row] < 0 || of_row[row] >= c)) return -1;
            ++count;
        }
        return count;
    }
};

template <class T>
inline float one(const T* x) { return load(x, 1)[0]; }

// Σ w (x - m); w = 1 where it is nullptr.
template <class T>
inline double weighted(const T* x, const float* w, int64_t c, float m) {
    const Lanes most = all(m);
    Sums<1> sum;
    if (w == nullptr)
        sum.add(c, [&](int64_t i, auto at, Lanes* of) { of[0] = at(x + i, m) - most; });
    else
        sum.add(c, [&](int64_t i, auto at, Lanes* of) { of[0] = (at(x + i, m) - most) * at(w + i); });
    return sum.take(0);
}

// log Σ exp x. Where m is infinite it is m, unless there is a NaN.
template <class T>
inline float log_partition(const T* x, int64_t c, float m, float log_s) {
    if (!std::isinf(m)) return m + log_s;
    for (int64_t i = 0; i < c; ++i)
        if (std::isnan(one(x + i))) return NOT_A_NUMBER;
    return m;
}

// 1 - p_t from what the others are: the difference would round to 0.
template <class T>
inline float others(const T* x, int64_t c, int64_t t, float m, float s) {
    const auto nothing = [](int64_t, auto, Lanes) {};
    return (exp_sum(x, t, m, nothing) + exp_sum(x + t + 1, c - t - 1, m, nothing)) / s;
}

// Of each row, what is not nullptr: log p_t, 1 - p_t, Σ_c w_c log p_c, log Σ exp x; and how many rows count, -1 where a t is no class.
template <class T>
inline void log_probabilities(int64_t n, int64_t c, int threads, const T* x, const int64_t* target, int64_t ignored,
                              const float* w, float* log_p, float* rest, float* even, float* log_z, int64_t* counted) {
    const Classes classes{target, ignored};
    *counted = classes.counted(n, c);
    if (*counted < 0) return;
    const double mass = w == nullptr ? static_cast<double>(c) : sum(w, c);
    const auto counts = [=](int64_t row) { return classes.counts(row); };
    over_partitions<false>(n, c, threads, x, x, counts, [=](int64_t first, int64_t count, const Partitions& of) {
        const Lanes logs = of.log_s();
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = first + r;
            const T* from = x + row * c;
            const float m = of.m[r], log_s = logs[r];
            const bool here = counts(row);
            if (log_p != nullptr) log_p[row] = here ? one(from + target[row]) - m - log_s : 0.0f;
            if (rest != nullptr) rest[row] = here ? others(from, c, target[row], m, of.s[r]) : 0.0f;
            if (even != nullptr) even[row] = here ? static_cast<float>(weighted(from, w, c, m) - mass * log_s) : 0.0f;
            if (log_z != nullptr) log_z[row] = here ? log_partition(from, c, m, log_s) : 0.0f;
        }
    });
}

// What goes into the gradient of each row: one for all (step 0) or one for each; nullptr is 0. `share` goes with all of them.
struct Factors {
    int64_t step;
    float share;

    float operator()(const float* of, int64_t row) const { return of == nullptr ? 0.0f : of[row * step] * share; }
};

// The gradient of x: p_j (a + z log Σ exp x) - b w_j - d [j = t], with all four divided by the rows that count for a `mean`.
template <class T>
inline void softmax_gradient(int64_t n, int64_t c, int threads, const T* x, const int64_t* target, int64_t ignored,
                             const float* w, const float* a, const float* z, const float* b, const float* d, int64_t step,
                             int64_t mean, T* grad_x) {
    const Classes classes{target, ignored};
    const auto counts = [=](int64_t row) { return classes.counts(row); };
    const Factors factor{step, mean ? 1.0f / static_cast<float>(std::max<int64_t>(1, classes.counted(n, c))) : 1.0f};
    over_partitions<true>(n, c, threads, x, x, counts, [=](int64_t first, int64_t count, const Partitions& of) {
        const Lanes logs = z == nullptr ? Lanes{} : of.log_s();
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = first + r;
            T* to = grad_x + row * c;
            if (!counts(row)) {
                each(c, [=](int64_t i, auto at) { at(to + i, Lanes{}); });
                continue;
            }
            const float* e = of.e + r * c;
            const float log_z = z == nullptr ? 0.0f : log_partition(x + row * c, c, of.m[r], logs[r]);
            const float scale = (factor(a, row) + factor(z, row) * log_z) / of.s[r], level = factor(b, row);
            const Lanes scales = all(scale), levels = all(level);
            if (b == nullptr)
                each(c, [=](int64_t i, auto at) { at(to + i, at(e + i) * scales); });
            else if (w == nullptr)
                each(c, [=](int64_t i, auto at) { at(to + i, at(e + i) * scales - levels); });
            else
                each(c, [=](int64_t i, auto at) { at(to + i, at(e + i) * scales - levels * at(w + i)); });
            if (d == nullptr) continue;
            const int64_t t = target[row];  // again, for it is rounded once
            store(to + t, all(e[t] * scale - (w == nullptr ? level : level * w[t]) - factor(d, row)), 1);
        }
    });
}

}  // namespace torchbp
