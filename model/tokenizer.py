"""Carries a model's tokenizer, chat template and generation defaults into a checkpoint folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from .config import DecoderConfig
from .errors import ModelError
from .files import write_text

# Vocabularies (tokenizer.ggml.pre) that set each digit apart before all else, which transformers leaves out.
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")
GENERATION_KEYS = ("temperature", "top_k", "top_p", "do_sample")


def write_tokenizer_of_folder(folder: Path, out: Path, config: DecoderConfig) -> None:
    """From a Hugging Face folder; transformers converts a tokenizer that is not a tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    else:
        write_text(out / "tokenizer.json", _convert_tokenizer(folder))
    if template := _read_chat_template(folder):
        write_text(out / "chat_template.jinja", template)
    write_generation_config(out, config, _read_optional(folder / "generation_config.json"))


def write_generation_config(out: Path, config: DecoderConfig, defaults: dict[str, Any]) -> None:
    """`defaults`: a transformers generation_config, of which the sampling keys are kept."""
    settings: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    settings |= {key: defaults[key] for key in GENERATION_KEYS if defaults.get(key) is not None}
    write_text(out / "generation_config.json", json.dumps(settings, indent=2) + "\n")


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """Of a folder's generation_config.json, which overrules its config.json; () if it names none."""
    eos = _read_optional(folder / "generation_config.json").get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def write_tokenizer_of_gguf(path: Path, metadata: dict[str, Any], out: Path, config: DecoderConfig) -> None:
    """From the vocabulary, merges and template in a .gguf file, by way of transformers."""
    # The file alone says how it tokenizes. AutoTokenizer would first read all of it once more for a config.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # a vocabulary of a kind that transformers cannot convert
        raise ModelError(f"{path}: its tokenizer cannot be converted: {error}") from None
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.pre") in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    write_text(out / "tokenizer.json", backend.to_str())
    if template := metadata.get("tokenizer.chat_template"):
        write_text(out / "chat_template.jinja", template)
    write_generation_config(out, config, {})


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    path = checkpoint / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read ({error}): build the checkpoint again") from None


def _convert_tokenizer(folder: Path) -> str:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # a missing file, a missing converter, a class without a fast form
        raise ModelError(
            f"{folder} has no tokenizer.json, and its tokenizer could not be converted ({error}): "
            "save it with transformers' AutoTokenizer(...).save_pretrained and put tokenizer.json there"
        ) from None


def _read_chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _read_optional(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
