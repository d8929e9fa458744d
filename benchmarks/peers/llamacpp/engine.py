"""llama.cpp through llama-cpp-python, with its prompt lookup (two tokens, as its authors advise for CPUs)."""

from itertools import islice

from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # pyright: ignore[reportMissingImports]


def load(model: str, variant: str, speculate: bool, threads: int):
    llama = Llama(
        model,
        n_ctx=2048,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=speculate,  # without it the lookup breaks once a context passes n_batch
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=2) if speculate else None,
        verbose=False,
    )

    def generate(ids, count, emit):
        llama.reset()
        for token in islice(llama.generate(ids, temp=0.0), count):
            emit([int(token)])

    return generate
