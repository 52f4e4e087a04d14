"""A mod for Flower's ClientApps that sends the server an exception's whole traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkern.flower.adapter import Context, Message


class ClientAppFailed(Exception):
    """An exception of a ClientApp, with the original traceback as its message."""


def with_traceback(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Run the ClientApp and send an exception's traceback to the server, as the error's reason.

    Flower sends only the exception's type and message, and the traceback stays in the SuperNode's log. A traceback
    shows paths, source lines and the message, which may hold data. Leave the mod out at a site that keeps these
    private.

    Returns:
        The reply of ``call_next``.

    Raises:
        ClientAppFailed: the ClientApp raised an exception, which is the cause.

    Example:
        ``app = ClientApp(mods=[with_traceback])``
    """
    try:
        return call_next(message, context)
    except Exception as error:
        raise ClientAppFailed(traceback.format_exc()) from error
