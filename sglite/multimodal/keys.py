"""What the prefix cache knows the tokens of a prompt with images by."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sglite.multimodal.inputs import MultimodalInputs

# Text tokens are below 2**31, so that a key with the sign bit can be none.
_SIGN = np.uint64(1 << 63)


def pad_input_ids(input_ids: Sequence[int], inputs: MultimodalInputs) -> NDArray[np.int64]:
    """Cache keys of a prompt: text tokens are their ids, positions of images negative numbers.

    (SGLang calls it so: there the ids themselves are overwritten.)

    Args:
        input_ids: [n], the prompt with one placeholder id for each row of embeddings.
        inputs: where its images are.

    Returns:
        [n] int64.
    """
    keys = np.array(input_ids, np.int64)
    for item in inputs.items:
        keys[item.start : item.stop] = image_keys(item.digest, item.num_tokens)
    return keys


def image_keys(digest: bytes, count: int) -> NDArray[np.int64]:
    """[count] int64, all negative: key i is a function of the whole digest and of i.

    They are the words of a counter-based random stream keyed with the digest (Philox; Salmon et
    al., 2011), so that two pictures share a key by chance once in 2**63 positions, and a second
    position by another such chance.

    Args:
        digest: 16 bytes.
        count: positions of the picture.
    """
    stream = np.random.Philox(key=np.frombuffer(digest, np.uint64))
    return (stream.random_raw(count) | _SIGN).view(np.int64)
