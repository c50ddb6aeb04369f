"""Runs the model on a scheduled step and samples the next tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sglite.cache.kv_pool import KVPool
from sglite.engine.batch import LogitsRows, assemble
from sglite.engine.request import Request
from sglite.engine.sampler import Sampler
from sglite.engine.scheduler import Outcome, PageCopy, Step
from sglite.engine.tokenizer import Tokenizer


class ModelRunner:
    """Owns the model and the tensors of the KV cache.

    Args:
        model: `forward(input_ids, positions, forward_batch)` gives an object with
            `next_token_logits`, float32[R, vocabulary].
        pool: the KV cache.
        tokenizer: for the text of log-probabilities.
    """

    def __init__(self, model: nn.Module, pool: KVPool, tokenizer: Tokenizer):
        self.model = model
        self.pool = pool
        self.sampler = Sampler(tokenizer)

    def run(self, step: Step) -> list[Outcome]:
        """Computes the step's tokens; gives one outcome for each of its requests, in order."""
        # Also in a step that has nothing else, for want of pages: the copied tokens are counted.
        self._copy_pages(step.page_copies)
        if not step.items:
            return []
        inputs = assemble(step, self.pool.page_size, self.pool.layers, self.pool.device)
        output = self.model(inputs.input_ids, inputs.positions, inputs.forward_batch)
        requests = [item.request for item in step.items]
        return self._sample(requests, inputs.logits_rows, output.next_token_logits)

    def _copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy on write: the matching start of a shared page goes to the request's own page."""
        if copies:
            size = self.pool.page_size
            source = [copy.source * size + i for copy in copies for i in range(copy.num_tokens)]
            destination = [
                copy.destination * size + i for copy in copies for i in range(copy.num_tokens)
            ]
            self.pool.copy_slots(source, destination)

    def _sample(
        self, requests: Sequence[Request], rows: Sequence[LogitsRows], logits: Tensor
    ) -> list[Outcome]:
        sampling = [index for index, row in enumerate(rows) if row.sample_row is not None]
        sampled = {}
        if sampling:
            wanted = [rows[index].sample_row for index in sampling]
            if len(wanted) < len(logits):
                sample_logits = logits[torch.from_numpy(np.array(wanted)).to(logits.device)]
            else:
                sample_logits = logits
            drawn = self.sampler.sample(sample_logits, [requests[index] for index in sampling])
            sampled = dict(zip(sampling, drawn, strict=True))
        outcomes = []
        for index, (request, row) in enumerate(zip(requests, rows, strict=True)):
            token = sampled.get(index)
            outcomes.append(
                Outcome(
                    token_id=token.token_id if token else None,
                    logprobs=token.logprobs if token else None,
                    error=token.error if token else None,
                    prompt_logprobs=self._prompt_logprobs(request, row, logits),
                )
            )
        return outcomes

    def _prompt_logprobs(self, request: Request, row: LogitsRows, logits: Tensor) -> list:
        if not row.num_prompt_rows:
            return []
        first = row.first_prompt_position
        return self.sampler.score(
            logits[row.first_prompt_row : row.first_prompt_row + row.num_prompt_rows],
            request.token_ids[first : first + row.num_prompt_rows],
            request.params.prompt_logprobs,
        )

    def close(self) -> None:
        """Drops the model and the cache's tensors."""
        self.model = None
        self.pool.close()
