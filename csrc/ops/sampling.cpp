#include <cmath>

#include "cpu/kernels.h"
#include "ops.h"

namespace sglite::ops {

int64_t sampling_workspace_bytes(const Tensor& like, int64_t vocab, int64_t) {
    cpu::require_cpu("sampling_workspace", like);
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

// Checks the logits and which of their rows are asked for; returns how many those are.
static int64_t check_logits(const char* op, const Tensor& logits,
                            const std::optional<Tensor>& rows) {
    const Check check(op, "logits", logits);
    check.ndim(2).dtype(DType::kFloat32).dense_rows();
    cpu::require_cpu(op, logits);
    if (logits.size(1) < 1 || logits.size(1) > INT32_MAX) check.fail("1 to 2^31 - 1 columns");
    if (!rows) return logits.size(0);
    Check(op, "rows", *rows).dtype(DType::kInt64).ndim(1).dense().same_device(logits);
    for (int64_t i = 0; i < rows->size(0); ++i) {
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
    for (int64_t i = 0; i < ids.size(0); ++i) {
        const int64_t id = ids.ptr<T>()[i * stride];
        if (id < 0 || id >= vocab) {
            Check(op, name, ids)
                .fail("token ids from 0 to " + std::to_string(vocab - 1) + ", not " +
                      std::to_string(id));
        }
    }
}

static void check_parameters(const char* op, const Tensor& reals, const Tensor& integers,
                             int64_t count) {
    Check(op, "reals", reals).dtype(DType::kFloat32).shape({count, kSampleReals}).dense();
    Check(op, "integers", integers).dtype(DType::kInt64).shape({count, kSampleIntegers}).dense();
    for (int64_t row = 0; row < count; ++row) {
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

static void check_edits(const char* op, const TokenEdits& edits, int64_t count, int64_t vocab) {
    Check(op, "offsets", edits.offsets).dtype(DType::kInt64).shape({3, count + 1}).dense();
    Check(op, "seen", edits.seen).dtype(DType::kInt32).shape({-1, 3}).dense();
    Check(op, "bias_ids", edits.bias_ids).dtype(DType::kInt32).ndim(1).dense();
    Check(op, "bias_values", edits.bias_values)
        .dtype(DType::kFloat32)
        .shape({edits.bias_ids.size(0)})
        .dense();
    Check(op, "allowed_ids", edits.allowed_ids).dtype(DType::kInt32).ndim(1).dense();
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
    Check(kOp, "token_ids", token_ids).dtype(DType::kInt64).shape({count}).dense();
    Check(kOp, "status", status).dtype(DType::kInt32).shape({count}).dense();
    check_parameters(kOp, reals, integers, count);
    if (edits) check_edits(kOp, *edits, count, vocab);
    const int64_t* offsets = edits ? edits->offsets.ptr<int64_t>() : nullptr;
    cpu::kernels().sample({
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
        .workers = worker_count(kOp, count, vocab, workspace),
    });
}

void log_probs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids,
               const Tensor& top_logprobs, const Tensor& logits, const std::optional<Tensor>& rows,
               const Tensor& token_ids, const Tensor& workspace) {
    constexpr const char* kOp = "log_probs";
    const int64_t count = check_logits(kOp, logits, rows), vocab = logits.size(1);
    Check(kOp, "token_ids", token_ids).dtype(DType::kInt64).shape({count}).dense();
    check_token_ids<int64_t>(kOp, "token_ids", token_ids, 1, vocab);
    Check(kOp, "logprobs", logprobs).dtype(DType::kFloat32).shape({count}).dense();
    Check(kOp, "ranks", ranks).dtype(DType::kInt64).shape({count}).dense();
    Check(kOp, "top_ids", top_ids).dtype(DType::kInt64).shape({count, -1}).dense();
    const int64_t top_n = top_ids.size(1);
    if (top_n > vocab) {
        Check(kOp, "top_ids", top_ids).fail("at most " + std::to_string(vocab) + " columns");
    }
    Check(kOp, "top_logprobs", top_logprobs).dtype(DType::kFloat32).shape({count, top_n}).dense();
    cpu::kernels().log_probs({
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
        .workers = worker_count(kOp, count, vocab, workspace),
    });
}

}  // namespace sglite::ops
