"""Embeddings of images: encoded once, kept by use, laid out for the rows of a step."""

import re
import weakref

import numpy as np
import torch

from sglite import UnsupportedModelError
from sglite.engine.image_features import FeatureCache, ImageFeatures
from sglite.engine.request import Request
from sglite.engine.scheduler import ScheduledRequest, Step
from sglite.interface.sampling_params import SamplingParams
from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem


class Model:
    """Gives the number of a picture and the number of its row; counts its calls."""

    def __init__(self, missing=0):
        self.calls = []
        self.missing = missing

    def get_image_feature(self, items):
        (item,) = items
        self.calls.append(int(item.pixel_values))
        rows = torch.arange(item.num_tokens - self.missing).float()
        return torch.stack([torch.full_like(rows, float(item.pixel_values)), rows], 1)


def request_with(*spans, namespace=""):
    items = [
        MultimodalItem("image", torch.tensor(picture), start, stop)
        for picture, start, stop in spans
    ]
    params = SamplingParams(max_new_tokens=1)
    return Request([0] * 30, params, multimodal=MultimodalInputs(items), namespace=namespace)


def step_of(*items):
    """A step, and where the requests' tokens begin in it."""
    scheduled = [ScheduledRequest(request, *span, False, 0) for request, *span in items]
    counts = [item.stop - item.start for item in scheduled]
    return Step(scheduled), np.cumsum([0, *counts]).astype(np.int32)


def test_rows_of_a_step():
    features = ImageFeatures(Model(), 1000)
    text = Request([1, 2, 3], SamplingParams(max_new_tokens=1))
    first, second = request_with((7, 2, 5), (8, 6, 9)), request_with((7, 0, 3))
    found, _ = features.of_step(*step_of((text, 0, 3), (first, 3, 8), (second, 0, 10)))
    assert found.rows.tolist() == [3, 4, 6, 7, 8, 9, 10]
    assert found.embeds.tolist() == [[7, 1], [7, 2], [8, 0], [8, 1], [7, 0], [7, 1], [7, 2]]
    assert features.num_encoded == 2
    assert features.of_step(*step_of((text, 0, 3), (first, 9, 12))) == (None, {})


def test_an_image_that_is_cut_is_encoded_once_even_without_a_cache():
    model = Model()
    features = ImageFeatures(model, 0)
    request = request_with((7, 0, 20))
    for start in range(0, 20, 5):
        features.of_step(*step_of((request, start, start + 5)))
    assert model.calls == [7]
    features.of_step(*step_of((request, 20, 25)))
    features.of_step(*step_of((request, 0, 5)))
    assert model.calls == [7, 7]


def test_other_weights_give_other_embeddings():
    model = Model()
    features = ImageFeatures(model, 1000)
    for namespace in ("", "weights 1", "weights 1", ""):
        features.of_step(*step_of((request_with((7, 0, 3), namespace=namespace), 0, 3)))
    assert model.calls == [7, 7]


def test_what_is_held_for_a_cut_image_goes_when_nobody_wants_it():
    model = Model()
    features = ImageFeatures(model, 0)
    features.of_step(*step_of((request_with((7, 0, 20)), 0, 5)))
    (held,) = features._held.values()
    gone = weakref.ref(held)
    del held
    features.rest()
    assert gone() is None


def test_a_model_that_gives_too_few_rows_is_told_so():
    features = ImageFeatures(Model(missing=1), 1000)
    found, failures = features.of_step(*step_of((request_with((7, 0, 3)), 0, 3)))
    assert found is None
    assert re.search(r"gave \[2, 2\] for an image.*in 3 tokens", str(failures[0]))
    assert isinstance(failures[0].__cause__, UnsupportedModelError)


def test_an_image_that_cannot_be_encoded_fails_its_own_requests():
    class Broken(Model):
        def get_image_feature(self, items):
            found = super().get_image_feature(items)
            if self.calls[-1] == 7:
                raise MemoryError("planted")
            return found

    model = Broken()
    features = ImageFeatures(model, 1000)
    text = Request([1, 2, 3], SamplingParams(max_new_tokens=1))
    step = step_of(
        (request_with((7, 0, 3)), 0, 4),
        (text, 0, 3),
        (request_with((8, 0, 3), (7, 4, 6)), 0, 6),
        (request_with((8, 1, 4)), 0, 4),
    )
    found, failures = features.of_step(*step)
    assert found.rows.tolist() == [7, 8, 9, 14, 15, 16]
    assert found.embeds[:, 0].tolist() == [8] * 6
    assert sorted(failures) == [0, 2]
    assert failures[0] is not failures[2]
    for failure in failures.values():
        assert str(failure) == "encoding the image failed: MemoryError: planted"
        assert isinstance(failure.__cause__, MemoryError)
        assert failure.__cause__.__traceback__ is None
    assert model.calls == [7, 8], "each is tried once"


class TestCache:
    def test_what_was_used_longest_ago_goes(self):
        cache = FeatureCache(3 * 40)
        tensors = {key: torch.full((10,), float(key)) for key in range(5)}
        for key in (0, 1, 2):
            cache.put(key, tensors[key])
        assert cache.get(0) is tensors[0]
        cache.put(3, tensors[3])
        assert cache.get(1) is None
        assert all(cache.get(key) is tensors[key] for key in (0, 2, 3))
        assert (len(cache), cache.num_bytes) == (3, 120)

    def test_what_is_larger_than_all_is_not_kept(self):
        cache = FeatureCache(100)
        cache.put(0, torch.zeros(10))
        cache.put(1, torch.zeros(26))
        assert cache.get(1) is None
        assert cache.get(0) is not None
        cache.put(0, torch.ones(10))
        assert cache.num_bytes == 40
        cache.clear()
        assert (len(cache), cache.num_bytes) == (0, 0)
