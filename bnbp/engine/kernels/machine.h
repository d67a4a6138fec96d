/* What the kernels need of the machine and Cython has no words for. Compiled once for each instruction set. */
#ifndef BNBP_MACHINE_H
#define BNBP_MACHINE_H

#ifdef _OPENMP
#include <omp.h>
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

#ifdef _OPENMP
#define BNBP_OPENMP _OPENMP
#else
#define BNBP_OPENMP 0
#endif

/* The levels of the x86-64 psABI; elsewhere there is one. */
#if defined(__AVX512F__) && defined(__AVX512VL__)
#define BNBP_ISA "x86-64-v4"
#elif defined(__AVX2__)
#define BNBP_ISA "x86-64-v3"
#elif defined(__x86_64__) || defined(_M_X64)
#define BNBP_ISA "x86-64"
#else
#define BNBP_ISA "baseline"
#endif

#if defined(__GNUC__)
#define BNBP_INLINE inline __attribute__((always_inline))
#define BNBP_APART __attribute__((noinline))
#else
#define BNBP_INLINE inline
#define BNBP_APART inline
#endif

/* Fills in a Cython memoryview that is None: address, shape and strides of a C-contiguous (a, b, c) array. */
#define VIEW(view, memory, a, b, c, size)                                                                              \
    ((view).data = (char*)(memory), (view).shape[0] = (a), (view).strides[0] = (b) * (c) * (Py_ssize_t)(size),         \
     (view).shape[1] = (b), (view).strides[1] = (c) * (Py_ssize_t)(size), (view).shape[2] = (c),                       \
     (view).strides[2] = (Py_ssize_t)(size))

/* The threads of the team, which may be fewer than were asked for. */
static inline int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* The number of this thread in its team; that of the one that called is 0. */
static inline int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* How many threads OpenMP would start here if not told a number. */
static inline int openmp_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* A flag that one thread raises and the others see in time. */
static inline int flag_is_up(const int* flag) {
#if defined(__GNUC__)
    return __atomic_load_n(flag, __ATOMIC_RELAXED);
#else
    return *(const volatile int*)flag;
#endif
}

static inline void raise_flag(int* flag) {
#if defined(__GNUC__)
    __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
#else
    *(volatile int*)flag = 1;
#endif
}

/* Waits for the other threads of the team; nothing outside a parallel region. */
static inline void barrier(void) {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* Asks for the cache lines of memory that will be read soon; any address will do. Always inline: a function that does
   nothing else has no effect as far as GCC knows, and it removes the calls. */
static BNBP_INLINE void prefetch(const void* address, size_t bytes) {
#if defined(__GNUC__)
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char*)address + i, 0, 3);
#else
    (void)address, (void)bytes;
#endif
}

/* Writes a cache line, or half of one, past the caches: it is then not read before it is written, and does not push out
   what the other pass still needs. Where `from` is in an array that nothing else looks at, that stays in registers. */
static inline void stream_half_line(void* to, const void* from) {
#if defined(__AVX__)
    _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__SSE2__) || defined(_M_X64)
    for (int i = 0; i < 2; ++i)
        _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
#else
    memcpy(to, from, 32);
#endif
}
static inline void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#else
    stream_half_line(to, from);
    stream_half_line((char*)to + 32, (const char*)from + 32);
#endif
}

/* The same into the caches. With AVX2, GCC's memcpy moves 16 bytes at a time, from a stack that was written 32 at a
   time: a gradient took up to half as long again (Zen 3). */
static inline void put_half_line(void* to, const void* from) {
#if defined(__AVX__)
    _mm256_storeu_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#else
    memcpy(to, from, 32);
#endif
}
static inline void put_line(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
#else
    put_half_line(to, from);
    put_half_line((char*)to + 32, (const char*)from + 32);
#endif
}

/* A line's bytes to any place: past the caches where that begins a line or, in four parts, a quarter of one. */
static inline void stream_anywhere(void* to, const void* from) {
    if ((uintptr_t)to % 64 == 0) {
        stream_line(to, from);
        return;
    }
#if defined(__SSE2__) || defined(_M_X64)
    if ((uintptr_t)to % 16 == 0) {
        for (int i = 0; i < 4; ++i)
            _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
        return;
    }
#endif
    memcpy(to, from, 64);
}

/* Copies memory, whole cache lines past the caches. */
static inline void stream(void* to, const void* from, size_t bytes) {
    char* target = (char*)to;
    const char* source = (const char*)from;
    const size_t head = (size_t)(-(uintptr_t)target % 64);
    if (head) { /* not at all is cheaper than a call of memcpy for nothing */
        const size_t count = head < bytes ? head : bytes;
        memcpy(target, source, count);
        target += count, source += count, bytes -= count;
    }
    for (; bytes >= 64; target += 64, source += 64, bytes -= 64)
        stream_line(target, source);
    if (bytes)
        memcpy(target, source, bytes);
}

/* Makes streamed lines visible to the threads that read them next. */
static inline void stream_fence(void) {
#if defined(__SSE2__) || defined(_M_X64)
    _mm_sfence();
#endif
}

/* a + b and a - b by the units that multiply, which have little else to do in a reduction: on a CPU that has others for
   additions, the float64 sums take 0.62 ns an element instead of 0.87 (Zen 4). `one` is 1.0 from `one()`, which keeps
   the compiler from seeing that a multiplication by it can go. The bits are those of a plain sum. */
static inline double one(void) {
    double value = 1.0;
#if defined(__FMA__) && defined(__GNUC__)
    __asm__("" : "+x"(value));
#endif
    return value;
}
static inline double plus(double a, double b, double one) {
#if defined(__FMA__)
    return fma(a, one, b);
#else
    (void)one;
    return a + b;
#endif
}
static inline double minus(double a, double b, double one) {
#if defined(__FMA__)
    return fma(a, one, -b);
#else
    (void)one;
    return a - b;
#endif
}

/* The rounding error of p = a * b, exactly; 0 for products so small (below 2^-960) that it could be subnormal, where
   the two ways to compute it would differ. */
static inline double product_error(double a, double b, double p) {
#if defined(__FMA__)
    double error = fma(a, b, -p);
#else
    /* Dekker: each factor is split into halves of 26 bits, whose products are exact. Large factors would overflow in
       the split; they are scaled by a power of two, which changes no bit. */
    const double sa = fabs(a) > 0x1p990 ? 0x1p-60 : 1.0, sb = fabs(b) > 0x1p990 ? 0x1p-60 : 1.0;
    const double u = a * sa, v = b * sb, big_u = 134217729.0 * u, big_v = 134217729.0 * v;
    const double u1 = big_u - (big_u - u), v1 = big_v - (big_v - v), u2 = u - u1, v2 = v - v1;
    double error = (((u1 * v1 - p * sa * sb) + u1 * v2 + u2 * v1) + u2 * v2) / sa / sb;
#endif
    return fabs(p) < 0x1p-960 ? 0.0 : error;
}

#endif /* BNBP_MACHINE_H */
