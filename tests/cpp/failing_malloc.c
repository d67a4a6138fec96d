/* Preloaded into a Python process: counts the blocks of memory in use, and refuses one on request. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static long in_use, countdown = -1;

/* The request after `after` more is refused, once; -1: none is. */
void fail_after(long after) { countdown = after; }
int has_failed(void) { return countdown < 0; }
long blocks_in_use(void) { return in_use; }

static int refused(void) { return countdown >= 0 && countdown-- == 0; }

static void* counted(void* block) {
    if (block)
        __atomic_add_fetch(&in_use, 1, __ATOMIC_RELAXED);
    return block;
}

void* malloc(size_t size) { return refused() ? NULL : counted(__libc_malloc(size)); }

void* calloc(size_t count, size_t size) { return refused() ? NULL : counted(__libc_calloc(count, size)); }

void* realloc(void* block, size_t size) {
    if (refused())
        return NULL;
    return block ? __libc_realloc(block, size) : counted(__libc_realloc(NULL, size));
}

int posix_memalign(void** block, size_t alignment, size_t size) {
    if (refused())
        return ENOMEM;
    void* memory = counted(__libc_memalign(alignment, size));
    if (!memory)
        return ENOMEM;
    *block = memory;
    return 0;
}

void free(void* block) {
    if (block)
        __atomic_sub_fetch(&in_use, 1, __ATOMIC_RELAXED);
    __libc_free(block);
}
