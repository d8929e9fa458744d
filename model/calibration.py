"""Calibration tokens: what the model itself writes, or windows cut from files or a data set."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .decoder import Decoder
from .errors import ModelError
from .files import write_text
from .progress import Progress, no_progress
from .pypi import hash_file
from .sample import sample_rows
from .store import Checkpoint, write_part
from .tokenizer import load_tokenizer
from .turns import read_turns

SELF = "self"
DATASET = "dataset:"
JOINT = "\n\n"  # between files and between the documents of one
DATASET_SURPLUS = 16  # characters read from a data set for each token wanted
BOTH_KEYS = "calibration.num_calibration_samples or calibration.max_seq_length"


def write_tokens(
    checkpoint: Path,
    text: str | Sequence[str],
    num_calibration_samples: int,
    max_seq_length: int,
    seed: int,
    out: Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Writes ``out/tokens.safetensors`` and what it was made from as ``out/calibration.json``, which is
    returned: "tokens", int32 [num_calibration_samples, max_seq_length], and "frequencies", float64 [V], how
    often each token is in the whole text or, where the model writes it, is to be expected.

    text: "self" (the model writes it), paths of .txt or .jsonl files (their "text" fields), or
    "dataset:NAME[@CONFIG][:SPLIT[:COLUMN]]" on the hub (train and text if not given).

    Files are joined in the order given, tokenized as one, and cut into windows without overlap: the first
    ones if there are just enough, else windows spread evenly over the whole. Each window begins with the
    tokens that the tokenizer puts before a prompt. `seed` is of "self" alone.

    Raises ModelError for a text that is missing or too short."""
    model = Checkpoint(checkpoint)
    if max_seq_length > model.config.max_position_embeddings:
        raise ModelError(
            f"calibration.max_seq_length is {max_seq_length}, but the model ends at "
            f"{model.config.max_position_embeddings} tokens: lower it"
        )
    tokenizer = load_tokenizer(checkpoint)
    shape = (num_calibration_samples, max_seq_length)
    if text == SELF:
        turns = read_turns(checkpoint, model.config, tokenizer)
        tokens, frequencies = sample_rows(Decoder.from_checkpoint(model), turns, *shape, seed, progress)
        origin: dict[str, Any] = {"seed": seed, "opening": tokenizer.decode(turns.opening, False)}
    else:
        names = [text] if isinstance(text, str) else list(text)
        joined, origin = read_text(names, num_calibration_samples * max_seq_length)
        ids = tokenizer.encode(joined, add_special_tokens=False).ids
        tokens = cut_windows(ids, begin_tokens(tokenizer), *shape, ", ".join(names))
        frequencies = torch.bincount(torch.tensor(ids), minlength=model.config.vocab_size).double()
        origin["num_tokens_of_text"] = len(ids)
    report = {
        "text": text if isinstance(text, str) else list(text),
        **origin,
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    write_part(out, "tokens", {"tokens": tokens, "frequencies": frequencies})
    write_text(out / "calibration.json", json.dumps(report, indent=2) + "\n")
    return report


def cut_windows(ids: list[int], begin: list[int], num_windows: int, length: int, name: str) -> Tensor:
    """int32 [num_windows, length]: `begin`, then a window of `ids`; the windows are evenly spread."""
    size = length - len(begin)
    if size < 1:
        raise ModelError(f"calibration.max_seq_length is {length}: raise it above {len(begin)}")
    num_found = len(ids) // size
    if num_found < num_windows:
        raise ModelError(
            f"calibration.text: {name} has {len(ids)} tokens, but {num_windows} windows of {size} take "
            f"{num_windows * size}: give more text, or lower {BOTH_KEYS}"
        )
    starts = [window * num_found // num_windows * size for window in range(num_windows)]
    return torch.tensor([begin + ids[start : start + size] for start in starts], dtype=torch.int32)


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before any text, such as BOS."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    marked = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    return [token for token, _ in marked]


def read_text(names: list[str], num_tokens: int) -> tuple[str, dict[str, Any]]:
    """The joined text and a record of where it is from."""
    if len(names) == 1 and names[0].startswith(DATASET):
        return read_dataset(names[0].removeprefix(DATASET), num_tokens * DATASET_SURPLUS), {}
    paths = [Path(name).expanduser() for name in names]
    texts = [JOINT.join(read_documents(path)) for path in paths]
    return JOINT.join(texts), {"sha256": [hash_file(path) for path in paths]}


def read_documents(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"calibration.text: {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
            yield text
        except (ValueError, KeyError, TypeError):
            raise ModelError(
                f'calibration.text: {path}, line {number}: wanted a JSON object with a "text"'
            ) from None


def read_dataset(spec: str, num_characters: int) -> str:
    """The first documents of a hub data set, until they have `num_characters` together."""
    fields = spec.split(":")
    if len(fields) > 3:
        raise ModelError(f"calibration.text: {DATASET}{spec} is not {DATASET}NAME[@CONFIG][:SPLIT[:COLUMN]]")
    name, split, column = fields + ["train", "text"][len(fields) - 1 :]
    name, _, config = name.partition("@")
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError(
            f"calibration.text: {DATASET}{spec} needs the datasets package: "
            "pip install 'draftsmith[datasets]'"
        ) from None
    documents: list[str] = []
    num_found = 0
    try:
        for row in load_dataset(name, config or None, split=split, streaming=True):
            documents.append(row[column])
            num_found += len(row[column]) + len(JOINT)
            if num_found >= num_characters:
                break
    except Exception as error:  # the library passes on what its many backends raise
        raise ModelError(
            f"calibration.text: {DATASET}{spec} cannot be read ({type(error).__name__}: {error}); "
            "give files, or self"
        ) from None
    return JOINT.join(documents)
