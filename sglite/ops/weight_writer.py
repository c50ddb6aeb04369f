"""Writing many weights at once."""

from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PackedWeight
from sglite.ops.quantized_weight import QuantizedWeight


class WeightWriter:
    """Notes rows of weights, and writes them all with every thread busy until the last.

    What is written is what `PackedWeight.write_rows` and `QuantizedWeight.quantize_rows` write, bit
    for bit. The rows are read by `run`, and must not change before.

    Attributes:
        num_bytes: of the rows that wait to be written.
    """

    def __init__(self):
        self._writer = _C.WeightWriter()
        self._held: list[object] = []
        self.num_bytes = 0

    def add(
        self,
        weight: PackedWeight | QuantizedWeight,
        start: int,
        rows: Tensor,
        *,
        is_mapped: bool = False,
    ) -> None:
        """Notes rows to be written from the row `start` on.

        Args:
            weight: where to; a quantised one has no zero points.
            start: the first row.
            rows: [count, k]; for a packed weight of its dtype, for a quantised one float32,
                bfloat16 or float16.
            is_mapped: whether they lie in a private mapping of a file, whose pages are then given
                back to the system piece by piece. They can be read again, from the file.

        Raises:
            ValueError: a shape, stride, dtype or range does not fit.
        """
        if isinstance(weight, PackedWeight):
            self._writer.pack(weight.storage, weight.n, weight.k, start, rows, is_mapped)
        elif weight.zeros is None:
            self._writer.quantize(weight.arguments, start, rows, is_mapped)
        else:
            raise ValueError("WeightWriter.add: weight: expected one without zero points")
        self._held += [weight, rows]
        self.num_bytes += rows.nbytes

    def run(self) -> None:
        """Writes what has been noted. Other Python threads run meanwhile."""
        self._writer.run()
        self._held.clear()
        self.num_bytes = 0
