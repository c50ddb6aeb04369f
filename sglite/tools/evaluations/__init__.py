"""Evaluations by lm-evaluation-harness, the field's own tool: GSM8K, MMLU and the rest.

    python -m sglite eval --tasks gsm8k --model PATH

From Python, importing this package registers the model under the name "sglite":

    import lm_eval
    from sglite.tools.evaluations import SGLiteLM

    lm_eval.simple_evaluate(model="sglite", model_args={"pretrained": PATH}, tasks=["gsm8k"])
    lm_eval.simple_evaluate(model=SGLiteLM(llm), tasks=["gsm8k"])  # an LLM that is there already

The harness is not among sglite's own requirements: `pip install "sglite[eval]"` brings it.
"""

from importlib.util import find_spec

from sglite.interface.errors import MissingPackageError

if find_spec("lm_eval") is None:
    raise MissingPackageError(
        'evaluations need lm-evaluation-harness, which is not installed: pip install "sglite[eval]"'
    )

from sglite.tools.evaluations.harness_model import SGLiteLM

__all__ = ["SGLiteLM"]
