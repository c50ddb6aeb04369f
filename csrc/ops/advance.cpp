#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

static int64_t source_of(const GatherTokensArgs& args, int64_t i) {
    return args.wide ? static_cast<const int64_t*>(args.sources)[i]
                     : static_cast<const int32_t*>(args.sources)[i];
}

void gather_tokens(const Tensor& input_ids, const Tensor& previous, const Tensor& sources) {
    constexpr const char* kOp = "gather_tokens";
    Check(kOp, "input_ids", input_ids).dtype(DType::kInt64).ndim(1).dense();
    const int64_t count = input_ids.size(0);
    Check(kOp, "previous_token_ids", previous)
        .dtype(DType::kInt64)
        .ndim(1)
        .dense()
        .same_device(input_ids);
    Check(kOp, "sources", sources)
        .dtype_in({DType::kInt32, DType::kInt64})
        .shape({count})
        .dense()
        .same_device(input_ids);
    const GatherTokensArgs args{
        .input_ids = input_ids.ptr<int64_t>(),
        .previous = previous.ptr<const int64_t>(),
        .sources = sources.data,
        .wide = sources.dtype == DType::kInt64,
        .count = count,
    };
    if (input_ids.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).gather_tokens(args, cuda::stream_of(input_ids));
    }
    for (int64_t i = 0; i < count; ++i) {
        if (source_of(args, i) >= previous.size(0)) {
            throw std::out_of_range(std::string(kOp) + ": sources[" + std::to_string(i) + "] is " +
                                    std::to_string(source_of(args, i)) + " of " +
                                    std::to_string(previous.size(0)) + " tokens");
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t source = source_of(args, i);
        if (source < 0) continue;
        const int64_t token = args.previous[source];
        args.input_ids[i] = token < 0 ? 0 : token;
    }
}

// A few dozen rows of a few integers: no kernel of its own on the CPU.
static void advance_rows(const AdvanceArgs& args) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (args.kv_lens[row] > 0 && (args.positions[row] + 1) / args.page_size >= args.max_pages) {
            throw std::out_of_range("advance: position " + std::to_string(args.positions[row] + 1) +
                                    " of row " + std::to_string(row) + " is beyond its " +
                                    std::to_string(args.max_pages) + " pages");
        }
    }
    for (int64_t row = 0; row < args.rows; ++row) {
        if (args.kv_lens[row] <= 0) continue;
        args.input_ids[row] = args.token_ids[row] < 0 ? 0 : args.token_ids[row];
        const int64_t position = ++args.positions[row];
        ++args.kv_lens[row];
        ++args.kv_end[row];
        ++args.integers[row * kSampleIntegers + kPosition];
        const int64_t page =
            args.page_table[row * args.page_table_stride + position / args.page_size];
        args.slots[row] = page * args.page_size + position % args.page_size;
    }
}

void advance(const Tensor& token_ids, const Tensor& input_ids, const Tensor& positions,
             const Tensor& kv_lens, const Tensor& kv_end, const Tensor& slots,
             const Tensor& integers, const Tensor& page_table, int64_t page_size) {
    constexpr const char* kOp = "advance";
    Check(kOp, "token_ids", token_ids).dtype(DType::kInt64).ndim(1).dense();
    const int64_t rows = token_ids.size(0);
    const auto column = [&](const char* name, const Tensor& tensor, DType dtype) {
        Check(kOp, name, tensor).dtype(dtype).shape({rows}).dense().same_device(token_ids);
    };
    column("input_ids", input_ids, DType::kInt64);
    column("positions", positions, DType::kInt64);
    column("kv_lens", kv_lens, DType::kInt32);
    column("kv_end", kv_end, DType::kInt32);
    column("slots", slots, DType::kInt64);
    Check(kOp, "integers", integers)
        .dtype(DType::kInt64)
        .shape({rows, kSampleIntegers})
        .dense()
        .same_device(token_ids);
    Check(kOp, "page_table", page_table)
        .dtype(DType::kInt32)
        .shape({rows, -1})
        .dense_rows()
        .same_device(token_ids);
    if (page_size < 1) throw std::invalid_argument("advance: page_size: expected 1 or more");
    if (rows && page_table.size(1) < 1) {
        Check(kOp, "page_table", page_table).fail("at least one column");
    }
    const AdvanceArgs args{
        .token_ids = token_ids.ptr<const int64_t>(),
        .input_ids = input_ids.ptr<int64_t>(),
        .positions = positions.ptr<int64_t>(),
        .kv_lens = kv_lens.ptr<int32_t>(),
        .kv_end = kv_end.ptr<int32_t>(),
        .slots = slots.ptr<int64_t>(),
        .integers = integers.ptr<int64_t>(),
        .page_table = page_table.ptr<const int32_t>(),
        .rows = rows,
        .max_pages = page_table.size(1),
        .page_table_stride = page_table.stride(0),
        .page_size = page_size,
    };
    if (token_ids.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).advance(args, cuda::stream_of(token_ids));
    }
    advance_rows(args);
}

}  // namespace sglite::ops
