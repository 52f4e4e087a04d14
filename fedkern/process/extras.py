"""Optional packages, and advice to install them."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from fedkern.errors import UserError

PACKAGES = {"foundation": "transformers peft", "flower": "'flwr>=1.26,<2'", "privacy": "dp-accounting opacus",
            "medical": "nibabel", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow",
            "export": "onnx onnxscript"}  # fmt: skip
"""Packages of each extra, as pip's arguments."""


def install(extra: str) -> str:
    """Return the command that installs an extra or a package.

    No package index has fedkern, so an extra can be named only in a checkout. Elsewhere its packages are listed.
    """
    checkout = Path("pyproject.toml").is_file() and Path("fedkern/process/extras.py").is_file()
    return "pip install " + (f"'.[{extra}]'" if checkout and extra in PACKAGES else PACKAGES.get(extra, extra))


def import_extra(purpose: str, extra: str, *modules: str) -> ModuleType:
    """Import all modules and return the first."""
    try:
        imports = [import_module(name) for name in modules]
    except ImportError:
        raise UserError(f"{purpose}: {install(extra)}.") from None
    return imports[0]
