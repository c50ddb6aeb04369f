"""Requests with images: every form of asking, and what is refused while the engine goes on."""

import base64
import gc
import io
import json
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from sglite import (
    LLM,
    CheckpointError,
    GenerationError,
    InvalidRequestError,
    SamplingParams,
    UnsupportedModelError,
)
from tests.checkpoints import make_checkpoint
from tests.engine.test_driver import driver_threads, wait_until
from tests.faults import Planted
from tests.vision_checkpoints import RECIPES, make_vision_checkpoint, picture, words

OWN = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE, OTHER = picture(60, 44, 1), picture(30, 70, 2)
PARAMS = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_vision_checkpoint(tmp_path_factory.mktemp("vision"))
    with LLM(folder, kv_cache_tokens=4096) as model:
        yield model


@pytest.fixture(scope="module")
def expected(llm):
    """What the model says to two pictures in a text."""
    return llm.generate({"text": "a <image> b <image> c", "images": [PICTURE, OTHER]}, PARAMS)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def same(output, expected):
    return (output.prompt_token_ids, output.token_ids) == (
        expected.prompt_token_ids,
        expected.token_ids,
    )


class TestForms:
    def test_the_models_own_placeholder(self, llm, expected):
        prompt = {"text": f"a {OWN} b {OWN} c", "images": [PICTURE, OTHER]}
        assert same(llm.generate(prompt, PARAMS), expected)
        mixed = {"text": f"a <image> b {OWN} c", "images": [PICTURE, OTHER]}
        assert same(llm.generate(mixed, PARAMS), expected)

    def test_images_beside_the_prompt(self, llm, expected):
        text = "a <image> b <image> c"
        images = [png(PICTURE), np.asarray(OTHER)]
        assert same(llm.generate(text, PARAMS, images=images), expected)
        several = llm.generate([text, "hello", text], PARAMS, images=[images, None, images])
        assert [same(output, expected) for output in several] == [True, False, True]
        one = llm.generate(["x<image>", "<image>"], PARAMS, images=[PICTURE, [OTHER]])
        assert same(one[1], llm.generate("<image>", PARAMS, images=OTHER))

    def test_token_ids(self, llm, expected):
        short = llm.tokenizer.encode(f"a {OWN} b {OWN} c")
        for token_ids in (short, expected.prompt_token_ids):
            prompt = {"token_ids": token_ids, "images": [PICTURE, OTHER]}
            assert same(llm.generate(prompt, PARAMS), expected)

    def test_a_stream(self, llm, expected):
        chunks = list(llm.stream("a <image> b <image> c", PARAMS, images=[PICTURE, OTHER]))
        assert "".join(chunk.text for chunk in chunks) == expected.text

    def test_several_completions_of_one_picture(self, llm):
        before = llm.stats()["images_encoded"]
        image = picture(50, 50, 9)
        output = llm.generate("<image>x", images=image, n=3, seed=1, max_new_tokens=4)
        assert len(output.outputs) == 3
        assert llm.stats()["images_encoded"] == before + 1

    def test_a_fetcher_of_the_callers_own(self, llm, expected):
        files = {"http://a/1.png": png(PICTURE), "http://a/2.png": png(OTHER)}
        with LLM(llm.config.model, kv_cache_tokens=512, image_fetcher=files.__getitem__) as own:
            output = own.generate("a <image> b <image> c", PARAMS, images=list(files))
            assert same(output, expected)


class TestChat:
    def ask(self, llm, *parts):
        return llm.chat([{"role": "user", "content": list(parts)}], PARAMS)

    def test_content_parts(self, llm):
        url = "data:image/png;base64," + base64.b64encode(png(PICTURE)).decode()
        text = {"type": "text", "text": "what?"}
        pictures = [
            {"type": "image", "image": PICTURE},
            {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
            {"type": "image_url", "image_url": url},
            {"type": "image", "url": url},
            {"type": "image", "base64": base64.b64encode(png(PICTURE)).decode()},
        ]
        outputs = [self.ask(llm, part, text) for part in pictures]
        rendered = f"<s>user\n{OWN}what?</s>\n<s>assistant\n"
        assert outputs[0].prompt == rendered
        token_ids = llm.tokenizer.encode(rendered, add_special_tokens=False)
        wanted = llm.generate({"token_ids": token_ids, "images": [PICTURE]}, PARAMS)
        assert all(same(output, wanted) for output in outputs)

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": "PATH"},
            {"type": "image_url", "image_url": {"url": "PATH"}},
            {"type": "image_url", "image_url": {"url": "file://PATH"}},
            {"type": "image_url", "image_url": "FILE://localhostPATH"},
            {"type": "image_url", "url": "PATH"},
            {"type": "image_url", "path": "PATH"},
            {"type": "image", "image": {"url": "PATH"}},
            {"type": "image", "url": "PATH"},
            {"type": "video", "video_url": ["PATH"]},
            {"type": "video", "video_url": {"url": ["file:PATH"]}},
        ],
    )
    @pytest.mark.parametrize("exists", [True, False])
    def test_a_url_of_a_message_opens_no_file(self, llm, tmp_path, part, exists):
        """It also says nothing of which files there are."""
        path = tmp_path / "a.png"
        if exists:
            path.write_bytes(png(PICTURE))
        part = json.loads(json.dumps(part).replace("PATH", str(path)))
        with pytest.raises(InvalidRequestError, match="must begin with data:.*'image': path"):
            self.ask(llm, part)

    def test_a_file_of_the_callers_own(self, llm, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png(PICTURE))
        wanted = self.ask(llm, {"type": "image", "image": PICTURE}, "what?")
        for part in ({"type": "image", "image": path}, {"type": "image", "path": str(path)}):
            assert same(self.ask(llm, part, "what?"), wanted)

    def test_what_somebody_wrote_is_no_placeholder(self, llm):
        output = self.ask(llm, {"type": "text", "text": "an <image> tag"})
        assert "<image>" in output.prompt

    def test_several_turns_and_a_video(self, llm):
        output = llm.chat(
            [
                {"role": "user", "content": [{"type": "image", "image": PICTURE}, "one"]},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": [{"type": "video", "video": [PICTURE] * 3}, "two"]},
            ],
            PARAMS,
        )
        pads = llm.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        assert all(output.prompt_token_ids.count(pad) > 3 for pad in pads)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"type": "audio", "audio": b""}, "text, image, image_url or video"),
            ({"type": "image"}, "one of image, image_url"),
            ({"type": "image", "image": PICTURE, "url": "x"}, "it has image, url"),
            (5, "must be a dict"),
        ],
    )
    def test_other_parts_are_refused(self, llm, part, message):
        with pytest.raises(InvalidRequestError, match=message):
            self.ask(llm, part)


class TestRefusals:
    CASES = (
        ("<image>", {"images": []}, "1 placeholders for images.*and 0 images"),
        ("hello", {"images": [PICTURE]}, "0 placeholders for images.*and 1 images"),
        ("<image><image>", {"images": [PICTURE]}, "2 placeholders.*and 1 images"),
        (f"{OWN}<image>", {"images": [PICTURE] * 3}, "2 placeholders.*and 3 images"),
        ("<video>", {"images": [PICTURE]}, "0 placeholders for images"),
        ("<image>", {"videos": [[PICTURE]]}, "placeholders for images"),
        ("<image>", {"images": [b"no picture"]}, r"images\[0\].*no image"),
        ("<image><image>", {"images": [PICTURE, png(PICTURE)[:200]]}, r"images\[1\].*truncated"),
        ("<image>", {"images": [Image.new("RGB", (0, 4))]}, "empty"),
        ("<image>", {"images": [Image.new("1", (20_000, 20_000))]}, "20000 x 20000"),
        ("<image>", {"images": ["https://example.com/a.png"]}, "image_fetcher"),
        ("<image>", {"images": [Image.new("RGB", (4000, 4))]}, "cannot be processed.*ratio"),
        ("<video>", {"videos": [[]]}, "without a frame"),
        ("<image>" * 200, {"images": [PICTURE] * 200}, "context"),
    )

    @pytest.mark.parametrize(("text", "media", "message"), CASES)
    def test_bad_input_is_an_error_and_harms_nothing(self, llm, expected, text, media, message):
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate([{"text": "fine"}, {"text": text, **media}], PARAMS)
        again = {"text": "a <image> b <image> c", "images": [PICTURE, OTHER]}
        assert same(llm.generate(again, PARAMS), expected)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([PICTURE], "2 entries, one for each prompt"),
            (PICTURE, "2 entries"),
            ([[PICTURE], [PICTURE]], "images of its own"),
        ],
    )
    def test_images_that_do_not_fit_the_prompts(self, llm, images, message):
        prompts = [{"text": "<image>", "images": [PICTURE]}, "<image>"]
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate(prompts, PARAMS, images=images)

    def test_a_text_model_refuses_images_by_its_name(self, tmp_path):
        with LLM(make_checkpoint(tmp_path), kv_cache_tokens=256) as text_model:
            with pytest.raises(InvalidRequestError, match="LlamaForCausalLM takes text only"):
                text_model.generate("<image>", images=PICTURE)
            with pytest.raises(InvalidRequestError, match="has videos, but LlamaForCausalLM"):
                text_model.generate("<video>", videos=[[PICTURE]])
            message = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]
            with pytest.raises(InvalidRequestError, match="LlamaForCausalLM takes text only"):
                text_model.chat(message)
            assert text_model.generate("an <image> tag", PARAMS).token_ids

    def test_positions_that_run_ahead_of_the_tokens_have_to_fit(self, tmp_path):
        vision = {**RECIPES["qwen2.5-vl"].config["vision_config"], "tokens_per_second": 100}
        folder = make_vision_checkpoint(tmp_path, "qwen2.5-vl", vision_config=vision)
        with LLM(folder, kv_cache_tokens=1024, context_length=512) as own:
            frames = [picture(16, 16, seed) for seed in range(14)]
            message = "at 6[0-9]{2} positions.*context_length is 512"
            with pytest.raises(InvalidRequestError, match=message):
                own.generate("<video>", PARAMS, videos=[frames])
            assert len(own.generate("<video>", PARAMS, videos=[frames[:10]]).token_ids) == 5

    def test_a_model_without_videos_says_so(self, tmp_path):
        folder = make_vision_checkpoint(tmp_path, "llava")
        with (
            LLM(folder, kv_cache_tokens=256) as llava,
            pytest.raises(InvalidRequestError, match="takes images only"),
        ):
            llava.generate("<video>", videos=[[PICTURE]])


class TestFailures:
    """What fails with one picture fails that request, and no other of the same step."""

    PROMPTS = ("a <image> b", "no picture", "c <image> d", "e <image><image>")
    PICTURES = ([PICTURE], [], [OTHER], [OTHER, PICTURE])

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("planted"), torch.OutOfMemoryError("planted"), Planted("planted")],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("chunk", [512, 9])
    def test_one_that_cannot_be_encoded(self, tmp_path, monkeypatch, error, chunk):
        folder = make_vision_checkpoint(tmp_path)
        options = {"kv_cache_tokens": 4096, "image_cache_bytes": 0, "chunked_prefill_size": chunk}
        with LLM(folder, **options) as llm:
            prompts = [
                {"text": text, "images": pictures}
                for text, pictures in zip(self.PROMPTS, self.PICTURES, strict=True)
            ]
            expected = llm.generate(prompts, PARAMS)
            encode, broken, seen = llm.model.get_image_feature, [], []

            def failing(items):
                seen.extend(item.digest for item in items)
                if items[0].digest in broken:
                    raise error
                return encode(items)

            with monkeypatch.context() as patch:
                patch.setattr(llm.model, "get_image_feature", failing)
                llm.weights_changed()
                llm.generate(prompts[0], PARAMS)
                broken.append(seen[0])
                seen.clear()
                llm.weights_changed()
                with pytest.raises(GenerationError, match="encoding the image.*planted") as caught:
                    llm.generate(prompts, PARAMS)
            outputs = caught.value.outputs
            assert [output.error is None for output in outputs] == [False, True, True, False]
            assert outputs[0].error.__cause__ is error
            for index in (1, 2):
                assert same(outputs[index], expected[index])
            assert chunk == 9 or seen.count(broken[0]) == 1
            wait_until(lambda: not driver_threads())
            llm._open.engine.scheduler.cache.check_invariant()
            again = llm.generate(prompts, PARAMS)
            assert all(map(same, again, expected))

    @pytest.mark.parametrize("error", [RuntimeError("planted"), Planted("planted")])
    def test_a_processor_that_raises_reaches_its_caller_only(
        self, llm, expected, monkeypatch, error
    ):
        processor, main = llm._open.intake.reader.processor, threading.current_thread()
        process = processor.process_images
        prompt = {"text": "a <image> b <image> c", "images": [PICTURE, OTHER]}

        def failing(*arguments):
            if threading.current_thread() is main:
                raise error
            return process(*arguments)

        answers = []
        thread = threading.Thread(
            target=lambda: answers.extend(llm.generate(prompt, PARAMS) for _ in range(5))
        )
        with monkeypatch.context() as patch:
            patch.setattr(processor, "process_images", failing)
            thread.start()
            for _ in range(5):
                with pytest.raises((InvalidRequestError, Planted), match="planted"):
                    llm.generate(prompt, PARAMS)
            thread.join()
        assert len(answers) == 5
        assert all(same(answer, expected) for answer in answers)
        assert same(llm.generate(prompt, PARAMS), expected)

    def test_pixels_are_let_go_when_a_batch_has_ended(self, tmp_path, monkeypatch):
        folder, items = make_vision_checkpoint(tmp_path), []
        with LLM(folder, kv_cache_tokens=4096, image_cache_bytes=0) as llm:
            encode = llm.model.get_image_feature

            def watched(given):
                items.extend(weakref.ref(item) for item in given)
                found = encode(given)
                items.append(weakref.ref(found))
                return found

            gc.collect()
            gc.disable()
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(llm.model, "get_image_feature", watched)
                    llm.generate({"text": "a <image>", "images": [PICTURE]}, PARAMS)
                    wait_until(lambda: not driver_threads())
                    assert [reference() for reference in items] == [None] * 2
            finally:
                gc.enable()


class TestInvariance:
    def test_the_check_draws_no_placeholder(self, llm):
        report = llm.check_invariance(
            new_tokens=2, batch_sizes=(2,), chunk_sizes=(5,), prefix_lengths=(3,), num_threads=(1,)
        )
        assert report
        with pytest.raises(InvalidRequestError, match="without images"):
            llm.check_invariance({"text": "<image>", "images": [PICTURE]})


PART_LOOP = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT_ONLY = "{% for message in messages %}<{{ message.role + '>' + message.content }}{% endfor %}"


class TestChatTemplates:
    LOOK = ({"role": "user", "content": [{"type": "image", "image": PICTURE}, "what?"]},)
    TALK = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"})

    @staticmethod
    def checkpoint(folder, name, template):
        make_vision_checkpoint(folder, name)
        (folder / "chat_template.jinja").write_text(template)
        return LLM(folder, kv_cache_tokens=256)

    def test_a_string_is_not_lost_on_a_template_of_parts(self, tmp_path):
        with self.checkpoint(tmp_path, "llava-onevision", PART_LOOP) as llava:
            assert llava.chat(list(self.TALK), PARAMS).prompt == "[system]be kind[user]Hi"
            assert llava.chat(list(self.LOOK), PARAMS).prompt == "[user]<image>what?"

    def test_one_that_writes_no_pictures_is_for_text(self, tmp_path):
        with self.checkpoint(tmp_path, "llava", TEXT_ONLY) as llava:
            assert llava.chat(list(self.TALK), PARAMS).prompt == "<system>be kind<user>Hi"
            message = "register_chat_template.LlavaImageProcessor, .*llm.tokenizer.chat_template"
            with pytest.raises(InvalidRequestError, match=message):
                llava.chat(list(self.LOOK), PARAMS)

    def test_a_picture_that_it_leaves_out_is_named(self, tmp_path):
        loop = PART_LOOP.replace("part.type == 'image'", "part.type == 'image' and loop.first")
        two = [{"type": "image", "image": image} for image in (PICTURE, OTHER)]
        with self.checkpoint(tmp_path, "llava", loop) as llava:
            message = "2 images, but the chat template .* writes 1 of them"
            with pytest.raises(InvalidRequestError, match=message):
                llava.chat([{"role": "user", "content": two}], PARAMS)

    def test_of_another_language_model_in_the_familys_place(self, tmp_path):
        folder = make_vision_checkpoint(tmp_path, "llava-next")
        with (
            LLM(folder, kv_cache_tokens=256) as llava,
            pytest.raises(InvalidRequestError, match="has no chat template"),
        ):
            llava.chat(list(self.LOOK), PARAMS)

    def test_what_is_registered_is_for_pictures_alone_and_said(self, tmp_path, monkeypatch, caplog):
        from sglite.multimodal import chat_templates, register_chat_template
        from sglite.multimodal.llava import LlavaNextImageProcessor

        monkeypatch.setattr(chat_templates, "_TEMPLATES", dict(chat_templates._TEMPLATES))
        register_chat_template(LlavaNextImageProcessor, PART_LOOP)
        with self.checkpoint(tmp_path, "llava-next", TEXT_ONLY) as llava:
            assert llava.chat(list(self.TALK), PARAMS).prompt == "<system>be kind<user>Hi"
            assert not caplog.records
            assert llava.chat(list(self.LOOK), PARAMS).prompt == "[user]<image>what?"
            assert "registered for LlavaNextImageProcessor" in caplog.text

    def test_the_callers_own_is_used_as_it_is(self, tmp_path):
        folder = make_vision_checkpoint(tmp_path, "llava")
        with LLM(folder, kv_cache_tokens=256) as llava:
            asked = {"chat_template_kwargs": {"chat_template": TEXT_ONLY}}
            assert llava.chat(list(self.TALK), PARAMS, **asked).prompt == "<system>be kind<user>Hi"
            with pytest.raises(InvalidRequestError, match="takes no pictures"):
                llava.chat(list(self.LOOK), PARAMS, **asked)
            llava.tokenizer.chat_template = "{{ messages[-1].content[-1].text }}!"
            with pytest.raises(InvalidRequestError, match="1 images, .* writes 0 of them"):
                llava.chat(list(self.LOOK), PARAMS)
            llava.tokenizer.chat_template = "<image>{{ messages[-1].content[-1].text }}!"
            assert llava.chat(list(self.LOOK), PARAMS).prompt == "<image>what?!"

    def test_of_the_family_where_the_checkpoint_has_none(self, tmp_path):
        folder = make_vision_checkpoint(tmp_path, "llava")
        message = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, "what?"]}]
        with LLM(folder, kv_cache_tokens=256) as llava:
            assert llava.chat(message, PARAMS).prompt == "USER: <image>\nwhat? ASSISTANT:"

    def test_of_the_processor_goes_before(self, tmp_path):
        folder = make_vision_checkpoint(tmp_path, "llava")
        template = (
            "{% for message in messages %}{% for part in message.content %}"
            "{% if part.type == 'image' %}<image>{% else %}[{{ part.text }}]{% endif %}"
            "{% endfor %}{% endfor %}"
        )
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        message = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, "what?"]}]
        with LLM(folder, kv_cache_tokens=256) as llava:
            assert llava.chat(message, PARAMS).prompt == "<image>[what?]"


def test_a_checkpoint_without_an_image_processor_is_for_text(tmp_path):
    folder = make_vision_checkpoint(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    with LLM(folder, kv_cache_tokens=256) as own:
        assert own.generate("hello", PARAMS).token_ids
        with pytest.raises(InvalidRequestError, match=r"no image processor \(preprocessor_config"):
            own.generate("<image>", images=PICTURE)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        LLM(folder, kv_cache_tokens=256)


def test_crops_beside_a_picture_are_refused_by_name(tmp_path):
    folder = make_vision_checkpoint(tmp_path, "gemma3")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_pan_and_scan": True}))
    with pytest.raises(UnsupportedModelError, match="do_pan_and_scan"):
        LLM(folder, kv_cache_tokens=256)


def test_weights_that_changed_give_other_embeddings(tmp_path):
    with LLM(make_vision_checkpoint(tmp_path), kv_cache_tokens=512) as own:
        prompt = {"text": f"<image>{words(3)}", "images": [PICTURE]}
        before = own.generate(prompt, PARAMS, logprobs=0)
        merger = own.model.visual.merger.mlp[2]
        merger.weight = merger.weight * 1.5
        own.weights_changed()
        after = own.generate(prompt, PARAMS, logprobs=0)
        assert after.usage.cached_tokens == 0
        assert own.stats()["images_encoded"] == 2
        first = [next(iter(output.logprobs[0].values())).logprob for output in (before, after)]
        assert first[0] != first[1]


def test_pixels_on_another_device_or_with_gradients():
    from sglite.multimodal.images import read_image

    tensor = torch.rand(3, 8, 8, requires_grad=True)
    assert read_image("x", tensor).size == (8, 8)
