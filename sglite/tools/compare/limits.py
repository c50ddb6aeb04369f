"""How far sglite may be from Hugging Face, for each dtype, and why."""

from dataclasses import dataclass

from sglite.tools.compare.metrics import Closeness


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed in one dtype, against Hugging Face in float32.

    Attributes:
        dtype: the one that sglite runs in.
        prefill: for the rows of a prompt; what of, `is_relative` says.
        decode: for the rows behind it.
        is_relative: whether the two are for the relative error of centred logits and of module
            outputs; otherwise they are for the differences of the five largest log-probabilities.
        times_own: the error, relative to that of Hugging Face in the same dtype; None: no such
            rule.
        rounding: one unit in the last place of the dtype, which is always allowed.
        reason: where the numbers come from.
    """

    dtype: str
    prefill: float
    decode: float
    is_relative: bool
    times_own: float | None
    rounding: float
    reason: str

    def broken_by(self, phase: str, found: Closeness, own: Closeness | None) -> str:
        """What is too large, in words; "" where nothing is.

        Args:
            phase: "prefill" or "decode".
            found: sglite against Hugging Face in float32, over all prompts.
            own: Hugging Face in the run's dtype against itself in float32; None for float32.
        """
        allowed = self.prefill if phase == "prefill" else self.decode
        if self.is_relative:
            if found.relative_error <= allowed:
                return ""
            error = found.relative_error
            return f"{phase}: relative error {error:.2g} of logits, {allowed:g} is allowed"
        largest = max(allowed, self.times_own * own.largest)
        if not found.largest <= largest:
            return (
                f"{phase}: a log-probability is {found.largest:.2g} off, {largest:.2g} is allowed"
            )
        rms = self.times_own * own.rms + self.rounding
        if not found.rms <= rms:
            return (
                f"{phase}: log-probabilities are {found.rms:.2g} off (root mean square), while "
                f"Hugging Face in {self.dtype} is {own.rms:.2g} off"
            )
        return ""

    def for_scores(self, largest: float, own: float) -> float:
        """How far a score that experts are chosen by may be off.

        Args:
            largest: of the scores, whatever its sign.
            own: how far Hugging Face is off in the run's dtype; not looked at for float32.
        """
        if self.is_relative:
            return self.prefill * largest
        return self.times_own * own + self.rounding * largest

    def for_modules(self, own: float | None) -> float:
        """The relative error allowed of a module's output.

        For float32 it is the largest of any position, otherwise the mean over positions.

        Args:
            own: the error of Hugging Face in the run's dtype; None for float32.
        """
        if self.is_relative:
            return self.prefill
        return self.times_own * (own or 0.0) + self.rounding


_FIELD = (
    "what the field's own tests allow for the five largest log-probabilities (where Hugging Face "
    "itself in this dtype is further off its float32, twice that), and at most twice Hugging "
    "Face's own error in the root mean square"
)

#: By the name of the dtype.
LIMITS = {
    limits.dtype: limits
    for limits in (
        Limits(
            "float32",
            prefill=1e-4,
            decode=1e-4,
            is_relative=True,
            times_own=None,
            rounding=2.0**-23,
            reason="sums in another order differ by 1e-6 to 1e-5; any error of a formula by more",
        ),
        Limits("bfloat16", 5e-2, 6e-2, False, 2.0, 2.0**-8, _FIELD),
        Limits("float16", 5e-2, 6e-2, False, 2.0, 2.0**-11, _FIELD),
    )
}
