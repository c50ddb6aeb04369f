"""Names that belong to other libraries, and what to write instead.

People arrive with vLLM's, SGLang's or Hugging Face's names in their fingers. The names that mean
the same are accepted (`sampling_params.ALIASES`, `config.ALIASES`); all the others are refused
with the sentence found here. Each sentence continues "... does not exist here: ".
"""

from __future__ import annotations

__all__ = ["advice_for_option", "advice_for_prompt_key", "advice_for_sampling"]

_STRUCTURED = (
    "structured output is a logits processor (logits_processors=[...]); examples/json_output.py "
    "shows one with llguidance"
)
_PROCESSOR = "write it as a logits processor (logits_processors=[...])"
_BEAMS = "there is no beam search; draw n completions and rank them by cumulative_logprob"
_LORA = "LoRA adapters are not supported; merge the adapter into the weights before loading"
_SPECULATIVE = "there is no speculative decoding"
_PARALLEL = "a model runs on one device"
_SERVER = "there is no server and no other process"
_KERNELS = "the kernels are chosen by device and shape"
_IMAGES = "images belong to the prompt, {'text': ..., 'images': [...]}, or to generate(images=...)"
_PIXELS = (
    "use image_processor={'max_pixels': ...}, which takes the keywords of the Hugging Face image "
    "processor"
)

_SAMPLING = {
    # vLLM
    "best_of": _BEAMS,
    "use_beam_search": _BEAMS,
    "beam_width": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "detokenize": "the text is always made; .token_ids has the ids",
    "extra_args": _PROCESSOR,
    "flat_logprobs": "logprobs have one shape, a list of dicts from token id to Logprob",
    "output_kind": "llm.stream() gives pieces, llm.generate() the whole",
    "spaces_between_special_tokens": (
        "it has no effect on the tokenizers of transformers 5; leave it out"
    ),
    "structured_outputs": _STRUCTURED,
    "truncate_prompt_tokens": "cut the prompt's token ids yourself and pass those",
    "use_tqdm": "use progress",
    # Ours, where it has no place.
    "progress": "it is an argument of generate(), chat() and resume(); streams and async calls "
    "show no bar",
    "priority": "requests are served in the order in which they come",
    # SGLang
    "custom_logit_processor": "use logits_processors",
    "custom_params": _PROCESSOR,
    "ebnf": _STRUCTURED,
    "json_schema": _STRUCTURED,
    "regex": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "stop_regex": "stop takes plain strings",
    "sampling_seed": "use seed",
    "stream": "use llm.stream(...)",
    "stream_interval": "every token that completes some text is a chunk of llm.stream()",
    "return_logprob": "use logprobs (chosen and most likely tokens) or prompt_logprobs",
    "top_logprobs_num": "use logprobs, the number of most likely tokens",
    "logprob_start_len": "use prompt_logprobs with prompt_logprobs_start",
    "token_ids_logprob": "use logprobs, which gives the most likely tokens and the chosen one",
    "return_hidden_states": "hidden states are not returned; register a model that keeps them",
    "rid": "requests are numbered by the engine; .request_id has the name",
    "input_ids": "pass the ids as the prompt: [1, 2, 3] or {'token_ids': [1, 2, 3]}",
    "prompt_token_ids": "pass the ids as the prompt: [1, 2, 3] or {'token_ids': [1, 2, 3]}",
    "image_data": _IMAGES,
    "images": _IMAGES,
    "multi_modal_data": _IMAGES,
    # Hugging Face and OpenAI
    "bad_words_ids": "use bad_words, or logit_bias for single ids",
    "do_sample": "use temperature (0 is greedy)",
    "eos_token_id": "use stop_token_ids",
    "max_length": "use max_new_tokens, which does not count the prompt",
    "min_length": "use min_new_tokens, which does not count the prompt",
    "max_completion_tokens": "use max_new_tokens",
    "logits_processor": "use logits_processors",
    "no_repeat_ngram_size": _PROCESSOR,
    "num_beams": _BEAMS,
    "num_return_sequences": "use n",
    "response_format": _STRUCTURED,
    "stop_sequences": "use stop",
    "stop_strings": "use stop",
    "stopping_criteria": "use stop, stop_token_ids or leave a stream early",
    "streamer": "use llm.stream(...)",
    "suppress_tokens": "use logit_bias or bad_words",
    "top_logprobs": "use logprobs, the number of most likely tokens",
    "typical_p": _PROCESSOR,
    "repeat_penalty": "use repetition_penalty",
}

_SAMPLING_PREFIXES = {"guided_": _STRUCTURED, "lora_": _LORA}

_OPTIONS = {
    # memory and batch
    "gpu_memory_utilization": (
        "use mem_fraction, the share of the free memory that the KV cache takes, or kv_cache_tokens"
    ),
    "mem_fraction_static": (
        "use mem_fraction, the share of the free memory that the KV cache takes, or kv_cache_tokens"
    ),
    "kv_cache_memory_bytes": "use kv_cache_tokens",
    "max_total_tokens": "use kv_cache_tokens",
    "num_gpu_blocks_override": "use kv_cache_tokens (in tokens, not blocks)",
    "block_size": "use page_size",
    "max_num_seqs": "use max_running_requests",
    "max_num_batched_tokens": "use chunked_prefill_size, which counts prefill tokens of a step",
    "max_prefill_tokens": "use chunked_prefill_size, which counts prefill tokens of a step",
    "enable_chunked_prefill": "prefill is always chunked; chunked_prefill_size says how",
    "max_model_len": "use context_length",
    "context_len": "use context_length",
    "max_seq_len": "use context_length",
    "max_seq_len_to_capture": "use cuda_graphs (True or False)",
    "swap_space": "a request that gives way is computed again from the prefix cache",
    "cpu_offload_gb": "weights are not offloaded; use a smaller model or dtype",
    "kv_cache_dtype": "the KV cache has the dtype of the model",
    "enable_prefix_caching": "use prefix_cache",
    "disable_radix_cache": "use prefix_cache=False",
    "enable_hierarchical_cache": "the prefix cache lives in the memory of the device",
    "radix_eviction_policy": "the least recently used prefix is evicted",
    "schedule_policy": "requests are served in the order in which they come",
    "scheduling_policy": "requests are served in the order in which they come",
    # devices and kernels
    "enforce_eager": "use cuda_graphs=False",
    "disable_cuda_graph": "use cuda_graphs=False",
    "compilation_config": "nothing is compiled at run time; see cuda_graphs",
    "enable_torch_compile": "nothing is compiled at run time; see cuda_graphs",
    "attention_backend": _KERNELS,
    "sampling_backend": _KERNELS,
    "device_map": "use device",
    "base_gpu_id": "use device, for example 'cuda:1'",
    "torch_dtype": "use dtype",
    "enable_deterministic_inference": "use batch_invariant",
    "distributed_executor_backend": _PARALLEL,
    "disable_custom_all_reduce": _PARALLEL,
    "disable_overlap_schedule": "how steps overlap is chosen by device",
    "dp": _PARALLEL,
    "nnodes": _PARALLEL,
    "node_rank": _PARALLEL,
    "num_gpus": _PARALLEL,
    "pp": _PARALLEL,
    "tp": _PARALLEL,
    # model, tokenizer, files
    "tokenizer_path": "use tokenizer",
    "tokenizer_mode": "the tokenizer is the Hugging Face one that the checkpoint names",
    "tokenizer_revision": "load the tokenizer yourself and pass it as tokenizer",
    "skip_tokenizer_init": "a tokenizer is always loaded; prompts may be token ids all the same",
    "random_seed": "use seed",
    "hf_token": "use token",
    "use_auth_token": "use token",
    "download_dir": "use cache_dir",
    "load_format": "weights are read from safetensors files",
    "model_loader_extra_config": "weights are read from safetensors files",
    "config_format": "the configuration is read from config.json",
    "model_impl": "use architecture",
    "hf_overrides": "edit config.json, or pass a live Hugging Face module",
    "json_model_override_args": "edit config.json, or pass a live Hugging Face module",
    "rope_scaling": "edit config.json, or pass a live Hugging Face module",
    "rope_theta": "edit config.json, or pass a live Hugging Face module",
    "generation_config": "what generation_config.json says holds for what a call leaves unset",
    "chat_template": "set llm.tokenizer.chat_template",
    "is_embedding": "there are no embedding models",
    "task": "models generate text",
    "runner": "models generate text",
    "allowed_local_media_path": (
        "no URL of a message opens a file; pass files of your own as {'type': 'image', 'image': "
        "path}"
    ),
    "limit_mm_per_prompt": "the number of images is bounded by the context alone",
    "mm_processor_kwargs": _PIXELS,
    "mm_process_config": _PIXELS,
    "max_pixels": _PIXELS,
    "min_pixels": _PIXELS,
    "enable_lora": _LORA,
    "max_loras": _LORA,
    "max_lora_rank": _LORA,
    "max_logprobs": "logprobs goes up to the size of the vocabulary",
    "logits_processors": "pass them to llm.generate(), request by request",
    "guided_decoding_backend": _STRUCTURED,
    "structured_outputs_config": _STRUCTURED,
    "grammar_backend": _STRUCTURED,
    # server
    "host": _SERVER,
    "port": _SERVER,
    "api_key": _SERVER,
    "served_model_name": _SERVER,
    "disable_log_stats": "nothing is logged; llm.stats() answers",
    "disable_log_requests": "nothing is logged; llm.stats() answers",
    "log_level": "nothing is logged; llm.stats() answers",
    "stream_interval": "every token that completes some text is a chunk of llm.stream()",
    "watchdog_timeout": _SERVER,
    "worker_cls": _SERVER,
}

_OPTION_PREFIXES = {
    "cuda_graph_": "use cuda_graphs (True or False); graphs are captured at first use",
    "data_parallel_": _PARALLEL,
    "decode_attention_": _KERNELS,
    "prefill_attention_": _KERNELS,
    "flashinfer_": _KERNELS,
    "triton_attention_": _KERNELS,
    "moe_": _KERNELS,
    "disaggregation_": _SERVER,
    "dp_": _PARALLEL,
    "ep_": _PARALLEL,
    "expert_parallel_": _PARALLEL,
    "hicache_": "the prefix cache lives in the memory of the device",
    "lora_": _LORA,
    "pipeline_parallel_": _PARALLEL,
    "pp_": _PARALLEL,
    "ray_": _PARALLEL,
    "speculative_": _SPECULATIVE,
    "tensor_parallel_": _PARALLEL,
    "tokenizer_pool_": _SERVER,
    "tokenizer_worker_": _SERVER,
    "tp_": _PARALLEL,
}

_PROMPT_KEYS = {
    "attention_mask": "pass encoding['input_ids'] of one prompt, without padding",
    "token_type_ids": "pass encoding['input_ids'] of one prompt, without padding",
    "role": "conversations go to llm.chat(...)",
    "content": "conversations go to llm.chat(...)",
    "messages": "conversations go to llm.chat(...)",
    "multi_modal_data": "use images",
    "image_data": "use images",
    "image": "use images",
    "prompt_embeds": "a prompt is text or token ids",
    "input_embeds": "a prompt is text or token ids",
}


def advice_for_sampling(name: str) -> str | None:
    """Return what to write instead of another library's sampling parameter, or None."""
    return _look_up(name, _SAMPLING, _SAMPLING_PREFIXES)


def advice_for_option(name: str) -> str | None:
    """Return what to write instead of another library's engine argument, or None."""
    return _look_up(name, _OPTIONS, _OPTION_PREFIXES)


def advice_for_prompt_key(name: str) -> str | None:
    """Return what to write instead of another library's key of a prompt dict, or None."""
    return _PROMPT_KEYS.get(name)


def _look_up(name: str, exact: dict[str, str], prefixes: dict[str, str]) -> str | None:
    if name in exact:
        return exact[name]
    return next((text for prefix, text in prefixes.items() if name.startswith(prefix)), None)
