"""Whether a model is right, and if not, where it first goes wrong: `sglite.compare`."""

from sglite.tools.compare.divergence import Divergence
from sglite.tools.compare.report import ComparisonReport
from sglite.tools.compare.run import compare

__all__ = ["ComparisonReport", "Divergence", "compare"]
