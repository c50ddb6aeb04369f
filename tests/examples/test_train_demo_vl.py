"""The vision checkpoint that ships, and the script that made it."""

import importlib
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from sglite import LLM

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "train_demo_vl"
CHECKPOINT = ROOT / "sglite" / "checkpoints" / "demo-vl"
MODULES = (
    *("pictures", "questions", "conversations", "tokenizer", "data", "model", "train"),
    "evaluate",
)


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
def image_processor():
    return AutoImageProcessor.from_pretrained(CHECKPOINT, backend="pil")


# -- the checkpoint -----------------------------------------------------------------------------


def test_it_is_small():
    files = [file for file in CHECKPOINT.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000


def test_held_out_questions_are_answered(scripts, tokenizer, image_processor):
    """A sample; `make evaluate-demos` asks all."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    prompts = scripts.evaluate.held_out_prompts(64, seed=2)
    assert len({(prompt.kind, prompt.form) for prompt in prompts}) == 12
    wrong = scripts.evaluate.wrong_answers(model, tokenizer, image_processor, prompts)
    assert len(wrong) <= 0.05 * len(prompts), wrong[:5]
    broken = scripts.evaluate.Prompt(*list(vars(prompts[0]).values())[:-1], "never<|im_end|>")
    assert len(scripts.evaluate.wrong_answers(model, tokenizer, image_processor, [broken])) == 1


def test_sglite_answers_by_name(scripts):
    prompts = scripts.evaluate.held_out_prompts(64, seed=2)
    with LLM("demo-vl", kv_cache_tokens=16_384) as llm:
        asked = [{"text": prompt.text, "images": prompt.images} for prompt in prompts]
        outputs = llm.generate(asked, temperature=0, max_new_tokens=24)
    ends = "<|im_end|>"
    right = [o.text + ends == p.expected for o, p in zip(outputs, prompts, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_pictures_of_other_sizes_are_understood(scripts):
    """They are resized to what was trained on."""
    rng, right = random.Random(0), 0
    pictures = [
        scripts.pictures.Picture((112, 112), number=rng.randint(10, 99), colour="blue", seed=seed)
        for seed in range(12)
    ]
    images = [
        scripts.pictures.draw(p).resize((side, side))
        for p, side in zip(pictures, [60, 150, 224, 300] * 3, strict=True)
    ]
    with LLM("demo-vl", kv_cache_tokens=8192) as llm:
        for picture, image in zip(pictures, images, strict=True):
            parts = [
                {"type": "image", "image": image},
                {"type": "text", "text": "Read the number."},
            ]
            output = llm.chat([{"role": "user", "content": parts}], temperature=0)
            right += output.text == f"The number is {picture.number}."
    assert right >= 10


def test_chat_template_gives_what_was_trained_on(scripts, tokenizer):
    turn = scripts.conversations.Turn
    chat = scripts.conversations.Conversation(
        (turn("<image><image>\nWhat shape is this?", "It is a star."), turn("Thanks", "Bye"))
    )
    image = {"type": "image"}
    parts = [image, image, {"type": "text", "text": "\nWhat shape is this?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "It is a star."},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ]
    trained = "".join(text for text, _ in scripts.conversations.render(chat))
    render = tokenizer.apply_chat_template
    prompt = render(messages, tokenize=False, add_generation_prompt=True)
    assert prompt + "Bye<|im_end|>\n" == trained
    system = [{"role": "system", "content": "Be kind."}]
    url = {"type": "image_url", "image_url": {"url": "data:"}}
    video = {"type": "video", "video": []}
    user = [{"role": "user", "content": [url, image, video]}]
    vision = "<|vision_start|><|{}_pad|><|vision_end|>"
    assert render(system + user, tokenize=False, add_vision_id=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        f"Picture 1: {vision.format('image')}Picture 2: {vision.format('image')}"
        f"Video 1: {vision.format('video')}<|im_end|>\n"
    )


def test_tokenizer_survives_any_text(tokenizer):
    for text in ("Malé, N'Djamena , don't .", " two  spaces\n\n\ttab \x00", "日本語 🇫🇷 \U0010ffff"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2042") == ["2", "0", "4", "2"]
    assert len(tokenizer.tokenize("<|image_pad|>" * 9)) == 9


# -- pictures and questions -----------------------------------------------------------------------


def test_a_picture_depends_on_its_description_alone(scripts):
    rng = random.Random(0)
    for _ in range(20):
        picture = scripts.pictures.random_picture(rng, (84, 112))
        first, second = scripts.pictures.draw(picture), scripts.pictures.draw(picture)
        assert first.size == (112, 84)
        assert first.tobytes() == second.tobytes()
        assert len(first.getcolors(1 << 16)) > 1


def test_figures_have_their_colours_and_do_not_touch(scripts):
    """As many patches of a colour as there are figures, counted by filling them."""
    pictures = scripts.pictures
    for seed in range(30):
        figures = tuple(
            pictures.Figure(random.Random(seed).choice(pictures.SHAPES), colour)
            for colour in list(pictures.COLOURS)[: 1 + seed % 6]
        )
        picture = pictures.Picture((112, 112), figures=figures, seed=seed)
        pixels = np.asarray(pictures.draw(picture)).astype(int)
        paper = pixels[0, 0]
        shown = np.abs(pixels - paper).max(-1) > 60
        assert _blobs(shown) == len(figures)


def _blobs(shown):
    """Connected regions of a mask, those of a pixel or two left out."""
    left, count = {tuple(place) for place in np.argwhere(shown)}, 0
    while left:
        front, size = [left.pop()], 0
        while front:
            y, x = front.pop()
            size += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    front.append(near)
        count += size > 3
    return count


def test_questions_have_the_right_answer(scripts):
    """Recounted from the description, by the words of the question."""
    rng, checked = random.Random(1), Counter()
    for _ in range(400):
        picture = scripts.pictures.random_picture(rng, (84, 84))
        for kind, questions in scripts.questions.questions_about(picture).items():
            for question in questions:
                words = question.templates[0].replace("{where}", "").rstrip("?.").split()
                assert question.word in question.sentence.replace("no ", "0 ")
                if kind == "number":
                    assert question.word == str(picture.number)
                elif kind == "count" and words[:2] == ["How", "many"]:
                    chosen = [f for f in picture.figures if _is_meant(f, words[2:-2])]
                    assert question.word == str(len(chosen))
                    checked[len(chosen)] += 1
                options, right = question.options(rng, 10)
                assert options[right] == question.word
                assert len(set(options)) == 10
    assert checked[0] < sum(checked.values()) / 2
    assert min(checked[count] for count in range(7)) > 10


def _is_meant(figure, words):
    noun = words[-1].removesuffix("es") if words[-1] == "crosses" else words[-1].removesuffix("s")
    return noun in ("figure", figure.shape) and (len(words) == 1 or words[0] == figure.colour)


# -- training -------------------------------------------------------------------------------------


def test_pictures_at_once_are_what_hugging_face_computes_one_by_one(scripts, image_processor):
    """Pixels, the tower, and M-RoPE's positions."""
    torch.manual_seed(0)
    tokenizer = scripts.tokenizer.train_tokenizer(0)
    model = Qwen2VLForConditionalGeneration(scripts.model.model_config(tokenizer)).eval()
    groups = scripts.data.make_groups(tokenizer.backend_tokenizer.to_str(), 40, 0, workers=1)
    for number in (4, 6, 7):
        sequences = groups[number].families["open"]
        data = scripts.train.DeviceData(groups[number], sequences, torch.device("cpu"))
        rows = np.arange(2)
        ids, positions, pixels, answers = data.take(rows)
        with torch.no_grad():
            hidden = scripts.model.hidden_states(model, ids, positions, pixels)
        assert 2 <= len(answers) < ids.numel() / 2
        for row in rows:
            images = [Image.fromarray(groups[number].pictures[i]) for i in sequences.pictures[row]]
            inputs = image_processor(images=images, return_tensors="pt")
            own = ids[row : row + 1, : sequences.lengths[row]]
            model.model.rope_deltas = None
            with torch.no_grad():
                expected = model.model(
                    input_ids=own,
                    mm_token_type_ids=(own == model.config.image_token_id).int(),
                    **inputs,
                ).last_hidden_state[0]
            torch.testing.assert_close(hidden[row, : own.shape[1]], expected, rtol=1e-4, atol=1e-4)


def test_script_trains_and_saves_a_checkpoint(tmp_path):
    command = [sys.executable, SCRIPTS / "train.py", "--out", tmp_path, "--steps", "2"]
    command += ["--pictures", "20", "--batch", "4", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert AutoImageProcessor.from_pretrained(tmp_path).merge_size == 2
    # What does not depend on training is what ships.
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()
