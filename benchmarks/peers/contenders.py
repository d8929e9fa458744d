"""Who takes part: which engine, with which weights, plain or with its own speculation."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from environments import make_environment, run
from weights import load_source, write_folder, write_gguf


@dataclass(frozen=True)
class Contender:
    peer: str  # a folder beside this file
    variant: str
    speculate: bool

    @property
    def name(self) -> str:
        variant = Path(self.variant).name  # ours is a bundle's path
        return f"{self.peer} {variant}" + (" +speculation" if self.speculate else "")

    @property
    def plain(self) -> "Contender":
        return Contender(self.peer, self.variant, False)


OURS = "ours"
VARIANTS = {
    "ort_genai": ["fp32", "int8", "int4"],
    "llamacpp": ["f32", "f16", "q8_0", "q4_1"],
    "ov_genai": ["f32", "default", "int8", "int4"],
    "hf": ["float32"],
}


def list_contenders(bundles: list[Path], peers: list[str]) -> Iterator[Contender]:
    """Plain and speculative. `peers`: "llamacpp", or "llamacpp:q8_0" for one of its variants."""
    pairs = [(OURS, str(bundle)) for bundle in bundles]
    for entry in peers:
        peer, _, variant = entry.partition(":")
        if peer not in VARIANTS or (variant and variant not in VARIANTS[peer]):
            raise SystemExit(f"no peer {entry!r}; there are {VARIANTS}")
        pairs += [(peer, name) for name in ([variant] if variant else VARIANTS[peer])]
    for peer, variant in pairs:
        for speculate in (False, True):
            yield Contender(peer, variant, speculate)


def prepare(contender: Contender, bundle: Path, work: Path) -> tuple[Path, Path]:
    """The Python that runs a contender and the model that it reads, the weights of `bundle`'s source. Raises
    Unavailable."""
    python = make_environment(contender.peer, work)
    return python, _prepare_model(contender, python, bundle, work)


def _prepare_model(contender: Contender, python: Path, bundle: Path, work: Path) -> Path:
    match contender.peer, contender.variant:
        case "ours", folder:
            return Path(folder)
        case "llamacpp", variant:
            return write_gguf(load_source(bundle, work), work / f"{variant}.gguf", variant)
        case "ov_genai", variant:
            stored = {"int8": "q8_0", "int4": "q4_0"}.get(variant, "f16")
            return write_gguf(load_source(bundle, work), work / f"{stored}.gguf", stored)
        case "hf", _:
            return write_folder(load_source(bundle, work), work / "hf_model")
        case "ort_genai", precision:
            source = write_folder(load_source(bundle, work), work / "hf_model")
            out = work / "ort_genai" / precision
            if not (out / "genai_config.json").exists():
                builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
                options = ["-i", str(source), "-o", str(out), "-p", precision, "-c", str(work / "cache")]
                run(builder + options, work)
            return out
    raise ValueError(contender)
