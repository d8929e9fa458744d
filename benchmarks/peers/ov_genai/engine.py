"""OpenVINO GenAI: reads a .gguf file itself; its prompt lookup, or with "+int8" a draft model, the q8_0.gguf
beside the model. Variant "f32" forces float32, else its own choice of precision holds."""

from pathlib import Path

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]


class _Streamer(genai.StreamerBase):
    def __init__(self, emit):
        super().__init__()
        self.emit = emit

    def write(self, token):
        self.emit([int(token)] if isinstance(token, int) else [int(one) for one in token])
        return genai.StreamingStatus.RUNNING

    def end(self):
        pass


def load(model: str, variant: str, speculate: bool, threads: int):
    options: dict = {"INFERENCE_NUM_THREADS": threads}
    target, _, draft = variant.partition("+")
    if target == "f32":
        options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        options |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # every prompt is read anew, as everywhere
    scheduler.max_num_batched_tokens = 2048
    options["scheduler_config"] = scheduler
    if draft:
        options["draft_model"] = genai.draft_model(str(Path(model).with_name("q8_0.gguf")), "CPU")
    else:
        options["prompt_lookup"] = speculate
    pipeline = genai.LLMPipeline(model, "CPU", **options)

    def generate(ids, count, emit):
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        if draft:
            config.num_assistant_tokens = 4
        elif speculate:
            config.num_assistant_tokens, config.max_ngram_size = 5, 3
        prompt = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        pipeline.generate(inputs, config, _Streamer(emit))

    return generate
