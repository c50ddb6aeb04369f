"""An error that has left the library holds nothing of it, and takes nothing from anybody else."""

import asyncio
import gc
import inspect
import sys
import weakref

import pytest

from sglite.engine.leaving import empty_all_frames, empty_frames, keeps_nothing

# Run as a module of the library's.
MODULE = '''
from sglite.engine.leaving import keeps_nothing

class Owner:
    """Something that is to be let go."""

    @keeps_nothing
    def call(self, depth=0):
        """What it does."""
        return fail(self)

    @keeps_nothing
    async def await_it(self):
        return fail(self)

    @keeps_nothing
    def iterate(self):
        yield 1
        fail(self)

def fail(owner):
    try:
        raise KeyError("first")
    except KeyError:
        raise ValueError("planted")
'''


@pytest.fixture
def owner_class():
    names = {"__name__": "sglite.somewhere"}
    exec(MODULE, names)
    return names["Owner"]


@pytest.mark.parametrize(
    "use", ["owner.call()", "asyncio.run(owner.await_it())", "list(owner.iterate())"]
)
def test_nothing_is_held_by_an_error_that_is_kept(owner_class, use):
    cell = {"owner": owner_class(), "asyncio": asyncio}
    held = weakref.ref(cell["owner"])
    gc.disable()
    try:
        with pytest.raises(ValueError, match="planted") as kept:
            exec(use, cell)
        del cell["owner"]
        assert held() is None
    finally:
        gc.enable()
    assert kept.traceback[-1].name == "fail", "where it was raised can still be read"


def test_methods_look_as_before(owner_class):
    assert owner_class.call.__doc__ == "What it does."
    assert list(inspect.signature(owner_class.call).parameters) == ["self", "depth"]
    assert inspect.iscoroutinefunction(owner_class.await_it)
    assert inspect.isgeneratorfunction(owner_class.iterate)


def test_frames_of_others_keep_their_variables():
    def foreign(thing):
        raise KeyError("planted")

    with pytest.raises(KeyError) as kept:
        keeps_nothing(foreign)(3)
    frames = [frame for frame in _frames(kept.value) if frame.f_code.co_name == "foreign"]
    assert [frame.f_locals for frame in frames] == [{"thing": 3}]
    empty_frames(kept.value)
    assert frames[0].f_locals == {"thing": 3}


def test_what_the_program_was_dealing_with_is_left_alone():
    def earlier(thing):
        raise KeyError("the program's own")

    def later(thing):
        raise ValueError("planted")

    try:
        earlier(1)
    except KeyError as own_error:
        handled = sys.exception()
        with pytest.raises(ValueError, match="planted") as caught:
            later(2)
        own = own_error
    assert caught.value.__context__ is own
    empty_all_frames(caught.value, handled)
    assert _frames(caught.value)[-1].f_locals == {}
    assert _frames(own)[-1].f_locals == {"thing": 1}


def _frames(error):
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames
