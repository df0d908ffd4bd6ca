// An elementwise formula in one loop over memory: read once, computed in float32, rounded once, written once.
//
// 512 elements at a time, which stay in the first cache: half precision becomes float32 there, and sums are taken. What is
// left at the end is filled up, so that every element goes through the same instructions: its bits depend neither on where
// it stands nor on the threads. A sum is that of 32 768 elements each, in order, so it does not either; that of a row is one
// thread's, and each element's place in the sum is that in the row.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "math.h"
#include "math/soft.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace torchbp {

constexpr int64_t BLOCK = 512;
constexpr int64_t CHUNK = 64 * BLOCK;

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __int_as_float(uint32_t bits) { return as_float(bits); }  // as CUDA calls it

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// To the nearest, ties to even: the 16 bits that a bfloat16 has of a float.
inline uint32_t bits_of_bfloat16(float x) {
    const uint32_t bits = as_bits(x);
    return x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline float rounded_to_bfloat16(float x) { return as_float(bits_of_bfloat16(x) << 16); }

inline float as_float(float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    // the exponent's bias grows from 15 to 127 by a product, which makes subnormal numbers right; ∞ and NaN are put right
    const float small = as_float(size << 13) * as_float(0x77800000u);
    return as_float((size >= 0x7c00u ? (size << 13) | 0x7f800000u : as_bits(small)) | sign);
}

inline float16 as_float16(float x) {
    const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    // normal: the exponent's bias shrinks by 112, and 13 bits are rounded off; below 2^-14 a sum with 0.5 rounds
    const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const uint32_t small = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 65520 on
    return {static_cast<uint16_t>(sign | (size >= 0x477ff000u ? large : size < 0x38800000u ? small : normal))};
}

// ---- from memory to float32 -------------------------------------------------------------------------------------------

inline void widen(const float* from, float* to) { std::memcpy(to, from, BLOCK * sizeof(float)); }

template <class Integer>
inline void widen(const Integer* from, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = static_cast<float>(from[i]);
}

inline void widen(const bfloat16* from, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = as_float(static_cast<uint32_t>(from[i].bits) << 16);
}

inline void widen(const float16* from, float* to) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < BLOCK; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
    for (int64_t i = 0; i < BLOCK; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = as_float(from[i]);
#endif
}

// ---- and back, to the nearest, ties to even ---------------------------------------------------------------------------

inline void narrow(const float* from, float* to) { std::memcpy(to, from, BLOCK * sizeof(float)); }

template <class Integer>
inline void narrow(const float* from, Integer* to) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = static_cast<Integer>(static_cast<int32_t>(from[i]));
}

inline void narrow(const float* from, bfloat16* to) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i].bits = static_cast<uint16_t>(bits_of_bfloat16(from[i]));
}

inline void narrow(const float* from, float16* to) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < BLOCK; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
    for (int64_t i = 0; i < BLOCK; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#else
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = as_float16(from[i]);
#endif
}

// ---- what goes in: an array, numbers for its elements, or rows --------------------------------------------------------

struct Row {
    const float* at;
    float operator[](int64_t i) const { return at[i]; }
};

struct Same {
    float value;
    float operator[](int64_t) const { return value; }
};

template <class T>
struct Array {
    const T* data;
    explicit Array(const void* p) : data(static_cast<const T*>(p)) {}

    Row block(int64_t start, int64_t n, float* room) const {
        const T* from = data + start;
        if (n == BLOCK) {
            if constexpr (std::is_same_v<T, float>) return {from};
            widen(from, room);
            return {room};
        }
        T full[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i) full[i] = from[i < n ? i : n - 1];
        widen(full, room);
        return {room};
    }
};

template <class T>
struct Number {
    float value;
    explicit Number(const void* p) {
        T all[BLOCK];
        float room[BLOCK];
        for (auto& one : all) one = *static_cast<const T*>(p);
        widen(all, room);
        value = room[0];
    }
    explicit Number(const float* p) : value(*p) {}

    Same block(int64_t, int64_t, float*) const { return {value}; }
};

// Numbers that are spread over dimensions: element i has number (i / inner) % size.
template <class T>
struct Spread {
    const T* data;
    int64_t inner, size;
    Spread(const void* p, const int64_t* lengths) : data(static_cast<const T*>(p)), inner(lengths[0]), size(lengths[1]) {}

    Row block(int64_t start, int64_t n, float* room) const {
        T full[BLOCK];
        if (inner == 1) {  // a number a column: runs of them, for one at a time takes as long as all else
            int64_t at = start % size;
            if constexpr (std::is_same_v<T, float>)
                if (at + BLOCK <= size) return {data + at};
            for (int64_t i = 0; i < BLOCK;) {
                const int64_t count = size - at < BLOCK - i ? size - at : BLOCK - i;
                std::memcpy(full + i, data + at, count * sizeof(T));
                i += count;
                at = at + count < size ? at + count : 0;
            }
            widen(full, room);
            return {room};
        }
        int64_t index = start / inner % size, left = inner - start % inner;
        for (int64_t i = 0; i < BLOCK;) {
            const int64_t count = left < BLOCK - i ? left : BLOCK - i;
            const T value = data[index];
            for (int64_t j = 0; j < count; ++j) full[i + j] = value;
            i += count;
            left = inner;
            index = index + 1 < size ? index + 1 : 0;
        }
        widen(full, room);
        return {room};
    }
};

// Rows of a length, each a stride behind the one before, as a half of a tensor along a dimension lies.
struct Lines {
    int64_t length, stride;
    explicit Lines(const int64_t* lengths) : length(lengths[0]), stride(lengths[1]) {}

    // take(i, place, count): the elements from i on, of the n from `start` on, lie at `place` one behind the other.
    template <class Take>
    void each(int64_t start, int64_t n, Take take) const {
        int64_t row = start / length, at = start % length;
        for (int64_t i = 0; i < n; ++row, at = 0) {
            const int64_t count = length - at < n - i ? length - at : n - i;
            take(i, row * stride + at, count);
            i += count;
        }
    }
    // Where a whole block lies, or -1.
    int64_t whole(int64_t start, int64_t n) const {
        const int64_t row = start / length, at = start % length;
        return n == BLOCK && at + BLOCK <= length ? row * stride + at : -1;
    }
};

template <class T>
struct Rows {
    const T* data;
    Lines lines;
    Rows(const void* p, const int64_t* lengths) : data(static_cast<const T*>(p)), lines(lengths) {}

    Row block(int64_t start, int64_t n, float* room) const {
        const int64_t place = lines.whole(start, n);
        if (place >= 0) {
            if constexpr (std::is_same_v<T, float>) return {data + place};
            widen(data + place, room);
            return {room};
        }
        T full[BLOCK];
        lines.each(start, n, [&](int64_t i, int64_t at, int64_t count) { std::memcpy(full + i, data + at, count * sizeof(T)); });
        for (int64_t i = n; i < BLOCK; ++i) full[i] = full[n - 1];
        widen(full, room);
        return {room};
    }
};

// ---- what comes out: an array, rows, a sum, or one of each row ----------------------------------------------------------------

template <class T>
struct Values {
    T* data;
    Values(void* p, int64_t) : data(static_cast<T*>(p)) {}

    float* room(int64_t start, int64_t n, float* room) const {
        if constexpr (std::is_same_v<T, float>)
            if (n == BLOCK) return data + start;
        return room;
    }
    void keep(const float* from, int64_t start, int64_t n) const {
        if (from == static_cast<const void*>(data + start)) return;
        if (n == BLOCK) return narrow(from, data + start);
        T full[BLOCK];
        narrow(from, full);
        std::memcpy(data + start, full, n * sizeof(T));
    }
    void finish() const {}
};

template <class T>
struct IntoRows {
    T* data;
    Lines lines;
    IntoRows(void* p, const int64_t* lengths) : data(static_cast<T*>(p)), lines(lengths) {}

    float* room(int64_t start, int64_t n, float* room) const {
        if constexpr (std::is_same_v<T, float>) {
            const int64_t place = lines.whole(start, n);
            if (place >= 0) return data + place;
        }
        return room;
    }
    void keep(const float* from, int64_t start, int64_t n) const {
        const int64_t place = lines.whole(start, n);
        if (place >= 0) {
            if (from != static_cast<const void*>(data + place)) narrow(from, data + place);
            return;
        }
        T full[BLOCK];
        narrow(from, full);
        lines.each(start, n, [&](int64_t i, int64_t at, int64_t count) { std::memcpy(data + at, full + i, count * sizeof(T)); });
    }
    void finish() const {}
};

struct Sum {
    float* result;
    mutable std::vector<double> chunks;
    Sum(void* p, int64_t n) : result(static_cast<float*>(p)), chunks((n + CHUNK - 1) / CHUNK, 0.0) {}

    float* room(int64_t, int64_t, float* room) const { return room; }
    void keep(float* from, int64_t start, int64_t n) const {
        for (int64_t i = n; i < BLOCK; ++i) from[i] = 0.0f;
        float lanes[32] = {};
        for (int64_t i = 0; i < BLOCK; i += 32)
#pragma omp simd
            for (int64_t l = 0; l < 32; ++l) lanes[l] += from[i + l];
        double total = 0.0;
        for (float lane : lanes) total += lane;
        chunks[start / CHUNK] += total;
    }
    void finish() const {
        double total = 0.0;
        for (double chunk : chunks) total += chunk;
        *result = static_cast<float>(total);
    }
};

// to[i] += from[i] for `count` <= 32, without a step for each.
inline void add_few(float* to, const float* from, int64_t count) {
#if defined(__AVX512F__)
    const auto some = [](int64_t n) { return static_cast<__mmask16>(n < 16 ? (1u << n) - 1u : 0xffffu); };
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(some(count - i), to + i), _mm512_maskz_loadu_ps(some(count - i), from + i));
        _mm512_mask_storeu_ps(to + i, some(count - i), sum);
    }
#else
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
#endif
}

// Sums of rows of `width` elements, float32 over at most 512 of them, float64 from there.
struct RowSums {
    static constexpr int64_t SIDE = 32, SETTLED = 16 * SIDE;
    struct Open {  // the row that a chunk is at
        float lanes[SIDE] = {};
        double total = 0.0;

        // Adds `count` elements, the first of them in the place `side`.
        void add(int64_t side, const float* from, int64_t count) {
            if (side != 0 || count < SIDE) {
                const int64_t some = SIDE - side < count ? SIDE - side : count;
                add_few(lanes + side, from, some);
                from += some;
                count -= some;
            }
            float sums[SIDE];  // of this function alone: in registers
            std::memcpy(sums, lanes, sizeof sums);
            for (; count >= SIDE; count -= SIDE, from += SIDE)
#pragma omp simd
                for (int64_t l = 0; l < SIDE; ++l) sums[l] += from[l];
            std::memcpy(lanes, sums, sizeof sums);
            if (count > 0) add_few(lanes, from, count);
        }
        void settle() {
            double sum = 0.0;
#pragma omp simd reduction(+ : sum)
            for (int64_t l = 0; l < SIDE; ++l) {
                sum += lanes[l];
                lanes[l] = 0.0f;
            }
            total += sum;
        }
    };
    float* result;
    int64_t width;
    mutable std::vector<Open> open;
    RowSums(void* p, int64_t n, const int64_t* lengths) : result(static_cast<float*>(p)), width(lengths[0]), open(n / chunk() + 1) {}

    int64_t chunk() const { return width < CHUNK ? CHUNK / width * width : width; }
    float* room(int64_t, int64_t, float* room) const { return room; }
    void keep(const float* from, int64_t start, int64_t n) const {
        Open& row = open[start / chunk()];
        for (int64_t index = start / width, at = start % width; n > 0; ++index, at = 0) {
            for (const int64_t end = width - at < n ? width : at + n; at < end;) {
                const int64_t settled = (at / SETTLED + 1) * SETTLED, some = (end < settled ? end : settled) - at;
                row.add(at % SIDE, from, some);
                at += some;
                from += some;
                n -= some;
                if (at == width || at == settled) row.settle();
            }
            if (at == width) {
                result[index] = static_cast<float>(row.total);
                row.total = 0.0;
            }
        }
    }
    void finish() const {}
};

template <class Out>
inline int64_t chunk_of(const Out&) { return 0; }
inline int64_t chunk_of(const RowSums& sums) { return sums.chunk(); }

// ---- the loop ---------------------------------------------------------------------------------------------------------

template <class F, class Outs, class Ins, std::size_t... O, std::size_t... I>
inline void block(F formula, const Outs& outs, const Ins& ins, int64_t start, int64_t n, std::index_sequence<O...>,
                  std::index_sequence<I...>) {
    alignas(64) float wide[sizeof...(I)][BLOCK];
    alignas(64) float made[sizeof...(O)][BLOCK];
    const auto from = std::make_tuple(std::get<I>(ins).block(start, n, wide[I])...);
    float* const to[] = {std::get<O>(outs).room(start, n, made[O])...};
    formula(to, std::get<I>(from)...);
    (std::get<O>(outs).keep(to[O], start, n), ...);
}

// Asks for the block at `start`, where memory is all that is waited for: of one array, 5 to 8 % of the time; of two none.
template <class Ins>
TORCHBP_INLINE void ask_for(const Ins&, int64_t, int64_t) {}
template <class T>
TORCHBP_INLINE void ask_for(const std::tuple<Array<T>>& ins, int64_t start, int64_t n) {
    if (start + BLOCK > n) return;
    const T* from = std::get<0>(ins).data + start;
    for (int64_t i = 0; i < BLOCK; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// formula(to, rows...) computes 512 elements: it holds the loop itself, so that numbers stay in registers.
template <class F, class... Out, class... In>
inline void run(int64_t n, int threads, F formula, const std::tuple<Out...>& outs, const std::tuple<In...>& ins) {
    int64_t length = CHUNK;  // whole rows, where there are sums of rows
    std::apply([&](const auto&... out) { ((length = chunk_of(out) > 0 ? chunk_of(out) : length), ...); }, outs);
    const int64_t chunks = (n + length - 1) / length;
    const auto chunk = [&](int64_t c) {
        const int64_t end = (c + 1) * length < n ? (c + 1) * length : n;
        for (int64_t start = c * length; start < end; start += BLOCK) {
            ask_for(ins, start + BLOCK, n);
            block(formula, outs, ins, start, end - start < BLOCK ? end - start : BLOCK,
                  std::index_sequence_for<Out...>{}, std::index_sequence_for<In...>{});
        }
    };
    if (threads > 1 && chunks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < chunks; ++c) chunk(c);
    } else {
        for (int64_t c = 0; c < chunks; ++c) chunk(c);
    }
    std::apply([](const auto&... out) { (out.finish(), ...); }, outs);
}

}  // namespace torchbp
