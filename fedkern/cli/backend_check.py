"""Early check of the variables that choose kernels."""

from contextlib import suppress

from fedkern.errors import UserError


def check_backend() -> None:
    """Raise UserError if ``FEDKERN_BACKEND`` or ``FEDKERN_CPU_ISA`` names what this machine cannot use."""
    from fedkern.ops._core import backend, loading

    try:
        with suppress(loading.Unavailable):  # PyTorch's reference is used, and doctor says why
            backend.cpu_core()
        forced = backend.forced_backend()
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if forced is not None:
        rows = [row for row in backend.status() if row.backend == forced]
        if not any(row.serves for row in rows):
            reason = next((row.reason for row in rows if row.reason != "not implemented"), "it implements nothing")
            raise UserError(f"FEDKERN_BACKEND={forced} cannot be used: {reason}.")
