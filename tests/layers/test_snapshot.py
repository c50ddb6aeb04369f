"""A snapshot holds exactly while everything lies where it lay."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sglite import _C
from sglite.layers.snapshot import Place, Snapshot

ABSENT = object()
VALUES = [None, 0, 1.5, "x", ABSENT]
tables = st.dictionaries(st.sampled_from("abc"), st.sampled_from(VALUES[:-1]))


class Module(nn.Module):
    def forward(self, x):
        return x


class Other(Module):
    pass


@given(
    looked_up=st.lists(
        st.tuples(tables, st.sampled_from("abcd"), st.sampled_from(VALUES)), max_size=60
    ),
    typed=st.lists(
        st.tuples(st.sampled_from([1, "x", 2.5]), st.sampled_from([int, str])), max_size=3
    ),
    empty=st.lists(tables, max_size=2),
)
def test_is_unchanged_is_what_the_interpreter_would_say(looked_up, typed, empty):
    expected = (
        all(table.get(key, ABSENT) is value for table, key, value in looked_up)
        and all(type(thing) is kind for thing, kind in typed)
        and not any(empty)
    )
    found, keys, values = zip(*looked_up, strict=True) if looked_up else ((), (), ())
    things, kinds = zip(*typed, strict=True) if typed else ((), ())
    assert _C.is_unchanged(found, keys, values, ABSENT, things, kinds, tuple(empty)) is expected


def test_is_unchanged_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="keys: expected tuples of one length, got 1 and 0"):
        _C.is_unchanged(({},), (), (), ABSENT, (), (), ())
    for argument in (0, 6):
        arguments = [(), (), (), ABSENT, (), (), ()]
        arguments[argument] = ([],)
        arguments[1] = arguments[2] = ("a",) if argument == 0 else ()
        with pytest.raises(TypeError, match="expected dictionaries"):
            _C.is_unchanged(*arguments)


CHANGES = {
    "a value": lambda table, module: table.update(a=2),
    "a value gone": lambda table, module: table.pop("a"),
    "a value that there was not": lambda table, module: table.update(b=None),
    "a hook": lambda table, module: module.register_forward_hook(lambda *call: None),
    "a hook before": lambda table, module: module.register_forward_pre_hook(lambda *call: None),
    "a forward": lambda table, module: setattr(module, "forward", lambda x: x),
    "a type": lambda table, module: setattr(module, "__class__", Other),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_joined", [False, True])
def test_a_change_is_seen(change, is_joined):
    table, module = {"a": 1}, Module()
    taken = Snapshot([Place(table, "a"), Place(table, "b")], [module])
    if is_joined:
        taken = Snapshot.of_all([Snapshot([], [Module()]), taken])
    assert taken.holds()
    table["c"] = 3  # nobody asked about it
    assert taken.holds()
    CHANGES[change](table, module)
    assert not taken.holds()


def test_a_hook_that_is_removed_leaves_nothing():
    module = Module()
    taken = Snapshot([], [module])
    for register in (
        module.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        hook = register(lambda *call: None)
        assert not taken.holds()
        hook.remove()
        assert taken.holds()


def test_a_kept_snapshot_goes_with_what_it_is_of():
    module = Module()
    module.kept = Snapshot([Place(module._modules, "part")], [Module()])
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()
