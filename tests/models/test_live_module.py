"""`LLM(module)`: a live Hugging Face module as it stands, and left as it was."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sglite import LLM, ModelRegistry, register
from sglite.interface.errors import ConfigError, UnsupportedModelError
from tests.checkpoints import VOCAB_SIZE, make_tokenizer
from tests.models.test_transformers_path import check_greedy, check_logits, model_of, prompts
from tests.models.unregistered import make_config, make_model

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def live(module, **options):
    return LLM(module, tokenizer=make_tokenizer(), kv_cache_tokens=2048, **options)


def state_of(module):
    """All that a caller could see of a module."""
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "pointers": {name: p.data_ptr() for name, p in module.named_parameters()},
        "gradients": {name: p.requires_grad for name, p in module.named_parameters()},
        "config": copy.deepcopy(module.config.to_dict()),
        "attention": module.config._attn_implementation,
        "experts": module.config._experts_implementation,
        "parts": [
            (name, type(part), part.training, sorted(part.__dict__), len(part._forward_pre_hooks))
            for name, part in module.named_modules()
        ],
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig", "Gemma2Config", "CohereConfig"]
)
def test_a_live_module_against_itself(name):
    module = make_model(make_config(name))
    with live(module, chunked_prefill_size=24) as llm:
        check_logits(model_of(llm), torch.float32, module)
        check_greedy(llm, module)


def test_what_is_not_batch_invariant_says_so():
    module = make_model(make_config("GPT2Config"))  # its Conv1D is a product of torch's
    with live(module) as llm:
        assert not llm.config.batch_invariant
    with pytest.raises(ConfigError, match="batch_invariant=True: parts of GPT2LMHeadModel"):
        live(module, batch_invariant=True)
    with live(make_model(make_config("LlamaConfig")), batch_invariant=True) as llm:
        assert llm.config.batch_invariant


def test_parameters_are_shared_and_the_module_left_as_it_was():
    module = make_model(make_config("LlamaConfig", tie_word_embeddings=True)).train()
    ids = torch.tensor([prompts()[3]])
    before, logits = state_of(module), module(ids).logits
    with live(module) as llm:
        ours = {p.data_ptr() for p in model_of(llm).parameters()}
        assert {p.data_ptr() for p in module.parameters()} <= ours
        llm.generate(prompts(), **GREEDY)
        assert_same_state(before, state_of(module))
        assert torch.equal(module(ids).logits, logits)
    assert_same_state(before, state_of(module))


def test_a_training_step_in_between():
    module = make_model(make_config("LlamaConfig")).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    ids = torch.tensor([prompts()[4]])
    with live(module) as llm:
        first = llm.generate(prompts()[4], **GREEDY)
        loss = module(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        llm.weights_changed()
        again = llm.generate(prompts()[4], **GREEDY)
        assert again.usage.cached_tokens == 0
        assert again.token_ids != first.token_ids
        assert llm.generate(prompts()[4], **GREEDY).usage.cached_tokens > 0
        check_greedy(llm, module.eval())


def test_the_same_bits_as_from_its_checkpoint(tmp_path):
    """Of a model whose layers are not replaced whole, which round elsewhere."""
    module = make_model(make_config("HeliumConfig"))
    module.save_pretrained(tmp_path)
    options = {**GREEDY, "logprobs": 1}
    with (
        live(module) as llm,
        LLM(
            tmp_path, tokenizer=make_tokenizer(), architecture="transformers", kv_cache_tokens=2048
        ) as packed,
    ):
        shared, copied = llm.generate(prompts(), **options), packed.generate(prompts(), **options)
    assert [o.logprobs for o in shared] == [o.logprobs for o in copied]


def test_hooks_of_the_module_run_in_generation_and_stay():
    module = make_model(make_config("LlamaConfig"))
    with live(module) as llm:
        plain = llm.generate(prompts()[2], **GREEDY)
    handle = module.model.layers[0].mlp.register_forward_hook(lambda m, i, output: output * 0)
    with live(module) as llm:
        steered = llm.generate(prompts()[2], **GREEDY)
        check_greedy(llm, module)
    assert steered.token_ids != plain.token_ids
    handle.remove()


def test_a_replaced_parameter_is_refused():
    module = make_model(make_config("LlamaConfig"))
    with live(module) as llm:
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight * 2)
        with pytest.raises(ConfigError, match="lm_head.weight is another object"):
            llm.weights_changed()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"quantization": "int8"}, "quantization='int8'"),
        ({"architecture": "LlamaForCausalLM"}, "architecture"),
        ({"context_length": 1000}, "at most 256"),
    ],
)
def test_options_that_would_need_other_weights_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        live(make_model(make_config("LlamaConfig")), **options)


def test_a_tokenizer_is_asked_for():
    with pytest.raises(ConfigError, match="pass tokenizer="):
        LLM(make_model(make_config("LlamaConfig")))


def test_a_forward_of_its_own_is_refused():
    module = make_model(make_config("LlamaConfig"))
    module.model.norm.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="model.norm .* forward of its own"):
        live(module)


# -- a class as someone writes it in a notebook ---------------------------------------------------


class NotebookConfig(AutoConfig.for_model("llama").__class__):
    model_type = "notebook"


class NotebookAttention(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_key_value_groups = 2
        self.qkv = torch.nn.Linear(48, 48 + 2 * 24)
        self.out = torch.nn.Linear(48, 48)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).split([48, 24, 24], -1)
        q, k, v = (t.unflatten(-1, (-1, 12)).transpose(1, 2) for t in (q, k, v))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        out, _ = function(self, q, k, v, mask, scaling=0.5)
        return self.out(out.flatten(2))


class NotebookLM(PreTrainedModel, GenerationMixin):
    config_class = NotebookConfig
    _supports_sdpa = True
    extra = None

    def __init__(self, config):
        super().__init__(config)
        self.tokens = torch.nn.Embedding(config.vocab_size, 48)
        self.places = torch.nn.Embedding(config.max_position_embeddings, 48)
        self.blocks = torch.nn.ModuleList(NotebookAttention(config) for _ in range(2))
        self.head = torch.nn.Linear(48, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.tokens(input_ids) + self.places(position_ids)
        mask = create_causal_mask(self.config, x, attention_mask, None, position_ids)
        for block in self.blocks:
            x = x + block(x, mask)
            if self.extra == "shift":
                x = x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        if self.extra == "places":
            x = x + self.places(torch.arange(x.shape[1]))
        return CausalLMOutput(logits=self.head(x).tanh())


@pytest.fixture
def notebook():
    config = NotebookConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    return make_model(config, NotebookLM)


def test_a_class_from_a_notebook(notebook):
    with live(notebook) as llm:
        check_logits(model_of(llm), torch.float32, notebook)
        check_greedy(llm, notebook)


def test_a_class_from_a_notebook_and_its_checkpoint(notebook, tmp_path):
    AutoConfig.register("notebook", NotebookConfig, exist_ok=True)
    AutoModelForCausalLM.register(NotebookConfig, NotebookLM, exist_ok=True)
    notebook.save_pretrained(tmp_path)
    with LLM(tmp_path, tokenizer=make_tokenizer(), kv_cache_tokens=2048) as llm:
        assert llm.config.architecture == "NotebookLM"
        check_logits(model_of(llm), torch.float32, notebook)


def test_a_class_from_a_notebook_by_the_decorator(notebook, tmp_path):
    notebook.save_pretrained(tmp_path)
    register("NotebookLM")(NotebookLM)
    try:
        with LLM(tmp_path, tokenizer=make_tokenizer(), kv_cache_tokens=2048) as llm:
            check_logits(model_of(llm), torch.float32, notebook)
    finally:
        del ModelRegistry.models["NotebookLM"]


@pytest.mark.parametrize("extra", ["shift", "places"])
def test_what_reads_its_neighbours_elsewhere_than_in_attention_is_refused(notebook, extra):
    notebook.extra = extra
    with pytest.raises(UnsupportedModelError, match="from others elsewhere than in attention"):
        live(notebook)
