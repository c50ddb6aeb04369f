"""Structured output: a JSON schema enforced by a plain logits processor.

The grammar work is llguidance's (`pip install llguidance`); sglite calls the processor once per
token with the ids generated so far and the row of logits, which it returns masked.
"""

import json

import llguidance
import llguidance.hf
import llguidance.torch
from torch import Tensor

from sglite import LLM

SCHEMA = {
    "type": "object",
    "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
    "required": ["country", "capital"],
    "additionalProperties": False,
}


class JsonSchemaProcessor:
    """Leaves only tokens that can still become JSON of a schema. Serves one request.

    Args:
        tokenizer: an `llguidance.LLTokenizer` of the model.
        schema: a JSON schema.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, schema: dict):
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False}
        )
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._bitmask = llguidance.torch.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._num_seen = 0

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """Masks one row of logits, [vocabulary]."""
        for token_id in token_ids[self._num_seen :]:
            if not self._matcher.consume_token(token_id):
                raise ValueError(f"token {token_id} breaks the grammar")
        self._num_seen = len(token_ids)
        llguidance.torch.fill_next_token_bitmask(self._matcher, self._bitmask)
        row = logits.unsqueeze(0)
        llguidance.torch.apply_token_bitmask_inplace(row, self._bitmask)
        return row[0]


def main() -> None:
    with LLM("demo") as llm:
        tokenizer = llguidance.hf.from_tokenizer(llm.tokenizer)
        for question in ("Tell me the capital of Japan.", "Give the capital of Peru as JSON."):
            output = llm.chat(
                [{"role": "user", "content": question}],
                temperature=0,
                max_new_tokens=64,
                logits_processors=[JsonSchemaProcessor(tokenizer, SCHEMA)],
            )
            print(question, "->", json.loads(output.text))


if __name__ == "__main__":
    main()
