"""Import of the compiled CPU and CUDA cores, and of the Triton kernels."""

import functools
import hashlib
import importlib
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

# The oldest version of Triton that runs the kernels.
TRITON = (3, 6)

# The end of messages about an outdated core.
REBUILD = "run pip install . again (pip install -e . for an editable install)"


class Unavailable(Exception):
    """Error of a backend that cannot be used here, with a message that fits after ``because``."""


class Unsuited(Unavailable):
    """No compiled core runs on this kind of machine, or with this torch: warned of once, since no user chose it."""


class Slower(UserWarning):
    """Warning that fedkern works, but without its fast kernels."""


@functools.cache
def warn_once(sentence: str) -> None:
    warnings.warn(sentence, Slower, stacklevel=2)


def unsupported_machine() -> str:
    """Return the kind of a machine without compiled cores, or "" on Linux on x86-64."""
    system, machine = platform.system(), platform.machine()
    return "" if system == "Linux" and machine in {"x86_64", "AMD64"} else f"{system} on {machine}"


def load_core(name: str) -> ModuleType:
    """Import ``fedkern._cpu`` or ``fedkern._cuda``, or raise :class:`Unavailable`.

    A source tree that shadows an installed fedkern uses the installed core if it was built from the same ``csrc/``.
    """
    try:
        return importlib.import_module(f"fedkern.{name}")
    except ModuleNotFoundError:
        if (core := _installed_core(name)) is not None:
            return core
        if kind := unsupported_machine():
            raise Unsuited(f"fedkern's compiled kernels are made for Linux on x86-64, and this is {kind}") from None
        raise Unavailable(f"fedkern.{name} was not built") from None
    except ImportError as error:
        raise _load_error(f"fedkern.{name}", error) from error


def _load_error(core: str, error: ImportError) -> Unavailable:
    """Return the error for a core that does not load, Unsuited if it was compiled for another processor.

    Such a core names ``FEDKERN_ISA`` in its message (``csrc/bindings/cpu.cpp``).
    """
    kind = Unsuited if "FEDKERN_ISA" in str(error) else Unavailable
    return kind(f"{core} does not load ({error})")


def load_triton(module: str) -> ModuleType:
    """Import ``fedkern.ops.<module>``, which defines Triton kernels, or raise :class:`Unavailable`."""
    try:
        import triton
    except ModuleNotFoundError:
        raise Unavailable("triton is not installed (pip install triton)") from None
    except ImportError as error:
        raise Unavailable(f"triton does not load ({error})") from error
    if not hasattr(triton, "jit"):  # a folder of that name
        raise Unavailable("triton is not installed (pip install triton)")
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < TRITON:
        oldest = ".".join(map(str, TRITON))
        raise Unavailable(f"triton {triton.__version__} is installed, and fedkern needs {oldest} or newer")
    if release == (3, 6) and is_interpreted():
        import numpy

        try:
            int(numpy.zeros(1))
        except TypeError:
            raise Unavailable(f"the interpreter of triton 3.6 does not run with numpy {numpy.__version__}") from None
    if is_interpreted() and isinstance(triton.language.sum, triton.JITFunction):
        raise Unavailable(
            "triton was imported before TRITON_INTERPRET=1 was set (torch imports it too: set it before Python starts)"
        )
    try:
        return importlib.import_module(f"fedkern.ops.{module}")
    except Exception as error:  # the kernels' decorators read what another Triton may not have
        raise Unavailable(f"fedkern.ops.{module} does not load ({error})") from error


def is_interpreted() -> bool:
    loaded = sys.modules.get("fedkern.ops._core.triton")
    if loaded is not None:
        return bool(loaded.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}


def _installed_core(name: str) -> ModuleType | None:
    import fedkern

    package = Path(fedkern.__file__).resolve().parent
    for entry in sys.path:
        folder = (Path(entry) / "fedkern").resolve()
        if folder == package or not any(folder.glob(f"{name}.*.so")):
            continue
        fedkern.__path__.append(str(folder))
        try:
            core = importlib.import_module(f"fedkern.{name}")
        except ImportError as error:
            raise _load_error(f"fedkern.{name} of the installed fedkern", error) from error
        finally:
            fedkern.__path__.remove(str(folder))
        if core.source_hash() != source_hash(package.parent / "csrc", name):
            raise Unavailable(f"this source tree was changed after fedkern.{name} was installed in {folder}: {REBUILD}")
        return core
    return None


def stale_cores() -> list[str]:
    """Return the names of the cores that were not built from the checkout's ``csrc/``.

    Reads all of ``csrc/``, and is therefore not called on import.
    """
    import fedkern

    sources = Path(fedkern.__file__).resolve().parent.parent / "csrc"
    if not (sources / "bindings" / "cpu.cpp").is_file():  # fedkern's csrc/, not another project's
        return []
    stale = []
    for name in ("_cpu", "_cuda"):
        try:
            core = load_core(name)
        except Unavailable:
            continue
        if core.source_hash() != source_hash(sources, name):
            stale.append(f"fedkern.{name}")
    return stale


def source_hash(folder: Path, core: str, without: re.Pattern[str] | None = None) -> str:
    """Return the ``source_hash()`` of ``core`` built from ``folder`` (csrc/), "" without the folder.

    Files whose path in ``folder`` matches ``without`` do not count.
    """
    if not folder.is_dir():
        return ""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}
    )
    # As in cmake/SourceHash.cmake: files that only the other core is built from do not count.
    foreign = re.compile(r"^cuda/|^bindings/cuda|_cuda\.h$" if core == "_cpu" else r"^cpu/|^bindings/cpu")
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in names
        if not foreign.search(name) and not (without and without.search(name))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
