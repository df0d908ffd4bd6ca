// Softmax along rows: p = exp(x - m) / S with m = max x and S = Σ exp(x - m), and log-softmax, with their gradients.
//
// Some rows at a time, 4096 elements: they stay in the first cache, the logarithms of 16 are taken at once, and no row waits for
// the one before. Everything is float32, S a sum as in lanes.h. A row is one thread's, and depends on no other.
#pragma once

#include <memory>

#include "lanes.h"
#include "math/log.h"
#include "math/soft.h"

namespace torchbp {

// f of each of 16: of a function of one float the compiler makes one of vectors.
template <class F>
inline Lanes of_each(Lanes v, F f) {
    float one[LANES];
    std::memcpy(one, &v, sizeof v);
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) one[i] = f(one[i]);
    std::memcpy(&v, one, sizeof v);
    return v;
}

inline Lanes normal_exp_below_0(Lanes v) {
    return of_each(v, [](float x) { return normal_exp_below_0(x); });
}

inline Lanes log(Lanes v) {
    return of_each(v, [](float x) { return log(x); });
}

constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

// m. A NaN is no maximum: it comes back in S.
template <class T>
inline float largest(const T* x, int64_t c) {
    constexpr int64_t SIDE = 4;
    Lanes most[SIDE];
    for (Lanes& one : most) one = all(-INF);
    int64_t i = 0;
    for (; i + SIDE * LANES <= c; i += SIDE * LANES)
#pragma GCC unroll 4
        for (int64_t side = 0; side < SIDE; ++side) most[side] = larger(load(x + i + side * LANES), most[side]);
    each(c - i, [&](int64_t j, auto at) { most[0] = larger(at(x + i + j, -INF), most[0]); });
    return folded(larger(larger(most[0], most[1]), larger(most[2], most[3])), larger);
}

// S. Each of its terms also goes to term(i, at, value).
template <class T, class F>
inline float exp_sum(const T* x, int64_t c, float m, F term) {
    const Lanes most = all(m);
    const auto next = [&](int64_t i, auto at, Lanes* of) {
        of[0] = normal_exp_below_0(at(x + i, -INF) - most);
        term(i, at, of[0]);
    };
    if (c <= LANES) {  // a third of the time of sums in general
        Lanes only;
        next(0, Part{c}, &only);
        return together(only);
    }
    Sums<1> sum;
    sum.add(c, next);
    return static_cast<float>(sum.take(0));
}

template <class T>
inline double sum(const T* v, int64_t c) {
    Sums<1> of_v;
    of_v.add(c, [&](int64_t i, auto at, Lanes* of) { of[0] = at(v + i); });
    return of_v.take(0);
}

// Of up to 16 rows: m and S, and, where they are wanted, exp(x - m), c of each row.
struct Partitions {
    alignas(sizeof(Lanes)) float m[LANES], s[LANES];
    const float* e;

    Lanes log_s() const { return log(load(s)); }
};

// run(first, count, of): the rows from `first` on; of those that do not count nothing is computed. Meanwhile memory is asked for the next ones, and for those of `beside`,
// which `run` reads: that takes a tenth to a fifth of the time away.
template <bool EXPONENTIALS, class T, class Counts, class F>
inline void over_partitions(int64_t n, int64_t c, int threads, const T* x, const T* beside, Counts counts, F run) {
    const int64_t some = std::clamp<int64_t>(4096 / c, 1, LANES), chunk = std::max<int64_t>(1, CHUNK / c);
    in_parallel((n + chunk - 1) / chunk, threads, [=](int64_t k) {
        const std::unique_ptr<float[]> room(EXPONENTIALS ? new float[some * c] : nullptr);
        const int64_t end = std::min(n, (k + 1) * chunk);
        for (int64_t first = k * chunk; first < end; first += some) {
            const int64_t count = std::min(some, end - first);
            Partitions of;
            of.e = room.get();
            store(of.s, all(1.0f));
            for (int64_t r = 0; r < count; ++r)
                if (counts(first + r)) of.m[r] = largest(x + (first + r) * c, c);
            for (int64_t r = 0; r < count; ++r) {
                if (!counts(first + r)) continue;
                const T *row = x + (first + r) * c, *next = row + some * c, *other = beside + (first + r) * c;
                float* e = room.get() + r * c;
                of.s[r] = exp_sum(row, c, of.m[r], [=](int64_t i, auto at, Lanes term) {
                    __builtin_prefetch(next + i);
                    __builtin_prefetch(other + i);
                    if (EXPONENTIALS) at(e + i, term);
                });
            }
            run(first, count, of);
        }
    });
}

constexpr auto every_row = [](int64_t) { return true; };

// y = x - m - log S, of n rows of c.
template <class T>
inline void log_softmax(int64_t n, int64_t c, int threads, const T* x, T* y) {
    over_partitions<false>(n, c, threads, x, x, every_row, [=](int64_t first, int64_t count, const Partitions& of) {
        const Lanes logs = of.log_s();
        for (int64_t r = 0; r < count; ++r) {
            const int64_t start = (first + r) * c;
            const Lanes m = all(of.m[r]), log_s = all(logs[r]);
            each(c, [=](int64_t i, auto at) { at(y + start + i, at(x + start + i) - m - log_s); });
        }
    });
}

// The gradient of x for g, that of y: g - p Σ g.
template <class T>
inline void log_softmax_backward(int64_t n, int64_t c, int threads, const T* g, const T* x, T* grad_x) {
    over_partitions<true>(n, c, threads, x, g, every_row, [=](int64_t first, int64_t count, const Partitions& of) {
        for (int64_t r = 0; r < count; ++r) {
            const int64_t start = (first + r) * c;
            const float* e = of.e + r * c;
            const Lanes scale = all(static_cast<float>(sum(g + start, c) / of.s[r]));
            each(c, [=](int64_t i, auto at) { at(grad_x + start + i, at(g + start + i) - at(e + i) * scale); });
        }
    });
}

// y = p.
template <class T>
inline void softmax(int64_t n, int64_t c, int threads, const T* x, T* y) {
    over_partitions<true>(n, c, threads, x, x, every_row, [=](int64_t first, int64_t count, const Partitions& of) {
        for (int64_t r = 0; r < count; ++r) {
            const float* e = of.e + r * c;
            T* to = y + (first + r) * c;
            const Lanes share = all(1.0f / of.s[r]);
            each(c, [=](int64_t i, auto at) { at(to + i, at(e + i) * share); });
        }
    });
}

// The gradient of x for g, that of y: y (g - Σ g y).
template <class T>
inline void softmax_backward(int64_t n, int64_t c, int threads, const T* g, const T* y, T* grad_x) {
    const int64_t chunk = std::max<int64_t>(1, CHUNK / c);
    in_parallel((n + chunk - 1) / chunk, threads, [=](int64_t k) {
        for (int64_t row = k * chunk; row < std::min(n, (k + 1) * chunk); ++row) {
            const T *of_y = g + row * c, *from = y + row * c;
            T* to = grad_x + row * c;
            Sums<1> sum;
            sum.add(c, [&](int64_t i, auto at, Lanes* of) { of[0] = at(of_y + i) * at(from + i); });
            const Lanes along = all(static_cast<float>(sum.take(0)));
            each(c, [=](int64_t i, auto at) { at(to + i, at(from + i) * (at(of_y + i) - along)); });
        }
    });
}

}  // namespace torchbp
