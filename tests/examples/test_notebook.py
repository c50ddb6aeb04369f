"""The example notebook, run in a real kernel."""

import nbformat
from nbclient import NotebookClient


def run(notebook):
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return ["".join(o.get("text", "") for o in c.outputs) for c in notebook.cells if "outputs" in c]


def test_the_notebook_runs_with_a_model_from_a_cell(pytestconfig):
    path = pytestconfig.rootpath / "examples" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    # Cells are run twice in practice: so is the one that registers the model here.
    (registering,) = [i for i, cell in enumerate(notebook.cells) if "@register" in cell.source]
    notebook.cells.insert(
        registering, nbformat.v4.new_code_cell(notebook.cells[registering].source)
    )
    texts = run(notebook)
    assert any("42" in text and "Paris" in text for text in texts)
    assert any("4 5 6 7 8 9" in text for text in texts)
    (compared,) = [text for text in texts if text.count("42") == 2]
    plain, wrapped = (float(line.split()[-1]) for line in compared.strip().splitlines())
    assert wrapped < plain  # square roots bring the logits closer together
