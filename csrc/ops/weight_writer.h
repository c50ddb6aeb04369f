// Filling many weights at once: rows are noted first, and written by all threads together.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernel_args.h"
#include "ops.h"

namespace sglite::ops {

// Rows that wait to be packed or quantised. One weight alone would leave threads idle at its end;
// together the rows are cut into pieces that each thread takes as it gets ready. What is noted
// must outlive `run`. Pieces end between panels, whose words belong to one row each, so that rows
// that meet in a panel may be written at the same time.
class WeightWriter {
  public:
    // As pack_rows and quantize_rows. `mapped`: rows lie in a private mapping of a file, of which
    // each piece's own pages are given back as soon as it is written.
    void pack(const Tensor& storage, int64_t n, int64_t k, int64_t start, const Tensor& rows,
              bool mapped);
    void quantize(const QuantizedTensors& weight, int64_t start, const Tensor& rows, bool mapped);

    // Writes all that has been noted, and forgets it.
    void run();

  private:
    struct Rows {
        std::variant<PackRowsArgs, QuantizeRowsArgs> args;
        bool mapped;
    };
    std::vector<Rows> rows_;
};

}  // namespace sglite::ops
