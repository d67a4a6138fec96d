"""The floor: loops that read and write the bytes that an operator must, and do next to nothing with them.

`copy2` reads two arrays and writes one, as the gradient operators do, `copy1` reads one and writes one, as the forward
operators do, and `copy3` reads three and writes two, as the gradient operators do where there is an addend; `read2` and
`read1` only read, as a pass that computes sums does. `bnbp bench` times them on the arrays of the operator, with its
number of threads, and gives the operator's time as a multiple of theirs.

Each thread takes a contiguous share. A word is 8 bytes of a tensor of any type: integers are added as fast as they are
read, in lanes and in any order, and the time is that of the memory. Like the kernels this is compiled once for each
level of the instruction set: with the 16-byte vectors of plain x86-64, `copy2` takes up to twice as long in the L3
cache.
"""

from cython.parallel cimport prange
from libc.stdint cimport uint64_t, uintptr_t

cdef extern from "machine.h" nogil:
    void prefetch(const void* address, size_t size)
    void stream(void* to, const void* source, size_t size)
    void stream_fence()

ctypedef uint64_t word

cdef enum:
    BLOCK = 128   # words computed before they are streamed: enough for vector code, and they stay in the first cache
    LINE = 64     # bytes of a cache line, of which a streaming store takes whole ones
    AHEAD = 4096  # bytes from what is read to what is prefetched


cdef inline void look_ahead(const word* a) noexcept nogil:
    prefetch(<const char*> a + AHEAD, BLOCK * sizeof(word))


cdef void copy3_share(const word* a, const word* b, const word* c, word* out, word* second, Py_ssize_t n,
                      bint streaming) noexcept nogil:
    # Where the two results are not alike in their place in a cache line, lines of the second are written in two parts.
    cdef word[128] block, other
    cdef Py_ssize_t i = 0, k
    if streaming:
        while i < n and <uintptr_t> (out + i) % LINE:
            second[i] = b[i] + c[i]
            out[i] = a[i] + b[i]
            i += 1
        while i + BLOCK <= n:
            look_ahead(a + i)
            look_ahead(b + i)
            look_ahead(c + i)
            for k in range(128):
                block[k] = a[i + k] + b[i + k]
                other[k] = b[i + k] + c[i + k]
            stream(out + i, block, BLOCK * sizeof(word))
            stream(second + i, other, BLOCK * sizeof(word))
            i += BLOCK
        stream_fence()
    for k in range(i, n):
        second[k] = b[k] + c[k]
        out[k] = a[k] + b[k]


cdef void copy2_share(const word* a, const word* b, word* out, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef word[128] block
    cdef Py_ssize_t i = 0, k
    if streaming:
        while i < n and <uintptr_t> (out + i) % LINE:
            out[i] = a[i] + b[i]
            i += 1
        while i + BLOCK <= n:
            look_ahead(a + i)
            look_ahead(b + i)
            for k in range(128):
                block[k] = a[i + k] + b[i + k]
            stream(out + i, block, BLOCK * sizeof(word))
            i += BLOCK
        stream_fence()
    for k in range(i, n):
        out[k] = a[k] + b[k]


cdef void copy1_share(const word* a, word* out, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef Py_ssize_t i = 0, k
    if streaming:
        while i < n and <uintptr_t> (out + i) % LINE:
            out[i] = a[i]
            i += 1
        while i + BLOCK <= n:
            look_ahead(a + i)
            stream(out + i, a + i, BLOCK * sizeof(word))
            i += BLOCK
        stream_fence()
    for k in range(i, n):
        out[k] = a[k]


cdef word read2_share(const word* a, const word* b, Py_ssize_t n) noexcept nogil:
    cdef word total = 0
    cdef Py_ssize_t i = 0, k
    while i + BLOCK <= n:
        look_ahead(a + i)
        look_ahead(b + i)
        for k in range(i, i + 128):
            total += a[k] + b[k]
        i += BLOCK
    for k in range(i, n):
        total += a[k] + b[k]
    return total


cdef word read1_share(const word* a, Py_ssize_t n) noexcept nogil:
    cdef word total = 0
    cdef Py_ssize_t i = 0, k
    while i + BLOCK <= n:
        look_ahead(a + i)
        for k in range(i, i + 128):
            total += a[k]
        i += BLOCK
    for k in range(i, n):
        total += a[k]
    return total


cdef inline Py_ssize_t first_of(int thread, int num_threads, Py_ssize_t n) noexcept nogil:
    """Where a thread's share begins: a whole number of blocks from the start."""
    cdef Py_ssize_t blocks = (n + BLOCK - 1) // BLOCK
    return min(n, blocks * thread // num_threads * BLOCK)


def copy3(const word[::1] a, const word[::1] b, const word[::1] c, word[::1] out, word[::1] second, int num_threads,
          bint streaming=True):
    """Write a + b to `out` and b + c to `second`: five arrays of words, of the same length."""
    cdef Py_ssize_t n = common_length(num_threads, a.shape[0], b.shape[0], c.shape[0]), start, stop
    common_length(num_threads, n, out.shape[0], second.shape[0])
    cdef const word* pa = &a[0]
    cdef const word* pb = &b[0]
    cdef const word* pc = &c[0]
    cdef word* to = &out[0]
    cdef word* also_to = &second[0]
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", nogil=True,
                         use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        copy3_share(pa + start, pb + start, pc + start, to + start, also_to + start, stop - start, streaming)


def copy2(const word[::1] a, const word[::1] b, word[::1] out, int num_threads, bint streaming=True):
    """Write a + b to `out`: three arrays of words, of the same length."""
    cdef Py_ssize_t n = common_length(num_threads, a.shape[0], b.shape[0], out.shape[0]), start, stop
    cdef const word* pa = &a[0]
    cdef const word* pb = &b[0]
    cdef word* to = &out[0]
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", nogil=True,
                         use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        copy2_share(pa + start, pb + start, to + start, stop - start, streaming)


def copy1(const word[::1] a, word[::1] out, int num_threads, bint streaming=True):
    """Write a to `out`: two arrays of words, of the same length."""
    cdef Py_ssize_t n = common_length(num_threads, a.shape[0], a.shape[0], out.shape[0]), start, stop
    cdef const word* pa = &a[0]
    cdef word* to = &out[0]
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", nogil=True,
                         use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        copy1_share(pa + start, to + start, stop - start, streaming)


def read2(const word[::1] a, const word[::1] b, int num_threads):
    """The sum of two arrays of words, modulo 2^64: returned so that no compiler can leave the reading out."""
    cdef Py_ssize_t n = common_length(num_threads, a.shape[0], b.shape[0], b.shape[0]), start, stop
    cdef const word* pa = &a[0]
    cdef const word* pb = &b[0]
    cdef word total = 0
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", nogil=True,
                         use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        total += read2_share(pa + start, pb + start, stop - start)
    return total


def read1(const word[::1] a, int num_threads):
    """The sum of an array of words, as `read2`."""
    cdef Py_ssize_t n = common_length(num_threads, a.shape[0], a.shape[0], a.shape[0]), start, stop
    cdef const word* pa = &a[0]
    cdef word total = 0
    cdef int thread
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", nogil=True,
                         use_threads_if=num_threads > 1):
        start, stop = first_of(thread, num_threads, n), first_of(thread + 1, num_threads, n)
        total += read1_share(pa + start, stop - start)
    return total


cdef Py_ssize_t common_length(int num_threads, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) except -1:
    """What the loops take for granted; the views check types and axes."""
    if num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
    if not a == b == c:
        raise ValueError(f"expected arrays of one length, got {a}, {b} and {c}")
    return a
