"""What NVIDIA's driver says of this machine, asked through its own library: no CUDA package is needed."""

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, cuda.h


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: str  # such as "8.9"
    memory: int  # bytes


def find_gpus() -> tuple[list[Gpu], str]:
    """The GPUs that a process can use here and, where there is none, why in one line."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return [], f"no NVIDIA driver: {DRIVER} is not found"
    count = ctypes.c_int()
    for call in (lambda: driver.cuInit(0), lambda: driver.cuDeviceGetCount(ctypes.byref(count))):
        if status := call():
            return [], f"the NVIDIA driver gives error {status} ({_name_error(driver, status)})"
    if count.value == 0:
        return [], "the NVIDIA driver sees no GPU"
    return [_describe(driver, device) for device in range(count.value)], ""


def supported_cuda() -> int:
    """The newest CUDA that the driver supports, such as 13000 for 13.0. Only where `find_gpus` found some."""
    version = ctypes.c_int()
    ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return Gpu(name.value.decode(), ".".join(capability), memory.value)


def _name_error(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"unknown").decode()
