"""fedkern's ClientApp on nodes that misbehave, as the entry "fault" of their node_config says."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkern.flower import adapter
from fedkern.flower.runs import client_app
from fedkern.flower.runs.parcel import Parcel, Raw
from fedkern.flower.runs.portable import pack, unpack

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    return client_app.introduce(message, context)


@app.train()
def answer(message: Message, context: Context) -> Message:
    reply = client_app.answer(message, context)
    _, parcel = adapter.opened(reply)
    return adapter.replied(message, spoilt(str(context.node_config.get("fault", "")), parcel))


def spoilt(fault: str, parcel: Parcel) -> Parcel:
    """The parcel with its largest tensor changed, or its text."""
    content = unpack(parcel)
    message = content["message"]
    if fault == "nan":
        message["parameters"] = message["parameters"] * float("nan")
        return pack(content)
    if fault == "shape":
        message["parameters"] = message["parameters"][:-1].clone()
        return pack(content)
    name, raw = max(parcel.tensors.items(), key=lambda item: len(item[1].data))
    others = {key: value for key, value in parcel.tensors.items() if key != name}
    if fault == "oversized":
        shape = (len(raw.data) // 4 + (2 << 20),)
        return Parcel(parcel.text, {name: Raw(raw.dtype, shape, raw.data + bytes(8 << 20)), **others})
    if fault == "malformed":
        return Parcel("{", parcel.tensors)
    if fault == "missing":
        return Parcel(parcel.text, others)
    return parcel
