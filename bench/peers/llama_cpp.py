"""llama.cpp through llama-cpp-python's C API: `python -m bench.peers.llama_cpp`.

Its best setting on a CPU: compiled for this processor, flash attention, and all prompts decoded as
one batch. A prefix in common is computed once and its cells are shared between the sequences, which
takes one unified cache; without one, each sequence has a part of its own, as attention then skips
the cells of the others.
"""

import ctypes
import os

import llama_cpp
import numpy as np

from bench.runner import common_prefix, serve

_BATCH = 2048  # tokens of one call of `llama_decode`
_MICROBATCH = 512  # rows that pass through the layers at once


class LlamaCppEngine:
    """See `bench.runner.BenchEngine`."""

    def __init__(
        self, model: str, dtype: str, num_threads: int, kv_tokens: int, quantization: str | None
    ):
        llama_cpp.llama_backend_init()
        file = os.path.join(model, "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(
            file, llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file.decode()}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.num_threads = num_threads
        self.about = {
            "version": llama_cpp.__version__,
            "settings": f"{'Q8_0' if quantization else dtype}, built with GGML_NATIVE, flash "
            "attention, one batch, a common prefix computed once",
        }

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        shared = common_prefix(prompts)
        # At least one token of each prompt is its own: its logits are wanted.
        shared = min(shared, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
        context = self._context(prompts, shared, max_new_tokens)
        memory = llama_cpp.llama_get_memory(context)
        sequences = np.arange(len(prompts))
        rows = []
        if shared:
            self._decode(context, np.array(prompts[0][:shared]), np.arange(shared), 0, False)
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, -1)
        lengths = [len(prompt) - shared for prompt in prompts]
        last = np.zeros(sum(lengths), bool)
        last[np.cumsum(lengths) - 1] = True
        rows = self._decode(
            context,
            np.concatenate([prompt[shared:] for prompt in prompts]),
            np.concatenate([shared + np.arange(length) for length in lengths]),
            np.repeat(sequences, lengths),
            last,
        )
        tokens = [rows]
        positions = np.array([len(prompt) for prompt in prompts])
        for step in range(max_new_tokens - 1):
            tokens.append(self._decode(context, tokens[-1], positions + step, sequences, True))
        llama_cpp.llama_free(context)
        return np.stack(tokens, axis=1).tolist()

    def _context(self, prompts: list[list[int]], shared: int, max_new_tokens: int):
        lengths = [len(prompt) - shared + max_new_tokens for prompt in prompts]
        cells = shared + sum(lengths) if shared else len(prompts) * max(lengths)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells + 256 * len(prompts)  # the cache's parts are multiples of 256 cells
        params.n_seq_max = len(prompts)
        params.n_batch = _BATCH
        params.n_ubatch = _MICROBATCH
        params.n_threads = params.n_threads_batch = self.num_threads
        params.kv_unified = shared > 0
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp has no memory for the context")
        return context

    def _decode(self, context, token_ids, positions, sequences, wanted) -> np.ndarray:
        """Computes tokens, any number of them.

        Args:
            context: of this call of `generate`.
            token_ids, positions: [tokens].
            sequences, wanted: [tokens] or one for all: which prompt a token belongs to, and whether
                the token after it is wanted.

        Returns:
            The most probable next tokens where one is wanted.
        """
        count = len(token_ids)
        arrays = (
            np.ascontiguousarray(token_ids, np.int32),
            np.ascontiguousarray(positions, np.int32),
            np.ascontiguousarray(np.broadcast_to(sequences, count), np.int32),
            np.ascontiguousarray(np.broadcast_to(wanted, count), np.int8),
        )
        chosen = []
        for begin in range(0, count, _BATCH):
            ids, places, owners, logits = (array[begin : begin + _BATCH] for array in arrays)
            ones = np.ones(len(ids), np.int32)
            pointers = owners.ctypes.data + owners.itemsize * np.arange(len(ids), dtype=np.uint64)
            batch = llama_cpp.llama_batch(
                n_tokens=len(ids),
                token=_pointer(ids, ctypes.c_int32),
                pos=_pointer(places, ctypes.c_int32),
                n_seq_id=_pointer(ones, ctypes.c_int32),
                seq_id=_pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
                logits=_pointer(logits, ctypes.c_int8),
            )
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            if logits.any():
                shape = (int(logits.sum()), self.vocab_size)
                scores = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape)
                chosen.append(scores.argmax(axis=1))
        return np.concatenate(chosen) if chosen else np.empty(0, np.int32)


def _pointer(array: np.ndarray, item: type):
    return array.ctypes.data_as(ctypes.POINTER(item))


if __name__ == "__main__":
    serve(LlamaCppEngine)
