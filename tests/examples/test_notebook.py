"""The example notebook, run in a real kernel."""

import nbformat
from nbclient import NotebookClient


def run(notebook):
    """What the cells printed, one text for each."""
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return ["".join(o.get("text", "") for o in c.get("outputs", ())) for c in notebook.cells]


def cell_with(notebook, source):
    """The number of the only cell whose source holds this."""
    (index,) = (i for i, cell in enumerate(notebook.cells) if source in cell.source)
    return index


def test_the_notebook_runs_with_a_model_from_a_cell(pytestconfig):
    path = pytestconfig.rootpath / "examples" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    # Cells are run twice in practice: so is the one that registers the model here.
    registering = cell_with(notebook, "@register")
    again = nbformat.v4.new_code_cell(notebook.cells[registering].source)
    notebook.cells.insert(registering, again)
    texts = run(notebook)
    answers = texts[cell_with(notebook, "outputs = llm.generate")]
    assert "42" in answers
    assert "Paris" in answers
    assert "4 5 6 7 8 9" in texts[cell_with(notebook, "llm.stream")]
    compared = texts[cell_with(notebook, "wrapped_output")].strip().splitlines()
    assert all("42" in line for line in compared)
    plain, wrapped = (float(line.split()[-1]) for line in compared)
    assert wrapped < plain  # square roots bring the logits closer together
