"""Choose the sublayers that a drafter leaves out of the target, whose weights and cache it shares.

Draft & Verify (arXiv 2309.08168) searches for them by the measured speed of decoding, SWIFT (arXiv
2410.06916) by how often one parallel pass over generated text chooses the same tokens. Here such a pass tells
the agreement, and the bytes of the weights left tell the cost, so the choice is the same on every machine;
both make a speed by the formula of speculative decoding. From nothing skipped on, that sublayer goes which
leaves the most speed, until more of that has long not helped. A sublayer is tried anew only while the share
of the agreement that it left when it was last tried makes it the best (lazy greedy search, Minoux 1978; exact
while sublayers do not get easier to miss as others go), so few are tried at each step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..export.onnx_files import list_weight_bytes
from ..speculate.bundle import Bundle, load
from ..speculate.errors import BundleError
from ..speculate.levels import TARGET
from ..speculate.loop import PREFILL_ROWS
from ..speculate.onnx_engine import OnnxEngine, SkippingEngine, SwiftEngine
from .hashing import write_json
from .pack import ENGINE_FILE
from .processor import num_threads
from .progress import Progress, no_progress

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 32
MAX_DRAFT = 16
PARTS = ("attention", "mlp")  # of a layer, in the order of its sublayers
PATIENCE = 6  # sublayers that go without a gain before the search ends

Agreement = Callable[
    [frozenset[int]], float
]  # of sublayers skipped: 2 * layer for attention, + 1 for the MLP


@dataclass(frozen=True)
class Choice:
    skipped: frozenset[int]
    agreement: float
    cost: float  # of a call, the target's being 1
    speedup: float


def choose_skips(
    bundle_dir: Path,
    tokens: Path,
    wanted: str | Mapping[str, Any],
    weights: str,
    out: Path,
    progress: Progress = no_progress,
) -> dict:
    """The stage: write what the manifest says of the drafter. `wanted`: "auto", or the layers by sublayer, or
    the share that is searched while decoding, of which the figures are those of the layers to begin with.

    The texts are the target's own continuations of the ends of evenly spaced calibration windows (`tokens`, a
    folder with ``tokens.safetensors``), of which tuning reads the beginnings.
    """
    bundle = load(bundle_dir, num_threads(), device="cpu")
    sizes, rest = measure_sublayers(bundle)
    windows = load_file(tokens / "tokens.safetensors")["tokens"]
    chosen = windows[np.linspace(0, len(windows) - 1, min(TEXTS, len(windows))).astype(int), -PROMPT_TOKENS:]
    rehearsal = Rehearsal(bundle, chosen.tolist(), progress)
    if isinstance(wanted, str):
        choice = search(sizes, rest, rehearsal.agreement, progress)
    else:
        choice = weigh(
            _list_sublayers(wanted, rehearsal.target, len(sizes)), sizes, rest, rehearsal.agreement
        )
    if not isinstance(wanted, str) and "swift" in wanted:
        found, skips = {"swift": wanted["swift"]}, {"share": wanted["swift"]}
    else:
        found = skips = {
            key: sorted(sublayer // 2 for sublayer in choice.skipped if sublayer % 2 == part)
            for part, key in enumerate(PARTS)
        }
    write_json(out / ENGINE_FILE, {"skips": {**skips, "bytes_read": choice.cost}, "weights": weights})
    return {
        "skip_layers": found,
        "greedy_agreement": choice.agreement,
        "bytes_read": choice.cost,
        "estimated_speedup": choice.speedup,
        "positions": rehearsal.positions,
        "tried": rehearsal.tried,
    }


def _list_sublayers(wanted: Mapping[str, Any], target: OnnxEngine, count: int) -> frozenset[int]:
    """Those that are named, or that the search of `swift` begins with."""
    if "swift" not in wanted:
        return frozenset(2 * layer + part for part, key in enumerate(PARTS) for layer in wanted[key])
    begins_with = SwiftEngine("skip_layers", target, count // 2, wanted["swift"]).state.skips
    return frozenset(np.flatnonzero(begins_with).tolist())


def measure_sublayers(bundle: Bundle) -> tuple[list[int], int]:
    """Bytes of the packed weights of each sublayer of the target, and of all others that a call of greedy
    decoding reads."""
    entry = bundle.manifest.engines[TARGET]
    graph = bundle.path / entry.graph
    sizes, rest = [0] * (2 * entry.num_layers), 0
    for name, size in list_weight_bytes(graph, graph.with_suffix(".data").name).items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            sizes[2 * int(parts[2]) + (parts[3] == "mlp")] += size
        else:
            rest += size
    return sizes, rest - entry.screened_bytes


class Rehearsal:
    """The target's own greedy texts, side by side in its cache, for drafters to say what they would.

    Rows of a drafter stand behind all texts. Each sees the target's rows before it in its own text and
    itself, so one pass tells what the drafter says at every position.
    """

    def __init__(
        self, bundle: Bundle, prompts: Sequence[list[int]], progress: Progress = no_progress
    ) -> None:
        target = bundle.engine(TARGET)
        if not isinstance(target, OnnxEngine):
            raise BundleError("skip_layers leaves out layers of the graph for the CPU")
        self.target, self.tried = target, 0
        self._num_layers = bundle.manifest.engines[TARGET].num_layers
        self._chunk = min(PREFILL_ROWS, target.max_seq_len // 4)
        room = target.max_seq_len - self._chunk
        count = max(1, min(len(prompts), room // (PROMPT_TOKENS + NEW_TOKENS)))
        new = min(NEW_TOKENS, room // count - len(prompts[0]))
        texts: list[list[int]] = []
        choices: list[int] = []
        for index, prompt in enumerate(prompts[:count]):
            said = bundle.generate(prompt, new, speculate="none", ignore_eos=True).token_ids
            texts.append([*prompt, *said])
            choices += said
            progress(index + 1, count, "writing texts to skip layers on")
        self._choices = np.array(choices)
        self._ids = np.concatenate(texts).astype(np.int32)
        self._positions = np.concatenate([np.arange(len(text)) for text in texts])
        ends = np.cumsum([len(text) for text in texts])
        # The tokens right before those that were chosen.
        self._rows = np.concatenate([np.arange(end - new - 1, end - 1) for end in ends])
        self._read_texts()

    @property
    def positions(self) -> int:
        return len(self._rows)

    def _read_texts(self) -> None:
        self.target.reserve(len(self._ids) + self._chunk)
        for start in range(0, len(self._ids), self._chunk):
            rows = np.arange(start, min(start + self._chunk, len(self._ids)))
            self.target.forward(self._ids[rows], start, self._positions[rows], self._see(rows, start), 1)

    def _see(self, rows: np.ndarray, start: int) -> np.ndarray:
        """bool [S, start + S]: of tokens `rows` [S] in the slots from `start` on, what each sees."""
        slots = np.arange(start + len(rows))
        first = rows - self._positions[rows]
        before = (slots >= first[:, None]) & (slots < rows[:, None])
        return before | (slots == start + np.arange(len(rows))[:, None])

    def agreement(self, skipped: frozenset[int]) -> float:
        """The share of the target's choices that a drafter without these sublayers makes too."""
        table = np.zeros(2 * self._num_layers, bool)
        table[list(skipped)] = True
        drafter = SkippingEngine("skip_layers", self.target, table.reshape(-1, 2))
        said: list[np.ndarray] = []
        for begin in range(0, len(self._rows), self._chunk):
            rows, end = self._rows[begin : begin + self._chunk], len(self._ids)
            logits = drafter.forward(self._ids[rows], end, self._positions[rows], self._see(rows, end))
            said.append(logits.argmax(axis=-1))
        self.tried += 1
        return float(np.mean(np.concatenate(said) == self._choices))


def predict_speedup(agreement: float, cost: float) -> float:
    """Over plain decoding, at the best draft length, as if tokens agreed independently (Leviathan et al.,
    arXiv 2211.17192, theorem 3.8). cost: of a draft's call, the target's being 1."""
    tokens = np.cumsum(agreement ** np.arange(MAX_DRAFT + 1))
    return float(np.max(tokens[1:] / (1 + cost * np.arange(1, MAX_DRAFT + 1))))


def weigh(skipped: frozenset[int], sizes: Sequence[int], rest: int, agreement: Agreement) -> Choice:
    """`sizes`: bytes by sublayer; `rest`: those of weights that every call reads."""
    agreed, cost = agreement(skipped), 1 - sum(sizes[i] for i in skipped) / (sum(sizes) + rest)
    return Choice(skipped, agreed, cost, predict_speedup(agreed, cost))


def search(sizes: Sequence[int], rest: int, agreement: Agreement, progress: Progress = no_progress) -> Choice:
    """The fastest choice on the greedy path; at least one sublayer is skipped, and one is not."""
    last = best = Choice(frozenset(), 1.0, 1.0, 0.0)
    shares = dict.fromkeys(range(len(sizes)), 1.0)  # of the agreement, that it left when last tried
    total, idle, tried = sum(sizes) + rest, 0, 0
    while idle < PATIENCE and len(last.skipped) < len(sizes) - 1:
        fresh: dict[int, Choice] = {}

        def hope(sublayer: int, last: Choice = last, fresh: Mapping[int, Choice] = fresh) -> float:
            if sublayer in fresh:
                return fresh[sublayer].speedup
            return predict_speedup(last.agreement * shares[sublayer], last.cost - sizes[sublayer] / total)

        while (likeliest := max(shares, key=hope)) not in fresh:
            fresh[likeliest] = weigh(last.skipped | {likeliest}, sizes, rest, agreement)
            tried += 1
            progress(len(last.skipped), len(sizes), f"sublayers skipped, {tried} tries")
            if last.agreement:
                shares[likeliest] = fresh[likeliest].agreement / last.agreement
        last = fresh[likeliest]
        del shares[likeliest]
        idle = 0 if last.speedup > best.speedup else idle + 1
        best = last if idle == 0 else best
    return best
