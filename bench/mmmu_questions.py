"""Questions of MMMU and MMMU-Pro, read from the parquet files that the hub has.

MMMU (Yue et al., 2024, arXiv:2311.16502) is a folder per subject with a file or more per split;
MMMU-Pro (Yue et al., 2025, arXiv:2409.02813) a folder per setting. What is in a file is told by its
columns:

    mmmu          id, question, options, image_1 to image_7, answer, question_type, ...
    pro-standard  the same without question_type, with subject
    pro-vision    id, image, options, answer, subject; the question stands in the picture
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

SPLITS = ("dev", "validation", "test")
SETTINGS = ("mmmu", "pro-standard", "pro-vision")
MAX_IMAGES = 7
_HIDDEN = ("?", "", None)  # what stands for the answer where it is kept back
_FILE = re.compile(r"(dev|validation|test)(-\d+-of-\d+)?\.parquet")


class DataError(ValueError):
    """The data are not what they should be; the message says which file, and why."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: as in the data.
        subject: of the 30, for instance "Art_Theory".
        setting: of `SETTINGS`.
        text: with `<image 1>` and the like in it; empty in "pro-vision".
        options: in order; empty for an open question.
        images: the files' bytes, by number.
        answers: those that are right, a letter or texts; empty where the answer is kept back.
    """

    id: str
    subject: str
    setting: str
    text: str
    options: tuple[str, ...]
    images: dict[int, bytes]
    answers: tuple[str, ...]

    @property
    def is_choice(self) -> bool:
        """Whether one of the options is to be chosen."""
        return bool(self.options)

    @property
    def letters(self) -> tuple[str, ...]:
        """The names of the options: "A", "B" and so on."""
        return tuple(chr(ord("A") + index) for index in range(len(self.options)))


def read_questions(
    folder: Path, split: str | None = None, subjects: list[str] | None = None
) -> list[Question]:
    """Reads all questions of a split, in the order of the files' names.

    Args:
        folder: holds parquet files, or a folder per subject that does.
        split: of `SPLITS`; None: "validation" where it is there, else "test".
        subjects: only these; None: all.

    Raises:
        DataError: nothing is there, several settings are, or something in a file is wrong.
    """
    files = _find_files(folder)
    if split is None:
        split = "validation" if any(name == "validation" for name, _ in files) else "test"
    chosen = [file for name, file in files if name == split]
    if not chosen:
        there = ", ".join(sorted({name for name, _ in files}))
        raise DataError(f"{folder} has no files of the split {split!r}, but of {there}")
    questions: list[Question] = []
    found: dict[str, Path] = {}
    for file in chosen:
        for question in _read_file(file):
            found.setdefault(question.setting, file.parent)
            questions.append(question)
    if len(found) > 1:
        raise DataError(
            f"{folder} holds several settings, {', '.join(found)}: name the folder of one, for "
            f"instance {next(iter(found.values()))}"
        )
    if subjects:
        missing = set(subjects) - {question.subject for question in questions}
        if missing:
            raise DataError(f"{folder} has no subject {', '.join(sorted(missing))}")
        questions = [question for question in questions if question.subject in subjects]
    if not questions:
        raise DataError(f"{folder} has no questions in the split {split!r}")
    return questions


def _find_files(folder: Path) -> list[tuple[str, Path]]:
    """(split, file) of the parquet files in a folder, or in the folders that it holds."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    for pattern in ("*.parquet", "*/*.parquet"):
        matches = [(_FILE.fullmatch(file.name), file) for file in sorted(folder.glob(pattern))]
        files = [(match[1], file) for match, file in matches if match]
        if files:
            return files
    raise DataError(
        f"{folder} holds no file such as validation-00000-of-00001.parquet, nor does a folder in it"
    )


def _read_file(file: Path) -> Iterator[Question]:
    table = parquet.ParquetFile(file)
    setting = _setting(set(table.schema_arrow.names), file)
    for batch in table.iter_batches(batch_size=16):  # rows hold pictures, so few at a time
        for row in batch.to_pylist():
            try:
                yield _question(row, setting, file)
            except (DataError, SyntaxError, ValueError) as error:
                raise DataError(f"{file}, question {row.get('id')!r}: {error}") from error


def _setting(columns: set[str], file: Path) -> str:
    needed = {"id", "options", "answer"}
    if "image" in columns and "question" not in columns:
        setting, needed = "pro-vision", needed | {"image", "subject"}
    elif "question_type" in columns:
        setting, needed = "mmmu", needed | {"question", "image_1"}
    else:
        setting, needed = "pro-standard", needed | {"question", "image_1", "subject"}
    if missing := needed - columns:
        raise DataError(f"{file} lacks the columns {', '.join(sorted(missing))}")
    return setting


def _question(row: dict[str, Any], setting: str, file: Path) -> Question:
    options = _strings(row["options"])
    if setting == "pro-vision":
        images = {1: _image_bytes(row["image"], file)}
    else:
        numbered = {number: row.get(f"image_{number}") for number in range(1, MAX_IMAGES + 1)}
        images = {n: _image_bytes(image, file) for n, image in numbered.items() if image}
    if setting == "mmmu":
        subject = file.parent.name
        is_choice = row["question_type"] == "multiple-choice"
    else:
        subject, is_choice = row["subject"], True
    if is_choice and not options:
        raise DataError("a multiple-choice question without options")
    return Question(
        id=row["id"],
        subject=subject,
        setting=setting,
        text=row.get("question") or "",
        options=options if is_choice else (),
        images=images,
        answers=_answers(row["answer"], is_choice),
    )


def _answers(answer: Any, is_choice: bool) -> tuple[str, ...]:
    if answer in _HIDDEN:
        return ()
    # An open question may have several right answers, written as a list.
    if not is_choice and str(answer).strip().startswith("["):
        return _strings(answer)
    return (str(answer),)


def _strings(value: Any) -> tuple[str, ...]:
    """A list of texts, which the data hold as a text, in Python's notation."""
    found = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise DataError(f"a list was expected, got {value!r}")
    return tuple(str(item) for item in found)


def _image_bytes(image: dict[str, Any] | None, file: Path) -> bytes:
    """The encoded picture; `image` has `bytes`, or a `path` beside the parquet file."""
    if image and image.get("bytes"):
        return image["bytes"]
    if image and image.get("path") and (file.parent / image["path"]).is_file():
        return (file.parent / image["path"]).read_bytes()
    raise DataError("a picture without bytes")
