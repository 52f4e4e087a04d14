"""A mod for the ClientApps of Flower: the server learns an exception's traceback, not only its last line."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkern.flower.adapter import Context, Message


class ClientAppFailed(Exception):
    """An exception of a ClientApp whose message is the traceback of the original one."""


def with_traceback(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Run the ClientApp.

    An exception's traceback goes to the server as the error's reason.

    Flower sends the exception's type and message, and the traceback stays in the SuperNode's log.  A traceback shows
    paths, source lines and the exception's message, which may hold data: a site that keeps these to itself leaves the
    mod out.

    Returns:
        The reply of ``call_next``.

    Raises:
        ClientAppFailed: the ClientApp raised an exception, which is its cause.

    Example:
        ``app = ClientApp(mods=[with_traceback])``
    """
    try:
        return call_next(message, context)
    except Exception as error:
        raise ClientAppFailed(traceback.format_exc()) from error
