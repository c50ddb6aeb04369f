"""lm-evaluation-harness over sglite, against the harness's own Hugging Face model in float32."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import sglite
from sglite.tools.cli import main
from sglite.tools.evaluations import SGLiteLM

DEMO = Path(sglite.__file__).parent / "checkpoints" / "demo"

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Kenya": "Nairobi",
    "Cuba": "Havana",
}

# One task of each kind. The third has no context, so that texts start at the tokenizer's BOS.
TASKS = {
    "capitals": """
        output_type: multiple_choice
        doc_to_text: "The capital of {{country}} is"
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "sums": """
        output_type: generate_until
        doc_to_text: "What is {{a}} + {{b}}?"
        doc_to_target: "{{total}}"
        generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
        filter_list:
          - name: number
            filter:
              - {function: regex, regex_pattern: "(\\\\d+)\\\\D*$"}
              - {function: take_first}
        metric_list: [{metric: exact_match}]
    """,
    "texts": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
    """,
}


def documents():
    names = list(CAPITALS.values())
    capitals = [
        {
            "country": country,
            # Of different lengths in tokens; every third answer is marked wrongly, as a model
            # that is always right would show little.
            "choices": [f" {names[(i + j) % len(names)]}" for j in range(4)],
            "answer": 1 if i % 3 == 2 else 0,
        }
        for i, country in enumerate(CAPITALS)
    ]
    sums = [{"a": a, "b": 41 - a, "total": 41 + (a % 5 == 0)} for a in range(3, 9)]
    texts = [
        {"text": "What is 17 + 25? 17 + 25 is 42. " * n + "The capital of Cuba is Oslo."}
        for n in (0, 1, 4)
    ]
    return {"capitals": capitals, "sums": sums, "texts": texts}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, records in documents().items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        lines = [line[8:] for line in TASKS[name].strip("\n").splitlines()]
        dataset = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        lines += [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {json.dumps(dataset)}"]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, "test_split: test"]))
    return folder


@pytest.fixture(scope="module")
def ours():
    model = SGLiteLM("demo", dtype="float32", device="cpu")
    yield model
    model.llm.close()


@pytest.fixture(scope="module")
def theirs():
    return HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=4)


def results(model, task_folder, **arguments):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    loaded = manager.load(list(TASKS))
    found = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True, **arguments)
    scores = {
        f"{task}.{metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    answers = [sample["filtered_resps"] for sample in found["samples"]["sums"]]
    return scores, answers


def instances(kind, *arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_score_as_with_the_harness_own_model(ours, theirs, task_folder, chat):
    arguments = {"apply_chat_template": chat}
    expected, expected_answers = results(theirs, task_folder, **arguments)
    scores, answers = results(ours, task_folder, **arguments)
    assert answers == expected_answers
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, rel=1e-4)
    if not chat:
        assert 0.5 < scores["capitals.acc,none"] < 1
        assert 0.5 < scores["sums.exact_match,number"] < 1


def test_log_likelihoods(ours, theirs):
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " Rome, I think"),
        ("What is 17 + 25? ", "42"),  # the space belongs to the continuation
        ("", "The capital of France is Paris."),
        ("<|bos|>The capital of Peru is", " Lima"),  # no second BOS
        ("What is 17 + 25? 17 + 25 is 42", ".<|end|>"),
    ]
    requests = instances("loglikelihood", *pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert {one[1] for one in found} == {True, False}


def test_choices_share_one_prompt(ours):
    before = ours.llm.stats()["prompt_tokens"], ours.llm.stats()["cached_tokens"]
    context = "Which of these is the capital of Kenya: A, B, C or D? The answer is"
    pairs = [(context, f" {letter}") for letter in "ABCD"]
    first = [ours.tok_encode(context + choice)[:-1] for _, choice in pairs]
    assert all(ids == first[0] for ids in first)
    ours.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    after = ours.llm.stats()["prompt_tokens"], ours.llm.stats()["cached_tokens"]
    assert after[0] - before[0] == 4 * len(first[0])
    assert after[1] - before[1] >= 3 * (len(first[0]) - 1)


@pytest.fixture(scope="module")
def short(ours):
    """Both models with a short context; sglite counts the last token, which is never read."""
    oracle = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=4, max_length=64)
    return SGLiteLM(ours.llm, max_length=65), oracle


def test_rolling_log_likelihoods_in_windows(short):
    model, oracle = short
    texts = [("What is 17 + 25? 17 + 25 is 42. " * n,) for n in (1, 3, 20)]
    requests = instances("loglikelihood_rolling", *texts)
    assert len(model.tok_encode(texts[-1][0])) > 3 * 64
    expected = oracle.loglikelihood_rolling(requests, disable_tqdm=True)
    assert model.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


def test_contexts_that_are_too_long_lose_their_beginning(short, caplog):
    model, oracle = short
    pair = ("What is 17 + 25? " * 20 + "The capital of Japan is", " Tokyo, and not Rome")
    (expected,) = oracle.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)
    (found,) = model.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)
    assert found[0] == pytest.approx(expected[0], abs=1e-3)
    assert "1 of 1 prompts" in caplog.text


def test_generation_ends_where_the_task_says(ours, theirs):
    count = "Count from 3 to 12."
    requests = instances(
        "generate_until",
        (count, {"until": ["9"], "max_gen_toks": 40}),
        (count, {"until": "6", "max_gen_toks": 40}),
        (count, {"max_gen_toks": 5}),
        (count, {"until": ["<|end|>", "<|user|>"], "max_gen_toks": 64}),
        ("What is 17 + 25? " * 150, {"until": ["\n"], "max_gen_toks": 8, "num_beams": 1}),
    )
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected
    assert len(set(expected)) == 5
    assert "9" not in expected[0]
    assert "8" in expected[0]


def test_a_conversation_becomes_text_by_the_template(ours, theirs):
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 17 + 25?"},
    ]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    prefilled = [*history, {"role": "assistant", "content": "It is"}]
    found = ours.apply_chat_template(prefilled, add_generation_prompt=False)
    assert found == theirs.apply_chat_template(prefilled, add_generation_prompt=False)
    assert found.endswith("It is")
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_what_is_refused(ours):
    with pytest.raises(sglite.InvalidRequestError, match="no token"):
        ours._loglikelihood_tokens([("a pair", [1], [])])
    with pytest.raises(sglite.InvalidRequestError, match="do not fit"):
        ours._loglikelihood_tokens([("a pair", [1], [5] * ours.max_length)])
    with pytest.raises(sglite.InvalidRequestError, match="beam search"):
        ours.generate_until(instances("generate_until", ("Hi", {"num_beams": 4})))
    with pytest.raises(sglite.InvalidRequestError, match="no room"):
        ours.generate_until(instances("generate_until", ("Hi", {"max_gen_toks": 5000})))
    with pytest.raises(sglite.ConfigError, match="dtype"):
        SGLiteLM(ours.llm, dtype="float32")
    with pytest.raises(sglite.ConfigError, match="max_length"):
        SGLiteLM(ours.llm, max_length=100_000)


def test_the_command_line_hands_over_to_the_harness(task_folder, tmp_path, capsys, monkeypatch):
    # It asks pip, git and the processor for the versions of everything: seconds of no interest.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    before = list(sys.argv)
    arguments = ["--tasks", "capitals,sums", "--model", "demo", "--llm", "dtype=float32"]
    arguments += ["--llm", "device=cpu", "--include_path", str(task_folder), "--limit", "4"]
    assert main(["eval", *arguments, "--output_path", str(tmp_path / "out")]) == 0
    assert sys.argv == before
    table = capsys.readouterr().out
    assert "capitals" in table
    assert "exact_match" in table
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    assert written["n-samples"]["sums"]["effective"] == 4
    assert written["config"]["model"] == "sglite"
    assert written["config"]["model_dtype"] == "float32"


def test_without_the_harness_the_error_says_what_to_install():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lm_eval' else find(name, *rest)\n"
        "from sglite.tools.cli import main\n"
        "sys.exit(main(['eval', '--tasks', 'gsm8k']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert 'pip install "sglite[eval]"' in done.stderr
    assert "Traceback" not in done.stderr
