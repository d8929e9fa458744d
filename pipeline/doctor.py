"""What this machine can run and build, and what is missing for the rest."""

import importlib.util
import shutil
from dataclasses import asdict
from typing import Any

from ..export.capabilities import ENTERPRISE, RTX
from ..speculate.devices import installed_version
from ..speculate.driver import find_gpus
from ..speculate.folders import default_root
from .hashing import package_version
from .machine import describe_machine
from .preflight import BUILD_PACKAGES
from .processor import num_threads, vector_extensions

GIB = 2**30
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def diagnose() -> dict[str, Any]:
    """Facts and verdicts as JSON data; looks at nothing but this machine, and changes nothing.

    "can" has for each thing why it cannot be done, or "" if it can.
    """
    root = default_root()
    folder = next(path for path in (root, *root.absolute().parents) if path.exists())
    packages = (
        "numpy",
        "onnxruntime",
        "tokenizers",
        *(name for name in BUILD_PACKAGES if name != "onnxruntime"),
    )
    gpus, no_gpu = find_gpus()
    return {
        "machine": describe_machine(),
        "threads": num_threads(),
        "vector_extensions": vector_extensions(),
        "gpus": [asdict(gpu) for gpu in gpus],
        "packages": {name: package_version(name) for name in packages}
        | {name: installed_version(name) for name in (RTX, ENTERPRISE) if _is_installed(name)},
        "onnxruntime_providers": _providers(),
        "cache": {"root": str(root), "free_gib": round(shutil.disk_usage(folder).free / GIB, 1)},
        "can": {
            "run a bundle": _why_not_run(),
            "build a bundle": _why_not_build(),
            "build TensorRT engines": _why_not_package(RTX),
            "build them for 9.0, 10.0": _why_not_package(ENTERPRISE) or no_gpu,
            "run TensorRT engines": _why_not_engines(),
            "run ONNX Runtime on a GPU": _why_not_provider() or no_gpu,
            "compile CUDA kernels": _why_not_compile(),
            "run CUDA kernels": _why_not_kernels(),
        },
    }


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _why_not_run() -> str:
    """Empty if it can."""
    if not _is_installed("onnxruntime"):
        return "onnxruntime is not installed: pip install 'draftsmith[cpu]'"
    try:
        from ..speculate import binding

        binding.lib  # noqa: B018 (loads the native library)
    except Exception as error:  # whatever keeps it from loading is the answer
        return f"the native library does not load: {error}"
    return ""


def _why_not_build() -> str:
    missing = [name for name in BUILD_PACKAGES if not _is_installed(name)]
    return f"{', '.join(missing)} not installed: pip install 'draftsmith[build,cpu]'" if missing else ""


def _why_not_package(package: str) -> str:
    if _is_installed(package):
        return ""
    how = "pip install 'draftsmith[tensorrt]'" if package == RTX else f"pip install {package}"
    return f"{package} is not installed: {how}"


def _why_not_engines() -> str:
    without_package = _why_not_package(RTX) and _why_not_package(ENTERPRISE) and _why_not_package(RTX)
    return _why_not_kernels() or without_package  # memory and streams are the kernels' library's


def _why_not_provider() -> str:
    if any(provider in _providers() for provider in GPU_PROVIDERS):
        return ""
    return "ONNX Runtime has no GPU provider: pip install 'draftsmith[gpu]' in place of onnxruntime"


def _why_not_compile() -> str:
    return "" if shutil.which("nvcc") else "nvcc is not on PATH: install the CUDA toolkit"


def _why_not_kernels() -> str:
    from ..speculate.cuda import why_no_cuda

    try:
        return why_no_cuda()
    except Exception as error:  # the native package is not there at all
        return f"the native library does not load: {error}"
