"""torch.jit: an error instead of a recorded graph that would replay uninitialised memory.

The tracer sees the allocation of a kernel's result, but not the kernel that fills it.
"""

from typing import Any, NoReturn

REFUSAL = (
    "fedkern's operators cannot be recorded by torch.jit.trace or torch.jit.script, which do not see their kernels; "
    "use torch.export.export, which records each as one node"
)


def refuse(*_: Any) -> NoReturn:
    raise RuntimeError(REFUSAL)


def unscriptable(public: Any) -> None:
    """Make ``torch.jit.script`` refuse a function or class, alone and within other code."""
    public.__prepare_scriptable__ = refuse  # torch.jit.script calls this before it compiles anything
