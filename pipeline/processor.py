"""What of the processor decides how a stage computes."""

import os
from pathlib import Path

KNOWN_EXTENSIONS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def num_threads() -> int:
    """How many threads stages and verbs compute with: OMP_NUM_THREADS, else one for each core that they may
    use.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def vector_extensions() -> list[str]:
    """Those that numerical libraries choose their kernels by; empty where Linux does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), [])
    return [name for name in KNOWN_EXTENSIONS if name in flags]
