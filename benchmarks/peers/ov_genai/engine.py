"""OpenVINO GenAI: reads a .gguf file itself; its prompt lookup. Variant "f32" forces float32, else its own
choice of precision holds."""

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
    if variant == "f32":
        options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        options |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # every prompt is read anew, as everywhere
    scheduler.max_num_batched_tokens = 2048
    pipeline = genai.LLMPipeline(model, "CPU", options, prompt_lookup=speculate, scheduler_config=scheduler)

    def generate(ids, count, emit):
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        if speculate:
            config.num_assistant_tokens, config.max_ngram_size = 5, 3
        prompt = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        pipeline.generate(inputs, config, _Streamer(emit))

    return generate
