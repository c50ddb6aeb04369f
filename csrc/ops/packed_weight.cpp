#include "ops/packed_weight.h"

#include "cpu/kernels.h"
#include "ops.h"

namespace sglite::ops {

void check_packed(const char* op, const char* name, const Tensor& storage, int64_t n, int64_t k) {
    const Check check(op, name, storage);
    check.dtype_in(kFloatTypes);
    const int64_t depth = storage.dtype == DType::kFloat32 ? 1 : 2;
    const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns, steps = (k + depth - 1) / depth;
    if (depth == 1) {
        check.shape({panels, steps, kPanelColumns});
    } else {
        check.shape({panels, steps, kPanelColumns, depth});
    }
    check.dense();
}

PackRowsArgs pack_arguments(const char* op, const Tensor& storage, int64_t n, int64_t k,
                            int64_t start, const Tensor& rows) {
    check_packed(op, "storage", storage, n, k);
    cpu::require_cpu(op, storage);
    Check(op, "rows", rows).dtype(storage.dtype).shape({-1, k}).dense_rows().same_device(storage);
    const int64_t count = rows.size(0);
    if (start < 0 || start + count > n) {
        throw std::invalid_argument(std::string(op) + ": rows " + std::to_string(start) + " to " +
                                    std::to_string(start + count) + " of a weight with " +
                                    std::to_string(n) + " rows");
    }
    return {
        .packed = storage.data,
        .rows = rows.data,
        .row_stride = rows.stride(0),
        .start = start,
        .count = count,
        .k = k,
        .dtype = storage.dtype,
    };
}

void pack_rows(const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows) {
    const PackRowsArgs args = pack_arguments("PackedWeight", storage, n, k, start, rows);
    if (args.count && k) cpu::kernels().pack_rows(args);
}

void unpack_rows(const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows) {
    const PackRowsArgs args = pack_arguments("PackedWeight", storage, n, k, start, rows);
    if (args.count && k) cpu::kernels().unpack_rows(args);
}

}  // namespace sglite::ops
