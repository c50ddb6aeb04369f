"""A real kernel: the interrupt button, `await` in a cell, and a second run of a cell."""

import os
import signal
import threading
import time

import nbformat
from nbclient import NotebookClient

LOAD = """
import asyncio, pathlib, threading
from sglite import LLM
llm = LLM("demo", kv_cache_tokens=8192)
prompts = ["Count from 3 to 12."] * 4
params = dict(ignore_eos=True, max_new_tokens=400, temperature=1.3, seed=3)
whole = llm.generate(prompts, **params)
print(len(whole))
"""
INTERRUPTED = """
def tell(first=llm.stats()["steps"]):
    while llm.stats()["steps"] < first + 50:
        pass
    pathlib.Path({flag!r}).touch()

threading.Thread(target=tell).start()
llm.generate(prompts, **params)
"""
RESUMED = """
so_far = llm.interrupted
print(0 < len(so_far[0].token_ids) < 400, llm.stats()["running"])
print([out.token_ids for out in llm.resume()] == [out.token_ids for out in whole])
"""
AWAITED = """
print((await llm.agenerate("What is 17 + 25?", temperature=0)).text)
async for chunk in llm.astream("Count from 3 to 12.", temperature=0):
    print(chunk.text, end="")
outputs = await asyncio.gather(*[llm.async_generate(p, temperature=0) for p in prompts])
print(len({out.text for out in outputs}))
"""
RELOADED = """
llm.close()
llm = LLM("demo", kv_cache_tokens=8192)
print(llm.generate("What is 17 + 25?", temperature=0).text)
"""
WATCHED = """
import gc, sys, weakref
gc.collect()
gc.disable()
engine = llm._open.engine
watched = [weakref.ref(part) for part in (engine, engine.runner.model, engine.runner.pool)]
del engine
def failing(*arguments):
    raise MemoryError("planted")
"""
FAILED = """
llm.model.forward = failing
llm.generate(prompts, **params)
"""
DELETED = """
del llm
print(sys.last_value is not None, [reference() for reference in watched])
llm = LLM("demo", kv_cache_tokens=8192)
print(llm.generate("What is 17 + 25?", temperature=0).text)
"""


def test_interrupt_resume_and_await_in_a_kernel(tmp_path):
    flag = tmp_path / "is generating"
    interrupted = INTERRUPTED.format(flag=str(flag))
    errors, texts = run_cells([LOAD, interrupted, RESUMED, AWAITED, RELOADED, RELOADED], flag)
    assert errors == {1: ["KeyboardInterrupt"]}
    assert texts[0] == "4\n"
    assert texts[2] == "True 0\nTrue\n"
    assert "42" in texts[3]
    assert "3 4 5 6 7 8 9 10 11 12" in texts[3]
    assert texts[3].endswith("1\n")
    assert "42" in texts[4]
    assert "42" in texts[5]


def test_del_frees_everything_after_an_interrupt_and_after_an_error(tmp_path):
    """A kernel keeps the last error, with its traceback."""
    flag = tmp_path / "is generating"
    cells = [LOAD, WATCHED, INTERRUPTED.format(flag=str(flag)), DELETED]
    cells += [WATCHED, FAILED, DELETED]
    errors, texts = run_cells(cells, flag)
    assert errors == {2: ["KeyboardInterrupt"], 5: ["GenerationError"]}
    for text in (texts[3], texts[6]):
        assert text.startswith("True [None, None, None]\n")
        assert "42" in text


def run_cells(sources, flag):
    """Runs cells in a kernel, and presses its interrupt button once the file `flag` is there.

    Gives the names of errors by the cell's number, and the texts that all cells printed.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True)

    def press_interrupt():
        while not flag.exists():
            time.sleep(0.002)
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    thread = threading.Thread(target=press_interrupt, daemon=True)
    thread.start()
    client.execute()
    errors = {
        i: [o.ename for o in c.outputs if o.output_type == "error"] for i, c in _cells(client)
    }
    texts = [
        "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
        for _, cell in _cells(client)
    ]
    return {i: names for i, names in errors.items() if names}, texts


def _cells(client):
    return enumerate(client.nb.cells)
