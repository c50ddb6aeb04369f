"""Loading a checkpoint, and its logits, in one line each."""

from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.forward import Runner


def load(folder, **arguments):
    return load_model(resolve_checkpoint(folder), **arguments)


def logits_of(loaded, token_ids=(5, 6, 7, 8)):
    run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=1)
    return run.run([list(token_ids)])[0]


def move_data_to_odd_places(path):
    """Makes the header of a file longer, so that its data cannot be mapped."""
    contents = path.read_bytes()
    length = int.from_bytes(contents[:8], "little")
    header = contents[8 : 8 + length] + b" " * (3 - length % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + contents[8 + length :])
