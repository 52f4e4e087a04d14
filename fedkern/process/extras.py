"""Packages that fedkern uses where they are installed, and asks for where they are not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from fedkern.errors import UserError

PACKAGES = {"foundation": "transformers", "flower": "'flwr>=1.26,<2'", "privacy": "dp-accounting opacus",
            "medical": "nibabel", "tensorboard": "tensorboard", "wandb": "wandb",
            "export": "onnx onnxscript"}  # fmt: skip
"""The packages of an extra, as pip takes them."""


def install(extra: str) -> str:
    """Return the command that installs an extra, or a package that is in none.

    No package index has fedkern, so the extra can be named in a checkout alone; its packages can anywhere.
    """
    checkout = Path("pyproject.toml").is_file() and Path("fedkern/process/extras.py").is_file()
    return (
        f"pip install '.[{extra}]'" if checkout and extra in PACKAGES else f"pip install {PACKAGES.get(extra, extra)}"
    )


def import_extra(purpose: str, extra: str, *modules: str) -> ModuleType:
    """Return the first of the modules, all of which are imported.

    Raises:
        UserError: a module is not installed; ``what`` says what needs it, and the rest how to install ``extra``.
    """
    try:
        imports = [import_module(name) for name in modules]
    except ImportError:
        raise UserError(f"{purpose}: {install(extra)}.") from None
    return imports[0]
