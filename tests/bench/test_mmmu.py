"""`bench/mmmu.py`: reading, prompts, parsing, comparing, and a run on drawn questions."""

import importlib
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.stats import binomtest

from bench.mmmu import main
from bench.mmmu_answers import is_right, open_answers, parse
from bench.mmmu_engines import HuggingFace, Reply, Sglite, load_processor
from bench.mmmu_prompts import as_messages, make_prompt, prompt_text
from bench.mmmu_questions import DataError, Question, read_questions
from bench.mmmu_report import (
    DifferentPromptsError,
    Run,
    check_same_prompts,
    mcnemar,
    summarise,
    tables,
)
from tests.vision_checkpoints import RECIPES, make_vision_checkpoint, picture

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "train_demo_vl"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = ("id", "question", "options", "explanation", *(f"image_{n}" for n in range(1, 8)))
MMMU = (*COLUMNS, "img_type", "answer", "topic_difficulty", "question_type", "subfield")


def png(side=28):
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(file, rows, columns=MMMU):
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(c, IMAGE if c.startswith("image") else pa.string()) for c in columns])
    parquet.write_table(pa.Table.from_pylist(rows, schema), file)


def row(**fields):
    return {
        "id": "validation_Art_1",
        "question": "What is in <image 1>?",
        "options": "['a cat', \"a dog's nose\"]",
        "image_1": png(),
        "answer": "B",
        "question_type": "multiple-choice",
        **fields,
    }


def question(options=(), answers=("A",), setting="mmmu", text="What?", images=None):
    return Question("x", "Art", setting, text, tuple(options), images or {}, tuple(answers))


# -- reading ------------------------------------------------------------------------------------


def test_a_folder_per_subject_is_read(tmp_path):
    write(tmp_path / "Art" / "validation-00000-of-00001.parquet", [row()])
    write(tmp_path / "Art" / "test-00000-of-00001.parquet", [row(answer="?")])
    write(
        tmp_path / "Music" / "validation-00000-of-00002.parquet",
        [row(id="m1", question_type="open", options="[]", answer="['1/2', '0.5']")],
    )
    write(
        tmp_path / "Music" / "validation-00001-of-00002.parquet",
        [row(id="m2", image_7=png(56), question_type="open", options="[]", answer="C major")],
    )
    first, second, third = read_questions(tmp_path)
    assert (first.subject, first.setting, first.is_choice) == ("Art", "mmmu", True)
    assert first.options == ("a cat", "a dog's nose")
    assert first.letters == ("A", "B")
    assert first.answers == ("B",)
    assert (second.subject, second.options, second.answers) == ("Music", (), ("1/2", "0.5"))
    assert sorted(third.images) == [1, 7]
    assert third.answers == ("C major",)
    assert [q.id for q in read_questions(tmp_path, subjects=["Music"])] == ["m1", "m2"]
    (hidden,) = read_questions(tmp_path, split="test")
    assert hidden.answers == ()


def test_both_settings_of_pro_are_read(tmp_path):
    standard = (*COLUMNS, "img_type", "answer", "topic_difficulty", "subject")
    ten = repr([str(n) for n in range(10)])
    rows = [row(id="test_Art_1", options=ten, answer="J", subject="Art")]
    write(tmp_path / "standard (10 options)" / "test-00000-of-00001.parquet", rows, standard)
    vision = ("id", "image", "options", "answer", "subject")
    rows = [{"id": "v", "image": png(), "options": ten, "answer": "A", "subject": "Music"}]
    write(tmp_path / "vision" / "test-00000-of-00001.parquet", rows, vision)
    (found,) = read_questions(tmp_path / "standard (10 options)")
    assert (found.setting, found.subject, len(found.options)) == ("pro-standard", "Art", 10)
    (found,) = read_questions(tmp_path / "vision")
    assert (found.setting, found.subject, found.text) == ("pro-vision", "Music", "")
    with pytest.raises(DataError, match="several settings, pro-standard, pro-vision"):
        read_questions(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": "not a list"}, "validation_Art_1"),
        ({"options": "[]"}, "without options"),
        ({"image_1": {"bytes": None, "path": "gone.png"}}, "a picture without bytes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, fields, message):
    write(tmp_path / "Art" / "validation-00000-of-00001.parquet", [row(**fields)])
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path)


def test_missing_columns_splits_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        read_questions(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no file such as"):
        read_questions(tmp_path)
    write(tmp_path / "Art" / "dev-00000-of-00001.parquet", [row()], MMMU[1:])
    with pytest.raises(DataError, match="no files of the split 'test', but of dev"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match="lacks the columns id"):
        read_questions(tmp_path, split="dev")


# -- prompts ------------------------------------------------------------------------------------


def test_prompts_are_worded_as_the_benchmark_does():
    choice = question(["4", "5"], text="How many?")
    assert prompt_text(choice) == (
        "How many?\n(A) 4\n(B) 5\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert prompt_text(question(text="How many?")) == (
        "How many?\nAnswer the question using a single word or phrase."
    )
    assert prompt_text(question(["4", "5"], setting="pro-standard", text="How many?")) == (
        "How many?\nA. 4\nB. 5\nAnswer with the option letter from the given choices directly."
    )
    assert prompt_text(question(["4"], setting="pro-vision")).startswith("<image 1>Answer with")


def test_pictures_stand_where_they_are_mentioned():
    images = {number: bytes([number]) for number in (1, 2, 3)}
    asked = question(
        ["<image 2>", "other"], text="Is <image 1> like <image  1>, or <image 9>?", images=images
    )
    prompt = make_prompt(asked)
    # The third is mentioned nowhere, and comes first; there is no ninth.
    assert prompt[:5] == [b"\3", "Is ", b"\1", " like ", b"\1"]
    assert "".join(p if isinstance(p, str) else f"[{p[0]}]" for p in prompt[5:]).startswith(
        ", or <image 9>?\n(A) [2]\n(B) other\n\nAnswer"
    )


def test_messages_hold_texts_and_pictures():
    (message,) = as_messages(["a ", png(56)["bytes"], " b"])
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image", "text"]
    assert message["content"][1]["image"].size == (56, 56)


# -- answers ------------------------------------------------------------------------------------

FRUIT = ["apple", "ripe banana", "cherry", "date"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("'B'", "B"),
        ("(B) ripe banana", "B"),
        ("B. ripe banana", "B"),
        ("Option C is right", "C"),
        ("It is not (A) but (C)", "C"),
        ("A or D is meant, D I think", "D"),
        ("I think that it is surely the ripe Banana", "B"),
        ("it is an apple I think, no, a cherry", "C"),
        ("ripe banana", None),  # too short to be searched for an option, as in the original
        ("E", None),
        ("", None),
        ("Dates", None),
    ],
)
def test_letters_are_found(response, letter):
    assert parse(question(FRUIT), response) == letter
    assert is_right(question(FRUIT, ["C"]), response) == (letter == "C")


def test_pro_looks_behind_the_word_answer_first():
    pro = question(FRUIT, ["D"], "pro-vision")
    assert parse(pro, "Not (A).\nAnswer: D") == "D"
    assert parse(pro, "Answer: $D") == "D"
    assert parse(question(FRUIT), "Not (A).\nAnswer: D") == "A"


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        ("42", ["42"], True),
        ("The answer is 42.", ["42"], True),
        ("It is 42.004 metres", ["42"], True),
        ("1,234", ["1234"], True),
        ("x = 3\nso y = 4", ["4"], True),
        ("x = 3\nso y = 4", ["3"], False),  # an equals sign counts in the last line
        ("Blue", ["blue"], True),
        ("It is dark blue.", ["blue"], True),
        ("red", ["blue"], False),
        ("5", ["0.5", "5.0"], True),
        ("a", ["a"], True),
        ("banana", ["a"], False),  # a single letter is not looked for inside words
        ("-3", ["3"], False),
        ("", ["3"], False),
    ],
)
def test_open_answers_are_judged(response, answers, right):
    assert is_right(question(answers=answers), response) == right


def test_an_empty_open_answer_is_unparsable():
    assert parse(question(), " . ") is None
    assert open_answers("so it is 7") == {7.0}


# -- the report ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (10, 10), (40, 12)])
def test_mcnemar_is_the_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def run(engine, texts):
    replies = [Reply(text, 10, 2) for text in texts]
    return Run(engine, "1.0", replies, 2.0, [0.1, 0.3, 0.2])


def test_subjects_unparsable_answers_and_differences_are_counted():
    questions = [
        Question("a1", "Art", "mmmu", "", ("x", "y"), {1: b""}, ("A",)),
        Question("a2", "Art", "mmmu", "", ("x", "y"), {1: b"", 2: b""}, ("B",)),
        Question("m1", "Music", "mmmu", "", (), {}, ("7",)),
        Question("m2", "Music", "mmmu", "", (), {}, ()),
    ]
    result = summarise(
        questions, [run("ours", ["A", "?", "7", "3"]), run("hf", ["(A)", "B", "8", "3"])]
    )
    ours = result["engines"]["ours"]
    assert ours["accuracy"] == {
        "Art": {"questions": 2, "right": 1, "unparsable": 1, "hidden": 0},
        "Music": {"questions": 1, "right": 1, "unparsable": 0, "hidden": 1},
        "overall": {"questions": 3, "right": 2, "unparsable": 1, "hidden": 1},
    }
    assert ours["speed"]["first_token_ms"] == pytest.approx(200)
    assert ours["speed"]["questions_per_second"] == 2
    assert ours["speed"]["new_tokens_per_second"] == 4
    comparison = result["comparison"]
    assert comparison["differing"] == ["a2", "m1"]
    assert (comparison["same_answer"], comparison["same_text"]) == (2, 1)
    assert (comparison["only_first_right"], comparison["only_second_right"]) == (1, 1)
    assert comparison["p_value"] == 1.0
    assert comparison["agreement"] == 0.5
    assert comparison["first_token_speedup"] == comparison["throughput_speedup"] == 1.0
    assert result["images"] == 3
    accuracy, speed, paired = tables(json.loads(json.dumps(result)))
    assert accuracy.cells[-1] == ["overall", "3", "2", "66.7", "1", "2", "66.7", "0"]
    assert [len(line) for line in speed.cells] == [3] * 6
    assert paired.cells[0] == ["same answer", "2 of 4, 50.0 %"]
    assert paired.cells[5] == ["time to first token, hf / ours", "1.00"]


def test_speedups_are_above_one_where_the_first_engine_is_ahead():
    questions = [Question("a", "Art", "mmmu", "", (), {}, ("7",))]
    replies = [Reply("7", 10, 2)]
    ours = Run("ours", "1.0", replies, 2.0, [0.1])
    theirs = Run("hf", "1.0", replies, 6.0, [0.4])
    comparison = summarise(questions, [ours, theirs])["comparison"]
    assert comparison["first_token_speedup"] == pytest.approx(4)
    assert comparison["throughput_speedup"] == pytest.approx(3)


def test_prompts_of_other_lengths_are_no_comparison():
    questions = [Question(f"q{n}", "Art", "mmmu", "", (), {}, ("7",)) for n in range(8)]
    same = [Reply("7", 10, 2)] * 8
    check_same_prompts(questions, [Run("a", "", same, 1, [1]), Run("b", "", same, 1, [1])])
    other = [Reply("7", 10 + n % 2, 2) for n in range(8)]
    with pytest.raises(DifferentPromptsError, match=r"4 of 8(.|\n)*q1: a 10, b 11\nq3: a 10, b 11"):
        check_same_prompts(questions, [Run("a", "", same, 1, [1]), Run("b", "", other, 1, [1])])


# -- both engines' prompts ------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}[{{ part.text }}]{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_an_older_llava_counts_the_tokens_of_its_tower(tmp_path, tower, strategy):
    vision = RECIPES["llava" if tower == "clip" else "llava-onevision"].config["vision_config"]
    make_vision_checkpoint(
        tmp_path, "llava", vision_config=vision, vision_feature_select_strategy=strategy
    )
    processor = load_processor(tmp_path)
    found = processor(text="<image>", images=picture(40, 30), return_tensors="pt")
    count = 36 + (tower == "clip") - (strategy == "default")
    assert found["input_ids"].tolist()[0].count(processor.image_token_id) == count


def test_both_take_the_processors_chat_template_before_the_tokenizers(tmp_path):
    make_vision_checkpoint(tmp_path, "llava")
    other = TEMPLATE.replace("[", "and much more: [")
    for file, template in (("chat_template.json", TEMPLATE), ("tokenizer_config.json", other)):
        path = tmp_path / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "chat_template": template}))
    replies = []
    for kind in (Sglite, HuggingFace):
        engine = kind(str(tmp_path), "float32", "cpu", 2)
        replies.append(list(engine.answer([[png(56)["bytes"], "what?"], ["who?"]], 4)))
        engine.close()
    assert replies[0] == replies[1]


# -- a run on drawn questions, with the checkpoint that ships --------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in the layout of the hub's two, with 6 questions of each kind."""
    folder = tmp_path_factory.mktemp("drawn")
    names = ("mmmu_set", "questions", "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        writer = importlib.import_module("mmmu_set")
        writer.write_mmmu(folder / "MMMU", 6)
        writer.write_mmmu_pro(folder / "MMMU_Pro", 3)
        for name in names:
            patch.delitem(sys.modules, name)
    return folder


def measure(tmp_path, *arguments):
    output = tmp_path / "result.json"
    words = ["--model", "demo-vl", "--max-new-tokens", "8", "--first-tokens", "2"]
    main([*words, "--output", str(output), *map(str, arguments)])
    assert output.with_suffix(".md").read_text().startswith("# demo-vl, ")
    return json.loads(output.read_text())


def test_both_engines_agree_on_drawn_questions(drawn, tmp_path, capsys):
    # Greedy answers of the same weights in float32: no near tie is decided by rounding.
    words = ("--engine", "both", "--dtype", "float32")
    result = measure(tmp_path, "--data", drawn / "MMMU", *words)
    assert result["questions"] == 24
    assert result["images"] > 24
    assert list(result["engines"]) == ["sglite", "hf"]
    for engine in result["engines"].values():
        assert sorted(engine["accuracy"]) == ["Colour", "Count", "Number", "Shape", "overall"]
        assert engine["accuracy"]["overall"]["right"] >= 21
        assert engine["speed"]["prompt_tokens"] > 24 * 40
    comparison = result["comparison"]
    assert (comparison["same_answer"], comparison["differing"]) == (24, [])
    assert comparison["first_token_speedup"] > 0
    assert comparison["throughput_speedup"] > 0
    printed = capsys.readouterr().out
    for words in ("24 of 24, 100.0 %", "McNemar", "time to first token, hf / sglite"):
        assert words in printed
    ours, theirs = (engine["speed"] for engine in result["engines"].values())
    assert ours["prompt_tokens"] == theirs["prompt_tokens"]


def test_a_run_whose_prompts_differ_fails(drawn, tmp_path, monkeypatch):
    def other(self, prompts, max_new_tokens):
        return [Reply("A", 7, 1)] * len(prompts)

    monkeypatch.setattr(HuggingFace, "answer", other)
    with pytest.raises(SystemExit, match=r"NO COMPARISON: 2 of 2 (.|\n)*hf 7"):
        measure(tmp_path, "--data", drawn / "MMMU", "--engine", "both", "--limit", "2")
    assert (tmp_path / "result.json").exists()


def test_ten_options_are_read_and_pictures_of_questions_are_shown(drawn, tmp_path):
    result = measure(tmp_path, "--data", drawn / "MMMU_Pro" / "standard (10 options)")
    assert (result["setting"], result["questions"]) == ("pro-standard", 12)
    assert result["engines"]["sglite"]["accuracy"]["overall"]["right"] >= 9
    result = measure(tmp_path, "--data", drawn / "MMMU_Pro" / "vision", "--limit", "4")
    assert (result["setting"], result["questions"], result["images"]) == ("pro-vision", 4, 4)


def test_hidden_answers_are_not_scored(drawn, tmp_path, capsys):
    result = measure(tmp_path, "--data", drawn / "MMMU", "--split", "test", "--subject", "Shape")
    overall = result["engines"]["sglite"]["accuracy"]["overall"]
    assert overall == {"questions": 0, "right": 0, "unparsable": 0, "hidden": 5}
    assert "5 questions have no answer in the data" in capsys.readouterr().out


def test_wrong_arguments_are_named(drawn, tmp_path):
    with pytest.raises(SystemExit, match="several settings"):
        main(["--model", "demo-vl", "--data", str(drawn / "MMMU_Pro")])
    with pytest.raises(SystemExit, match="has no subject Art"):
        main(["--model", "demo-vl", "--data", str(drawn / "MMMU"), "--subject", "Art"])
