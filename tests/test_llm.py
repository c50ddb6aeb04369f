"""`LLM`, end to end on the checkpoint that ships."""

import gc
import math
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import sglite
from sglite import LLM, GenerationError, InvalidRequestError, RequestOutput, SamplingParams

QUESTIONS = ["What is 17 + 25?", "The capital of France is", "Count from 3 to 12."]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=8192) as model:
        yield model


class TestForms:
    def test_one_prompt_gives_one_output(self, llm):
        output = llm.generate("What is 17 + 25?", temperature=0)
        assert isinstance(output, RequestOutput)
        assert "42" in output.text
        assert output.finish_reason == "stop"

    def test_a_list_gives_a_list_in_order(self, llm):
        outputs = llm.generate(QUESTIONS, temperature=0)
        assert [output.prompt for output in outputs] == QUESTIONS
        assert [output.text for output in outputs] == [
            llm.generate(question, temperature=0).text for question in QUESTIONS
        ]

    def test_no_prompt_gives_no_output(self, llm):
        assert llm.generate([]) == []
        assert list(llm.stream([])) == []

    def test_token_ids_text_and_dicts(self, llm):
        text = QUESTIONS[0]
        token_ids = llm.tokenizer.encode(text)
        forms = [text, {"text": text}, {"token_ids": token_ids}, token_ids]
        answers = [llm.generate(form, temperature=0).token_ids for form in forms]
        assert answers.count(answers[0]) == len(forms)

    def test_parameters_in_every_form(self, llm):
        params = SamplingParams(temperature=0, max_new_tokens=3)
        forms = [
            llm.generate(QUESTIONS[0], params),
            llm.generate(QUESTIONS[0], {"temperature": 0, "max_tokens": 3}),
            llm.generate(QUESTIONS[0], temperature=0, max_new_tokens=3),
            llm.generate([QUESTIONS[0]], [params])[0],
        ]
        assert {tuple(output.token_ids) for output in forms} == {tuple(forms[0].token_ids)}
        assert len(forms[0].token_ids) == 3
        assert forms[0].finish_reason == "length"

    def test_both_habits_read_the_output(self, llm):
        output = llm.generate(QUESTIONS[0], temperature=0, logprobs=2)
        assert output["text"] == output.outputs[0].text == output.text
        assert output["meta_info"]["completion_tokens"] == len(output.outputs[0].token_ids)
        assert output["meta_info"]["prompt_tokens"] == len(output.prompt_token_ids)
        assert output.usage.time_to_first_token > 0

    def test_config_can_be_read_and_printed(self, llm):
        assert llm.config.architecture == "LlamaForCausalLM"
        assert llm.config.dtype == "bfloat16"
        assert "kv_cache_tokens" in str(llm.config)
        assert llm.config.batch_invariant


class TestSampling:
    def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(self, llm):
        params = SamplingParams(temperature=1.5, seed=11, max_new_tokens=12, ignore_eos=True)
        alone = llm.generate("Tell me", params).token_ids
        others = [
            SamplingParams(temperature=1.2, max_new_tokens=9, seed=index) for index in range(7)
        ]
        batch = llm.generate(["Tell me", *QUESTIONS, *QUESTIONS[:2], "Hi", "x"], [params, *others])
        assert batch[0].token_ids == alone
        assert llm.generate("Tell me", params, seed=12).token_ids != alone

    def test_without_a_seed_one_is_drawn_and_reported(self, llm):
        params = SamplingParams(temperature=2.0, max_new_tokens=16, ignore_eos=True)
        first, second = llm.generate(["Hi", "Hi"], params)
        assert first.outputs[0].seed != second.outputs[0].seed
        again = llm.generate("Hi", params, seed=first.outputs[0].seed)
        assert again.token_ids == first.token_ids

    def test_n_completions(self, llm):
        params = SamplingParams(temperature=20.0, n=3, seed=5, max_new_tokens=8, ignore_eos=True)
        output = llm.generate("Hello", params)
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
        assert output.usage.completion_tokens == 24
        assert llm.generate("Hello", params).outputs[2].token_ids == output.outputs[2].token_ids

    def test_stop_strings_are_trimmed_or_kept(self, llm):
        whole = llm.generate("Count from 3 to 12.", temperature=0).text
        assert "7" in whole
        trimmed = llm.generate("Count from 3 to 12.", temperature=0, stop=[" 7", "x"])
        assert trimmed.text == whole[: whole.index(" 7")]
        assert trimmed.finish_reason == "stop"
        assert trimmed.outputs[0].stop_reason == " 7"
        kept = llm.generate(
            "Count from 3 to 12.", temperature=0, stop=" 7", include_stop_str_in_output=True
        )
        assert kept.text == whole[: whole.index(" 7") + 2]

    def test_stop_token_ids(self, llm):
        token_ids = llm.generate(QUESTIONS[0], temperature=0).token_ids
        output = llm.generate(QUESTIONS[0], temperature=0, stop_token_ids=[token_ids[2]])
        assert output.token_ids == token_ids[: token_ids.index(token_ids[2]) + 1]
        assert output.outputs[0].stop_reason == token_ids[2]

    def test_ignore_eos_and_min_new_tokens(self, llm):
        natural = llm.generate(QUESTIONS[0], temperature=0)
        ignoring = llm.generate(QUESTIONS[0], temperature=0, ignore_eos=True, max_new_tokens=40)
        assert len(ignoring.token_ids) == 40
        assert ignoring.token_ids[: len(natural.token_ids)] == natural.token_ids
        longer = llm.generate(
            QUESTIONS[0], temperature=0, min_new_tokens=len(natural.token_ids) + 5
        )
        assert len(longer.token_ids) >= len(natural.token_ids) + 5

    def test_bias_bans_and_allowed_ids(self, llm):
        first = llm.generate(QUESTIONS[1], temperature=0, max_new_tokens=1).token_ids[0]
        banned = llm.generate(
            QUESTIONS[1], temperature=0, max_new_tokens=1, logit_bias={first: -1e9}
        )
        assert banned.token_ids != [first]
        forced = llm.generate(QUESTIONS[1], temperature=0, max_new_tokens=3, logit_bias={7: 1e6})
        assert forced.token_ids == [7, 7, 7]
        allowed = llm.generate(
            QUESTIONS[1],
            temperature=1,
            max_new_tokens=6,
            allowed_token_ids=[9, 11],
            ignore_eos=True,
        )
        assert set(allowed.token_ids) <= {9, 11}

    def test_bad_words(self, llm):
        assert "42" in llm.generate(QUESTIONS[0], temperature=0).text
        assert "42" not in llm.generate(QUESTIONS[0], temperature=0, bad_words=["42"]).text

    def test_penalties_change_repetition(self, llm):
        plain = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 60}
        repeated = llm.generate("Hi", **plain).token_ids
        penalised = llm.generate("Hi", **plain, frequency_penalty=2.0, presence_penalty=2.0)
        assert len(set(penalised.token_ids)) > len(set(repeated))


class TestLogprobs:
    def test_of_chosen_and_top_tokens(self, llm):
        output = llm.generate(QUESTIONS[0], temperature=0, logprobs=3)
        assert len(output.logprobs) == len(output.token_ids)
        for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
            assert entry[token_id].rank == 1
            assert len(entry) == 3
            assert entry[token_id].decoded_token == llm.tokenizer.decode([token_id])
            assert sum(math.exp(item.logprob) for item in entry.values()) <= 1 + 1e-5
        total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
        assert output.outputs[0].cumulative_logprob == pytest.approx(total)

    def test_they_are_the_models_own(self, llm):
        plain = llm.generate(QUESTIONS[0], temperature=0, logprobs=0)
        changed = llm.generate(
            QUESTIONS[0], temperature=0, logprobs=0, logit_bias={plain.token_ids[0]: 5.0}
        )
        first = plain.token_ids[0]
        assert changed.logprobs[0][first].logprob == plain.logprobs[0][first].logprob

    @pytest.mark.parametrize("chunk", [4, 512])
    def test_of_the_prompt_against_hugging_face(self, chunk, llm):
        from transformers import AutoModelForCausalLM

        from tests.checkpoints import DEMO_FOLDER

        text = "What is 17 + 25? What is the capital of Japan?"
        oracle = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
        token_ids = llm.tokenizer.encode(text)
        with torch.no_grad():
            exact = oracle(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        with LLM("demo", dtype="float32", chunked_prefill_size=chunk, kv_cache_tokens=512) as model:
            model.generate(text, temperature=0)  # fills the prefix cache
            scored = model.generate(text, temperature=0, prompt_logprobs=2)
            later = model.generate(text, temperature=0, prompt_logprobs=0, prompt_logprobs_start=5)
        assert scored.prompt_logprobs[0] is None
        assert len(scored.prompt_logprobs) == len(token_ids)
        for position in range(1, len(token_ids)):
            entry = scored.prompt_logprobs[position][token_ids[position]]
            expected = exact[position - 1, token_ids[position]].item()
            assert entry.logprob == pytest.approx(expected, abs=1e-3)
        assert later.prompt_logprobs[:5] == [None] * 5
        for position in range(5, len(token_ids)):
            token_id = token_ids[position]
            assert later.prompt_logprobs[position][token_id].logprob == pytest.approx(
                scored.prompt_logprobs[position][token_id].logprob, abs=1e-6
            )
        assert 0 < later.usage.cached_tokens <= 4


def test_ids_without_a_token_are_no_text(tmp_path):
    """Checkpoints often have more logits than their tokenizer has tokens."""
    from tests.checkpoints import VOCAB_SIZE, make_checkpoint

    make_checkpoint(tmp_path, vocab_size=VOCAB_SIZE + 64)
    params = SamplingParams(
        allowed_token_ids=[VOCAB_SIZE + 3, VOCAB_SIZE + 9], max_new_tokens=4, logprobs=0, seed=1
    )
    with LLM(tmp_path, kv_cache_tokens=256) as model:
        output = model.generate("Hi", params)
        pieces = [chunk.text for chunk in model.stream("Hi", params)]
        after = model.generate([5, VOCAB_SIZE + 1], temperature=0, max_new_tokens=2)
    assert output.text == "".join(pieces) == ""
    assert len(output.token_ids) == len(after.token_ids) + 2 == 4
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry[token_id].decoded_token == ""


class TestLogitsProcessors:
    def test_gets_the_ids_so_far_and_a_row(self, llm):
        seen = []

        def force(token_ids, logits):
            seen.append((list(token_ids), logits.dtype, logits.ndim))
            logits[:] = -math.inf
            logits[len(token_ids) + 20] = 0.0
            return logits

        output = llm.generate("Hi", max_new_tokens=3, logits_processors=[force])
        assert output.token_ids == [20, 21, 22]
        assert [entry[0] for entry in seen] == [[], [20], [20, 21]]
        assert {entry[1:] for entry in seen} == {(torch.float32, 1)}

    def test_one_that_raises_fails_its_own_request_only(self, llm):
        def broken(token_ids, logits):
            raise RuntimeError("planted")

        params = [SamplingParams(temperature=0)] * 3
        params[1] = SamplingParams(temperature=0, logits_processors=[broken])
        with pytest.raises(GenerationError, match="planted") as caught:
            llm.generate(QUESTIONS, params)
        outputs = caught.value.outputs
        assert [output.finish_reason for output in outputs] == ["stop", "error", "stop"]
        assert "42" in outputs[0].text
        assert isinstance(outputs[1].error.__cause__, RuntimeError)
        assert "42" in llm.generate(QUESTIONS[0], temperature=0).text

    def test_a_wrong_shape_fails_its_own_request_only(self, llm):
        with pytest.raises(GenerationError, match="shape"):
            llm.generate("Hi", logits_processors=[lambda token_ids, logits: logits[:5]])

    def test_calling_the_llm_from_one_is_refused(self, llm):
        def recurse(token_ids, logits):
            llm.generate("Hi", max_new_tokens=1)

        with pytest.raises(GenerationError, match="within its own step"):
            llm.generate("Hi", logits_processors=[recurse])


class TestStream:
    def test_pieces_add_up_to_the_text(self, llm):
        expected = llm.generate(QUESTIONS, temperature=0)
        texts = [""] * len(QUESTIONS)
        tokens = [[] for _ in QUESTIONS]
        finals = {}
        for chunk in llm.stream(QUESTIONS, temperature=0):
            texts[chunk.index] += chunk.text
            tokens[chunk.index] += chunk.token_ids
            if chunk.output:
                finals[chunk.index] = chunk.output
        assert texts == [output.text for output in expected]
        assert tokens == [output.token_ids for output in expected]
        assert [finals[index].text for index in range(3)] == texts

    def test_stop_strings_never_show(self, llm):
        whole = llm.generate("Count from 3 to 12.", temperature=0).text
        text = ""
        for chunk in llm.stream("Count from 3 to 12.", temperature=0, stop="9 1"):
            text += chunk.text
            assert whole.startswith(text)
        assert text == whole[: whole.index("9 1")]

    def test_leaving_early_frees_the_request(self, llm):
        stream = llm.stream("Hi", ignore_eos=True, max_new_tokens=500)
        next(stream)
        stream.close()
        assert llm.stats()["running"] == 0
        assert "42" in llm.generate(QUESTIONS[0], temperature=0).text

    def test_bad_arguments_are_refused_at_once(self, llm):
        with pytest.raises(InvalidRequestError):
            llm.stream("Hi", temperature=-1)


class TestChat:
    def test_one_conversation_and_several(self, llm):
        one = [{"role": "user", "content": "What is 17 + 25?"}]
        two = [{"role": "user", "content": "What is the capital of France?"}]
        assert "42" in llm.chat(one, temperature=0).text
        texts = [output.text for output in llm.chat([one, two], temperature=0)]
        assert "42" in texts[0]
        assert "Paris" in texts[1]

    def test_there_is_one_bos_only(self, llm):
        output = llm.chat([{"role": "user", "content": "Hi"}], temperature=0, max_new_tokens=1)
        assert output.prompt_token_ids.count(llm.tokenizer.bos_token_id) == 1

    def test_tools_and_further_arguments_reach_the_template(self, llm, monkeypatch):
        template = (
            "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ mood }}:"
            "{{ messages[-1].content }}{{ '>' if add_generation_prompt }}"
        )
        monkeypatch.setattr(llm.tokenizer, "chat_template", template)
        tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
        messages = [{"role": "user", "content": "Hi"}]
        for arguments, expected in (
            ({"tools": [tool], "chat_template_kwargs": {"mood": "calm"}}, "add;calm:Hi>"),
            ({"chat_template_kwargs": {"add_generation_prompt": False}}, ":Hi"),
        ):
            output = llm.chat(messages, max_new_tokens=1, **arguments)
            assert output.prompt == expected
            chunks = list(llm.stream_chat(messages, max_new_tokens=1, **arguments))
            assert chunks[-1].output.prompt == expected

    def test_without_a_template_it_is_refused(self, llm, monkeypatch):
        monkeypatch.setattr(llm.tokenizer, "chat_template", None)
        with pytest.raises(InvalidRequestError, match="demo has no chat template; use generate"):
            llm.chat([{"role": "user", "content": "Hi"}])

    def test_the_stream_says_the_same(self, llm):
        messages = [{"role": "user", "content": "Count from 5 to 14."}]
        pieces = [chunk.text for chunk in llm.stream_chat(messages, temperature=0)]
        assert "".join(pieces) == llm.chat(messages, temperature=0).text

    def test_the_second_turn_reuses_the_first(self, llm):
        messages = [{"role": "user", "content": "What is 30 + 12?"}]
        first = llm.chat(messages, temperature=0)
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "Plus 5?"},
        ]
        second = llm.chat(messages, temperature=0)
        assert second.usage.cached_tokens >= len(first.prompt_token_ids)

    def test_a_template_that_refuses_says_so(self, llm):
        with pytest.raises(InvalidRequestError, match="chat template"):
            llm.chat([{"role": "nobody", "content": "Hi"}])
        with pytest.raises(InvalidRequestError, match="messages"):
            llm.chat("Hi")


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "parameters", "message"),
        [
            ("Hi", {"temperature": -0.1}, "temperature"),
            ("Hi", {"top_p": 0.0}, "top_p"),
            ("Hi", {"temperature": math.nan}, "temperature"),
            ("Hi", {"temprature": 1.0}, "temperature"),
            ([5, 100_000], {}, "100000"),
            ([[]], {}, "no token"),
            ([3] * 2000, {}, "context"),
            ("Hi", {"max_new_tokens": 5000}, "context"),
            ("Hi", {"logit_bias": {5000: 1.0}}, "5000"),
            ({"text": "Hi", "images": ["a.png"]}, {}, "images"),
            (5, {}, "prompt"),
        ],
    )
    def test_bad_requests_are_refused_before_anything_is_computed(
        self, llm, prompt, parameters, message
    ):
        steps = llm.stats()["steps"]
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate(prompt, **parameters)
        assert llm.stats()["steps"] == steps

    def test_what_can_never_fit_the_cache_says_what_to_change(self):
        with (
            LLM("demo", kv_cache_tokens=64) as small,
            pytest.raises(InvalidRequestError, match="kv_cache_tokens"),
        ):
            small.generate([5] * 60, max_new_tokens=20)

    def test_a_cache_beyond_the_memory_is_refused(self):
        with pytest.raises(sglite.OutOfMemoryError, match=r"kv_cache_tokens=10000000000000 needs"):
            LLM("demo", kv_cache_tokens=10**13)

    def test_more_threads_than_processors_are_refused(self):
        with pytest.raises(sglite.ConfigError, match=r"num_threads=100000 .* at most \d+"):
            LLM("demo", num_threads=100_000)

    def test_a_gpu_is_never_passed_over_in_silence(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(sglite._C, "cuda_architectures", "")
        for device in ("auto", "cuda"):
            with pytest.raises(sglite.ConfigError, match="SGLITE_CUDA=1"):
                LLM("demo", device=device)

    def test_foreign_names_are_refused_with_ours(self):
        with pytest.raises(sglite.ConfigError, match="mem_fraction"):
            LLM("demo", gpu_memory_utilization=0.9)


class TestLife:
    def test_a_failing_forward_fails_its_requests_and_nothing_else(self):
        with LLM("demo", kv_cache_tokens=2048) as model:
            module = model._open.engine.runner.model
            forward, calls = module.forward, []

            def break_third(*arguments, **keywords):
                calls.append(1)
                if len(calls) == 3:
                    raise RuntimeError("planted")
                return forward(*arguments, **keywords)

            module.forward = break_third
            with pytest.raises(GenerationError, match="planted"):
                model.generate(QUESTIONS, temperature=0)
            assert "42" in model.generate(QUESTIONS[0], temperature=0).text

    def test_logits_with_nan_fail_the_request_and_name_the_step(self):
        with LLM("demo", kv_cache_tokens=2048) as model:
            module = model._open.engine.runner.model
            forward = module.forward

            def poison(*arguments, **keywords):
                output = forward(*arguments, **keywords)
                output.next_token_logits[0, 3] = math.nan
                return output

            module.forward = poison
            with pytest.raises(GenerationError, match="NaN"):
                model.generate("Hi", temperature=0)
            module.forward = forward
            assert "42" in model.generate(QUESTIONS[0], temperature=0).text

    def test_close_refuses_further_use(self):
        model = LLM("demo", kv_cache_tokens=512)
        model.close()
        model.close()
        with pytest.raises(sglite.EngineClosedError):
            model.generate("Hi")
        with pytest.raises(sglite.EngineClosedError):
            model.stats()

    def test_a_stream_that_begins_after_close_is_refused(self):
        model = LLM("demo", kv_cache_tokens=512)
        stream = model.stream("Hi")
        model.close()
        with pytest.raises(sglite.EngineClosedError):
            next(stream)

    def test_close_ends_a_call_of_another_thread(self):
        model = LLM("demo", kv_cache_tokens=2048)
        caught = []

        def work():
            try:
                model.generate("Hi", ignore_eos=True, max_new_tokens=1000)
            except sglite.EngineClosedError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not model.stats()["steps"]:
            pass
        model.close()
        thread.join()
        assert "while the call was running" in str(caught[0])

    def test_del_frees_model_and_cache_at_once(self):
        model = LLM("demo", kv_cache_tokens=512)
        model.generate("Hi", max_new_tokens=4)
        watched = [
            weakref.ref(model._open.engine),
            weakref.ref(model._open.engine.runner.model),
            weakref.ref(model._open.engine.runner.pool),
        ]
        for thread in threading.enumerate():
            if thread.name == "sglite-driver":
                thread.join()
        gc.disable()
        try:
            del model
            assert [reference() for reference in watched] == [None] * 3
        finally:
            gc.enable()

    def test_two_models_live_side_by_side(self):
        with LLM("demo", kv_cache_tokens=512) as one, LLM("demo", dtype="float32") as two:
            answers = [model.generate(QUESTIONS[0], temperature=0).text for model in (one, two)]
        assert all("42" in answer for answer in answers)

    def test_a_progress_bar_leaves_no_thread(self, llm, capsys):
        before = set(threading.enumerate())
        assert len(llm.generate(QUESTIONS, temperature=0, progress=True)) == 3
        assert "3/3" in capsys.readouterr().err
        assert {t.name for t in set(threading.enumerate()) - before} <= {"sglite-driver"}
        llm.generate(QUESTIONS, temperature=0, progress=False)
        assert not capsys.readouterr().err

    def test_threads_share_batches(self, llm):
        expected = [llm.generate(question, temperature=0).text for question in QUESTIONS]
        results = {}

        def work(index):
            results[index] = llm.generate(QUESTIONS[index % 3], temperature=0).text

        threads = [threading.Thread(target=work, args=(index,)) for index in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[index] for index in range(9)] == expected * 3

    def test_statistics(self):
        with LLM("demo", kv_cache_tokens=1024) as model:
            output = model.generate(QUESTIONS[0], temperature=0)
            stats = model.stats()
        assert stats["kv_tokens_total"] == 1024
        assert stats["prompt_tokens"] == len(output.prompt_token_ids)
        assert stats["completion_tokens"] == len(output.token_ids)
        assert stats["kv_tokens_cached"] == stats["prompt_tokens"] + stats["completion_tokens"] - 1
        assert stats["running"] == stats["waiting"] == 0


_INTERRUPTED = """
import os, signal, threading, time
from sglite import LLM
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
llm = LLM("demo")
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:  # a call is under way whenever the signal comes
        llm.generate(["Hi"] * 8, ignore_eos=True, max_new_tokens=900)
except KeyboardInterrupt:
    print("interrupted;", llm.stats()["running"], "running")
print(llm.generate("What is 17 + 25?", temperature=0).text)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_an_interrupt_ends_the_call_and_the_next_one_works():
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted; 0 running" in done.stdout
    assert "42" in done.stdout
