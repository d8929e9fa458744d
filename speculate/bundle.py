"""A bundle opened for decoding: the runtime's front door."""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .datastore import Datastore
from .devices import choose_devices
from .drafters import Drafter, Sources
from .engine import Engine, LearningEngine, Logits
from .engines import Engines
from .errors import BundleError
from .generate import Generation, Run, exclusive
from .ladder import (
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    Rung,
    Speculate,
    build_ladder,
    check_names,
    choose_ladder,
)
from .levels import TARGET, list_models
from .loop import PREFILL_ROWS, Decoder
from .manifest import (
    CHAT_TEMPLATE,
    DATASTORE,
    NGRAMS,
    PLAN,
    TOKENIZER,
    read_manifest,
    resolve_inside,
)
from .ngrams import Ngrams
from .onnx_engine import SharingEngine, default_threads
from .plan import read_plan
from .prompt import Prompt, check_ids, encode_chat, encode_text, is_chat, load_tokenizer
from .settings import Rule, Sampling

# Vocabularies are padded to multiples of 64 to 512; a larger difference means another tokenizer.
_MAX_PADDING = 1024


def load(
    path: str | Path,
    threads: int | None = None,
    datastore: str | Path | None = None,
    device: str | Mapping[str, str] = "auto",
) -> "Bundle":
    """Open a bundle folder, checking every file against the manifest. Engines are loaded when first used.

    threads: compute threads of each engine; by default one for each core that this process may use.
    datastore: a file by `draftsmith datastore`, for ladders that begin with "rest"; by default the bundle's
        own, if it has one.
    device: "cpu"; "cuda", which needs a GPU, its driver and TensorRT or ONNX Runtime for GPUs; or "auto": the
        GPU where the bundle has TensorRT engines that run here, else the CPU, with a warning if it has any.
        "onnx-cuda", "onnx-tensorrt" or "onnx-rtx": the portable graphs on that provider of ONNX Runtime.
        "portable" runs on the CPU what engines for GPUs are built from, to see what they would say.
        Or one of these by engine, {"target": "cuda", "int8": "cpu"}.
    Raises BundleError if the folder is not a bundle, is damaged, or needs another version of draftsmith, and
    if the device is not to be had.
    """
    bundle = Bundle(Path(path), threads, datastore, device)
    if bundle.why_cpu:
        warnings.warn(f"runs on the CPU: {bundle.why_cpu}", stacklevel=2)
    return bundle


class Bundle:
    """A target, its drafters and the plan to decode with them. It has one cache: one generation at a time."""

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        datastore: str | Path | None = None,
        device: str | Mapping[str, str] = "auto",
    ) -> None:
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise BundleError(f"threads={threads!r}: wanted at least 1, or None for all cores")
        self.path = path
        self.threads = threads or default_threads()
        self.manifest = read_manifest(path, engines=False)
        self.devices, self.why_cpu = choose_devices(self.manifest.engines, device)
        self.plan = read_plan(path / PLAN)
        for planned in (self.plan, *self.plan.choices):
            check_names(list(planned.ladder), self.manifest.engines)
        self.tokenizer = load_tokenizer(path / TOKENIZER)
        self._check_vocabularies()
        self.datastore = self._open_datastore(datastore)
        self.ngrams = self._open_ngrams()
        self._lasting: dict[str, Drafter] = {}
        self._engines = Engines(path, self.manifest, self.devices, self.threads)
        self._busy = Lock()

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        speculate: Speculate = "auto",
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
        num_speculative_tokens: int | Mapping[str, int] | None = None,
        verify: Rule | None = None,
        references: Sequence[str | Sequence[int]] = (),
    ) -> Generation:
        """Continue a prompt. Whatever drafts, the output is the target's own.

        prompt: text, continued as it is; or a list of token ids; or a list of {"role", "content"}, which goes
            through the chat template.
        max_new_tokens: at most; prompt and output together must fit the target's cache (`max_seq_len`). The
            plan's ladder is chosen for this length: ask for about as many as you expect.
        temperature, top_k, top_p, seed: temperature 0 is greedy; else the settings of every level.
        speculate: "auto" follows the bundle's plan, "none" leaves out all drafters, else a list of drafters,
            innermost first.
        ignore_eos: decode on behind an end-of-text token.
        stop: strings at which to stop; the text ends before the first of them to appear.
        num_speculative_tokens: drafted per call by the outermost drafter, or a dict by name; else at most as
            many as planned, and fewer where the plan's measured costs say that more would not pay.
        verify: how sampled drafts are verified ("block", "token" or "exact"); else as planned.
        references: texts, or token ids, that the output may quote: documents, earlier answers. The ladder's
            first level, "suffix" or "llma", then drafts from them too.
        """
        run = self.stream(
            prompt,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            speculate,
            ignore_eos,
            stop,
            num_speculative_tokens,
            verify,
            references,
        )
        pieces = list(run)
        token_ids = [token for piece in pieces for token in piece.token_ids]
        return Generation(token_ids, "".join(piece.text for piece in pieces), run.finish_reason, run.stats)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        speculate: Speculate = "auto",
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
        num_speculative_tokens: int | Mapping[str, int] | None = None,
        verify: Rule | None = None,
        references: Sequence[str | Sequence[int]] = (),
    ) -> Run:
        """As `generate`, in pieces (`text`, `token_ids`) as they are decoded; their texts add up to its text.

        Errors in the arguments are raised here, before anything is decoded.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, verify or self.plan.verify)
        if not isinstance(max_new_tokens, Integral) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise BundleError(f"max_new_tokens={max_new_tokens!r}: wanted at least 1")
        prompt_ids = self.encode(prompt)
        lengths = (len(prompt_ids), int(max_new_tokens))
        rungs = self._choose_ladder(speculate, num_speculative_tokens, lengths)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in stops):
            raise BundleError(f"stop={stop!r}: wanted strings that are not empty")
        sources = Sources(self._encode_references(references), self.datastore, self.ngrams, self._lasting)
        sources.check([rung.name for rung in rungs])
        self._check_room(*lengths, rungs)
        target = self.manifest.engines[TARGET]
        eos = frozenset() if ignore_eos else frozenset(target.eos_token_ids)
        context = lengths[0] + lengths[1] // 2
        costs = self._planned_costs(rungs, context) if num_speculative_tokens is None else None
        for name in self._engine_names(rungs):
            self.engine(name)

        def begin() -> Decoder:
            decoder = build_ladder(rungs, self.engine, costs, sources.open)
            decoder.begin(prompt_ids, max_new_tokens, sampling, eos)
            return decoder

        return Run(prompt_ids, begin, eos, self.tokenizer, max_new_tokens, stops, self._busy)

    def logits(self, token_ids: Sequence[int], engine: str = TARGET, *, drafting: bool = False) -> Logits:
        """float32 logits [T, V] of the token after each of `token_ids` [T], as one engine has them.

        drafting: of one that drafts in the target's cache, as it has them where the target has read all
            tokens before. A drafter that skips layers has no others.
        """
        if engine not in self.manifest.engines:
            raise BundleError(f"no engine {engine!r} in this bundle, only {', '.join(self.manifest.engines)}")
        ids = np.array(check_ids(token_ids, self.manifest.engines[engine].vocab_size), np.int32)
        runner = self.engine(engine, alone=not drafting)
        logits = np.empty((len(ids), runner.vocab_size), np.float32)
        with exclusive(self._busy):
            if isinstance(runner, SharingEngine):
                return runner.read_along(ids)
            runner.reserve(len(ids))
            for start in range(0, len(ids), PREFILL_ROWS):
                logits[start : start + PREFILL_ROWS] = runner.forward(
                    ids[start : start + PREFILL_ROWS], start
                )
        return logits

    def forget(self) -> None:
        """Drop what drafters keep of earlier generations ("history", the layers that `skip_layers: swift`
        found), as if the bundle were just loaded."""
        with exclusive(self._busy):
            self._lasting.clear()
            for engine in self._engines.opened.values():
                if isinstance(engine, LearningEngine):
                    engine.forget()

    @property
    def drafters(self) -> list[str]:
        """The names of the engines other than the target."""
        return [name for name in self.manifest.engines if name != TARGET]

    @property
    def plan_fits(self) -> bool:
        """Whether the plan's costs hold here: they are those of the CPU's graphs."""
        return all(device == "cpu" for device in self.devices.values())

    def plan_for(
        self, speculate: Speculate = "auto", lengths: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """The ladder that `generate` would use, in the form of plan.json.

        lengths: tokens of the prompt and of the output at most; else those that the plan was tuned on.
        """
        rungs = self._choose_ladder(speculate, None, lengths)
        return {
            "ladder": [rung.name for rung in rungs],
            "num_speculative_tokens": {rung.name: rung.num_speculative_tokens for rung in rungs},
            "verify": self.plan.verify,
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that `generate` would continue."""
        target = self.manifest.engines[TARGET]
        if is_chat(prompt):
            if CHAT_TEMPLATE not in self.manifest.files:
                raise BundleError("this bundle has no chat template: pass the prompt as text or as token ids")
            template = (self.path / CHAT_TEMPLATE).read_text(encoding="utf-8")
            tokens = {"bos_token": target.bos_token_id, "eos_token": next(iter(target.eos_token_ids), None)}
            ids = encode_chat(self.tokenizer, template, prompt, tokens)
        elif isinstance(prompt, str):
            ids = encode_text(self.tokenizer, prompt)
        else:
            ids = prompt
        return check_ids(ids, target.vocab_size)

    def _encode_references(self, references: Sequence[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(references, str):
            raise BundleError("references is one text: wanted a list of them")
        vocab_size, encoded = self.manifest.engines[TARGET].vocab_size, []
        for i, text in enumerate(references):
            ids = encode_text(self.tokenizer, text, False) if isinstance(text, str) else text
            if not len(ids):
                raise BundleError(f"references[{i}] is empty: wanted a text, or leave it out")
            encoded.append(check_ids(ids, vocab_size, f"references[{i}]"))
        return encoded

    def engine(self, name: str, *, alone: bool = False) -> Engine:
        """One of the bundle's engines, loaded at the first call, as ladders have it: in the target's cache if
        it shares that. `alone`: in its own, if it has one."""
        return self._engines.alone(name) if alone else self._engines.in_ladder(name)

    def _open_datastore(self, path: str | Path | None) -> Datastore | None:
        if path is None and DATASTORE not in self.manifest.files:
            return None
        vocab_size = self.manifest.engines[TARGET].vocab_size
        return Datastore(
            resolve_inside(self.path, DATASTORE) if path is None else path,
            vocab_size,
            self.manifest.files[TOKENIZER].sha256,
        )

    def _open_ngrams(self) -> Ngrams | None:
        if NGRAMS not in self.manifest.files:
            return None
        vocab_size = self.manifest.engines[TARGET].vocab_size
        return Ngrams(resolve_inside(self.path, NGRAMS), vocab_size, self.manifest.fingerprint(TARGET))

    def _choose_ladder(
        self,
        speculate: Speculate,
        num_speculative_tokens: int | Mapping[str, int] | None,
        lengths: tuple[int, int] | None,
    ) -> list[Rung]:
        """Who says how many tokens to draft means the plan's main ladder, whatever the lengths. Drafters
        that are part of the target's graph for the CPU are left out where that does not run."""
        free = speculate == "auto" and num_speculative_tokens is None
        best = self.plan.choose(*lengths) if free and lengths and self.plan_fits else None
        best = best or self.plan
        counts, engines = best.num_speculative_tokens, self.manifest.engines
        planned = [
            Rung(name, counts.get(name, DEFAULT_NUM_SPECULATIVE_TOKENS))
            for name in best.ladder
            if self.devices[TARGET] == "cpu" or not any(engines[model].skips for model in list_models([name]))
        ]
        return choose_ladder(speculate, num_speculative_tokens, planned, engines)

    def _planned_costs(self, rungs: list[Rung], context: int) -> dict[str, list[float]] | None:
        """What the plan's measured calls cost, for as many rows as the ladder's longest draft makes."""
        costs, engines = self.plan.costs, self._engine_names(rungs)
        if costs is None or not rungs or any(self.devices[name] != "cpu" for name in engines):
            return None
        num_rows = 1 + max(rung.num_speculative_tokens for rung in rungs)
        return {name: costs.spread(name, num_rows, context) for name in engines if name in costs.milliseconds}

    def _engine_names(self, rungs: list[Rung]) -> list[str]:
        return [TARGET, *list_models(rung.name for rung in rungs)]

    def _check_room(self, prompt_tokens: int, max_new_tokens: int, rungs: list[Rung]) -> None:
        wanted = prompt_tokens + max_new_tokens
        for name in self._engine_names(rungs):
            slots = self.manifest.engines[name].max_seq_len
            if wanted <= slots:
                continue
            room = slots - prompt_tokens
            way_out = f"ask for max_new_tokens <= {room}" if room > 0 else "shorten the prompt"
            if name != TARGET:
                way_out += ' or leave this drafter out (speculate="none")'
            raise BundleError(
                f"the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}: "
                f"together more than the {slots} that the cache of {name} holds; {way_out}"
            )

    def _check_vocabularies(self) -> None:
        target = self.manifest.engines[TARGET].vocab_size
        needed = min(target, self.tokenizer.get_vocab_size(with_added_tokens=True))
        for name, entry in self.manifest.engines.items():
            if entry.vocab_size < needed or abs(entry.vocab_size - target) > _MAX_PADDING:
                raise BundleError(
                    f"{self.path}: {name} has a vocabulary of {entry.vocab_size}, the target one of {target} "
                    f"(of which the tokenizer fills {needed}): wanted a drafter with the target's tokenizer"
                )
