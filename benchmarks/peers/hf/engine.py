"""transformers on torch, with its prompt lookup."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class _Streamer(BaseStreamer):
    """The first thing it is given is the prompt."""

    def __init__(self, emit):
        self.emit, self.is_prompt = emit, True

    def put(self, value):
        if not self.is_prompt:
            self.emit(value.flatten().tolist())
        self.is_prompt = False

    def end(self):
        pass


def load(model: str, variant: str, speculate: bool, threads: int):
    torch.set_num_threads(threads)
    dtype = getattr(torch, variant)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
    loaded.generation_config.eos_token_id = None
    options = {"prompt_lookup_num_tokens": 10} if speculate else {}

    def generate(ids, count, emit):
        prompt = torch.tensor([ids])
        loaded.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(emit),
            **options,
        )

    return generate
