"""Checks that the visible GPUs can run the compiled kernels, when a backend is chosen.

All visible GPUs have to qualify: a check of the tensor's own GPU would be needed in every call.
"""

from types import ModuleType

import torch

from fedkern.ops._core.loading import REBUILD, Unavailable

# By major version of CUDA, the oldest Linux driver for a runtime of that version. NVIDIA's release notes have it
# under "CUDA minor version compatibility".
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}

# Lowest compute capability that Triton says it supports: 80 for 8.0.
OLDEST_OF_TRITON = 80


def driver_for(core: ModuleType) -> str:
    """Return the NVIDIA driver that ``core`` needs, for example "525.60.13 or newer"."""
    major = core.versions()[0] // 1000
    return f"{DRIVERS[major]} or newer" if major in DRIVERS else f"one for CUDA {major}.0 or newer"


def check_cuda(core: ModuleType) -> None:
    """Raise :class:`Unavailable` if ``core`` (``fedkern._cuda``) cannot run on this machine."""
    if torch.version.hip:
        raise Unavailable(f"torch is a ROCm build (HIP {torch.version.hip}), and fedkern._cuda is for NVIDIA GPUs")
    if not hasattr(core, "architectures"):
        raise Unavailable(f"fedkern._cuda was built from older sources than these Python files: {REBUILD}")
    built_for = core.architectures()
    runtime, driver = core.versions()
    gpus = _gpus()
    for name, number in gpus:
        if driver // 1000 < runtime // 1000:
            versions = f"CUDA {version(runtime)} and the driver serves {version(driver)}"
            raise Unavailable(
                f"fedkern._cuda was built with {versions}: update the driver ({driver_for(core)}), or build with an "
                "nvcc no newer than it"
            )
        if any(number // 10 == arch // 10 and number >= arch for arch in built_for):
            continue
        if number < max(built_for):
            kinds = ", ".join(f"sm_{arch}" for arch in built_for)
            hide = " (CUDA_VISIBLE_DEVICES can hide it)" if len(gpus) > 1 else ""
            raise Unavailable(f"{name} is of sm_{number}, and fedkern._cuda was built for {kinds} and newer{hide}")
        if driver < runtime:  # the driver translates PTX for such a GPU, of its own CUDA version at most
            raise Unavailable(
                f"{name} is of sm_{number}, newer than fedkern._cuda, and to translate kernels of CUDA "
                f"{version(runtime)} the driver has to be newer than for CUDA {version(driver)}"
            )


def only_forced(backend: str) -> str:
    """Return why ``backend`` takes CUDA tensors here only when forced, or ""."""
    if backend != "triton":
        return ""
    if torch.version.hip:
        return f"never tried on ROCm (HIP {torch.version.hip}); FEDKERN_BACKEND=triton tries it"
    try:
        old = next((gpu for gpu in _gpus() if gpu[1] < OLDEST_OF_TRITON), None)
    except Unavailable as error:
        return str(error)
    if old is None:
        return ""
    support = f"Triton supports sm_{OLDEST_OF_TRITON} and newer"
    return f"{old[0]} is of sm_{old[1]}, and {support}; FEDKERN_BACKEND=triton tries it"


def _gpus() -> list[tuple[str, int]]:
    """Return name and compute capability (90 for 9.0) of every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    gpus = []
    try:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append((f"GPU {index} ({torch.cuda.get_device_name(index)})", 10 * major + minor))
    except RuntimeError as error:
        raise Unavailable(f"torch cannot use the GPUs ({str(error).splitlines()[0]})") from None
    return gpus


def version(number: int) -> str:
    """Format a version of CUDA: "13.0" for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"
