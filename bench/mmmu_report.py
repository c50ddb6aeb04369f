"""From what engines answered to accuracies, a paired comparison, and tables."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

from bench.mmmu_answers import is_right, parse
from bench.mmmu_engines import Reply
from bench.mmmu_questions import Question
from bench.report import Rows

#: Of questions that are named in a message or a table.
_SHOWN = 5


class DifferentPromptsError(Exception):
    """Two engines were not asked the same."""


@dataclass(frozen=True)
class Run:
    """One engine's answers to all questions.

    Attributes:
        engine, about: its name and version.
        replies: one for each question.
        seconds: for all of them together.
        first_token_seconds: of prompts asked one by one.
    """

    engine: str
    about: str
    replies: list[Reply]
    seconds: float
    first_token_seconds: list[float]


def judge(questions: list[Question], run: Run) -> list[dict[str, Any]]:
    """Per question what was answered; `right` is None where the answer is kept back."""
    return [
        {
            "id": question.id,
            "subject": question.subject,
            "response": reply.text,
            "answer": parse(question, reply.text),
            "right": is_right(question, reply.text) if question.answers else None,
        }
        for question, reply in zip(questions, run.replies, strict=True)
    ]


def accuracies(judged: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Per subject, and in all ("overall"): questions scored, right, and unparsable."""
    counts: dict[str, Counter] = {}
    for row in judged:
        for name in (row["subject"], "overall"):
            count = counts.setdefault(name, Counter(questions=0, right=0, unparsable=0, hidden=0))
            if row["right"] is None:
                count["hidden"] += 1
                continue
            count["questions"] += 1
            count["right"] += row["right"]
            count["unparsable"] += row["answer"] is None
    overall = counts.pop("overall")
    return {**{name: dict(counts[name]) for name in sorted(counts)}, "overall": dict(overall)}


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Two engines on the same questions, paired.

    `p_value` is McNemar's exact test: were both equally good, how likely it is that the questions
    that only one of them has right fall so unevenly, or more.
    """
    pairs = list(zip(ours, theirs, strict=True))
    only_ours = sum(bool(a["right"]) and b["right"] is False for a, b in pairs)
    only_theirs = sum(bool(b["right"]) and a["right"] is False for a, b in pairs)
    differing = [a["id"] for a, b in pairs if a["answer"] != b["answer"]]
    return {
        "questions": len(pairs),
        "agreement": (len(pairs) - len(differing)) / len(pairs),
        "same_text": sum(a["response"] == b["response"] for a, b in pairs),
        "same_answer": len(pairs) - len(differing),
        "differing": differing,
        "only_first_right": only_ours,
        "only_second_right": only_theirs,
        "p_value": mcnemar(only_ours, only_theirs),
    }


def mcnemar(first: int, second: int) -> float:
    """The two-sided p-value of `first` against `second` under a fair coin (McNemar, 1947)."""
    n = first + second
    tail = sum(comb(n, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


def summarise(questions: list[Question], runs: list[Run]) -> dict[str, Any]:
    """Everything that is reported, as JSON can hold it."""
    judged = {run.engine: judge(questions, run) for run in runs}
    result: dict[str, Any] = {
        "setting": questions[0].setting,
        "questions": len(questions),
        "images": sum(len(question.images) for question in questions),
        "engines": {
            run.engine: {
                "about": run.about,
                "accuracy": accuracies(judged[run.engine]),
                "speed": _speed(run),
                "answers": judged[run.engine],
            }
            for run in runs
        },
    }
    if len(runs) == 2:
        result["comparison"] = compare(*judged.values()) | _ratios(result["engines"].values())
    return result


def _ratios(engines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast the first engine is as the second; above 1 it is ahead."""
    ours, theirs = (engine["speed"] for engine in engines)
    return {
        "first_token_speedup": theirs["first_token_ms"] / ours["first_token_ms"],
        "throughput_speedup": ours["questions_per_second"] / theirs["questions_per_second"],
    }


def check_same_prompts(questions: list[Question], runs: list[Run]) -> None:
    """Whether two engines were asked the same: prompts must have as many tokens with both.

    Raises:
        DifferentPromptsError: naming questions, and how many tokens they were to each engine.
    """
    first, second = runs
    rows = zip(questions, first.replies, second.replies, strict=True)
    found = [
        f"{question.id}: {first.engine} {a.prompt_tokens}, {second.engine} {b.prompt_tokens}"
        for question, a, b in rows
        if a.prompt_tokens != b.prompt_tokens
    ]
    if found:
        more = f"\nand {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DifferentPromptsError(
            f"{len(found)} of {len(questions)} prompts have other numbers of tokens with "
            f"{first.engine} than with {second.engine}, so that the two were not asked the same "
            f"(another chat template, or another size of pictures):\n"
            + "\n".join(found[:_SHOWN])
            + more
        )


def _speed(run: Run) -> dict[str, float]:
    new = sum(reply.new_tokens for reply in run.replies)
    prompt = sum(reply.prompt_tokens for reply in run.replies)
    return {
        "first_token_ms": 1000 * median(run.first_token_seconds),
        "first_token_ms_max": 1000 * max(run.first_token_seconds),
        "first_tokens": len(run.first_token_seconds),
        "seconds": run.seconds,
        "questions_per_second": len(run.replies) / run.seconds,
        "prompt_tokens_per_second": prompt / run.seconds,
        "new_tokens_per_second": new / run.seconds,
        "prompt_tokens": prompt,
        "new_tokens": new,
    }


def tables(result: dict[str, Any]) -> list[Rows]:
    """Accuracy by subject, speed, and where two engines differ."""
    engines = result["engines"]
    found = [_accuracy_table(engines), _speed_table(engines)]
    if "comparison" in result:
        found.append(_comparison_table(list(engines), result["comparison"]))
    return found


def _accuracy_table(engines: dict[str, Any]) -> Rows:
    by_engine = {name: engine["accuracy"] for name, engine in engines.items()}
    columns = ["subject", "questions"]
    for name in engines:
        columns += [f"{name}, right", "%", "unparsable"]
    cells = []
    for subject, first in next(iter(by_engine.values())).items():
        row = [subject, str(first["questions"])]
        for accuracy in by_engine.values():
            count = accuracy[subject]
            share = f"{100 * count['right'] / count['questions']:.1f}" if count["questions"] else ""
            row += [str(count["right"]), share, str(count["unparsable"])]
        cells.append(row)
    return Rows("Accuracy", columns, cells)


def _speed_table(engines: dict[str, Any]) -> Rows:
    speeds = {name: engine["speed"] for name, engine in engines.items()}
    lines = (
        ("first token, ms, median", "first_token_ms", 1),
        ("first token, ms, longest", "first_token_ms_max", 1),
        ("all questions, s", "seconds", 2),
        ("questions/s", "questions_per_second", 2),
        ("prompt tokens/s", "prompt_tokens_per_second", 0),
        ("new tokens/s", "new_tokens_per_second", 1),
    )
    cells = [
        [title, *(f"{speed[key]:,.{digits}f}" for speed in speeds.values())]
        for title, key, digits in lines
    ]
    return Rows("Speed", ["", *speeds], cells)


def _comparison_table(names: list[str], comparison: dict[str, Any]) -> Rows:
    n = comparison["questions"]
    first, second = names
    share = f"{100 * comparison['agreement']:.1f} %"
    cells = [
        ["same answer", f"{comparison['same_answer']} of {n}, {share}"],
        ["same text", f"{comparison['same_text']} of {n}"],
        [f"only {first} right", str(comparison["only_first_right"])],
        [f"only {second} right", str(comparison["only_second_right"])],
        ["McNemar's exact test, p", f"{comparison['p_value']:.3g}"],
        [
            f"time to first token, {second} / {first}",
            f"{comparison['first_token_speedup']:.2f}",
        ],
        [f"questions/s, {first} / {second}", f"{comparison['throughput_speedup']:.2f}"],
    ]
    if comparison["differing"]:
        shown = ", ".join(comparison["differing"][:_SHOWN])
        more = len(comparison["differing"]) - _SHOWN
        cells.append(["differing", shown + (f" and {more} more" if more > 0 else "")])
    return Rows("Question by question", ["", f"{first} and {second}"], cells)
