// Picks the kernel table for this processor and keeps each thread's thread count.
#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef SGLITE_X86_PATHS
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace sglite {

void refuse_float_type(DType dtype) {
    throw std::invalid_argument(std::string("expected a floating-point dtype, got ") +
                                dtype_name(dtype));
}

}  // namespace sglite

namespace sglite::cpu {

#ifdef SGLITE_X86_PATHS
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace amx {
int64_t linear_workspace(int64_t m, int64_t k, DType dtype);
void linear(const LinearArgs& args);
void paged_attention(const AttentionArgs& args);
}  // namespace amx
#endif
namespace portable {
extern const Kernels table;
}

#ifdef SGLITE_X86_PATHS
// AVX-512's, but for what matrix tiles are better at.
static const Kernels& amx_table() {
    static const Kernels table = [] {
        Kernels changed = avx512::table;
        changed.path = "amx";
        changed.linear_workspace = amx::linear_workspace;
        changed.linear = amx::linear;
        changed.paged_attention = amx::paged_attention;
        return changed;
    }();
    return table;
}

// Whether this process may use tiles. Linux asks a process to ask, since their state is large.
// Source: https://docs.kernel.org/arch/x86/xstate.html
static bool gets_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

static std::vector<const Kernels*> runnable_tables() {
    std::vector<const Kernels*> tables;
#ifdef SGLITE_X86_PATHS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bf16")) {
        if (gets_tiles()) tables.push_back(&amx_table());
        tables.push_back(&avx512::table);
    }
    if (avx2) tables.push_back(&avx2::table);
#endif
    tables.push_back(&portable::table);
    return tables;
}

static const Kernels* find_table(const std::string& name) {
    std::string known;
    for (const Kernels* table : runnable_tables()) {
        if (name == table->path) return table;
        known += (known.empty() ? "" : ", ") + std::string(table->path);
    }
    throw std::invalid_argument("cpu path: expected one of " + known + ", got \"" + name + "\"");
}

static std::atomic<const Kernels*>& current_table() {
    static std::atomic<const Kernels*> table = [] {
        const char* wanted = std::getenv("SGLITE_CPU_PATH");
        return wanted && *wanted ? find_table(wanted) : runnable_tables().front();
    }();
    return table;
}

const Kernels& kernels() { return *current_table().load(std::memory_order_relaxed); }

std::vector<std::string> available_paths() {
    std::vector<std::string> names;
    for (const Kernels* table : runnable_tables()) names.push_back(table->path);
    return names;
}

void select_path(const std::string& name) { current_table().store(find_table(name)); }

static thread_local int thread_count = 0;

void set_num_threads(int count) {
    if (count < 0) {
        throw std::invalid_argument("num_threads: expected 0 or more, got " +
                                    std::to_string(count));
    }
    thread_count = count;
}

int num_threads() { return thread_count ? thread_count : omp_get_max_threads(); }

void require_cpu(const char* op, const Tensor& tensor) {
    if (tensor.device != DeviceType::kCPU) {
        throw std::invalid_argument(std::string(op) +
                                    ": this build has no kernel for the tensors' device");
    }
}

}  // namespace sglite::cpu
