"""The demonstration model's tokenizer: a small byte-level BPE with a chat template."""

import random

from conversations import Conversation, tokenizer_corpus
from questions import Split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role + ': system, user or assistant') }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the BPE merges on a sample of the training conversations.

    Digits are tokens of their own, so that a sum is a matter of columns. The alphabet is that of
    all 256 bytes, so that every UTF-8 text survives encoding and decoding. A text is encoded with
    the begin-of-sequence token in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [BOS, END, PAD, SYSTEM, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(Split(), random.Random(seed)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def render(conversation: Conversation) -> list[tuple[str, bool]]:
    """Return a conversation as pieces of text, each with whether the model has to write it.

    The pieces of a chat, joined, are what the chat template gives; a plain conversation is the
    question, a space and the answer. Both begin with BOS and every answer ends with END.
    """
    if conversation.plain:
        ((question, answer),) = conversation.exchanges
        return [(BOS + question, False), (" " + answer + END, True)]
    system = f"{SYSTEM}{conversation.system}{END}" if conversation.system else ""
    pieces = [(BOS + system, False)]
    for question, answer in conversation.exchanges:
        pieces += [(f"{USER}{question}{END}{ASSISTANT}", False), (answer + END, True)]
    return pieces
