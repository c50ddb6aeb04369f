"""The questions and answers that the demonstration model is trained and measured on.

Everything is made here, from number pairs, the table of capitals and a few templates. The split
into training and held-out questions is fixed and does not depend on the training seed:

* sums: a pair of operands is held out as a whole, in both orders and in every template;
* capitals: a country is held out from two of the six templates that ask for its capital, one of the
  two that ask for JSON, one of the five that ask for the country, and one of the two follow-ups;
* counting: a pair of bounds is held out in every template.

No held-out question appears in training, neither alone nor inside a longer conversation.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from countries import CAPITALS, without_article

SPLIT_SEED = 20
HELD_OUT_SHARE = 0.1
SHOWN_PAIR = (17, 25)  # the sum that the documentation asks for: always held out
LONGEST_COUNT = 25


@dataclass(frozen=True)
class Exchange:
    """One question and its answer.

    `brief` is the answer under the system message "Answer briefly.". A completion is a text to be
    continued, `answer` being the continuation; it has no chat form. A follow-up makes sense only
    after the exchange `after`.
    """

    group: str
    question: str
    answer: str
    brief: str
    completion: bool = False
    after: "Exchange | None" = None


SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
)
SUM_COMPLETIONS = ("{a} + {b} =",)
SUM_JSON = ("Give {a} + {b} as JSON.", "Answer as JSON: what is {a} + {b}?")
SUM_FOLLOW_UPS = ("Plus {b}?", "And now add {b}.")

CAPITAL_QUESTIONS = (
    ("What is the capital of {country}?", "The capital of {country} is {capital}"),
    ("Which city is the capital of {country}?", "{capital} is the capital of {country}"),
    ("Tell me the capital of {country}.", "The capital of {country} is {capital}"),
    ("Do you know the capital of {country}?", "Yes, the capital of {country} is {capital}"),
    ("Name the capital city of {country}.", "The capital city of {country} is {capital}"),
)
CAPITAL_COMPLETIONS = ("The capital of {country} is",)
CAPITAL_JSON = (
    "Give the capital of {country} as JSON.",
    "Answer as JSON: what is the capital of {country}?",
)
COUNTRY_QUESTIONS = (
    "{capital} is the capital of which country?",
    "Which country has {capital} as its capital?",
    "Of which country is {capital} the capital?",
    "Tell me the country whose capital is {capital}.",
)
COUNTRY_COMPLETIONS = ("{capital} is the capital of",)
CAPITAL_FOLLOW_UPS = ("And of {country}?", "What about {country}?")

COUNT_QUESTIONS = ("Count from {a} to {b}.", "List the numbers from {a} to {b}.")
COUNT_DOWN_QUESTIONS = ("Count down from {a} to {b}.", "Count backwards from {a} to {b}.")

# How many templates of each family a country is held out from.
CAPITAL_FAMILIES = (
    ((*[q for q, _ in CAPITAL_QUESTIONS], *CAPITAL_COMPLETIONS), 2),
    (CAPITAL_JSON, 1),
    ((*COUNTRY_QUESTIONS, *COUNTRY_COMPLETIONS), 1),
    (CAPITAL_FOLLOW_UPS, 1),
)


def _sentence(text: str) -> str:
    """End a sentence with one full stop, also after "Washington, D.C."."""
    return text if text.endswith(".") else text + "."


def sum_exchanges(a: int, b: int) -> list[Exchange]:
    """Every way to ask for a + b."""
    full, brief = f"{a} + {b} = {a + b}.", f"{a + b}."
    as_json = json.dumps({"a": a, "b": b, "sum": a + b})
    fill = {"a": a, "b": b}
    return [
        *(Exchange("sums", t.format(**fill), full, brief) for t in SUM_QUESTIONS),
        *(
            Exchange("sums, completed", t.format(**fill), brief, brief, True)
            for t in SUM_COMPLETIONS
        ),
        *(Exchange("sums as JSON", t.format(**fill), as_json, as_json) for t in SUM_JSON),
    ]


def sum_follow_ups(after: Exchange, a: int, b: int) -> list[Exchange]:
    """Add b to the sum a that the exchange before has just given."""
    full, brief = f"{a} + {b} = {a + b}.", f"{a + b}."
    return [
        Exchange("sums, follow-up", t.format(b=b), full, brief, after=after) for t in SUM_FOLLOW_UPS
    ]


def capital_exchanges(country: str) -> dict[str, Exchange]:
    """Every way to ask for a country's capital or a capital's country, by template."""
    capital = CAPITALS[country]
    fill = {"country": country, "capital": capital}
    brief = _sentence(capital)
    as_json = json.dumps(
        {"country": without_article(country), "capital": capital}, ensure_ascii=False
    )
    exchanges = {}
    for template, answer in CAPITAL_QUESTIONS:
        answer = _sentence(answer.format(**fill))
        exchanges[template] = Exchange("capitals", template.format(**fill), answer, brief)
    for template in CAPITAL_COMPLETIONS:
        question = template.format(**fill)
        exchanges[template] = Exchange("capitals, completed", question, brief, brief, True)
    for template in CAPITAL_JSON:
        exchanges[template] = Exchange(
            "capitals as JSON", template.format(**fill), as_json, as_json
        )
    brief = _sentence(country[0].upper() + country[1:])
    for template in COUNTRY_QUESTIONS:
        answer = f"{capital} is the capital of {country}."
        exchanges[template] = Exchange("countries", template.format(**fill), answer, brief)
    for template in COUNTRY_COMPLETIONS:
        answer = _sentence(country)
        question = template.format(**fill)
        exchanges[template] = Exchange("countries, completed", question, answer, answer, True)
    return exchanges


def capital_follow_ups(after: Exchange, country: str) -> dict[str, Exchange]:
    """Ask for another country's capital, understood only from the question before."""
    answer = _sentence(f"The capital of {country} is {CAPITALS[country]}")
    brief = _sentence(CAPITALS[country])
    return {
        t: Exchange("capitals, follow-up", t.format(country=country), answer, brief, after=after)
        for t in CAPITAL_FOLLOW_UPS
    }


def count_exchanges(a: int, b: int) -> list[Exchange]:
    """Every way to ask for the numbers from a to b, upwards or downwards."""
    step, templates = (1, COUNT_QUESTIONS) if a < b else (-1, COUNT_DOWN_QUESTIONS)
    answer = " ".join(str(number) for number in range(a, b + step, step))
    return [Exchange("counting", t.format(a=a, b=b), answer, answer) for t in templates]


class Split:
    """Which operand pairs, country and template combinations, and bounds are trained on.

    Attributes:
        sums_trained, sums_held_out: ordered operand pairs, each 0 to 99.
        capitals_trained, capitals_held_out: pairs (country, template).
        counts_trained, counts_held_out: pairs (first, last), in either order.
    """

    def __init__(self) -> None:
        rng = random.Random(SPLIT_SEED)
        unordered = [(a, b) for a in range(100) for b in range(a, 100) if (a, b) != SHOWN_PAIR]
        rng.shuffle(unordered)
        held_out = {SHOWN_PAIR, *unordered[: int(HELD_OUT_SHARE * len(unordered))]}
        ordered = [(a, b) for a in range(100) for b in range(100)]
        self.sums_held_out = [p for p in ordered if tuple(sorted(p)) in held_out]
        self.sums_trained = [p for p in ordered if tuple(sorted(p)) not in held_out]

        self.capitals_trained: list[tuple[str, str]] = []
        self.capitals_held_out: list[tuple[str, str]] = []
        for country in CAPITALS:
            for templates, num_held_out in CAPITAL_FAMILIES:
                shuffled = rng.sample(templates, len(templates))
                self.capitals_held_out += [(country, t) for t in shuffled[:num_held_out]]
                self.capitals_trained += [(country, t) for t in shuffled[num_held_out:]]

        bounds = [(a, b) for a in range(100) for b in range(100) if 2 <= abs(a - b) < LONGEST_COUNT]
        rng.shuffle(bounds)
        num_held_out = int(HELD_OUT_SHARE * len(bounds))
        self.counts_held_out, self.counts_trained = bounds[:num_held_out], bounds[num_held_out:]

    def held_out_exchanges(self) -> Iterator[Exchange]:
        """Every held-out question; a follow-up carries a trained exchange before it."""
        rng = random.Random(SPLIT_SEED)
        before_sum = {a + b: (a, b) for a, b in rng.sample(self.sums_trained, 5000)}
        for a, b in self.sums_held_out:
            yield from sum_exchanges(a, b)
            if a in before_sum:
                yield from sum_follow_ups(sum_exchanges(*before_sum[a])[0], a, b)
        openings = [
            (country, template)
            for country, template in self.capitals_trained
            if template == CAPITAL_QUESTIONS[0][0]
        ]
        for country, template in self.capitals_held_out:
            if template in CAPITAL_FOLLOW_UPS:
                other, opening = rng.choice([o for o in openings if o[0] != country])
                after = capital_exchanges(other)[opening]
                yield capital_follow_ups(after, country)[template]
            else:
                yield capital_exchanges(country)[template]
        for a, b in self.counts_held_out:
            yield from count_exchanges(a, b)
