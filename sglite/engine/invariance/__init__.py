"""Whether logits are the same bits however a prompt is computed: `LLM.check_invariance`."""

from sglite.engine.invariance.check import check_invariance, compute
from sglite.engine.invariance.plans import Settings
from sglite.engine.invariance.prompts import read_prompts
from sglite.engine.invariance.recording import LogitsRecorder
from sglite.engine.invariance.report import Condition, Difference, InvarianceReport

__all__ = [
    "Condition",
    "Difference",
    "InvarianceReport",
    "LogitsRecorder",
    "Settings",
    "check_invariance",
    "compute",
    "read_prompts",
]
