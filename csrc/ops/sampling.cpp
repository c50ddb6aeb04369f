#include <cmath>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

int64_t sampling_workspace_bytes(const Tensor& like, int64_t vocab, int64_t rows) {
    constexpr const char* kOp = "sampling_workspace";
    if (like.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).sampling_workspace_bytes(vocab, rows, like.device_index);
    }
    return cpu::sampling_workspace_bytes(vocab) * cpu::num_threads();
}

// Rows that one thread takes at once when the vocabulary is small: a team of threads costs several
// microseconds, the time of so many logits.
static int worker_count(const char* op, int64_t rows, int64_t vocab, const Tensor& workspace) {
    constexpr int64_t kLogitsWorthAThread = 65536;
    Check(op, "workspace", workspace).dtype(DType::kUInt8).ndim(1).dense();
    const int64_t room = workspace.size(0) / cpu::sampling_workspace_bytes(vocab);
    if (room < 1) {
        Check(op, "workspace", workspace)
            .fail("at least " + std::to_string(cpu::sampling_workspace_bytes(vocab)) + " bytes");
    }
    int64_t workers = 1 + rows * vocab / kLogitsWorthAThread;
    for (int64_t limit : {rows, room, static_cast<int64_t>(cpu::num_threads())}) {
        if (workers > limit) workers = limit;
    }
    return static_cast<int>(workers < 1 ? 1 : workers);
}

// What the tensors on a GPU hold is not looked at: that would make the host wait.
static bool on_gpu(const Tensor& tensor) { return tensor.device == DeviceType::kCUDA; }

static void check_gpu_workspace(const char* op, int64_t rows, const Tensor& logits,
                                const Tensor& workspace) {
    const Check check(op, "workspace", workspace);
    check.dtype(DType::kUInt8).ndim(1).dense().same_device(logits);
    const int64_t size = sampling_workspace_bytes(logits, logits.size(1), rows);
    if (workspace.size(0) < size) check.fail("at least " + std::to_string(size) + " bytes");
}

// Checks the logits and which of their rows are asked for; returns how many those are.
static int64_t check_logits(const char* op, const Tensor& logits,
                            const std::optional<Tensor>& rows) {
    const Check check(op, "logits", logits);
    check.ndim(2).dtype(DType::kFloat32).dense_rows();
    if (logits.size(1) < 1 || logits.size(1) > INT32_MAX) check.fail("1 to 2^31 - 1 columns");
    if (!rows) return logits.size(0);
    Check(op, "rows", *rows).dtype(DType::kInt64).ndim(1).dense().same_device(logits);
    for (int64_t i = 0; i < rows->size(0) && !on_gpu(logits); ++i) {
        const int64_t row = rows->ptr<int64_t>()[i];
        if (row < 0 || row >= logits.size(0)) {
            Check(op, "rows", *rows)
                .fail("numbers from 0 to " + std::to_string(logits.size(0) - 1) + ", not " +
                      std::to_string(row));
        }
    }
    return rows->size(0);
}

template <typename T>
static void check_token_ids(const char* op, const char* name, const Tensor& ids, int64_t stride,
                            int64_t vocab) {
    for (int64_t i = 0; i < ids.size(0) && !on_gpu(ids); ++i) {
        const int64_t id = ids.ptr<T>()[i * stride];
        if (id < 0 || id >= vocab) {
            Check(op, name, ids)
                .fail("token ids from 0 to " + std::to_string(vocab - 1) + ", not " +
                      std::to_string(id));
        }
    }
}

static void check_parameters(const char* op, const Tensor& reals, const Tensor& integers,
                             const Tensor& logits, int64_t count) {
    Check(op, "reals", reals)
        .dtype(DType::kFloat32)
        .shape({count, kSampleReals})
        .dense()
        .same_device(logits);
    Check(op, "integers", integers)
        .dtype(DType::kInt64)
        .shape({count, kSampleIntegers})
        .dense()
        .same_device(logits);
    for (int64_t row = 0; row < count && !on_gpu(logits); ++row) {
        const float* values = reals.ptr<float>() + row * kSampleReals;
        const auto require = [&](bool holds, SampleReal column, const char* allowed) {
            if (holds) return;
            throw std::invalid_argument(std::string(op) + ": reals: expected " + allowed +
                                        " in row " + std::to_string(row) + ", got " +
                                        std::to_string(values[column]));
        };
        // Below 1e-30 its inverse could leave the range of float32.
        const float temperature = values[kTemperature];
        require(temperature == 0.0f || (temperature >= 1e-30f && std::isfinite(temperature)),
                kTemperature, "temperature 0 or at least 1e-30");
        require(values[kTopP] > 0.0f && values[kTopP] <= 1.0f, kTopP, "top_p in (0, 1]");
        require(values[kMinP] >= 0.0f && values[kMinP] <= 1.0f, kMinP, "min_p in [0, 1]");
        require(values[kRepetition] > 0.0f && std::isfinite(values[kRepetition]), kRepetition,
                "repetition_penalty above 0");
        require(std::isfinite(values[kFrequency]), kFrequency, "a finite frequency_penalty");
        require(std::isfinite(values[kPresence]), kPresence, "a finite presence_penalty");
    }
}

static void check_edits(const char* op, const TokenEdits& edits, const Tensor& logits,
                        int64_t count) {
    const int64_t vocab = logits.size(1);
    const auto list = [&](const char* name, const Tensor& tensor, DType dtype) {
        return Check(op, name, tensor).dtype(dtype).dense().same_device(logits);
    };
    list("offsets", edits.offsets, DType::kInt64).shape({3, count + 1});
    list("seen", edits.seen, DType::kInt32).shape({-1, 3});
    list("bias_ids", edits.bias_ids, DType::kInt32).ndim(1);
    list("bias_values", edits.bias_values, DType::kFloat32).shape({edits.bias_ids.size(0)});
    list("allowed_ids", edits.allowed_ids, DType::kInt32).ndim(1);
    if (on_gpu(logits)) return;
    const int64_t lengths[] = {edits.seen.size(0), edits.bias_ids.size(0),
                               edits.allowed_ids.size(0)};
    for (int list = 0; list < 3; ++list) {
        const int64_t* offsets = edits.offsets.ptr<int64_t>() + list * (count + 1);
        bool ascending = offsets[0] == 0 && offsets[count] == lengths[list];
        for (int64_t i = 0; i < count; ++i) ascending &= offsets[i] <= offsets[i + 1];
        if (!ascending) {
            Check(op, "offsets", edits.offsets)
                .fail("ascending numbers from 0 to " + std::to_string(lengths[list]) + " in row " +
                      std::to_string(list));
        }
    }
    check_token_ids<int32_t>(op, "seen", edits.seen, 3, vocab);
    check_token_ids<int32_t>(op, "bias_ids", edits.bias_ids, 1, vocab);
    check_token_ids<int32_t>(op, "allowed_ids", edits.allowed_ids, 1, vocab);
}

void sample(const Tensor& token_ids, const Tensor& status, const Tensor& logits,
            const std::optional<Tensor>& rows, const Tensor& reals, const Tensor& integers,
            const std::optional<TokenEdits>& edits, const Tensor& workspace) {
    constexpr const char* kOp = "sample";
    const int64_t count = check_logits(kOp, logits, rows), vocab = logits.size(1);
    Check(kOp, "token_ids", token_ids)
        .dtype(DType::kInt64)
        .shape({count})
        .dense()
        .same_device(logits);
    Check(kOp, "status", status).dtype(DType::kInt32).shape({count}).dense().same_device(logits);
    check_parameters(kOp, reals, integers, logits, count);
    if (edits) check_edits(kOp, *edits, logits, count);
    const int64_t* offsets = edits ? edits->offsets.ptr<int64_t>() : nullptr;
    SampleArgs args{
        .token_ids = token_ids.ptr<int64_t>(),
        .status = status.ptr<int32_t>(),
        .logits = logits.ptr<float>(),
        .logits_rows = rows ? rows->ptr<int64_t>() : nullptr,
        .reals = reals.ptr<float>(),
        .integers = integers.ptr<int64_t>(),
        .seen_start = offsets,
        .bias_start = offsets ? offsets + (count + 1) : nullptr,
        .allowed_start = offsets ? offsets + 2 * (count + 1) : nullptr,
        .seen = edits ? edits->seen.ptr<int32_t>() : nullptr,
        .bias_ids = edits ? edits->bias_ids.ptr<int32_t>() : nullptr,
        .bias_values = edits ? edits->bias_values.ptr<float>() : nullptr,
        .allowed_ids = edits ? edits->allowed_ids.ptr<int32_t>() : nullptr,
        .workspace = workspace.ptr<char>(),
        .count = count,
        .vocab = vocab,
        .logits_stride = logits.stride(0),
        .workers = 1,
    };
    if (on_gpu(logits)) {
        check_gpu_workspace(kOp, count, logits, workspace);
        return cuda::kernels(kOp).sample(args, cuda::stream_of(logits));
    }
    args.workers = worker_count(kOp, count, vocab, workspace);
    cpu::kernels().sample(args);
}

int64_t most_top_tokens(const Tensor& logits) {
    const int64_t vocab = logits.size(-1);
    return on_gpu(logits) && vocab > kMostTopTokensOnGpu ? kMostTopTokensOnGpu : vocab;
}

void log_probs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids,
               const Tensor& top_logprobs, const Tensor& logits, const std::optional<Tensor>& rows,
               const Tensor& token_ids, const Tensor& workspace) {
    constexpr const char* kOp = "log_probs";
    const int64_t count = check_logits(kOp, logits, rows), vocab = logits.size(1);
    const auto column = [&](const char* name, const Tensor& tensor, DType dtype) {
        Check(kOp, name, tensor).dtype(dtype).shape({count}).dense().same_device(logits);
    };
    column("token_ids", token_ids, DType::kInt64);
    check_token_ids<int64_t>(kOp, "token_ids", token_ids, 1, vocab);
    column("logprobs", logprobs, DType::kFloat32);
    column("ranks", ranks, DType::kInt64);
    const Check check(kOp, "top_ids", top_ids);
    check.dtype(DType::kInt64).shape({count, -1}).dense().same_device(logits);
    const int64_t top_n = top_ids.size(1);
    const int64_t most = most_top_tokens(logits);
    if (top_n > most) check.fail("at most " + std::to_string(most) + " columns");
    Check(kOp, "top_logprobs", top_logprobs)
        .dtype(DType::kFloat32)
        .shape({count, top_n})
        .dense()
        .same_device(logits);
    LogProbsArgs args{
        .logprobs = logprobs.ptr<float>(),
        .ranks = ranks.ptr<int64_t>(),
        .top_ids = top_ids.ptr<int64_t>(),
        .top_logprobs = top_logprobs.ptr<float>(),
        .logits = logits.ptr<float>(),
        .logits_rows = rows ? rows->ptr<int64_t>() : nullptr,
        .token_ids = token_ids.ptr<int64_t>(),
        .workspace = workspace.ptr<char>(),
        .count = count,
        .vocab = vocab,
        .top_n = top_n,
        .logits_stride = logits.stride(0),
        .workers = 1,
    };
    if (on_gpu(logits)) {
        check_gpu_workspace(kOp, count, logits, workspace);
        return cuda::kernels(kOp).log_probs(args, cuda::stream_of(logits));
    }
    args.workers = worker_count(kOp, count, vocab, workspace);
    cpu::kernels().log_probs(args);
}

}  // namespace sglite::ops
