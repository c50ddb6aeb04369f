// Mixture of experts for few rows, without the host knowing which experts they go to: a plan is
// made on the device, and blocks for as many experts as can be used take theirs from it. A row's
// bits are those of the linear kernel for few rows, whatever else goes to its experts.
#include "cuda/launchers.h"
#include "cuda/linear_rows.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr const char* kOp = "mix_experts";
constexpr int kMostExperts = static_cast<int>(kMostKernelExperts);
constexpr int kPlanThreads = 512;
constexpr int kSumThreads = 256;

// Of linear_rows; the number of warps is that of linear.cu, for the same bits.
constexpr int kWarps = 8;
constexpr int kGroups = 2, kOctets = 2, kDepth = 2;
constexpr int kTokens = 8 * kOctets;
constexpr int kBlocks = 2;
// Blocks that share a launch's work at least, so that all multiprocessors have some.
constexpr int64_t kFewestBlocks = 288;

// Rows that go to experts, one for each expert that a row goes to, sorted by expert.
struct Plan {
    int64_t* sources;  // [places] the row of x
    int* places;       // [rows, top_k] where a row lies among the sorted
    int* starts;       // [num_experts + 1] the first place of each expert, and the end
    int* used;         // [num_experts] the experts that have any, ascending, then -1
};

struct Memory {
    Plan plan;
    void* inputs;  // [places, hidden]: rows of x; then what the experts give
    void* gated;   // [places, width]
    int64_t size;
};

Memory memory_in(void* workspace, const ExpertMixArgs& args) {
    int64_t offset = 0;
    const auto take = [&](int64_t bytes) {
        void* taken = workspace ? static_cast<char*>(workspace) + offset : nullptr;
        offset += (bytes + 127) / 128 * 128;
        return taken;
    };
    const int64_t places = args.rows * args.top_k;
    Memory memory{};
    memory.plan.sources = static_cast<int64_t*>(take(places * 8));
    memory.plan.places = static_cast<int*>(take(places * 4));
    memory.plan.starts = static_cast<int*>(take((args.num_experts + 1) * 4));
    memory.plan.used = static_cast<int*>(take(args.num_experts * 4));
    memory.inputs = take(places * args.hidden * 2);
    memory.gated = take(places * args.width * 2);
    memory.size = offset;
    return memory;
}

// One block. A warp goes over all choices for one expert at a time, 32 at once.
__global__ void plan_experts_kernel(Plan plan, const int64_t* experts, int choices, int top_k,
                                    int num_experts) {
    __shared__ int starts[kMostExperts + 1];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const auto votes_for = [&](int expert, int first) {
        const int i = first + lane;
        return __ballot_sync(0xFFFFFFFFu, i < choices && experts[i] == expert);
    };
    for (int expert = warp; expert < num_experts; expert += warps) {
        int count = 0;
        for (int first = 0; first < choices; first += kWarp) {
            count += __popc(votes_for(expert, first));
        }
        if (lane == 0) starts[expert + 1] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        starts[0] = 0;
        int used = 0;
        for (int expert = 0; expert < num_experts; ++expert) {
            if (starts[expert + 1]) plan.used[used++] = expert;
            starts[expert + 1] += starts[expert];
        }
        while (used < num_experts) plan.used[used++] = -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i <= num_experts; i += blockDim.x) plan.starts[i] = starts[i];
    for (int expert = warp; expert < num_experts; expert += warps) {
        int place = starts[expert];
        for (int first = 0; first < choices; first += kWarp) {
            const unsigned votes = votes_for(expert, first);
            if (votes >> lane & 1) {
                const int own = place + __popc(votes & ((1u << lane) - 1));
                plan.sources[own] = (first + lane) / top_k;
                plan.places[first + lane] = own;
            }
            place += __popc(votes);
        }
    }
}

// A linear layer for each expert, over the rows that go there.
struct ExpertLinearArgs {
    void* out;      // [places, n] of T
    const void* x;  // [places, k] of T
    const int* starts;
    const int* used;
    int n, k;
    bool is_gated;
    Activation activation;
    const void* weights[kMostExperts];
};

// Blocks along y are for one used expert each.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks)
    expert_linear_kernel(const __grid_constant__ ExpertLinearArgs args) {
    const int expert = args.used[blockIdx.y];
    if (expert < 0) return;
    const int end = args.starts[expert + 1];
    for (int place = args.starts[expert]; place < end; place += kTokens) {
        LinearRowsArgs rows{};
        rows.out = static_cast<T*>(args.out) + static_cast<int64_t>(place) * args.n;
        rows.x = static_cast<const T*>(args.x) + static_cast<int64_t>(place) * args.k;
        rows.weight = args.weights[expert];
        rows.m = min(kTokens, end - place);
        rows.n = args.n;
        rows.k = args.k;
        rows.out_stride = args.n;
        rows.x_stride = args.k;
        rows.weight_stride = args.k;
        rows.is_gated = args.is_gated;
        rows.activation = args.activation;
        linear_rows<T, kGroups, kOctets, kDepth, false>(rows);
        __syncthreads();  // its shared memory is used again
    }
}

template <typename T>
void run_linear(const ExpertLinearArgs& args, int64_t most_used, Stream stream) {
    constexpr int kRows = 8 * kGroups;
    const int64_t width = args.is_gated ? kRows / 2 : kRows;
    const int64_t tiles = (args.n + width - 1) / width;
    // As many tiles for every block, as nearly as can be.
    const int64_t most = min(tiles, (kFewestBlocks + most_used - 1) / most_used);
    const int64_t each = (tiles + most - 1) / most;
    launch<expert_linear_kernel<T>>(
        {
            .op = kOp,
            .grid = dim3(static_cast<unsigned>((tiles + each - 1) / each),
                         static_cast<unsigned>(most_used)),
            .threads = kWarps * kWarp,
            .shared_bytes = linear_shared(kTokens, args.k, kRows, kWarps, false, false).bytes,
            .stream = stream,
            .resident = kBlocks,
        },
        args);
}

// out[row] = the sum over its experts, ascending, of their weight times what they give. One block
// for each row. Products and sums are rounded one by one, as where they are ops of their own.
template <typename T>
__global__ void sum_experts_kernel(T* out, const T* given, const float* weights, const int* places,
                                   int top_k, int hidden) {
    __shared__ int order[kMostExperts];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * top_k;
    // Places are sorted by expert.
    for (int i = threadIdx.x; i < top_k; i += blockDim.x) {
        int rank = 0;
        for (int j = 0; j < top_k; ++j) rank += places[first + j] < places[first + i];
        order[rank] = i;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < hidden; column += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < top_k; ++i) {
            const int64_t choice = first + order[i];
            const T value = given[static_cast<int64_t>(places[choice]) * hidden + column];
            sum = add(sum, multiply(to_float(value), weights[choice]));
        }
        out[static_cast<int64_t>(blockIdx.x) * hidden + column] = from_float<T>(sum);
    }
}

template <typename T>
void run(const ExpertMixArgs& args, Stream stream) {
    const Memory memory = memory_in(args.workspace, args);
    const int64_t places = args.rows * args.top_k;
    const int64_t most_used = min(places, args.num_experts);
    launch<plan_experts_kernel>(
        {.op = kOp, .grid = dim3(1), .threads = kPlanThreads, .stream = stream}, memory.plan,
        args.experts, static_cast<int>(places), static_cast<int>(args.top_k),
        static_cast<int>(args.num_experts));
    embedding(
        {
            .out = memory.inputs,
            .ids = memory.plan.sources,
            .table = args.x,
            .packed = false,
            .count = places,
            .width = args.hidden,
            .out_stride = args.hidden,
            .table_stride = args.x_stride,
            .dtype = args.dtype,
        },
        stream);
    ExpertLinearArgs linear{};
    linear.starts = memory.plan.starts;
    linear.used = memory.plan.used;
    linear.x = memory.inputs;
    linear.out = memory.gated;
    linear.n = static_cast<int>(args.width);
    linear.k = static_cast<int>(args.hidden);
    linear.is_gated = true;
    linear.activation = args.activation;
    for (int64_t i = 0; i < args.num_experts; ++i) linear.weights[i] = args.gate_up[i];
    run_linear<T>(linear, most_used, stream);
    linear.x = memory.gated;
    linear.out = memory.inputs;
    linear.n = static_cast<int>(args.hidden);
    linear.k = static_cast<int>(args.width);
    linear.is_gated = false;
    for (int64_t i = 0; i < args.num_experts; ++i) linear.weights[i] = args.down[i];
    run_linear<T>(linear, most_used, stream);
    launch<sum_experts_kernel<T>>(
        {
            .op = kOp,
            .grid = dim3(static_cast<unsigned>(args.rows)),
            .threads = kSumThreads,
            .stream = stream,
        },
        static_cast<T*>(args.out), static_cast<const T*>(memory.inputs), args.weights,
        static_cast<const int*>(memory.plan.places), static_cast<int>(args.top_k),
        static_cast<int>(args.hidden));
}

}  // namespace

int64_t expert_mix_workspace(const ExpertMixArgs& args) { return memory_in(nullptr, args).size; }

void mix_experts(const ExpertMixArgs& args, Stream stream) {
    if (args.dtype == DType::kBFloat16) {
        run<BFloat16>(args, stream);
    } else {
        run<Half>(args, stream);
    }
}

}  // namespace sglite::cuda
