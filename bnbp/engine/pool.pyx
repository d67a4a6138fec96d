"""Memory for results, kept for the next ones.

The system hands out memory page by page as it is first written, and clears each page: for a result of 100 MB that
takes as long as the operator itself. What is kept is already there. NumPy lets an array have an allocator of its own
(NEP 49), so a result is an array like any other, which owns its memory, and when it goes its memory comes back here.
No more than `limit` bytes are ever kept, of what came back last.
"""

import os
import warnings
from contextvars import copy_context

import numpy as np

cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
    #define NPY_TARGET_VERSION NPY_2_0_API_VERSION
    #include <numpy/arrayobject.h>

    #include <cstdlib>
    #include <cstring>
    #include <list>
    #include <mutex>
    #include <unordered_map>

    #if defined(__linux__)
    #include <sys/mman.h>
    #elif defined(_WIN32)
    #include <malloc.h>
    #endif

    namespace {

    struct Block {
        void* memory;
        size_t size;
    };

    struct Pool {
        std::mutex mutex;
        std::unordered_map<void*, size_t> lent;  // what is in an array's hands, and its size
        std::list<Block> kept;                   // what came back, the last first
        size_t limit = 0, held = 0;
        long long reused = 0;
    };

    Pool& pool = *new Pool;  // never destroyed: an array may go after everything else has

    const size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;

    // Memory that begins where a cache line does or, if it is large, a huge page, and consists of those if it may.
    void* get(size_t size) {
    #if defined(_WIN32)
        return _aligned_malloc(size, LINE);
    #else
        void* memory = nullptr;
        if (posix_memalign(&memory, size < 2 * HUGE_PAGE ? LINE : HUGE_PAGE, size)) return nullptr;
    #if defined(MADV_HUGEPAGE)
        if (size >= 2 * HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);
    #endif
        return memory;
    #endif
    }

    void give_back(void* memory) {
    #if defined(_WIN32)
        _aligned_free(memory);
    #else
        free(memory);
    #endif
    }

    // Gives memory back to the system until no more than `limit` bytes are kept.
    void shrink(size_t limit) {
        while (pool.held > limit) {
            pool.held -= pool.kept.back().size;
            give_back(pool.kept.back().memory);
            pool.kept.pop_back();
        }
    }

    void* pool_malloc(void*, size_t size) {
        try {
            std::lock_guard<std::mutex> lock(pool.mutex);
            auto best = pool.kept.end();
            for (auto block = pool.kept.begin(); block != pool.kept.end(); ++block)
                if (block->size >= size && block->size - size <= size / 4 &&
                    (best == pool.kept.end() || block->size < best->size))
                    best = block;
            if (best != pool.kept.end()) {
                void* memory = best->memory;
                pool.lent.emplace(memory, best->size);
                pool.held -= best->size;
                pool.kept.erase(best);
                ++pool.reused;
                return memory;
            }
            void* memory = get(size);
            if (!memory && pool.held) {  // what is kept may be what is missing
                shrink(0);
                memory = get(size);
            }
            if (memory) {
                try {
                    pool.lent.emplace(memory, size);
                } catch (...) {
                    give_back(memory);
                    throw;
                }
            }
            return memory;
        } catch (...) {
            return nullptr;
        }
    }

    void pool_free(void*, void* memory, size_t) {
        if (!memory) return;
        std::lock_guard<std::mutex> lock(pool.mutex);
        const auto lent = pool.lent.find(memory);
        const size_t size = lent->second;
        pool.lent.erase(lent);
        if (size > pool.limit) {
            give_back(memory);
            return;
        }
        try {
            pool.kept.push_front({memory, size});
        } catch (...) {
            give_back(memory);
            return;
        }
        pool.held += size;
        shrink(pool.limit);
    }

    void* pool_calloc(void*, size_t count, size_t size) {
        if (size && count > SIZE_MAX / size) return nullptr;
        void* memory = pool_malloc(nullptr, count * size);
        if (memory) std::memset(memory, 0, count * size);
        return memory;
    }

    void* pool_realloc(void*, void* memory, size_t size) {
        void* moved = pool_malloc(nullptr, size);
        if (moved && memory) {
            size_t old;
            {
                std::lock_guard<std::mutex> lock(pool.mutex);
                old = pool.lent.at(memory);
            }
            std::memcpy(moved, memory, old < size ? old : size);
            pool_free(nullptr, memory, old);
        }
        return moved;
    }

    PyDataMem_Handler pool_handler = {
        "bnbp_pool", 1, {nullptr, pool_malloc, pool_calloc, pool_realloc, pool_free}};

    PyObject* pool_capsule() {
        import_array1(nullptr);
        return PyCapsule_New(&pool_handler, "mem_handler", nullptr);
    }

    void pool_set_limit(size_t limit) {
        std::lock_guard<std::mutex> lock(pool.mutex);
        pool.limit = limit;
        shrink(limit);
    }

    }  // namespace
    """
    cppclass Pool:
        size_t limit, held
        long long reused

    Pool& pool
    object pool_capsule()
    void pool_set_limit(size_t limit)
    object PyDataMem_SetHandler(object handler)


DEFAULT_LIMIT = 256 << 20

cdef object handler = pool_capsule(), numpy_empty_like = np.empty_like


def empty_like(array):
    """An array as from `numpy.empty_like`, whose memory comes from what is kept and goes back there."""
    # In a context of its own: to leave that takes no memory, but to set the old allocator again would.
    return copy_context().run(_empty_like, array)


def _empty_like(array):
    PyDataMem_SetHandler(handler)
    return numpy_empty_like(array, subok=False)


def set_limit(limit):
    """Keep no more than `limit` bytes."""
    pool_set_limit(limit)


def state():
    """What is allowed to be kept, what is, and how often an array was made of it."""
    return {"limit": pool.limit, "held": pool.held, "reused": pool.reused}


def _limit_of_environment():
    value = os.environ.get("BNBP_POOL_MIB", "").strip()
    if not value:
        return DEFAULT_LIMIT
    if value.isdecimal() and int(value) < 2**43:
        return int(value) << 20
    warnings.warn(f"BNBP_POOL_MIB: expected a number of MiB, got {value!r}; ignored", RuntimeWarning, stacklevel=2)
    return DEFAULT_LIMIT


set_limit(_limit_of_environment())
