"""A checkpoint's processor: which class makes pixels, its settings, its chat template."""

import json

import pytest
import transformers
from transformers import ProcessorMixin
from transformers.models.auto import image_processing_auto

from sglite import LLM, ConfigError, SamplingParams
from sglite.multimodal.gemma3 import Gemma3ImageProcessor
from sglite.multimodal.hub_processor import HubProcessor
from tests.checkpoints import make_checkpoint
from tests.vision_checkpoints import RECIPES, make_vision_checkpoint, picture

PARAMS = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
PICTURE = picture(80, 60, 1)


def write(folder, name, **contents):
    """Adds to a JSON file."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **contents}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_vision_checkpoint(tmp_path_factory.mktemp("qwen"))


class TestPixels:
    @pytest.mark.parametrize("name", ["", "Fast"])
    def test_are_made_on_pillow_whatever_is_installed(self, tmp_path, monkeypatch, name):
        class ByTorchvision:
            """What Hugging Face would take."""

        find = image_processing_auto.get_image_processor_class_from_name

        def found(name):
            return find(name) if name.endswith("Pil") else ByTorchvision

        monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
        monkeypatch.setattr(image_processing_auto, "get_image_processor_class_from_name", found)
        settings = {**RECIPES["qwen2-vl"].images}
        settings["image_processor_type"] += name
        write(tmp_path, "preprocessor_config.json", **settings)
        loaded = HubProcessor.load(tmp_path, None).image_processor
        assert type(loaded).__name__ == "Qwen2VLImageProcessorPil"


class TestSettings:
    def tokens(self, folder, **options):
        """How many tokens a picture is, and the digest of its pixels."""
        with LLM(folder, kv_cache_tokens=256, **options) as llm:
            output = llm.generate("<image>", PARAMS, images=PICTURE)
            image_id = llm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            return output.prompt_token_ids.count(image_id)

    def test_bound_the_size_of_pictures(self, folder):
        assert self.tokens(folder) == 48
        assert self.tokens(folder, image_processor={}) == 48
        small = 8 * 8 * 12
        assert self.tokens(folder, image_processor={"max_pixels": small}) == 12
        size = {"shortest_edge": 64, "longest_edge": small}
        assert self.tokens(folder, image_processor={"size": size}) == 12
        assert self.tokens(folder, image_processor={"min_pixels": 8 * 8 * 90, "max_pixels": None})

    def test_are_those_of_hugging_face(self, folder):
        settings = {"max_pixels": 8 * 8 * 20, "image_mean": [0.1, 0.2, 0.3]}
        ours = HubProcessor.load(folder, None, image_settings=settings).image_processor
        theirs = image_processing_auto.AutoImageProcessor.from_pretrained(
            folder, backend="pil", **settings
        )
        pixels = [p(images=[PICTURE], return_tensors="pt")["pixel_values"] for p in (ours, theirs)]
        assert pixels[0].equal(pixels[1])

    def test_are_shown(self, folder):
        with LLM(folder, kv_cache_tokens=64, image_processor={"max_pixels": 5000}) as llm:
            assert llm.config.image_processor == {"max_pixels": 5000}
            assert "max_pixels" in repr(llm.config)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_pixel": 5}, "'max_pixel'.*Did you mean 'max_pixels'"),
            ({"patch_size": 8}, "'patch_size', which is no setting.*that can be changed"),
            ({"max_pixels": "much"}, "refuses this"),
            ({"max_pixels": 0}, "refuses this"),
            ("max_pixels", "must be a dict of settings"),
        ],
    )
    def test_that_are_wrong_are_named(self, folder, settings, message):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, kv_cache_tokens=64, image_processor=settings)

    def test_that_a_family_decides_are_refused(self, tmp_path):
        write(tmp_path, "preprocessor_config.json", **RECIPES["gemma3"].images)
        with pytest.raises(ConfigError, match="do_pan_and_scan"):
            HubProcessor.load(
                tmp_path,
                None,
                image_settings={"do_pan_and_scan": True},
                fixed_settings=Gemma3ImageProcessor.fixed_settings,
            )

    def test_of_models_without_pictures_are_refused(self, tmp_path):
        settings = {"max_pixels": 5000}
        with pytest.raises(ConfigError, match="LlamaForCausalLM takes text only"):
            LLM(make_checkpoint(tmp_path), kv_cache_tokens=64, image_processor=settings)
        module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="a live module takes text only"):
            LLM(module, tokenizer=tokenizer, kv_cache_tokens=64, image_processor=settings)

    @pytest.mark.parametrize("name", ["mm_processor_kwargs", "max_pixels"])
    def test_under_other_names_are_answered_with_ours(self, name):
        with pytest.raises(ConfigError, match=r"image_processor=\{'max_pixels'"):
            LLM("demo", **{name: 5})


class TestChatTemplate:
    def template(self, name):
        return (
            f"{name}:{{% for m in messages %}}{{% for p in m.content %}}"
            "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
            "{% endfor %}{% endfor %}"
        )

    @pytest.mark.parametrize("first", ["settings", "json", "jinja", "tokenizer"])
    def test_is_the_one_that_hugging_faces_processor_takes(self, tmp_path, first):
        make_vision_checkpoint(tmp_path, "llava")
        places = ["settings", "json", "jinja", "tokenizer"]
        for place in places[places.index(first) :]:
            template = self.template(place)
            if place == "settings":
                write(tmp_path, "processor_config.json", chat_template=template)
            elif place == "json":
                write(tmp_path, "chat_template.json", chat_template=template)
            elif place == "jinja":
                (tmp_path / "chat_template.jinja").write_text(template)
            else:
                write(tmp_path, "tokenizer_config.json", chat_template=template)
        theirs, _ = ProcessorMixin.get_processor_dict(tmp_path, local_files_only=True)
        assert theirs.get("chat_template", self.template("tokenizer")) == self.template(first)
        message = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, "x"]}]
        with LLM(tmp_path, kv_cache_tokens=256) as llm:
            assert llm.chat(message, PARAMS).prompt == f"{first}:<image>x"
            llm.tokenizer.chat_template = self.template("mine")
            assert llm.chat(message, PARAMS).prompt == "mine:<image>x"
