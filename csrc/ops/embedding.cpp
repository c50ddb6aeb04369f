#include "ops/embedding.h"

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"
#include "ops/packed_weight.h"

namespace sglite::ops {

void check_ids(const int64_t* ids, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= n) {
            throw std::out_of_range("embedding: ids: expected ids from 0 to " +
                                    std::to_string(n - 1) + " (the table has " + std::to_string(n) +
                                    " rows), got " + std::to_string(ids[i]) + " at position " +
                                    std::to_string(i));
        }
    }
}

static void run_embedding(const Tensor& out, const Tensor& ids, const Tensor& table, bool packed,
                          int64_t n, int64_t k) {
    constexpr const char* kOp = "embedding";
    Check(kOp, "ids", ids).dtype(DType::kInt64).ndim(1).dense().same_device(table);
    const int64_t count = ids.size(0);
    Check(kOp, "out", out).dtype(table.dtype).shape({count, k}).dense_rows().same_device(table);
    if (count == 0 || k == 0) return;
    const EmbeddingArgs args{
        .out = out.data,
        .ids = ids.ptr<const int64_t>(),
        .table = table.data,
        .packed = packed,
        .count = count,
        .width = k,
        .out_stride = out.stride(0),
        .table_stride = packed ? 0 : table.stride(0),
        .dtype = table.dtype,
    };
    if (table.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).embedding(args, cuda::stream_of(table));
    }
    check_ids(args.ids, count, n);
    cpu::kernels().embedding(args);
}

void embedding_packed(const Tensor& out, const Tensor& ids, const Tensor& storage, int64_t n,
                      int64_t k) {
    check_packed("embedding", "weight", storage, n, k);
    run_embedding(out, ids, storage, true, n, k);
}

void embedding_plain(const Tensor& out, const Tensor& ids, const Tensor& weight) {
    Check("embedding", "weight", weight).dtype_in(kFloatTypes).ndim(2).dense_rows();
    run_embedding(out, ids, weight, false, weight.size(0), weight.size(1));
}

}  // namespace sglite::ops
