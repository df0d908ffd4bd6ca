// CTC: the sums over all paths that spell a target, and their gradient, as ctc_loss.py derives them; a sequence is one thread's.
//
// The blanks of a target and its labels lie apart, so that both are rows: blank i stands before label i. All are logarithms
// in float32, less the largest of the time before: the sum of what was taken off is float64, so that no digit is lost to a
// sequence's length.
#pragma once

#include <memory>

#include "lanes.h"
#include "math/log.h"
#include "math/soft.h"

namespace torchbp {

constexpr float NEVER = -1e30f;  // log 0, but finite, so that differences are no NaN
constexpr double NO_PATH = -5e29;

// log(e^a + e^b)
TORCHBP_INLINE float log_add(float a, float b) { return (a > b ? a : b) + log1p_exp(-fabs(a - b)); }

// log(e^a + e^b + e^c): the sum is in [1, 3]
TORCHBP_INLINE float log_add(float a, float b, float c) {
    const float ab = a > b ? a : b, most = ab > c ? ab : c;
    const Split s = split(normal_exp_below_0(a - most) + normal_exp_below_0(b - most) + normal_exp_below_0(c - most), 0.75f);
    return most + log_of_split(s.f, float(s.exponent));
}

inline float widened_one(float x) { return x; }
inline float widened_one(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widened_one(float16 x) { return as_float(x); }

// The states of one time: blanks (S + 1) and labels (S), each with a NEVER before and behind.
struct States {
    float *blank, *label;
    States(float* room, int64_t s) : blank(room + 1), label(room + s + 4) {}
    static int64_t size(int64_t s) { return 2 * s + 6; }

    void clear(int64_t s) {
        for (int64_t i = -1; i <= s + 1; ++i) blank[i] = NEVER;
        for (int64_t i = -1; i <= s; ++i) label[i] = NEVER;
    }
    double largest(int64_t s) const {
        float most = NEVER;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i <= s; ++i) most = blank[i] > most ? blank[i] : most;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < s; ++i) most = label[i] > most ? label[i] : most;
        return most > NO_PATH ? most : 0.0;
    }
};

// One sequence and its target.
template <class T>
struct Spelling {
    const T* x;
    int64_t stride, time, s, blank;
    std::unique_ptr<int32_t[]> labels;
    std::unique_ptr<float[]> skip, emitted;  // skip: 0 where label i may follow label i - 1 at once, else NEVER

    Spelling(const T* x, int64_t stride, int64_t time, int64_t s, int64_t blank, const int64_t* of)
        : x(x), stride(stride), time(time), s(s), blank(blank), labels(new int32_t[s + 1]), skip(new float[s + 2]),
          emitted(new float[s + 1]) {
        for (int64_t i = 0; i < s; ++i) labels[i] = static_cast<int32_t>(of[i]);
        for (int64_t i = 0; i < s + 2; ++i)
            skip[i] = i > 0 && i < s && of[i] != blank && of[i] != of[i - 1] ? 0.0f : NEVER;
    }

    // Puts x of the labels at time t into `emitted`; returns that of the blank.
    float emit(int64_t t) {
        const T* row = x + t * stride;
        const auto bounded = [](float v) { return v < NEVER ? NEVER : v; };  // NaN stays
        for (int64_t i = 0; i < s; ++i) emitted[i] = bounded(widened_one(row[labels[i]]));
        return bounded(widened_one(row[blank]));
    }
    // (1) at time 0
    void start(States to) {
        to.clear(s);
        const float e = emit(0);
        to.blank[0] = e;
        if (s > 0) to.label[0] = emitted[0];
    }
    // (1) from one time to the next, less `off`
    void step(int64_t t, States from, States to, float off) {
        const float e = emit(t) - off;
#pragma omp simd
        for (int64_t i = 0; i <= s; ++i) to.blank[i] = log_add(from.blank[i], from.label[i - 1]) + e;
#pragma omp simd
        for (int64_t i = 0; i < s; ++i)
            to.label[i] = log_add(from.label[i], from.blank[i], from.label[i - 1] + skip[i]) + (emitted[i] - off);
    }
    // (2), of the last states, from which `off` was taken
    double value(States last, double off) const {
        const double most = log_add(last.blank[s], s > 0 ? last.label[s - 1] : NEVER);
        return most > NO_PATH || most != most ? -(most + off) : double(INF);
    }
};

inline bool fits(int64_t c, int64_t width, const int64_t* labels) {
    for (int64_t i = 0; i < width; ++i)
        if (labels[i] < 0 || labels[i] >= c) return false;
    return true;
}

// ℓ of n sequences (2). `odd` is how many are to be left to others: a label that is no class, or NaN.
template <class T>
inline void ctc_values(int64_t steps, int64_t n, int64_t c, int64_t width, int64_t blank, int threads, const T* x,
                       const int64_t* labels, const int64_t* times, const int64_t* lengths, float* values, int64_t* odd) {
    std::unique_ptr<int64_t[]> odds(new int64_t[n]());
    in_parallel(n, threads, [&, values](int64_t k) {
        const int64_t time = times[k], s = lengths[k];
        if (s < 0 || s > width || time < 0 || time > steps || !fits(c, width, labels + k * width)) {
            odds[k] = 1;
            return;
        }
        if (time == 0) {
            values[k] = s == 0 ? 0.0f : INF;
            return;
        }
        Spelling<T> of(x + k * c, n * c, time, s, blank, labels + k * width);
        std::unique_ptr<float[]> room(new float[2 * States::size(s)]);
        States from(room.get(), s), to(room.get() + States::size(s), s);
        to.clear(s);
        of.start(from);
        double off = 0.0;
        for (int64_t t = 1; t < time; ++t) {
            const double most = from.largest(s);
            of.step(t, from, to, static_cast<float>(most));
            off += static_cast<float>(most);
            std::swap(from, to);
        }
        values[k] = static_cast<float>(of.value(from, off));
        odds[k] = values[k] != values[k];
    });
    for (int64_t k = 0; k < n; ++k) *odd += odds[k];
}

// (4), for g, the gradient of each ℓ: 0 where no path spells the target, which without `zero` is odd, too.
template <class T>
inline void ctc_gradient(int64_t steps, int64_t n, int64_t c, int64_t width, int64_t blank, int threads, const T* x,
                         const int64_t* labels, const int64_t* times, const int64_t* lengths, const float* g, int64_t zero,
                         T* grad_x, int64_t* odd) {
    std::unique_ptr<int64_t[]> odds(new int64_t[n]());
    in_parallel(n, threads, [&](int64_t k) {
        const int64_t time = times[k], s = lengths[k], size = States::size(s);
        std::unique_ptr<float[]> row(new float[c]());
        const auto keep = [&](int64_t t) {
            each(c, [&](int64_t i, auto at) { at(grad_x + (t * n + k) * c + i, at(row.get() + i)); });
        };
        if (s < 0 || s > width || time < 0 || time > steps || !fits(c, width, labels + k * width)) {
            odds[k] = 1;
            return;
        }
        for (int64_t t = time; t < steps; ++t) keep(t);
        if (time == 0) {
            odds[k] = s > 0 && !zero;
            return;
        }
        Spelling<T> of(x + k * c, n * c, time, s, blank, labels + k * width);
        std::unique_ptr<float[]> room(new float[(time + 2) * size]);
        std::unique_ptr<double[]> offs(new double[time]());
        const auto at = [&](int64_t t) { return States(room.get() + t * size, s); };
        of.start(at(0));
        for (int64_t t = 1; t < time; ++t) {
            const float most = static_cast<float>(at(t - 1).largest(s));
            at(t).clear(s);
            of.step(t, at(t - 1), at(t), most);
            offs[t] = offs[t - 1] + most;
        }
        const double value = of.value(at(time - 1), offs[time - 1]);
        if (value != value || value == double(INF)) {
            odds[k] = value != value || !zero;
            for (int64_t t = 0; t < time; ++t) keep(t);
            return;
        }
        States rest = at(time), next = at(time + 1);  // (3), and that with what is emitted at its time
        rest.clear(s);
        next.clear(s);
        rest.blank[s] = 0.0f;
        if (s > 0) rest.label[s - 1] = 0.0f;
        double off = 0.0;
        for (int64_t t = time - 1;; --t) {
            const States alpha = at(t);
            const float known = static_cast<float>(offs[t] + off + value);
            const float e = of.emit(t);
            float of_blank = 0.0f;
#pragma omp simd reduction(+ : of_blank)
            for (int64_t i = 0; i <= s; ++i) of_blank += normal_exp_below_0(alpha.blank[i] + rest.blank[i] + known);
#pragma omp simd
            for (int64_t i = 0; i < s; ++i) next.label[i] = normal_exp_below_0(alpha.label[i] + rest.label[i] + known);
            for (int64_t i = 0; i < c; ++i) row[i] = 0.0f;
            for (int64_t i = 0; i < s; ++i) row[of.labels[i]] -= g[k] * next.label[i];
            row[blank] -= g[k] * of_blank;
            keep(t);
            if (t == 0) break;
            const double most = rest.largest(s);
            const float less = static_cast<float>(most);
            off += less;
#pragma omp simd
            for (int64_t i = 0; i <= s; ++i) next.blank[i] = rest.blank[i] + (e - less);
#pragma omp simd
            for (int64_t i = 0; i < s; ++i) next.label[i] = rest.label[i] + (of.emitted[i] - less);
#pragma omp simd
            for (int64_t i = 0; i <= s; ++i) rest.blank[i] = log_add(next.blank[i], next.label[i]);
#pragma omp simd
            for (int64_t i = 0; i < s; ++i)
                rest.label[i] = log_add(next.label[i], next.blank[i + 1], next.label[i + 1] + of.skip[i + 1]);
        }
    });
    for (int64_t k = 0; k < n; ++k) *odd += odds[k];
}

}  // namespace torchbp
