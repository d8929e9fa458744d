"""Where a bundle's engines run: on the CPU, or on a GPU by TensorRT or ONNX Runtime; and why not there."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Literal, cast

from .cuda import why_no_cuda
from .driver import Gpu, find_gpus
from .errors import BundleError
from .levels import TARGET
from .manifest import EngineEntry, TensorrtEntry

Device = Literal["cpu", "cuda", "portable", "onnx-cuda", "onnx-tensorrt", "onnx-rtx"]
ONNX_PROVIDERS = {
    "onnx-cuda": "CUDAExecutionProvider",
    "onnx-tensorrt": "TensorrtExecutionProvider",
    "onnx-rtx": "NvTensorRTRTXExecutionProvider",
}
DEVICES = ("auto", "cpu", "cuda", "portable", *ONNX_PROVIDERS)


def choose_device(device: str, engines: Iterable[EngineEntry]) -> tuple[Device, str]:
    """The device that `device` means here and, where "auto" leaves a GPU's engines unused, why.

    Raises BundleError for a GPU where something is missing, naming it.
    """
    if device not in DEVICES:
        raise BundleError(f"device={device!r}: wanted one of {', '.join(DEVICES)}")
    entries = list(engines)
    if device == "portable":
        if not all(entry.portable for entry in entries):
            raise BundleError("device portable: the bundle lacks a portable graph; build it again")
        return "portable", ""
    if device == "cpu" or (device == "auto" and not any(entry.tensorrt for entry in entries)):
        return "cpu", ""
    provider = ONNX_PROVIDERS.get(device)
    if provider:
        reasons = [why for entry in entries if (why := find_gpus()[1] or why_not_onnx(entry, provider))]
    else:
        reasons = [why for entry in entries if (why := why_not_on_gpu(entry))]
    if not reasons:
        return cast(Device, device) if provider else "cuda", ""
    if device == "auto":
        return "cpu", reasons[0]
    raise BundleError(f"device {device}: {reasons[0]}; --device cpu runs this bundle here")


def choose_devices(
    engines: Mapping[str, EngineEntry], device: str | Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """The device of every engine and, where "auto" left a GPU's engines unused, why. All engines of one wish
    go the same way, and those that leave out layers of the target go its."""
    whole = {name: entry for name, entry in engines.items() if entry.skips is None}
    wishes = spread_devices(device, whole)
    chosen = {
        wish: choose_device(wish, [whole[name] for name in whole if wishes[name] == wish])
        for wish in dict.fromkeys(wishes.values())
    }
    why = next((reason for _, reason in chosen.values() if reason), "")
    devices = {name: chosen[wish][0] for name, wish in wishes.items()}
    return {name: devices.get(name, devices[TARGET]) for name in engines}, why


def why_not_on_gpu(entry: EngineEntry) -> str:
    """Why neither TensorRT nor ONNX Runtime can run an engine on this machine's GPU; empty if one can."""
    if reason := why_no_cuda():
        return reason
    gpu = find_gpus()[0][0]
    without_tensorrt = why_not_tensorrt(entry, gpu)
    if not without_tensorrt or not (without_onnx := why_not_onnx(entry)):
        return ""
    return f"{without_tensorrt}; {without_onnx}"


def find_plan(entry: EngineEntry, gpu: Gpu) -> TensorrtEntry | None:
    """The engine's plan for a GPU, if there is one."""
    return next((plan for plan in entry.tensorrt if gpu.compute_capability in plan.compute_capability), None)


def why_not_tensorrt(entry: EngineEntry, gpu: Gpu) -> str:
    plan = find_plan(entry, gpu)
    if plan is None:
        return f"no TensorRT engine for {gpu.name}: build with compute_capability {gpu.compute_capability}"
    return why_not_builder(plan.builder)


def why_not_builder(builder: str) -> str:
    """A plan runs with the version that built it. `builder`: such as "tensorrt_rtx 1.7.1.116"."""
    package, _, wanted = builder.partition(" ")
    if find_spec(package) is None:
        return f"{package} is not installed: pip install '{_distribution(package)}=={wanted}'"
    found = installed_version(package)
    if found != wanted:
        return (
            f"the TensorRT engines are of {builder} and {found} is installed: "
            f"pip install '{_distribution(package)}=={wanted}', or build again"
        )
    return ""


def installed_version(package: str) -> str:
    """Of the distribution that brings a TensorRT package, without importing it."""
    from importlib.metadata import PackageNotFoundError, version  # 15 ms; few ask

    stem = package.replace("_", "-")
    for name in (f"{stem}-cu13", f"{stem}-cu12", stem):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "an unknown version"


def why_not_onnx(entry: EngineEntry, provider: str = ONNX_PROVIDERS["onnx-cuda"]) -> str:
    from .onnx_gpu_engine import why_no_provider

    if entry.portable is None:
        return "the bundle has no portable graph for ONNX Runtime"
    return why_no_provider(provider)


def spread_devices(device: str | Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The device asked for, by engine; of engines that a mapping leaves out, "auto"."""
    if isinstance(device, str):
        return dict.fromkeys(names, device)
    known = list(names)
    for name in device:
        if name not in known:
            raise BundleError(f"device names {name!r}, which this bundle has not; only {', '.join(known)}")
    return {name: device.get(name, "auto") for name in known}


def _distribution(package: str) -> str:
    return f"{package.replace('_', '-')}-cu13"
