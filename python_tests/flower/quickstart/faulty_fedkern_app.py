"""fedkern's ClientApp on nodes that misbehave, as the entry "fault" of their node_config says."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkern.flower import adapter
from fedkern.flower.runs import client_app
from fedkern.flower.runs.packed_message import PackedMessage, Raw
from fedkern.flower.runs.portable import pack, unpack

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    return client_app.introduce(message, context)


@app.train()
def answer(message: Message, context: Context) -> Message:
    reply = client_app.answer(message, context)
    _, packed = adapter.opened(reply)
    return adapter.replied(message, spoilt(str(context.node_config.get("fault", "")), packed))


def spoilt(fault: str, packed: PackedMessage) -> PackedMessage:
    """The packed message with its largest tensor changed, or its text."""
    content = unpack(packed)
    message = content["message"]
    if fault == "nan":
        message["parameters"] = message["parameters"] * float("nan")
        return pack(content)
    if fault == "shape":
        message["parameters"] = message["parameters"][:-1].clone()
        return pack(content)
    name, raw = max(packed.tensors.items(), key=lambda item: len(item[1].data))
    others = {key: value for key, value in packed.tensors.items() if key != name}
    if fault == "oversized":
        shape = (len(raw.data) // 4 + (2 << 20),)
        return PackedMessage(packed.text, {name: Raw(raw.dtype, shape, raw.data + bytes(8 << 20)), **others})
    if fault == "malformed":
        return PackedMessage("{", packed.tensors)
    if fault == "missing":
        return PackedMessage(packed.text, others)
    return packed
