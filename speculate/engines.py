"""The engines of a bundle, each opened when it is first used, where it runs."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from .devices import ONNX_PROVIDERS, find_plan, why_not_tensorrt
from .driver import find_gpus
from .engine import Engine
from .errors import BundleError
from .folders import default_root
from .levels import TARGET
from .manifest import EngineEntry, Manifest, Skips, check_files, resolve_inside
from .onnx_engine import OnnxEngine, OnnxRuntime, SharingEngine, SkippingEngine, SwiftEngine

if TYPE_CHECKING:
    from .tensorrt_engine import TensorrtRuntime


class Engines:
    """path: of the bundle, whose `manifest` this is. devices: by engine. threads: of each on the CPU."""

    def __init__(self, path: Path, manifest: Manifest, devices: Mapping[str, str], threads: int) -> None:
        self.opened: dict[str, Engine] = {}  # each in its own cache, if it has one
        self._guests: dict[str, SharingEngine] = {}  # the same in the target's
        self._path, self._manifest, self._devices, self._threads = path, manifest, devices, threads
        self._runtime: OnnxRuntime | None = None
        self._tensorrt: TensorrtRuntime | None = None

    def in_ladder(self, name: str) -> Engine:
        """As it drafts: in the target's cache, if it shares that."""
        engine = self.alone(name)
        if isinstance(engine, SharingEngine) or not self._manifest.engines[name].shares_cache:
            return engine
        target = self.alone(TARGET)
        if name not in self._guests and _can_share(target) and _can_share(engine):
            self._guests[name] = SharingEngine(name, target, engine)
        return self._guests.get(name, engine)

    def alone(self, name: str) -> Engine:
        """In a cache of its own, which one that leaves out layers of the target has not."""
        if name not in self.opened:
            entry = self._manifest.engines[name]
            engine = self._open(name, entry)
            if engine.vocab_size != entry.vocab_size:
                raise BundleError(
                    f"{self._path}: the logits of {name} are {engine.vocab_size} wide, "
                    f"the manifest wants {entry.vocab_size}: copy the whole bundle again"
                )
            self.opened[name] = engine
        return self.opened[name]

    def _open(self, name: str, entry: EngineEntry) -> Engine:
        device = self._devices[name]
        if entry.skips:
            return self._open_without(name, entry, entry.skips)
        if device == "cuda":
            return self._open_on_gpu(name, entry)
        if device in ONNX_PROVIDERS:
            return self._open_on_onnx(name, entry, ONNX_PROVIDERS[device])
        self._runtime = self._runtime or OnnxRuntime(self._threads)
        return self._open_on_cpu(name, entry, self._runtime, device == "portable")

    def _open_on_cpu(self, name: str, entry: EngineEntry, runtime: OnnxRuntime, portable: bool) -> Engine:
        """The graph for this machine or, if wished or where that cannot be opened, the portable one, which is
        slower and whose rows are not independent to the last bit."""
        if portable and entry.portable:
            return OnnxEngine(name, resolve_inside(self._path, entry.portable), entry, runtime)
        try:
            return OnnxEngine(name, resolve_inside(self._path, entry.graph), entry, runtime)
        except BundleError as error:
            if entry.portable is None:
                raise
            warnings.warn(f"{name} runs on stock operators: {error}", stacklevel=4)
            return OnnxEngine(name, resolve_inside(self._path, entry.portable), entry, runtime)

    def _open_without(self, name: str, entry: EngineEntry, skips: Skips) -> Engine:
        """The target without some of its layers."""
        target = self.alone(TARGET)
        if not isinstance(target, OnnxEngine):
            raise BundleError(
                f"{name} leaves out layers of the target's engine for the CPU, and the target runs on "
                f'{self._devices[TARGET]}: give the device "cpu" or leave {name} out'
            )
        if skips.share:
            return SwiftEngine(name, target, entry.num_layers, skips.share)
        return SkippingEngine(name, target, skips.table(entry.num_layers))

    def _open_on_gpu(self, name: str, entry: EngineEntry) -> Engine:
        """TensorRT's engine for this GPU or, where the bundle has none that runs, ONNX Runtime's."""
        from .tensorrt_engine import TensorrtEngine, TensorrtRuntime

        gpu = find_gpus()[0][0]
        plan = find_plan(entry, gpu)
        if plan is None or why_not_tensorrt(entry, gpu):
            return self._open_on_onnx(name, entry, ONNX_PROVIDERS["onnx-cuda"])
        check_files(self._path, {plan.file: self._manifest.files[plan.file]})
        self._tensorrt = self._tensorrt or TensorrtRuntime(plan.builder)
        return TensorrtEngine(name, resolve_inside(self._path, plan.file), plan, entry, self._tensorrt)

    def _open_on_onnx(self, name: str, entry: EngineEntry, provider: str) -> Engine:
        """ONNX Runtime's."""
        from .onnx_gpu_engine import OnnxGpuEngine

        graph = resolve_inside(self._path, entry.portable or entry.graph)
        folder = None if provider == ONNX_PROVIDERS["onnx-cuda"] else self._make_folder(name)
        return OnnxGpuEngine(name, graph, entry, provider, folder)

    def _make_folder(self, name: str) -> Path:
        """Where a provider keeps the engines that it builds for the next time."""
        folder = default_root() / "providers" / self._manifest.fingerprint(name)[:12]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(
                f"{folder}, where engines are kept, cannot be made: {error.strerror}; "
                "set DRAFTSMITH_CACHE to a folder that can be written"
            ) from error
        return folder


def _can_share(engine: Engine) -> TypeGuard[OnnxEngine]:
    """Whether its cache is of the layout that our kernels have."""
    return isinstance(engine, OnnxEngine) and not engine.is_stock
