"""What two models say together (`native/joint.h`): a weighted ensemble, or a contrast.

The output follows the joint law exactly, and that law is not the target's own: see docs/joint.md.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .bundle import Bundle, Prompt
from .engine import Engine
from .errors import BundleError
from .generate import FinishReason, exclusive
from .levels import TARGET
from .loop import NativeEngines, native_sampling
from .manifest import TOKENIZER
from .settings import Sampling

PROPOSALS = (1, 4)  # of the first and of the second model, in their turns


@dataclass(frozen=True)
class Ensemble:
    """(1 - weight) of the first model's law and `weight` of the second's."""

    weight: float = 0.5

    def describe(self, second: str) -> str:
        return f"{1 - self.weight:g} target + {self.weight:g} {second}"

    def settings(self) -> dict[str, Any]:
        return {"kind": lib.DS_JOINT_ENSEMBLE, "weight": self.weight}


@dataclass(frozen=True)
class Contrast:
    """softmax(first model's logits - weight * second's) on the tokens to which the first gives at least
    `cutoff` times the probability of its likeliest (arXiv 2502.01662, 2309.09117)."""

    weight: float = 0.1
    cutoff: float = 0.0

    def describe(self, second: str) -> str:
        within = f", among tokens of {self.cutoff:g} times the likeliest" if self.cutoff else ""
        return f"target - {self.weight:g} {second}, in logits{within}"

    def settings(self) -> dict[str, Any]:
        return {"kind": lib.DS_JOINT_CONTRASTIVE, "weight": self.weight, "cutoff": self.cutoff}


JointLaw = Ensemble | Contrast


def joint_law(
    law: JointLaw, first: NDArray[np.float32], second: NDArray[np.float32], sampling: Sampling
) -> NDArray[np.float64]:
    """The law [V], float64, that logits [V] of the two models make."""
    rows = [np.ascontiguousarray(row, np.float32) for row in (first, second)]
    if rows[0].ndim != 1 or rows[0].shape != rows[1].shape:
        raise BundleError(f"logits {rows[0].shape} and {rows[1].shape}: wanted two rows of one length")
    out = np.empty(len(rows[0]), np.float64)
    with_ = _settings(law, sampling, (0, 0))
    check(lib.ds_joint_law(with_, len(out), *(view("float[]", row) for row in rows), view("double[]", out)))
    return out


class JointDecoder:
    """The native joint loop over two engines, which are its own while it decodes."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self._engines = NativeEngines((first, second))
        handle = lib.ds_joint_create(*map(self._engines.handle, (first, second)))
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self._handle = ffi.gc(handle, lib.ds_joint_free)
        self._tokens = ffi.new("int32_t[]", lib.DS_JOINT_MAX_DRAFT + 1)

    def begin(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        law: JointLaw,
        sampling: Sampling,
        num_proposed: tuple[int, int] = PROPOSALS,
        eos_token_ids: Iterable[int] = (),
        verify: Any = ffi.NULL,
    ) -> None:
        """Start a generation. num_proposed: by each model in its turn; (0, 0): every token is a call of
        both. verify: a `ds_verify_function` in place of the shipped rules, for tests."""
        ids, eos = ffi.new("int32_t[]", prompt), ffi.new("int32_t[]", list(eos_token_ids))
        wanted = _settings(law, sampling, num_proposed, verify)
        self._engines.check(
            lib.ds_joint_begin(self._handle, wanted, ids, len(ids), max_new_tokens, eos, len(eos))
        )

    def step(self) -> list[int]:
        """The tokens of one round; none once the generation is finished."""
        count = self._engines.check(lib.ds_joint_step(self._handle, self._tokens, len(self._tokens)))
        return ffi.unpack(self._tokens, count)

    def counters(self) -> list[Any]:
        """The `ds_joint_stats` of both models, as they stand."""
        both = [ffi.new("ds_joint_stats *") for _ in range(lib.DS_JOINT_MODELS)]
        for model, stats in enumerate(both):
            check(lib.ds_joint_count(self._handle, model, stats))
        return both


@dataclass(frozen=True)
class JointGeneration:
    """`law` says in words what was decoded: not the target's own law."""

    law: str
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    models: dict[str, dict[str, int]]  # name -> calls, rows, proposed, accepted
    ttft_ms: float
    total_ms: float


def generate_jointly(
    bundle: Bundle,
    second: str | Bundle,
    law: JointLaw,
    prompt: Prompt,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    num_proposed: tuple[int, int] = PROPOSALS,
) -> JointGeneration:
    """Continue a prompt by the joint law of a bundle's target and `second`: one of its drafters, by name, or
    the target of another bundle with the same tokenizer.

    num_proposed: tokens that the first and the second model propose in their turns; what is best depends on
        their costs, the law does not. Raises BundleError before anything is decoded.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    other, name = (bundle, second) if isinstance(second, str) else (second, TARGET)
    if other is bundle and name not in bundle.drafters:
        known = ", ".join(bundle.drafters) or "none"
        raise BundleError(f"{bundle.path} has no drafter {name!r} to decode with, only {known}")
    partner = other.manifest.engines[name]
    if partner.skips:
        raise BundleError(
            f"{name} is the target without some layers, in its cache, and a joint law needs two caches: "
            "name another drafter"
        )
    if partner.draft_vocab_size is not None and isinstance(law, Contrast):
        raise BundleError(
            f"{name} knows {partner.draft_vocab_size} of the {partner.vocab_size} tokens and a contrast "
            "needs all: name a drafter without draft_vocab_size, or take an ensemble"
        )
    if other is not bundle:
        _check_tokenizers(bundle, other)
    ids = bundle.encode(prompt)
    entry = bundle.manifest.engines[TARGET]
    eos = [] if ignore_eos else entry.eos_token_ids
    with ExitStack() as held:
        for one in dict.fromkeys((bundle, other)):
            held.enter_context(exclusive(one._busy))
        started = perf_counter()
        decoder = JointDecoder(bundle.engine(TARGET), other.engine(name, alone=True))
        decoder.begin(ids, max_new_tokens, law, sampling, num_proposed, eos)
        token_ids, times = [], []
        for tokens in iter(decoder.step, []):
            token_ids += tokens
            times.append(1e3 * (perf_counter() - started))
    label = name if other is bundle else str(other.path)
    fields = ("calls", "rows", "proposed", "accepted")
    models = {
        model: {field: getattr(stats, field) for field in fields}
        for model, stats in zip((TARGET, label), decoder.counters(), strict=True)
    }
    return JointGeneration(
        law.describe(label),
        token_ids,
        bundle.tokenizer.decode(token_ids, skip_special_tokens=True),
        "eos" if token_ids[-1] in eos else "length",
        models,
        times[0],
        times[-1],
    )


def _check_tokenizers(first: Bundle, second: Bundle) -> None:
    entries = [bundle.manifest.engines[TARGET] for bundle in (first, second)]
    files = [bundle.manifest.files[TOKENIZER].sha256 for bundle in (first, second)]
    if entries[0].vocab_size != entries[1].vocab_size or files[0] != files[1]:
        raise BundleError(
            f"{first.path} and {second.path} have vocabularies of {entries[0].vocab_size} and "
            f"{entries[1].vocab_size} tokens{'' if files[0] == files[1] else ' and different tokenizers'}: "
            "wanted two bundles with the same tokenizer, whose tokens mean the same"
        )


def _settings(
    law: JointLaw, sampling: Sampling, num_proposed: tuple[int, int], verify: Any = ffi.NULL
) -> Any:
    if sampling.rule == "exact":
        raise BundleError('verify="exact": a joint law is verified by "token" or "block"')
    values = law.settings() | native_sampling(sampling, verify) | {"n_draft": num_proposed}
    return ffi.new("ds_joint_settings *", values)
