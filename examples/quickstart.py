"""The first minute with sglite: load, generate, sample, chat, stream."""

from sglite import LLM, SamplingParams

llm = LLM("demo")  # a folder or a Hugging Face hub id works the same way
print(llm.config)

# One prompt gives one output.
output = llm.generate("What is 17 + 25?", max_new_tokens=16, temperature=0)
print(output.text, output.usage)

# A list of prompts is one batch, answered in order.
params = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=16, seed=1)
for output in llm.generate(["The capital of Peru is", "The capital of Japan is"], params):
    print(repr(output.text), output.finish_reason)

# A conversation goes through the model's chat template.
print(llm.chat([{"role": "user", "content": "What is the capital of Italy?"}], temperature=0).text)

# A stream is a plain iterator.
for chunk in llm.stream("Count from 3 to 9.", temperature=0):
    print(chunk.text, end="", flush=True)
print()

llm.close()  # or `with LLM("demo") as llm:`, or just `del llm`
