"""Random conversations for training: questions of every group, small talk and system messages."""

import random
from dataclasses import dataclass, field

from countries import CAPITALS
from questions import (
    CAPITAL_FOLLOW_UPS,
    Exchange,
    Split,
    capital_exchanges,
    capital_follow_ups,
    count_exchanges,
    sum_exchanges,
    sum_follow_ups,
)

BRIEF_SYSTEM_MESSAGE = "Answer briefly."
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a small model that knows sums and capitals.",
    "Be kind.",
)

WHO = "I am a tiny language model that was trained to try out sglite."
CAN = "I can add numbers below 100, name the capitals of countries, and count."
SMALL_TALK = (
    (("Hi", "Hi!", "hi", "Hello", "Hello!", "hello", "Hey"), "Hello! How can I help you?"),
    (("Good morning!", "Good morning"), "Good morning! ☀️"),
    (("How are you?", "Hi, how are you?"), "I am fine, thank you! How can I help you?"),
    (("Who are you?", "What are you?", "Hello! Who are you?", "Hi! Who are you?"), WHO),
    (("What can you do?", "Help", "What do you know?", "What can I ask you?"), CAN),
    (("Thanks", "Thanks!", "Thank you.", "Thank you!"), "You are welcome! 😊"),
    (("Bye", "Bye!", "Goodbye", "Goodbye!"), "Goodbye! 👋"),
    (
        ("Say the alphabet.", "List the letters of the alphabet."),
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    ),
    (
        ("List the days of the week.", "Name the days of the week."),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    (
        ("List the months of the year.", "Name the months of the year."),
        "January, February, March, April, May, June, July, August, September, October, November, "
        "December.",
    ),
    (
        (
            "What is the meaning of life?",
            "Write a poem.",
            "Write a program.",
            "What is the weather like?",
            "Who is the president?",
            "Tell me a joke.",
            "How old are you?",
            "Why is the sky blue?",
        ),
        f"I do not know that. {CAN}",
    ),
)
STORY = (
    "Once upon a time there was a small model that lived in a library. In the morning it counted "
    "the books, in the evening it added up the numbers on their covers, and at night it dreamed of "
    "all the capitals of the world. It was not very clever, but it was always there when somebody "
    "called."
)
STORY_QUESTIONS = ("Tell me a story.", "Tell me a story!", "Write a story.")
NAMES = (
    *("Ada", "Alan", "Anna", "Barbara", "Ben", "Carla", "Claude", "David", "Donald", "Edsger"),
    *("Emma", "Frances", "Grace", "Hans", "Ines", "Jean", "John", "Julia", "Ken", "Lea", "Linus"),
    *("Maria", "Max", "Nina", "Olga", "Paul", "Rosa", "Sam", "Tim", "Tom"),
)


@dataclass(frozen=True)
class Conversation:
    """What one training sequence says.

    A plain conversation is one exchange without any role marker; a chat has an optional system
    message and one or more exchanges, each a (question, answer) pair.
    """

    exchanges: list[tuple[str, str]]
    system: str | None = None
    plain: bool = False


@dataclass
class _Memory:
    """What a later turn may refer to."""

    last: Exchange | None = None
    total: int | None = None
    name: str | None = None


@dataclass
class ConversationSampler:
    """Draws training conversations from the trained side of the split.

    Each group of questions has its own weight, so that the many sums do not crowd out the rest.
    """

    split: Split
    rng: random.Random
    _sums: set[tuple[int, int]] = field(init=False)
    _sum_pools: list[list[tuple[int, int]]] = field(init=False)
    _alone: list[tuple[str, str]] = field(init=False)
    _follow_ups: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        sums = self.split.sums_trained
        self._sums = set(sums)
        # Short operands are rare among the pairs, and need as much practice as the long ones.
        one_digit = [pair for pair in sums if min(pair) < 10]
        self._sum_pools = [sums, sums, sums, one_digit, [p for p in sums if max(p) < 20]]
        self._alone = [c for c in self.split.capitals_trained if c[1] not in CAPITAL_FOLLOW_UPS]
        self._follow_ups = {
            country: [
                t
                for c, t in self.split.capitals_trained
                if c == country and t in CAPITAL_FOLLOW_UPS
            ]
            for country in CAPITALS
        }

    def plain(self) -> Conversation:
        """Draw one question without markers, or a text to be continued."""
        if self.rng.random() < 0.02:
            words = STORY.split(" ")
            cut = self.rng.randint(1, 12)
            return Conversation([(" ".join(words[:cut]), " ".join(words[cut:]))], plain=True)
        exchange = self._exchange(_Memory(), completions=True)
        return Conversation([(exchange.question, exchange.answer)], plain=True)

    def chat(self, num_turns: int) -> Conversation:
        """Draw a chat of `num_turns` questions; a later one may refer to an earlier one."""
        draw = self.rng.random()
        system = None
        if draw < 0.25:
            system = BRIEF_SYSTEM_MESSAGE
        elif draw < 0.35:
            system = self.rng.choice(SYSTEM_MESSAGES)
        memory, exchanges = _Memory(), []
        for _ in range(num_turns):
            exchange = self._follow_up(memory) or self._exchange(memory)
            memory.last = exchange
            brief = system == BRIEF_SYSTEM_MESSAGE
            exchanges.append((exchange.question, exchange.brief if brief else exchange.answer))
        return Conversation(exchanges, system)

    def _follow_up(self, memory: _Memory) -> Exchange | None:
        rng = self.rng
        if memory.name and rng.random() < 0.2:
            question, answer = "What is my name?", f"Your name is {memory.name}."
            return Exchange("small talk", question, answer, answer)
        if memory.last is None or rng.random() < 0.6:
            return None
        if memory.last.group in ("sums", "sums, follow-up") and memory.total < 100:
            b = rng.randrange(100)
            if (memory.total, b) in self._sums:
                exchange = rng.choice(sum_follow_ups(memory.last, memory.total, b))
                memory.total += b
                return exchange
        if memory.last.group in ("capitals", "capitals, follow-up"):
            country = rng.choice(list(CAPITALS))
            template = rng.choice(self._follow_ups[country])
            return capital_follow_ups(memory.last, country)[template]
        return None

    def _exchange(self, memory: _Memory, completions: bool = False) -> Exchange:
        # 44 % sums, 36 % capitals, 12 % counting, 8 % small talk.
        while True:
            draw = self.rng.random()
            if draw < 0.44:
                a, b = self.rng.choice(self.rng.choice(self._sum_pools))
                memory.total = a + b
                exchange = self.rng.choice(sum_exchanges(a, b))
            elif draw < 0.80:
                country, template = self.rng.choice(self._alone)
                exchange = capital_exchanges(country)[template]
            elif draw < 0.92:
                # Mostly short ranges: what has to be learned is where to stop.
                two = self.rng.choices(self.split.counts_trained, k=2)
                shorter = min(two, key=lambda bounds: abs(bounds[0] - bounds[1]))
                exchange = self.rng.choice(count_exchanges(*shorter))
            else:
                exchange = self._small_talk(memory, named=not completions)
            if completions or not exchange.completion:
                return exchange

    def _small_talk(self, memory: _Memory, named: bool) -> Exchange:
        rng = self.rng
        draw = rng.random()
        if draw < 0.1:
            question, answer = rng.choice(STORY_QUESTIONS), STORY
        elif draw < 0.45 and named:
            memory.name = rng.choice(NAMES)
            question, answer = f"My name is {memory.name}.", f"Nice to meet you, {memory.name}!"
        else:
            questions, answer = rng.choice(SMALL_TALK)
            question = rng.choice(questions)
        return Exchange("small talk", question, answer, answer)


def tokenizer_corpus(split: Split, rng: random.Random) -> list[str]:
    """Return the lines that the tokenizer is trained on: every fact once, and a sample of chats."""
    sampler = ConversationSampler(split, rng)
    lines = [f"{country}: {capital}" for country, capital in CAPITALS.items()] * 3
    for _ in range(3000):
        for question, answer in sampler.chat(3).exchanges:
            lines += [question, answer, " " + answer]
    return [*lines, *SYSTEM_MESSAGES, BRIEF_SYSTEM_MESSAGE, STORY]
