#include "emulator/simt.h"

#include <csetjmp>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

namespace sglite::emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMostShared = 227 * 1024;
constexpr int kMostThreads = 1024;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr size_t kGuard = 128;
constexpr int kGuardByte = 0xA5;
constexpr int kPoison = 0xFF;  // NaN in every floating-point format
constexpr size_t kCopy = 16;

struct Barrier {
    int arrived = 0, expected = 0;
    uint64_t generation = 0;

    void release_if_complete() {
        if (arrived && arrived == expected) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Warp {
    Barrier barrier;
    const char* what = nullptr;  // the collective whose lanes are arriving
    bool has_lost_lanes = false;
    alignas(16) std::byte slots[2][32 * kSlot];
};

struct Copy {
    std::byte* to;
    const void* from;  // null: zeros
};

struct Block;

struct Fiber {
    Position position;
    Block* block = nullptr;
    Warp* warp = nullptr;
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // ends of the groups that are committed, in `copies`
    const Barrier* waits_for = nullptr;
    uint64_t waits_since = 0;
    uint64_t arrived_in = 0;  // the generation of the cluster's barrier
    bool done = false;
    std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
    jmp_buf state;
};

struct Block {
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<std::byte> shared;
    std::byte* shared_start = nullptr;
};

// The cluster of blocks that runs, most often of a single block. There is one at a time.
struct Cluster {
    const std::function<void()>* kernel = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from one to the next for their stacks
    std::vector<Block> blocks;
    Barrier barrier;
    Fiber* running = nullptr;
    jmp_buf scheduler;
    std::string error;
} cluster;

std::mutex one_launch;

[[noreturn]] void switch_to_scheduler() { longjmp(cluster.scheduler, 1); }

// Ends the whole launch; nothing of the kernel runs after it.
[[noreturn]] void fail(const std::string& what) {
    const Position& at = cluster.running->position;
    cluster.error = what + " (thread " + std::to_string(at.thread.x) + " of block " +
                    std::to_string(at.block.x) + ", " + std::to_string(at.block.y) + ", " +
                    std::to_string(at.block.z) + ")";
    switch_to_scheduler();
}

// Gives the generation to wait for the end of.
uint64_t arrive(Barrier& barrier) {
    const uint64_t generation = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_complete();
    return generation;
}

void wait(Barrier& barrier, uint64_t generation) {
    Fiber& self = *cluster.running;
    self.waits_for = &barrier;
    self.waits_since = generation;
    if (setjmp(self.state) == 0) switch_to_scheduler();
}

void arrive_and_wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

void finish(Fiber& fiber) {
    fiber.done = true;
    fiber.warp->has_lost_lanes = true;
    for (Barrier* barrier : {&fiber.warp->barrier, &fiber.block->barrier, &cluster.barrier}) {
        --barrier->expected;
        barrier->release_if_complete();
    }
}

void fiber_main() {
    (*cluster.kernel)();
    finish(*cluster.running);
    switch_to_scheduler();
}

// Runs the fiber until it waits or ends.
void resume(Fiber& fiber, bool is_new) {
    cluster.running = &fiber;
    if (setjmp(cluster.scheduler)) return;
    if (!is_new) longjmp(fiber.state, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

void start_block(Block& block, Fiber* const* fibers, const Position& at, size_t shared_bytes) {
    const int threads = static_cast<int>(at.block_size.x);
    block.warps.assign(threads / 32, Warp{});
    block.barrier = Barrier{.expected = threads};
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.position = at;
        fiber.position.thread = dim3(i, 0, 0);
        fiber.block = &block;
        fiber.warp = &block.warps[i / 32];
        fiber.warp->barrier.expected = 32;
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.waits_for = nullptr;
        fiber.done = false;
    }
    block.shared.assign(shared_bytes + 2 * kGuard + 128, std::byte{kGuardByte});
    const auto start = reinterpret_cast<uintptr_t>(block.shared.data()) + kGuard;
    block.shared_start = reinterpret_cast<std::byte*>((start + 127) / 128 * 128);
    std::memset(block.shared_start, kPoison, shared_bytes);
}

void start_cluster(dim3 first, dim3 grid, int threads, int blocks, size_t shared_bytes) {
    while (cluster.fibers.size() < static_cast<size_t>(threads) * blocks) {
        cluster.fibers.push_back(std::make_unique<Fiber>());
    }
    cluster.blocks.resize(blocks);
    cluster.barrier = Barrier{.expected = threads * blocks};
    std::vector<Fiber*> fibers;
    for (const auto& fiber : cluster.fibers) fibers.push_back(fiber.get());
    for (int rank = 0; rank < blocks; ++rank) {
        const dim3 at(first.x + rank, first.y, first.z);
        start_block(cluster.blocks[rank], fibers.data() + static_cast<ptrdiff_t>(rank) * threads,
                    {dim3(), at, dim3(threads), grid}, shared_bytes);
    }
}

void check_guards(const Block& block, size_t shared_bytes) {
    for (size_t i = 1; i <= kGuard; ++i) {
        if (block.shared_start[-static_cast<ptrdiff_t>(i)] != std::byte{kGuardByte} ||
            block.shared_start[shared_bytes + i - 1] != std::byte{kGuardByte}) {
            cluster.error = "a block wrote beyond its " + std::to_string(shared_bytes) +
                            " bytes of dynamic shared memory";
        }
    }
}

// Threads are resumed in ascending and descending order in turn, so that none is always ahead.
void run_cluster(int threads) {
    bool is_new = true, ascending = true;
    for (int done = 0; done < threads && cluster.error.empty(); ascending = !ascending) {
        bool progress = false;
        for (int i = 0; i < threads && cluster.error.empty(); ++i) {
            Fiber& fiber = *cluster.fibers[ascending ? i : threads - 1 - i];
            if (fiber.done) continue;
            if (!is_new && fiber.waits_for->generation == fiber.waits_since) continue;
            resume(fiber, is_new);
            progress = true;
            done += fiber.done;
        }
        is_new = false;
        if (!progress && cluster.error.empty()) {
            cluster.error = "threads wait at a barrier that the others never reach";
        }
    }
}

}  // namespace

const Position& position() { return cluster.running->position; }

void block_barrier() { arrive_and_wait(cluster.running->block->barrier); }

void cluster_arrive() { cluster.running->arrived_in = arrive(cluster.barrier); }

void cluster_wait() { wait(cluster.barrier, cluster.running->arrived_in); }

unsigned cluster_size() { return static_cast<unsigned>(cluster.blocks.size()); }

void* cluster_shared(void* shared, unsigned rank) {
    const std::byte* own = cluster.running->block->shared_start;
    return cluster.blocks.at(rank).shared_start + (static_cast<std::byte*>(shared) - own);
}

const std::byte* exchange(const char* what, const void* mine, size_t size) {
    Warp& warp = *cluster.running->warp;
    if (warp.has_lost_lanes) fail(std::string(what) + " after lanes of the warp have returned");
    if (warp.barrier.arrived == 0) warp.what = what;
    if (std::strcmp(warp.what, what) != 0) {
        fail(std::string("lanes of a warp meet in ") + warp.what + " and in " + what);
    }
    std::byte* slots = warp.slots[warp.barrier.generation % 2];
    std::memcpy(slots + lane() * kSlot, mine, size);
    arrive_and_wait(warp.barrier);
    return slots;
}

void* dynamic_shared() { return cluster.running->block->shared_start; }

void copy_async(void* shared, const void* global, bool valid) {
    for (const void* pointer : {static_cast<const void*>(shared), global}) {
        if ((valid || pointer == shared) && reinterpret_cast<uintptr_t>(pointer) % kCopy) {
            fail("copy_async: an address is not a multiple of 16");
        }
    }
    std::memset(shared, kPoison, kCopy);
    cluster.running->copies.push_back({static_cast<std::byte*>(shared), valid ? global : nullptr});
}

void commit_copies() { cluster.running->groups.push_back(cluster.running->copies.size()); }

void wait_copies(int left) {
    Fiber& self = *cluster.running;
    if (self.groups.size() <= static_cast<size_t>(left)) return;
    const size_t finished = self.groups.size() - left, end = self.groups[finished - 1];
    for (size_t i = 0; i < end; ++i) {
        const Copy& copy = self.copies[i];
        if (copy.from) {
            std::memcpy(copy.to, copy.from, kCopy);
        } else {
            std::memset(copy.to, 0, kCopy);
        }
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(end));
    self.groups.erase(self.groups.begin(), self.groups.begin() + static_cast<ptrdiff_t>(finished));
    for (size_t& group : self.groups) group -= end;
}

void load_matrices(uint32_t (&result)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices: a row is misaligned");
    uint16_t mine[8];
    std::memcpy(mine, row, sizeof mine);
    struct Row {
        uint16_t elements[8];
    } given;
    std::memcpy(given.elements, mine, sizeof mine);
    const auto rows = exchange(transposed ? "load_matrices_transposed" : "load_matrices", given);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const auto element = [&](int r, int c) {
            return static_cast<uint32_t>(rows[8 * i + r].elements[c]);
        };
        result[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                               : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
}

void launch(const char* op, dim3 grid, int threads, int cluster_size, size_t shared_bytes,
            const std::function<void()>& kernel) {
    const std::lock_guard lock(one_launch);
    cluster.error.clear();
    if (threads < 1 || threads > kMostThreads || threads % 32) {
        throw std::runtime_error(std::string(op) + ": " + std::to_string(threads) +
                                 " threads in a block");
    }
    if (shared_bytes > kMostShared) {
        throw std::runtime_error(std::string(op) + ": " + std::to_string(shared_bytes) +
                                 " bytes of shared memory");
    }
    if (cluster_size < 1 || cluster_size > kMostBlocks || grid.x % cluster_size) {
        throw std::runtime_error(std::string(op) + ": clusters of " + std::to_string(cluster_size) +
                                 " blocks in a grid of " + std::to_string(grid.x));
    }
    cluster.kernel = &kernel;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += cluster_size) {
                start_cluster(dim3(x, y, z), grid, threads, cluster_size, shared_bytes);
                run_cluster(threads * cluster_size);
                for (const Block& block : cluster.blocks) {
                    if (cluster.error.empty()) check_guards(block, shared_bytes);
                }
                if (!cluster.error.empty()) {
                    throw std::runtime_error(std::string(op) + ": " + cluster.error);
                }
            }
        }
    }
}

// ---- number formats ---------------------------------------------------------------------------

float half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

uint16_t float_to_half(float x) {
    const auto value = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace sglite::emulator
