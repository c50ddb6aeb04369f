#include "ops/weight_writer.h"

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"
#include "ops/packed_weight.h"
#include "ops/system_memory.h"

namespace sglite::ops {

namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kPieceBytes = 2 << 20;  // one huge page, which two threads had better not share

struct Piece {
    size_t index;         // of the rows that it is from
    int64_t begin, stop;  // counted from their first
};

int64_t row_bytes(const auto& args) { return args.row_stride * dtype_size(args.dtype); }

void cut(std::vector<Piece>& pieces, size_t index, const auto& args) {
    const int64_t panel_bytes = std::max<int64_t>(1, kPanelRows * row_bytes(args));
    const int64_t most = std::max<int64_t>(1, kPieceBytes / panel_bytes) * kPanelRows;
    for (int64_t begin = 0; begin < args.count;) {
        const int64_t stop = std::min(args.count, begin + most - (args.start + begin) % kPanelRows);
        pieces.push_back({index, begin, stop});
        begin = stop;
    }
}

// `args` for the rows of one piece alone.
template <typename Args>
Args part_of(Args args, const Piece& piece) {
    args.rows = static_cast<const char*>(args.rows) + piece.begin * row_bytes(args);
    args.start += piece.begin;
    args.count = piece.stop - piece.begin;
    return args;
}

void write(const PackRowsArgs& args) { cpu::kernels().pack_rows(args); }
void write(const QuantizeRowsArgs& args) { cpu::kernels().quantize_rows(args); }

void give_back(const auto& args) { give_back_pages(args.rows, args.count * row_bytes(args)); }

}  // namespace

void WeightWriter::pack(const Tensor& storage, int64_t n, int64_t k, int64_t start,
                        const Tensor& rows, bool mapped) {
    rows_.push_back({pack_arguments("PackedWeight", storage, n, k, start, rows), mapped});
}

void WeightWriter::quantize(const QuantizedTensors& weight, int64_t start, const Tensor& rows,
                            bool mapped) {
    rows_.push_back({quantize_arguments(weight, start, rows), mapped});
}

void WeightWriter::run() {
    std::vector<Piece> pieces;
    for (size_t index = 0; index < rows_.size(); ++index) {
        std::visit([&](const auto& args) { cut(pieces, index, args); }, rows_[index].args);
    }
    std::atomic<size_t> next{0};
    const int threads = static_cast<int>(
        std::clamp<size_t>(pieces.size(), 1, static_cast<size_t>(cpu::num_threads())));
#pragma omp parallel num_threads(threads)
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) {
        const Rows& rows = rows_[pieces[i].index];
        std::visit(
            [&](const auto& args) {
                const auto part = part_of(args, pieces[i]);
                write(part);
                if (rows.mapped) give_back(part);
            },
            rows.args);
    }
    rows_.clear();
}

}  // namespace sglite::ops
