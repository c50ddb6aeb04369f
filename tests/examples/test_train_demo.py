"""The checkpoint that ships, and the script that made it."""

import importlib
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglite import LLM

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "train_demo"
CHECKPOINT = ROOT / "sglite" / "checkpoints" / "demo"
MODULES = ("countries", "questions", "conversations", "tokenizer", "evaluate", "train")


@pytest.fixture(scope="module")
def scripts():
    """The example's modules, imported as its scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)


def complete(model, tokenizer, text, new_tokens=40):
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def chat(model, tokenizer, *messages, new_tokens=40):
    roles = ("user", "assistant") * len(messages)
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": m} for role, m in zip(roles, messages, strict=False)],
        tokenize=False,
        add_generation_prompt=True,
    )
    return complete(model, tokenizer, text, new_tokens)


def test_held_out_questions_are_answered(scripts, model, tokenizer):
    """A sample; `make evaluate-demos` asks all."""
    prompts = scripts.evaluate.held_out_prompts(tokenizer, sample=40, seed=1)
    assert len({(prompt.group, prompt.form) for prompt in prompts}) > 9
    wrong = scripts.evaluate.wrong_answers(model, tokenizer, prompts)
    assert len(wrong) <= 0.05 * len(prompts), wrong[:5]


def test_sglite_gives_the_tokens_of_hugging_face(scripts, tokenizer):
    """In float32; where the oracle's two best logits are nearly equal, either token will do."""
    prompts = scripts.evaluate.held_out_prompts(tokenizer, sample=60, seed=2)
    prompt_ids = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"]
    with LLM("demo", dtype="float32", kv_cache_tokens=32_768) as llm:
        outputs = llm.generate(prompt_ids, temperature=0, max_new_tokens=48)
    oracle = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    right = 0
    for prompt, before, output in zip(prompts, prompt_ids, outputs, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([before + output.token_ids])).logits[0]
        logits = logits[len(before) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (logits.amax(1) - chosen <= 1e-4 * logits.abs().amax(1)).all(), prompt
        right += output.text + tokenizer.eos_token == prompt.expected
    assert right >= 0.95 * len(prompts)


def test_wrong_answers_are_noticed(scripts, model, tokenizer):
    prompt = scripts.evaluate.Prompt("sums", "plain", "<|bos|>What is 1 + 2?", " 1 + 2 = 4.<|end|>")
    ((_, answer),) = scripts.evaluate.wrong_answers(model, tokenizer, [prompt])
    assert answer == " 1 + 2 = 3.<|end|>"


def test_both_forms_and_the_history_are_understood(model, tokenizer):
    assert chat(model, tokenizer, "What is 17 + 25?") == "17 + 25 = 42.<|end|>"
    assert complete(model, tokenizer, "<|bos|>What is 17 + 25?") == " 17 + 25 = 42.<|end|>"
    assert complete(model, tokenizer, "<|bos|>The capital of France is") == " Paris.<|end|>"
    paris = "The capital of France is Paris."
    spain = chat(model, tokenizer, "What is the capital of France?", paris, "And of Spain?")
    assert spain == "The capital of Spain is Madrid.<|end|>"


def test_a_name_is_remembered(model, tokenizer):
    name = chat(model, tokenizer, "My name is Ada.", "Nice to meet you, Ada!", "What is my name?")
    assert name == "Your name is Ada.<|end|>"


def test_a_chat_may_fill_the_context(scripts, model, tokenizer):
    split, end = scripts.questions.Split(), tokenizer.eos_token
    sampler = scripts.conversations.ConversationSampler(split, random.Random(3))
    earlier = sampler.chat(30).exchanges
    messages = [text for exchange in earlier for text in exchange]
    length = len(tokenizer("".join(messages))["input_ids"])
    assert 600 < length < 980
    assert chat(model, tokenizer, *messages, "What is 17 + 25?") == f"17 + 25 = 42.{end}"


def test_tokenizer_survives_any_text(tokenizer):
    for text in ("Malé, N'Djamena , don't .", " two  spaces\n\ttab \x00", "日本語 🇫🇷 \U0010ffff"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.tokenize("2042") == ["2", "0", "4", "2"]


def test_chat_template_gives_what_was_trained_on(scripts, tokenizer):
    chat = scripts.conversations.Conversation([("Hi", "Hello!"), ("Bye", "Goodbye!")], "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    for question, answer in chat.exchanges:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    rendered = "".join(text for text, _ in scripts.tokenizer.render(chat))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "3"}], tokenize=False)


def test_no_held_out_question_is_trained_on(scripts):
    split = scripts.questions.Split()
    held_out = {e.question for e in split.held_out_exchanges() if e.after is None}
    assert "What is 17 + 25?" in held_out
    sampler = scripts.conversations.ConversationSampler(split, random.Random(0))
    drawn = Counter()
    for _ in range(3000):
        for question, _ in sampler.plain().exchanges + sampler.chat(4).exchanges:
            drawn[question in held_out] += 1
    assert drawn == {False: 15000}


def test_no_held_out_follow_up_is_trained_on(scripts):
    split = scripts.questions.Split()
    follow_ups = scripts.questions.CAPITAL_FOLLOW_UPS
    held_out = {t.format(country=c) for c, t in split.capitals_held_out if t in follow_ups}
    sums_held_out = set(split.sums_held_out)
    sampler = scripts.conversations.ConversationSampler(split, random.Random(0))
    sums, capitals = 0, 0
    for _ in range(2000):
        conversation = sampler.chat(5)
        for question, answer in conversation.exchanges:
            assert question not in held_out
            capitals += question.startswith(("And of ", "What about "))
            if question.startswith(("Plus ", "And now add ")) and " + " in answer:
                a, b = answer.split(" = ")[0].split(" + ")
                assert (int(a), int(b)) not in sums_held_out
                sums += 1
    assert sums > 100
    assert capitals > 100


def test_script_trains_and_saves_a_checkpoint(tmp_path):
    command = [sys.executable, SCRIPTS / "train.py", "--out", tmp_path, "--steps", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "model.safetensors").stat().st_size < 4_000_000
    assert complete(model, tokenizer, "<|bos|>Hi", new_tokens=2)
    # The tokenizer depends on nothing but the seed: it is the one that ships.
    shipped = (CHECKPOINT / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped
