"""An engine on ONNX Runtime's GPU providers: the portable graph, its cache kept on the device.

ONNX Runtime falls back to the CPU without an error where a provider cannot start. A session that did is
refused.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import lib
from .devices import ONNX_PROVIDERS
from .engine import Ids, Logits, check_room
from .errors import BundleError
from .manifest import EngineEntry

CUDA = ONNX_PROVIDERS["onnx-cuda"]
RTX = ONNX_PROVIDERS["onnx-rtx"]  # a plugin, which has to be registered

_MOST_ROWS: int = lib.DS_PREFILL_ROWS + lib.DS_MAX_DRAFT  # of one call: the end of a prompt and a draft
_RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


def why_no_provider(provider: str) -> str:
    """Why ONNX Runtime has not got a provider here; empty if it says that it has."""
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed: pip install 'draftsmith[gpu]'"
    if provider == RTX:
        if find_spec(_RTX_PACKAGE) is None:
            return f"{_RTX_PACKAGE} is not installed: pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"
        return _register_rtx(onnxruntime)
    if provider in onnxruntime.get_available_providers():
        return ""
    return f"ONNX Runtime has no {provider}: pip install 'draftsmith[gpu]' in place of onnxruntime"


def _register_rtx(onnxruntime: Any) -> str:
    """Make the plugin known to ONNX Runtime, once in a process. Returns why that was not possible, or ""."""
    if not _find_devices(onnxruntime, RTX):
        try:
            plugin: Any = importlib.import_module(_RTX_PACKAGE)
            onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
        except Exception as error:  # of a class of its own for every cause
            return f"ONNX Runtime does not load {RTX}: {' '.join(str(error).split()):.300}"
    return "" if _find_devices(onnxruntime, RTX) else f"{RTX} finds no GPU that it runs on"


def _find_devices(onnxruntime: Any, provider: str) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]


class OnnxGpuEngine:
    """Runs `model.onnx` (batch 1) on a provider of `ONNX_PROVIDERS`, or for a test of itself on the CPU's.

    cache_folder: where the TensorRT providers keep the engines that they build at the first call.
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        entry: EngineEntry,
        provider: str = CUDA,
        cache_folder: Path | None = None,
    ) -> None:
        if reason := why_no_provider(provider):
            raise BundleError(f"{name}: {reason}")
        import onnxruntime

        self.calls = self.rows = 0
        self.vocab_size, self.max_seq_len = entry.vocab_size, entry.max_seq_len
        self._name, self._entry, self._ort = name, entry, onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._device = "cpu" if provider == "CPUExecutionProvider" else "cuda"
        if self._device != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = provider_options(provider, entry, cache_folder)
        try:
            if provider == RTX:
                options.add_provider_for_devices(_find_devices(onnxruntime, RTX)[:1], settings)
                self._session: Any = onnxruntime.InferenceSession(str(graph), options)
            else:
                self._session = onnxruntime.InferenceSession(
                    str(graph), options, providers=[(provider, settings)]
                )
        except Exception as error:  # of a class of its own for every cause
            words = " ".join(str(error).split())
            raise BundleError(f"{name}: {provider} does not open {graph.name}: {words:.300}") from error
        check_provider(name, provider, self._session.get_providers())
        self._cache: dict[str, Any] = {}
        self._slots = 0

    def reserve(self, num_slots: int) -> None:
        check_room(self._name, num_slots, self.max_seq_len, "export with a larger max_seq_len")
        if num_slots <= self._slots:
            return
        self._slots = min(self.max_seq_len, max(256, 1 << (num_slots - 1).bit_length()))
        shape = (1, self._entry.num_kv_heads, self._slots, self._entry.head_dim)
        self._cache = {
            # Each from zeros of its own: on the CPU they are not copied.
            f"{layer}.{kind}": self._ort.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, np.float32), self._device, 0
            )
            for layer in range(self._entry.num_layers)
            for kind in ("key", "value")
        }

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        num_logits: int | None = None,
    ) -> Logits:
        count = len(token_ids)
        slots = start + np.arange(count)
        seen = np.arange(self._slots) <= slots[:, None]
        if mask is not None:
            seen[:, : start + count], seen[:, start + count :] = mask, False
        feeds = {
            "input_ids": np.asarray(token_ids, np.int64)[None],
            "position_ids": np.asarray(slots if position_ids is None else position_ids, np.int64)[None],
            "write_index": np.array([start], np.int64),
            "attention_mask": seen[None, None],
        }
        binding = self._session.io_binding()
        for key, value in feeds.items():
            binding.bind_cpu_input(key, np.ascontiguousarray(value))
        for key, cache in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{key}", cache)
            binding.bind_ortvalue_output(f"present.{key}", cache)  # one buffer for both: updated in place
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        self.calls += 1
        self.rows += count
        logits = binding.get_outputs()[-1].numpy()[0]
        return logits[count - (count if num_logits is None else num_logits) :]


def check_provider(name: str, wanted: str, running: list[str]) -> None:
    """Raises BundleError where a session runs on something else than what it was opened for."""
    if not running or running[0] != wanted:
        raise BundleError(
            f"{name}: {wanted} could not start and ONNX Runtime fell back to "
            f"{', '.join(running) or 'nothing'}: "
            "install the CUDA and cuDNN libraries that it needs (draftsmith doctor), or use --device cpu"
        )


def provider_options(provider: str, entry: EngineEntry, cache_folder: Path | None) -> dict[str, str]:
    """Profiles with the cache's explicit shapes, and a folder for engines, where a provider builds any."""
    if provider == CUDA:
        return {"device_id": "0"}
    cache = {
        f"past_key_values.{layer}.{kind}": f"1x{entry.num_kv_heads}x{{slots}}x{entry.head_dim}"
        for layer in range(entry.num_layers)
        for kind in ("key", "value")
    }

    def shapes(rows: int, slots: int) -> str:
        inputs = {"input_ids": f"1x{rows}", "position_ids": f"1x{rows}", "write_index": "1"}
        inputs |= {"attention_mask": f"1x1x{rows}x{slots}"}
        inputs |= {key: shape.format(slots=slots) for key, shape in cache.items()}
        return ",".join(f"{key}:{shape}" for key, shape in inputs.items())

    most = entry.max_seq_len
    prefix = "nv" if provider == RTX else "trt"
    options = {
        f"{prefix}_profile_min_shapes": shapes(1, min(256, most)),
        f"{prefix}_profile_opt_shapes": shapes(8, min(2048, most)),
        f"{prefix}_profile_max_shapes": shapes(_MOST_ROWS, most),
    }
    if cache_folder is not None and prefix == "trt":
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache_folder)}
    elif cache_folder is not None:
        options |= {"nv_runtime_cache_path": str(cache_folder)}
    return options
