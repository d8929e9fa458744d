"""Stand-ins for real models: engines whose logits come from a table, and bundles around them.

The logits of a `FakeEngine` depend on exactly the tokens in the cache slots that a row sees. So a slot
that was not written, or still holds a rejected draft, changes the output, as with a real model.
"""

import hashlib
import json
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from draftsmith.speculate.bundle import Bundle
from draftsmith.speculate.manifest import SCHEMA_VERSION
from draftsmith.speculate.onnx_engine import OnnxEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = 256, 257
BYTE_VOCAB = 258  # 256 bytes, BOS, EOS
TOKEN_BYTES = np.dtype(np.int64).itemsize


class FakeEngine:
    """A random language model over `vocab_size` tokens.

    seed: of the model that it resembles. own: of its own part, weighted by `noise` (0: the model itself).
    The common part looks at the last two tokens, and a little at all that is visible.
    """

    def __init__(
        self,
        vocab_size: int,
        seed: int = 0,
        noise: float = 0.0,
        own: int = 1,
        scale: float = 2.0,
        max_seq_len: int = 256,
        padding: int = 0,
        pad_logit: float = 0.0,
    ) -> None:
        self.vocab_size = vocab_size + padding
        self.max_seq_len = max_seq_len
        self.calls = self.rows = 0
        self._settings = (vocab_size, seed, noise, own, scale, padding, pad_logit)
        self._slots = np.full(max_seq_len, -1, np.int64)
        self._by_guest = np.zeros(max_seq_len, bool)  # slots that a guest wrote last

    def reserve(self, num_slots: int) -> None:
        assert num_slots <= self.max_seq_len
        self._slots[:] = -1

    def forward(self, token_ids, start, position_ids=None, mask=None, num_logits=None) -> np.ndarray:
        assert len(token_ids) > 0 and (num_logits is None or 0 < num_logits <= len(token_ids))
        end = start + len(token_ids)
        assert end <= len(self._slots)
        assert token_ids.min() >= 0 and token_ids.max() < self.vocab_size
        assert not start or self._slots[:start].min() >= 0, "a slot below the first new one was never written"
        self.calls += 1
        self.rows += len(token_ids)
        self._slots[start:end] = token_ids
        self._by_guest[start:end] = isinstance(self, FakeGuest)
        if mask is None:
            assert position_ids is None
            mask = np.tri(len(token_ids), end, start, dtype=bool)
        else:
            new = mask[:, start:]
            assert new.diagonal().all() and not np.triu(new, 1).any(), (
                "a row sees itself and what is before it"
            )
            depths = mask.sum(axis=1) - 1
            assert (position_ids == depths).all(), "a position is the number of tokens before it"
        by_guest = self._by_guest[:end][mask.any(axis=0)].any()
        assert isinstance(self, FakeGuest) or not by_guest, "a row sees what a guest wrote"
        first = 0 if num_logits is None else len(token_ids) - num_logits
        return np.stack([self.logits_after(self._slots[:end][sees]) for sees in mask[first:]])

    def keep(self, start, slots) -> None:
        assert np.all(np.diff(slots) > 0) and slots[0] >= start
        self._slots[start : start + len(slots)] = self._slots[slots]
        self._by_guest[start : start + len(slots)] = self._by_guest[slots]

    def logits_after(self, tokens) -> np.ndarray:
        """float32 [V]: the logits after a sequence of tokens."""
        return _logits(np.asarray(tokens, np.int64).tobytes(), *self._settings)


class FakeGuest(FakeEngine):
    """A model of its own in the cache of another, which must never read what this one wrote."""

    def __init__(self, host: FakeEngine, **settings) -> None:
        super().__init__(host.vocab_size, max_seq_len=host.max_seq_len, **settings)
        self.cache_host = host
        self._slots, self._by_guest = host._slots, host._by_guest


class FakeLearner(FakeGuest):
    """A guest that is another model after each round: which, follows from what was decoded. For that it reads
    tokens behind the text, as far as its host has room there."""

    num_scratch = 3

    def adapt(self, token_ids, num_decoded) -> int:
        kept = len(token_ids) - 1
        assert 1 <= num_decoded <= kept and np.array_equal(self.cache_host._slots[:kept], token_ids[:-1])
        assert not self._by_guest[:kept].any(), "all before the last token is as the host read it"
        count = min(self.num_scratch, self.max_seq_len - kept)
        if count:
            sees = np.tri(count, kept + count, kept, dtype=bool)
            self.forward(token_ids[-1:].repeat(count), kept, kept + np.arange(count), sees)
        vocab_size, seed, noise, _, *rest = self._settings
        self._settings = (vocab_size, seed, noise, 2 + zlib.crc32(token_ids.tobytes()) % 97, *rest)
        return count


# Texts come back, within a test and from one to the next, and drawing takes longer than the loop under test.
@lru_cache(1 << 15)
def _logits(
    tokens: bytes,
    vocab_size: int,
    seed: int,
    noise: float,
    own: int,
    scale: float,
    padding: int,
    pad_logit: float,
) -> np.ndarray:
    last = tokens[-2 * TOKEN_BYTES :]
    logits = scale * (_normal(last, seed, vocab_size) + 0.3 * _normal(tokens, seed + 1, vocab_size))
    if noise:
        logits = logits + noise * _normal(tokens, 1000 + own, vocab_size)
    logits = np.concatenate([logits, np.full(padding, pad_logit)]).astype(np.float32)
    logits.flags.writeable = False
    return logits


@lru_cache(1 << 15)
def _normal(tokens: bytes, seed: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(tokens), len(tokens) // TOKEN_BYTES]).standard_normal(size)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, and two special ones: text of any language splits over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


def write_bundle(
    folder: Path,
    engines: dict[str, dict] | None = None,
    plan: dict | None = None,
    chat_template: str | None = None,
) -> Path:
    """A bundle folder whose graphs are no graphs. engines: changes to their manifest entries."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "plan.json").write_text(
        json.dumps(plan or {"ladder": ["suffix", "int8"], "num_speculative_tokens": {"suffix": 6, "int8": 4}})
    )
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    entries = {}
    for name, changes in (engines or {"target": {}, "int8": {}, "tiny": {}}).items():
        graph = "target/cpu.onnx" if name == "target" else f"drafters/{name}/cpu.onnx"
        (folder / graph).parent.mkdir(parents=True, exist_ok=True)
        (folder / graph).write_bytes(name.encode() * 100)
        entries[name] = {
            "graph": graph,
            "portable": None,
            "vocab_size": BYTE_VOCAB,
            "max_seq_len": 256,
            "num_layers": 1,
            "num_kv_heads": 1,
            "head_dim": 4,
            "weights": "float32",
            "eos_token_ids": [EOS],
            "bos_token_id": BOS,
            **changes,
        }
    write_manifest(folder, {"schema_version": SCHEMA_VERSION, "draftsmith_version": "0", "engines": entries})
    return folder


def write_manifest(folder: Path, manifest: dict) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def open_bundle(folder: Path, **engines: FakeEngine) -> Bundle:
    """The bundle of a folder, with these engines (by default three) in place of its graphs."""
    bundle = Bundle(folder)
    bundle._engines.opened.update(
        engines
        or {
            "target": FakeEngine(BYTE_VOCAB, scale=4),
            "int8": FakeEngine(BYTE_VOCAB, scale=4, noise=0.7),
            "tiny": FakeEngine(BYTE_VOCAB, scale=4, noise=1.5, own=2),
        }
    )
    assert not any(isinstance(engine, OnnxEngine) for engine in bundle._engines.opened.values())
    return bundle
