"""Write drawn pictures and questions in the layout of MMMU and MMMU-Pro, for `bench/mmmu.py`.

    python examples/train_demo_vl/mmmu_set.py --out DIR --questions 200

DIR/MMMU holds a folder per kind of question, DIR/MMMU_Pro one per setting; the pictures are none
that the model was trained on. In the last setting the question stands in the picture, in letters
that it never learned to read.
"""

import argparse
import ast
import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from pictures import SIZES, draw, random_picture
from PIL import Image, ImageDraw, ImageFont
from pyarrow import parquet
from questions import KINDS, Question, questions_about

MAX_IMAGES = 7
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
_LETTERS = "ABCDEFGHIJ"


def write_mmmu(folder: Path, num_questions: int, seed: int = 0) -> None:
    """Writes `num_questions` validation questions for each kind, a few for dev, and hidden ones."""
    names = ["id", "question", "options", "explanation"]
    names += [f"image_{number}" for number in range(1, MAX_IMAGES + 1)]
    names += ["img_type", "answer", "topic_difficulty", "question_type", "subfield"]
    for kind in KINDS:
        subject = kind.capitalize()
        for split, count in (("dev", 5), ("validation", num_questions), ("test", 5)):
            rng = random.Random(f"{seed}/{kind}/{split}")
            rows = []
            for number in range(1, count + 1):
                row = _row(rng, kind, is_choice=rng.random() < 0.7, num_options=4)
                row |= {"id": f"{split}_{subject}_{number}", "subfield": subject}
                if split == "test":  # kept back, as in the original
                    row["answer"] = "?"
                rows.append(row)
            _write(folder / subject / f"{split}-00000-of-00001.parquet", names, rows)


def write_mmmu_pro(folder: Path, num_questions: int, seed: int = 0) -> None:
    """Writes `num_questions` for each kind in each of the two settings."""
    names = ["id", "question", "options", "explanation"]
    names += [f"image_{number}" for number in range(1, MAX_IMAGES + 1)]
    names += ["img_type", "answer", "topic_difficulty", "subject"]
    rng = random.Random(f"{seed}/pro")
    standard, vision = [], []
    for kind in KINDS:
        for number in range(1, num_questions + 1):
            row = _row(rng, kind, is_choice=True, num_options=10)
            row |= {"id": f"test_{kind.capitalize()}_{number}", "subject": kind.capitalize()}
            standard.append(row)
            seen = {name: row[name] for name in ("id", "options", "answer", "subject")}
            vision.append({**seen, "image": _as_value(_with_question(row))})
    _write(folder / "standard (10 options)" / "test-00000-of-00001.parquet", names, standard)
    names = ["id", "image", "options", "answer", "subject"]
    _write(folder / "vision" / "test-00000-of-00001.parquet", names, vision)


def _row(rng: random.Random, kind: str, *, is_choice: bool, num_options: int) -> dict[str, Any]:
    """One question; most have a picture, some several, which may stand anywhere in it."""
    count = rng.choices((1, 2, 3, rng.randint(4, MAX_IMAGES)), (0.85, 0.08, 0.05, 0.02))[0]
    size = rng.choice(SIZES) if count == 1 else SIZES[0]
    while True:
        pictures = [random_picture(rng, size) for _ in range(count)]
        which = rng.randrange(count)
        asked = questions_about(pictures[which]).get(kind)
        if asked:
            break
    question = rng.choice(asked)
    text = _worded(rng, question, which, count)
    row: dict[str, Any] = {
        "question": text,
        "options": "[]",
        "explanation": "",
        "img_type": "['Diagrams']",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if is_choice else "open",
        "answer": question.word,
    }
    for number, picture in enumerate(pictures, 1):
        row[f"image_{number}"] = _as_value(draw(picture))
    if is_choice:
        options, right = question.options(rng, num_options)
        row |= {"options": repr(options), "answer": _LETTERS[right]}
    return row


def _worded(rng: random.Random, question: Question, which: int, count: int) -> str:
    template = rng.choice(question.templates)
    if count > 1:
        images = "".join(f"<image {number}>" for number in range(1, count + 1))
        return images + template.format(where=f" in the {_ORDINALS[which]} picture")
    draw = rng.random()
    if draw < 0.2:
        return template.format(where=" in <image 1>")
    return ("<image 1>" if draw < 0.9 else "<image 1>\n") + template.format(where="")


def _with_question(row: dict[str, Any]) -> Image.Image:
    """A picture of the question, its options and its pictures, as on a screen."""
    options = [
        f"{a}. {text}" for a, text in zip(_LETTERS, ast.literal_eval(row["options"]), strict=True)
    ]
    page = Image.new("RGB", (560, 400), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default()
    canvas.multiline_text((12, 130), "\n".join([row["question"], *options]), "black", font=font)
    left = 12
    for number in range(1, MAX_IMAGES + 1):
        if image := row.get(f"image_{number}"):
            shown = Image.open(io.BytesIO(image["bytes"]))
            page.paste(shown, (left, 8))
            left += shown.width + 4
    return page


def _as_value(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _write(file: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(n, _IMAGE if n.startswith("image") else pa.string()) for n in names])
    parquet.write_table(pa.Table.from_pylist(rows, schema), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=50, help="of each kind and setting")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_mmmu(arguments.out / "MMMU", arguments.questions, arguments.seed)
    write_mmmu_pro(arguments.out / "MMMU_Pro", arguments.questions, arguments.seed)


if __name__ == "__main__":
    main()
