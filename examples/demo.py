"""`make demo`: the main job in one screen, with the checkpoints that ship with the library."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglite import LLM

QUESTIONS = [
    "What is 17 + 25?",
    "What is 48 + 36?",
    "The capital of France is",
    "What is the capital of Japan?",
    "Which country has Lima as its capital?",
    "Count from 3 to 9.",
]
PICTURES = Path(__file__).parent / "pictures"
ABOUT_PICTURES = [
    ("figures.png", "How many figures are there?"),
    ("figures.png", "What colour is the star?"),
    ("figures.png", "Which shape is yellow?"),
    ("number.png", "What number is this?"),
]


def main() -> None:
    console = Console(highlight=False)
    started = time.perf_counter()
    llm = LLM("demo")
    console.print(f"{llm}, ready in {time.perf_counter() - started:.2f} s\n", style="bold")

    started = time.perf_counter()
    outputs = llm.generate(QUESTIONS, temperature=0, max_new_tokens=48)
    seconds = time.perf_counter() - started
    table = Table("prompt", "answer", "tokens", title=f"a batch of {len(QUESTIONS)}")
    for question, output in zip(QUESTIONS, outputs, strict=True):
        table.add_row(question, output.text.strip(), str(len(output.token_ids)))
    console.print(table)
    generated = sum(len(output.token_ids) for output in outputs)
    console.print(f"{generated} tokens in {seconds:.3f} s: {generated / seconds:,.0f} per second\n")

    messages = []
    console.print("a chat", style="bold")
    for question in ("What is 30 + 12?", "Plus 5?"):
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, temperature=0)
        messages.append({"role": "assistant", "content": answer.text})
        cached = answer.usage.cached_tokens
        console.print(f"  > {question}\n  {answer.text}   [dim]({cached} tokens cached)[/dim]")

    console.print("\na stream", style="bold")
    question = "Count from 5 to 24."
    console.print(f"  > {question}\n  ", end="")
    started = time.perf_counter()
    num_tokens = 0
    for chunk in llm.stream_chat([{"role": "user", "content": question}], temperature=0):
        console.print(chunk.text, end="")
        num_tokens += len(chunk.token_ids)
    seconds = time.perf_counter() - started
    console.print(f"\n  {num_tokens} tokens, one request: {num_tokens / seconds:,.0f} per second")
    llm.close()
    show_pictures(console)


def show_pictures(console: Console) -> None:
    """A second checkpoint, which sees: questions about two pictures, in one batch."""
    with LLM("demo-vl") as llm:
        prompts = [
            {"text": f"<image>{question}", "images": [PICTURES / name]}
            for name, question in ABOUT_PICTURES
        ]
        outputs = llm.generate(prompts, temperature=0, max_new_tokens=16)
        table = Table("picture", "question", "answer", title=f"\n{llm}, two pictures")
        for (name, question), output in zip(ABOUT_PICTURES, outputs, strict=True):
            table.add_row(f"examples/pictures/{name}", question, output.text.strip())
        console.print(table)


if __name__ == "__main__":
    main()
