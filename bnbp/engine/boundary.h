/* What the boundary needs of the process and Cython has no words for: the CPU, operators, signals, forks.

   For boundary.pyx alone, after Python.h. */
#ifndef BNBP_BOUNDARY_H
#define BNBP_BOUNDARY_H

#include "bnbp/batch_norm.hpp"

#include <initializer_list>

#include <string.h>

#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Whether this CPU, and its operating system, can run code of a level of the x86-64 psABI.
static int cpu_supports(const char* level) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                   __builtin_cpu_supports("bmi2");
    const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    if (!strcmp(level, "x86-64-v4"))
        return v4;
    if (!strcmp(level, "x86-64-v3"))
        return v3;
#endif
    return 1;
}

// Bytes of a core's second-level cache, or 0 where the system does not say.
static Py_ssize_t l2_cache_size() {
    long long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#elif defined(__APPLE__)
    size_t length = sizeof size;
    if (sysctlbyname("hw.l2cachesize", &size, &length, NULL, 0))
        size = 0;
#endif
    return size > 0 ? (Py_ssize_t)size : 0;
}

// What DLPack says of a tensor; the start of a managed one.
struct DLTensor {
    void* data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
};
enum { DL_UINT = 1, DL_BFLOAT = 4 };

// The operator of this name, or null.
static const bnbp::detail::Signature* signature_of(const char* name) {
    using namespace bnbp::detail;
    for (const Signature* signature :
         {&training_signature(), &training_statistics_signature(), &training_backprop_signature(),
          &training_backprop_reduce_signature(), &training_backprop_apply_signature(), &inference_signature(),
          &inference_backprop_signature(), &exact_statistics_signature(), &exact_reduce_signature()})
        if (!strcmp(signature->name, name))
            return signature;
    return nullptr;
}

static const char* input_name(const bnbp::detail::Signature* signature, Py_ssize_t k) {
    return bnbp::detail::spec_of(signature->inputs[k]).name;
}

// From `begin` to the end of one of these, the kernels heed signals if this is Python's main thread.
struct Patience {
    static thread_local PyThreadState* state;
    static unsigned long main_thread;
    PyThreadState* outer = state; // of the call that a signal has come in between
    void begin() {
        if (PyThread_get_thread_ident() == main_thread)
            state = PyThreadState_Get();
    }
    ~Patience() { state = outer; }

    // Runs the handlers of the signals that have come; whether one of them has raised an exception.
    static int interrupted() {
        PyThreadState* const own = state;
        if (!own)
            return 0;
        PyEval_RestoreThread(own);
        const int raised = PyErr_CheckSignals();
        PyEval_SaveThread();
        return raised != 0;
    }
};
thread_local PyThreadState* Patience::state = nullptr;
unsigned long Patience::main_thread = 0;

// GNU OpenMP's threads are not in a forked child, and a team would wait for them for ever. Whether there were any,
// nobody knows: another library may have started them.
static bnbp_kernels* forked_kernels;
static void after_fork() {
    forked_kernels->serial = 1;
    Patience::main_thread = PyThread_get_thread_ident();
}
static int at_fork(bnbp_kernels* table) {
    forked_kernels = table;
#if !defined(_WIN32)
    return pthread_atfork(nullptr, nullptr, after_fork);
#else
    return 0;
#endif
}

#endif /* BNBP_BOUNDARY_H */
