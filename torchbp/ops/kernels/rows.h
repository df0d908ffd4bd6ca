// Normalization over rows: x̂ = (x - μ) r, r = 1 / √(v + ε), then y = x̂ w + b, and the gradients of both.
//
// What there is one of per row is float64. μ is taken out in two parts, for x - μ would have the error of μ's rounding: that is
// seen where |μ| is a thousand times the deviation. Each row is one thread's, and sums over rows are those of chunks whose length
// the shape alone determines: no bit depends on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace torchbp {

// ---- statistics --------------------------------------------------------------------------------------------------------

// Elements that share their statistics: `count` pieces of `length`, the starts of two a `stride` apart.
struct Pieces {
    int64_t count, length, stride;
    double share;  // of one element: a division for each row takes as long as 64 elements
    Pieces(int64_t count, int64_t length, int64_t stride)
        : count(count), length(length), stride(stride), share(1.0 / (static_cast<double>(count) * static_cast<double>(length))) {}
};

struct Statistics {
    float shift, rest;  // μ in two parts
    double mean, variance, r;

    // Of Σ c and Σ c², c = x - shift.
    Statistics(float shift, double by_c, double by_square, Pieces p, double eps) : shift(shift) {
        const double off = by_c * p.share, v = by_square * p.share - off * off;
        rest = static_cast<float>(off);
        mean = shift + off;
        variance = v < 0.0 ? 0.0 : v;
        r = 1.0 / std::sqrt(variance + eps);
    }
    // Σ v x̂ of Σ v and Σ v c.
    double along(double by_v, double by_product) const { return (by_product - (mean - shift) * by_v) * r; }
    // Whether the squares are those of deviations. Where the shift is far from μ they are not, and their digits cancel.
    bool exact() const { return rest * rest <= 4.0 * variance && std::isfinite(variance); }
};

// About the mean, from the first few elements.
template <class T>
inline float near_mean(const T* x, Pieces p) {
    const int64_t few = std::min<int64_t>(p.length, LANES);
    return together(load(x, few)) / static_cast<float>(few);
}

template <bool CENTRED, class T>
inline Statistics statistics_about(float shift, const T* x, Pieces p, double eps) {
    const Lanes away = all(shift);
    Sums<2> sums;
    for (int64_t k = 0; k < p.count; ++k) {
        const T* from = x + k * p.stride;
        sums.add(p.length, [&](int64_t i, auto at, Lanes* of) {
            const Lanes c = at(from + i, shift) - away;
            of[0] = CENTRED ? c : Lanes{};
            of[1] = c * c;
        });
    }
    return Statistics(shift, sums.take(0), sums.take(1), p, eps);
}

// In float64, element by element, for what overflows float32.
template <bool CENTRED, class T>
inline Statistics wide_statistics(const T* x, Pieces p, double eps) {
    double shift = 0.0;
    for (int pass = CENTRED ? 0 : 1;; ++pass) {
        double by[2] = {};
        for (int64_t k = 0; k < p.count; ++k)
            for (int64_t i = 0; i < p.length; ++i) {
                const double c = load(x + k * p.stride + i, 1)[0] - shift;
                by[0] += c;
                by[1] += c * c;
            }
        if (pass == 1) return Statistics(static_cast<float>(shift), CENTRED ? by[0] : 0.0, by[1], p, eps);
        shift = static_cast<float>(by[0] * p.share);
    }
}

template <bool CENTRED, class T>
inline Statistics statistics(const T* x, Pieces p, double eps) {
    Statistics s = statistics_about<CENTRED>(CENTRED ? near_mean(x, p) : 0.0f, x, p, eps);
    if (CENTRED && !s.exact()) s = statistics_about<CENTRED>(static_cast<float>(s.mean), x, p, eps);
    return std::isfinite(s.variance) ? s : wide_statistics<CENTRED>(x, p, eps);
}

// ---- rows with a weight for each element -------------------------------------------------------------------------------

// (N, G, D): y, and of each row μ and r. w, b: (G, D).
template <bool CENTRED, class T>
inline void rows(int64_t n, int64_t groups, int64_t width, int threads, double eps, const T* x, const float* w, const float* b,
                 T* y, float* mean, float* rstd) {
    const int64_t some = std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, width)), count = n * groups;
    const Pieces whole(1, width, 0);
    in_parallel((count + some - 1) / some, threads, [=](int64_t chunk) {
        for (int64_t row = chunk * some; row < std::min(count, (chunk + 1) * some); ++row) {
            const T* from = x + row * width;
            T* to = y + row * width;
            const float* w_row = w + row % groups * width;
            const Statistics s = statistics<CENTRED>(from, whole, eps);
            const Lanes shift = all(s.shift), rest = all(s.rest), r = all(static_cast<float>(s.r));
            const auto normalized = [&](int64_t i, auto at) { return (CENTRED ? at(from + i) - shift - rest : at(from + i)) * r; };
            if (b != nullptr) {
                const float* b_row = b + row % groups * width;
                each(width, [&](int64_t i, auto at) { at(to + i, normalized(i, at) * at(w_row + i) + at(b_row + i)); });
            } else {
                each(width, [&](int64_t i, auto at) { at(to + i, normalized(i, at) * at(w_row + i)); });
            }
            if (mean != nullptr) mean[row] = static_cast<float>(s.mean);
            if (rstd != nullptr) rstd[row] = static_cast<float>(s.r);
        }
    });
}

// Sums over rows, of columns (C,), in `some`: float32 over 16 rows, float64 from there.
struct Columns {
    float* some;
    int64_t size, rows = 0;
    std::vector<double> total = {};

    void next_rows(int64_t count) {
        rows += count;
        if (rows >= 16) settle();
    }
    void settle() {
        total.resize(size, 0.0);
        double* to = total.data();
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            to[i] += some[i];
            some[i] = 0.0f;
        }
        rows = 0;
    }
    void finish() {
        if (total.empty()) return;
        settle();
        for (int64_t i = 0; i < size; ++i) some[i] = static_cast<float>(total[i]);
    }
};

// What the gradient of a row is made of: (s - level - (x - shift - rest) share) r.
struct RowGradient {
    float shift, rest, r, level, share;
};

// Of a row, from where it is about centred.
template <bool CENTRED, class T>
inline RowGradient row_gradient(Pieces whole, double eps, const T* g, const T* x, const float* w, float shift) {
    const auto sums_about = [&](float shift) {
        const Lanes away = all(shift);
        Sums<4> sums;  // Σ s, Σ s c, Σ c, Σ c², with c = x - shift
        sums.add(whole.length, [&](int64_t i, auto at, Lanes* of) {
            const Lanes s = at(g + i) * at(w + i), c = CENTRED ? at(x + i, shift) - away : at(x + i);
            of[0] = CENTRED ? s : Lanes{};
            of[1] = s * c;
            of[2] = CENTRED ? c : Lanes{};
            of[3] = c * c;
        });
        for (int k = 0; k < 4; ++k) sums.settle(k);
        return sums;
    };
    Sums<4> by = sums_about(shift);
    Statistics s(shift, by.total[2], by.total[3], whole, eps);
    if (!s.exact()) {
        s = statistics<CENTRED>(x, whole, eps);
        if (CENTRED) by = sums_about(s.shift);
    }
    const double share = s.along(by.total[0], by.total[1]) * s.r * whole.share;
    const double level = by.total[0] * whole.share;
    return {s.shift, s.rest, static_cast<float>(s.r), static_cast<float>(level), static_cast<float>(share)};
}

// ROWS rows at once, `stride` apart: their sums go to memory once.
template <bool CENTRED, bool GRADIENT, bool SUMMED, int ROWS, class T>
inline void row_gradients(int64_t width, int64_t stride, const RowGradient* rows, const T* g, const T* x, const float* w, T* to,
                          float* by_w, float* by_b) {
    Lanes shift[ROWS], rest[ROWS], r[ROWS], level[ROWS], share[ROWS];
    for (int k = 0; k < ROWS; ++k) {
        shift[k] = all(rows[k].shift);
        rest[k] = all(rows[k].rest);
        r[k] = all(rows[k].r);
        level[k] = all(rows[k].level);
        share[k] = all(rows[k].share);
    }
    each(width, [&](int64_t i, auto at) {
        const Lanes scale = at(w + i);
        Lanes of_w = {}, of_b = {}, made[ROWS];
#pragma GCC unroll 4
        for (int k = 0; k < ROWS; ++k) {
            const int64_t place = k * stride + i;
            const Lanes v = at(g + place), c = CENTRED ? at(x + place) - shift[k] - rest[k] : at(x + place);
            if (SUMMED) {
                of_w += v * (c * r[k]);
                of_b += v;
            }
            if (GRADIENT) {
                const Lanes s = v * scale;
                made[k] = ((CENTRED ? s - level[k] : s) - c * share[k]) * r[k];  // r last: it rounds what is left
            }
        }
        // Behind all that is read: rows lie whole pages apart, where a processor takes a place for one just written to.
        for (int k = 0; k < ROWS && GRADIENT; ++k) at(to + k * stride + i, made[k]);
        if (SUMMED) at(by_w + i, at(by_w + i) + of_w);
        if (SUMMED && CENTRED) at(by_b + i, at(by_b + i) + of_b);
    });
}

// The gradients of `rows`: of x, and where they are wanted of w and b. `mean` is where x is centred about, if it is known.
template <bool CENTRED, bool GRADIENT, bool SUMMED, class T>
inline void rows_backward(int64_t n, int64_t groups, int64_t width, int threads, double eps, const T* g, const T* x,
                          const float* w, const float* mean, T* grad_x, float* grad_w, float* grad_b) {
    constexpr int64_t ROWS = 4;
    const Pieces whole(1, width, 0);
    const int64_t columns = groups * width;
    const int64_t least = 4 * CHUNK / std::max<int64_t>(1, columns), some = std::max<int64_t>({1, least, (n + 63) / 64});
    const int64_t chunks = (n + some - 1) / some, kept = SUMMED ? (CENTRED ? 2 : 1) * columns : 0;
    std::vector<float> room(chunks * kept + LANES);
    float* const parts = aligned(room.data());
    in_parallel(chunks, threads, [&](int64_t chunk) {
        Columns sums{parts + chunk * kept, kept};
        const int64_t last = std::min(n, (chunk + 1) * some);
        for (int64_t sample = chunk * some; sample < last;) {
            const int64_t count = std::min(ROWS, last - sample);
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t column = group * width, start = sample * columns + column;
                RowGradient rows[ROWS];
                for (int64_t k = 0; k < count; ++k) {
                    const T* x_row = x + start + k * columns;
                    const float known = mean == nullptr ? near_mean(x_row, whole) : mean[(sample + k) * groups + group];
                    rows[k] = row_gradient<CENTRED>(whole, eps, g + start + k * columns, x_row, w + column, CENTRED ? known : 0.0f);
                }
                float *by_w = sums.some + column, *by_b = by_w + columns;
                const auto write = [&](int64_t k, auto some_rows) {
                    const int64_t place = start + k * columns;
                    row_gradients<CENTRED, GRADIENT, SUMMED, some_rows>(width, columns, rows + k, g + place, x + place, w + column,
                                                                       grad_x + place, by_w, by_b);
                };
                if (count == ROWS)
                    write(0, std::integral_constant<int, ROWS>{});
                else
                    for (int64_t k = 0; k < count; ++k) write(k, std::integral_constant<int, 1>{});
            }
            sample += count;
            if (SUMMED) sums.next_rows(count);
        }
        if (SUMMED) sums.finish();
    });
    std::vector<double> total(kept, 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < kept; ++i) total[i] += parts[chunk * kept + i];
    for (int64_t i = 0; i < columns && SUMMED; ++i) {
        if (grad_w != nullptr) grad_w[i] = static_cast<float>(total[i]);
        if (grad_b != nullptr) grad_b[i] = static_cast<float>(total[columns + i]);
    }
}

template <bool CENTRED, class T>
inline void rows_backward(int64_t n, int64_t groups, int64_t width, int threads, double eps, const T* g, const T* x,
                          const float* w, const float* mean, T* grad_x, float* grad_w, float* grad_b) {
    const bool summed = grad_w != nullptr || grad_b != nullptr;
    const auto run = grad_x == nullptr ? rows_backward<CENTRED, false, true, T>
                     : summed          ? rows_backward<CENTRED, true, true, T>
                                       : rows_backward<CENTRED, true, false, T>;
    run(n, groups, width, threads, eps, g, x, w, mean, grad_x, grad_w, grad_b);
}

// ---- channels: pieces with one weight each -----------------------------------------------------------------------------

// x as (N, C, L), its channels in G groups with statistics of their own in each sample; or G = 0: each channel has them over all
// samples.
struct Channels {
    int64_t n, channels, length, groups;

    int64_t units() const { return groups > 0 ? n * groups : channels; }
    int64_t pieces() const { return groups > 0 ? channels / groups : n; }
    int64_t stride() const { return groups > 0 ? length : channels * length; }
    int64_t start(int64_t unit) const { return groups > 0 ? unit * pieces() * length : unit * length; }
    int64_t channel(int64_t unit, int64_t piece) const { return groups > 0 ? unit % groups * pieces() + piece : unit; }
    Pieces of_unit() const {  // as few as there can be
        return groups > 0 ? Pieces(1, pieces() * length, 0) : Pieces(n, length, stride());
    }
};

// y, and of each unit μ, r and, where it is wanted, v. w, b: (C,).
template <class T>
inline void channels(Channels of, int threads, double eps, const T* x, const float* w, const float* b, T* y, float* mean,
                     float* rstd, float* variance) {
    const Pieces whole = of.of_unit();
    in_parallel(of.units(), threads, [=](int64_t unit) {
        const Statistics s = statistics<true>(x + of.start(unit), whole, eps);
        const Lanes shift = all(s.shift), rest = all(s.rest);
        for (int64_t k = 0; k < of.pieces(); ++k) {
            const int64_t start = of.start(unit) + k * of.stride(), channel = of.channel(unit, k);
            const Lanes scale = all(static_cast<float>(s.r * (w == nullptr ? 1.0 : w[channel])));
            const Lanes level = all(b == nullptr ? 0.0f : b[channel]);
            each(of.length, [&](int64_t i, auto at) { at(y + start + i, (at(x + start + i) - shift - rest) * scale + level); });
        }
        mean[unit] = static_cast<float>(s.mean);
        rstd[unit] = static_cast<float>(s.r);
        if (variance != nullptr) variance[unit] = static_cast<float>(s.variance);
    });
}

template <class T>
inline void channels_backward(Channels of, int threads, double eps, const T* g, const T* x, const float* w, const float* mean,
                              T* grad_x, float* grad_w, float* grad_b) {
    const int64_t pieces = of.pieces();
    const Pieces whole = of.of_unit();
    std::vector<double> of_w(of.units() * pieces), of_b(of.units() * pieces);
    in_parallel(of.units(), threads, [&](int64_t unit) {
        const int64_t first = of.start(unit);
        double *by_w = of_w.data() + unit * pieces, *by_b = of_b.data() + unit * pieces;
        double by_s, by_product;
        const auto weight = [&](int64_t k) { return w == nullptr ? 1.0f : w[of.channel(unit, k)]; };
        const auto sums_about = [&](float shift) {
            const Lanes away = all(shift);
            Sums<4> by;  // Σ g, Σ g c of each piece, Σ c, Σ c² of all, with c = x - shift
            by_s = by_product = 0.0;
            for (int64_t k = 0; k < pieces; ++k) {
                const T *g_piece = g + first + k * of.stride(), *x_piece = x + first + k * of.stride();
                by.add(of.length, [&](int64_t i, auto at, Lanes* of) {
                    const Lanes v = at(g_piece + i), c = at(x_piece + i, shift) - away;
                    of[0] = v;
                    of[1] = v * c;
                    of[2] = c;
                    of[3] = c * c;
                });
                by_b[k] = by.take(0);
                by_w[k] = by.take(1);
                by_s += by_b[k] * weight(k);
                by_product += by_w[k] * weight(k);
            }
            return Statistics(shift, by.take(2), by.take(3), whole, eps);
        };
        Statistics s = sums_about(mean != nullptr ? mean[unit] : near_mean(x + first, whole));
        if (!s.exact()) {
            s = statistics<true>(x + first, whole, eps);
            sums_about(s.shift);
        }
        for (int64_t k = 0; k < pieces; ++k) by_w[k] = s.along(by_b[k], by_w[k]);
        if (grad_x == nullptr) return;
        const double along = s.along(by_s, by_product) * s.r * whole.share;
        const Lanes from = all(s.shift), rest = all(s.rest), r = all(static_cast<float>(s.r)),
                    share = all(static_cast<float>(along)), level = all(static_cast<float>(by_s * whole.share));
        for (int64_t k = 0; k < pieces; ++k) {
            const int64_t start = first + k * of.stride();
            const Lanes scale = all(weight(k));
            each(of.length, [&](int64_t i, auto at) {
                const Lanes s = at(g + start + i) * scale - level, c = at(x + start + i) - from - rest;
                at(grad_x + start + i, (s - c * share) * r);  // r last: it rounds what is left
            });
        }
    });
    std::vector<double> by_w(of.channels), by_b(of.channels);
    for (int64_t unit = 0; unit < of.units(); ++unit)
        for (int64_t k = 0; k < pieces; ++k) {
            by_w[of.channel(unit, k)] += of_w[unit * pieces + k];
            by_b[of.channel(unit, k)] += of_b[unit * pieces + k];
        }
    for (int64_t i = 0; i < of.channels; ++i) {
        if (grad_w != nullptr) grad_w[i] = static_cast<float>(by_w[i]);
        if (grad_b != nullptr) grad_b[i] = static_cast<float>(by_b[i]);
    }
}

}  // namespace torchbp
