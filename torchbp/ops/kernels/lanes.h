// 16 elements at a time, in float32 whatever memory holds: from memory and back, loops over them, their sums.
//
// What is left at a row's end is filled up, so that every element goes through the same instructions. Sums are float32 over at
// most 2048 elements, float64 from there, in an order that only their number determines.
#pragma once

#include <algorithm>
#include <type_traits>

#include "loop.h"

namespace torchbp {

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline float* aligned(float* room) {  // to what is read at once; the room is 16 longer
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room) + sizeof(Lanes) - 1) / sizeof(Lanes) * sizeof(Lanes));
}

inline Lanes all(float value) { return Lanes{} + value; }

// ---- 16 elements from memory and back; of `count` < 16 only those are touched, the others are `fill` -------------------

template <class Vector, class T>
inline Vector raw(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Lanes widened(Halves h, bfloat16) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of it
    return (Lanes)((Words)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
    return (Lanes)(__builtin_convertvector(h, Words) << 16);
#endif
}

inline Halves narrowed(Lanes v, bfloat16) {
    const Words bits = (Words)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words near = v != v ? (Words{} + 0x7fc0u) : rounded;
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)near);
#else
    return __builtin_convertvector(near, Halves);
#endif
}

inline Lanes widened(Halves h, float16) {
    Lanes v;
#if defined(__AVX512F__)
    const __m512 wide = _mm512_cvtph_ps((__m256i)h);
    std::memcpy(&v, &wide, sizeof v);
#elif defined(__F16C__)
    __m128i half[2];
    std::memcpy(half, &h, sizeof h);
    const __m256 wide[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
    std::memcpy(&v, wide, sizeof v);
#else
    for (int64_t i = 0; i < LANES; ++i) v[i] = as_float(float16{h[i]});
#endif
    return v;
}

inline Halves narrowed(Lanes v, float16) {
    Halves h;
#if defined(__AVX512F__)
    h = (Halves)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__F16C__)
    __m256 wide[2];
    std::memcpy(wide, &v, sizeof v);
    const __m128i half[2] = {_mm256_cvtps_ph(wide[0], 0), _mm256_cvtps_ph(wide[1], 0)};
    std::memcpy(&h, half, sizeof h);
#else
    for (int64_t i = 0; i < LANES; ++i) h[i] = as_float16(v[i]).bits;
#endif
    return h;
}

template <class T>
inline Lanes load(const T* from) {
    if constexpr (std::is_same_v<T, float>)
        return raw<Lanes>(from);
    else
        return widened(raw<Halves>(from), T{});
}

template <class T>
inline void store(T* to, Lanes v) {
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(to, &v, sizeof v);
    } else {
        const Halves h = narrowed(v, T{});
        std::memcpy(to, &h, sizeof h);
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

template <class T>
inline Lanes load(const T* from, int64_t count, float fill = 0.0f) {
    if constexpr (std::is_same_v<T, float>) {
        return (Lanes)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), from);
    } else {
        const Lanes v = widened((Halves)_mm256_maskz_loadu_epi16(first(count), from), T{});
        return (Lanes)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(count), (__m512)v);
    }
}

template <class T>
inline void store(T* to, Lanes v, int64_t count) {
    if constexpr (std::is_same_v<T, float>)
        _mm512_mask_storeu_ps(to, first(count), (__m512)v);
    else
        _mm256_mask_storeu_epi16(to, first(count), (__m256i)narrowed(v, T{}));
}
#else
template <class T>
inline Lanes load(const T* from, int64_t count, float fill = 0.0f) {
    T full[LANES] = {};
    std::memcpy(full, from, count * sizeof(T));
    Lanes v = load(full);
    for (int64_t i = count; i < LANES; ++i) v[i] = fill;
    return v;
}

template <class T>
inline void store(T* to, Lanes v, int64_t count) {
    T full[LANES];
    store(full, v);
    std::memcpy(to, full, count * sizeof(T));
}
#endif

// ---- loops and sums ----------------------------------------------------------------------------------------------------

struct Whole {  // 16 elements, known to the compiler as such
    template <class T>
    Lanes operator()(const T* from, float = 0.0f) const { return load(from); }
    template <class T>
    void operator()(T* to, Lanes v) const { store(to, v); }
};

struct Part {
    int64_t count;
    template <class T>
    Lanes operator()(const T* from, float fill = 0.0f) const { return load(from, count, fill); }
    template <class T>
    void operator()(T* to, Lanes v) const { store(to, v, count); }
};

// step(i, at) for 16 elements from i on, which it reads and writes by `at`.
template <class F>
inline void each(int64_t n, F step) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) step(i, Whole{});
    if (i < n) step(i, Part{n - i});
}

// f of 16 elements, by halves.
template <class F>
inline float folded(Lanes v, F f) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];
    std::memcpy(eight, &v, sizeof v);
    eight[0] = f(eight[0], eight[1]);
    Four four[2];
    std::memcpy(four, eight, sizeof four);
    four[0] = f(four[0], four[1]);
    return f(f(four[0][0], four[0][2]), f(four[0][1], four[0][3]));
}

inline float together(Lanes v) {
    return folded(v, [](auto a, auto b) { return a + b; });
}

// N sums at once, of rows in one piece or in several.
template <int N>
struct Sums {
    static constexpr int64_t SIDE = N > 2 ? 2 : 4;  // sums side by side, for one waits for its last addition
    Lanes lanes[SIDE][N];
    double total[N];
    int64_t since = 0;

    Sums() {  // not by {}, of which GCC makes `rep stos`: it takes as long as a row of 64
#pragma GCC unroll 4
        for (int64_t side = 0; side < SIDE; ++side)
#pragma GCC unroll 4
            for (int k = 0; k < N; ++k) lanes[side][k] = Lanes{};
        for (int k = 0; k < N; ++k) total[k] = 0.0;
    }

    // Adds, for n elements, to the k-th sum the k-th of what terms(i, at, of) writes to `of`: 0 where there is no element.
    template <class F>
    void add(int64_t n, F terms) {
        for (int64_t start = 0; start < n; start += 2048) {
            const int64_t end = std::min(n, start + 2048);
            Lanes sums[SIDE][N];  // of this function alone: in registers
            std::memcpy(sums, lanes, sizeof sums);
            int64_t i = start;
            for (; i + SIDE * LANES <= end; i += SIDE * LANES)
#pragma GCC unroll 4
                for (int64_t side = 0; side < SIDE; ++side) next(i + side * LANES, Whole{}, sums[side], terms);
            for (; i + LANES <= end; i += LANES) next(i, Whole{}, sums[0], terms);
            if (i < end) next(i, Part{end - i}, sums[1], terms);
            std::memcpy(lanes, sums, sizeof sums);
            since += end - start;
            if (since >= 2048) {
                for (int k = 0; k < N; ++k) settle(k);
                since = 0;
            }
        }
    }
    template <class At, class F>
    static void next(int64_t i, At at, Lanes* sums, F terms) {
        Lanes of[N];
        terms(i, at, of);
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) sums[k] += of[k];
    }
    void settle(int k) {
        Lanes sum = lanes[0][k];
        lanes[0][k] = Lanes{};
        for (int64_t side = 1; side < SIDE; ++side) {
            sum += lanes[side][k];
            lanes[side][k] = Lanes{};
        }
        total[k] += together(sum);
    }
    double take(int k) {
        settle(k);
        const double sum = total[k];
        total[k] = 0.0;
        return sum;
    }
};

template <class F>
inline void in_parallel(int64_t n, int threads, F run) {
    if (threads > 1 && n > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) run(i);
    } else {
        for (int64_t i = 0; i < n; ++i) run(i);
    }
}

}  // namespace torchbp
