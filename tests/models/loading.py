"""Loading a checkpoint, and its logits, in one line each."""

from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.forward import Runner


def load(folder, **arguments):
    return load_model(resolve_checkpoint(folder), **arguments)


def logits_of(loaded, token_ids=(5, 6, 7, 8)):
    run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=1)
    return run.run([list(token_ids)])[0]
