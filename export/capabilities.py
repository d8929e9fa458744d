"""Which TensorRT builds for which GPUs, by compute capability.

TensorRT-RTX builds ahead of time for any of its capabilities, several in one plan, on a machine without a
GPU. TensorRT itself times its kernels, so it builds for the GPU that it finds.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from ..model.errors import ModelError
from ..speculate.driver import find_gpus

RTX, ENTERPRISE = "tensorrt_rtx", "tensorrt"  # Python packages

# As TensorRT-RTX names them.
RTX_NAMES = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
WITHOUT_BFLOAT16 = ("7.5",)
ENTERPRISE_ONLY = ("9.0", "10.0", "10.3")

_HOW_TO_INSTALL = {
    RTX: "pip install 'draftsmith[tensorrt]'",
    ENTERPRISE: "pip install tensorrt, on a machine with such a GPU",
}


def choose_builder(capabilities: Sequence[str], precision: str = "bfloat16") -> str:
    """The package that builds one plan in `precision` for all of `capabilities`.

    Raises ModelError for one that is unknown or lacks the precision, for a mix that no package builds, and
    where the package or the GPU that it needs is missing.
    """
    known = [*RTX_NAMES, *ENTERPRISE_ONLY]
    for capability in capabilities:
        if capability not in known:
            raise ModelError(
                f"compute_capability {capability!r} is unknown; there are: {', '.join(known)}, quoted"
            )
    if len(set(capabilities)) < len(capabilities):
        raise ModelError("compute_capability names one twice")
    if precision == "bfloat16" and (without := [c for c in capabilities if c in WITHOUT_BFLOAT16]):
        raise ModelError(
            f"compute_capability {without[0]} has no bfloat16; give it an entry of its own with "
            "precision: float16"
        )
    enterprise = [capability for capability in capabilities if capability in ENTERPRISE_ONLY]
    if enterprise and len(capabilities) > 1:
        raise ModelError(
            f"compute_capability {enterprise[0]} is not built by TensorRT-RTX, and TensorRT builds for one "
            f"GPU at a time; give {enterprise[0]} an entry of its own"
        )
    builder = ENTERPRISE if enterprise else RTX
    if find_spec(builder) is None:
        raise ModelError(
            f"compute_capability {', '.join(capabilities)} needs the package {builder}, which is not "
            f"installed: {_HOW_TO_INSTALL[builder]}"
        )
    if builder == ENTERPRISE:
        _check_gpu(capabilities[0])
    return builder


def _check_gpu(capability: str) -> None:
    """TensorRT takes the first GPU."""
    gpus, why_none = find_gpus()
    if gpus and gpus[0].compute_capability == capability:
        return
    found = f"that is {gpus[0].name}, {gpus[0].compute_capability}" if gpus else f"here is none: {why_none}"
    raise ModelError(
        f"compute_capability {capability} is built by {ENTERPRISE} for the GPU that it finds, and {found}; "
        "build on a machine with such a GPU (CUDA_VISIBLE_DEVICES says which is first), or leave this export "
        "out"
    )


def name_plan(capabilities: Sequence[str]) -> str:
    """A file name such as "sm80-sm89.trt"."""
    return "-".join(f"sm{capability.replace('.', '')}" for capability in capabilities) + ".trt"
