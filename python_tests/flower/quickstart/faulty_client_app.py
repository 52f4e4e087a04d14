"""The quickstart's ClientApp on nodes that misbehave as the entry "fault" of their node_config says."""

import time
from pathlib import Path

import honest_client_app as honest
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedkern.flower.client_tracebacks import with_traceback

app = ClientApp(mods=[with_traceback])


def spoilt(fault: str, arrays: ArrayRecord) -> ArrayRecord:
    """Return the arrays with one entry changed."""
    weight, data = arrays["head.weight"].numpy(), bytes(arrays["head.weight"].data)
    if fault == "nan":
        arrays["head.weight"] = Array(np.full_like(weight, np.nan))
    elif fault == "shape":
        arrays["head.weight"] = Array(weight.T.copy())
    elif fault == "oversized":
        arrays["head.weight"] = Array(str(weight.dtype), weight.shape, "numpy.ndarray", data + bytes(8 << 20))
    elif fault == "malformed":
        arrays["head.weight"] = Array(str(weight.dtype), weight.shape, "numpy.ndarray", b"no array at all")
    elif fault == "missing":
        del arrays["head.weight"]
    return arrays


def a_broken_pipeline() -> None:
    raise ZeroDivisionError("division by zero at this site")


@app.train()
def fit(msg: Message, context: Context) -> Message:
    fault = str(context.node_config.get("fault", ""))
    if fault == "raises":
        a_broken_pipeline()
    if (at := context.node_config.get("hangs-in-round")) == msg.content["config"]["server-round"]:
        Path(str(context.node_config["marker"])).write_text(f"hangs in round {at}")
        time.sleep(600)
    reply = honest.fit(msg, context)
    reply.content["arrays"] = spoilt(fault, reply.content["arrays"])
    return reply
