#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(GEMMA_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemma {

#if defined(GEMMA_WITH_AMX)
namespace {

// Returns whether the processor has tiles that multiply bf16 and Linux lets this process use them. Linux is asked once,
// for every thread.
bool may_use_tiles() {
    static const bool may = [] {
        constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
        constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
               syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return may;
}

}  // namespace
#endif

const Kernels* kernels_named(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(GEMMA_WITH_AMX)
    if (!std::strcmp(name, "amx")) return bf16 && may_use_tiles() ? &kernels_amx() : nullptr;
#endif
    if (!std::strcmp(name, "avx512_bf16")) return bf16 ? &kernels_avx512_bf16() : nullptr;
    if (!std::strcmp(name, "avx512")) return avx512 ? &kernels_avx512() : nullptr;
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2() : nullptr;
#endif
#if defined(__aarch64__)
    if (!std::strcmp(name, "neon")) return &kernels_neon();
#endif
    if (!std::strcmp(name, "control")) return &kernels_control();
    return std::strcmp(name, "portable") ? nullptr : &kernels_portable();
}

const Kernels& kernels() {
    static const Kernels& chosen = []() -> const Kernels& {
        const char* wanted = std::getenv("GEMMA_MTP_ISA");
        if (wanted)
            if (const Kernels* k = kernels_named(wanted)) return *k;
        for (const char* name : ISAS)
            if (const Kernels* k = kernels_named(name)) return *k;
        return kernels_portable();
    }();
    return chosen;
}

}  // namespace gemma
