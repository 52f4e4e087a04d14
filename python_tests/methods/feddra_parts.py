"""FedDRA's server and clients without the engine's loop."""

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.server import Server
from fedkern.methods import FedDRA, Phase, Upload
from fedkern.models.towers import PARTS
from fedkern.ops import FlatParameters

ALIGN, JOINT, LOSSES = (Phase(0, "train", name) for name in ("alignment", "joint", "losses"))
SETTINGS = {"width": 4, "batch_size": 6, "local_steps": 2, "optimizer": "adamw", "lr": 0.003}


class Parts:
    """The engine's pieces without its loop."""

    def __init__(self, data, config, **options):
        self.context = RunContext(config.replace(options=options), data)
        self.method = FedDRA(FedDRA.Options.parse(options))
        self.server = Server(self.context)
        self.method.start(self.server)
        self.clients = [Client(self.context, k, {}) for k in range(len(data.clients))]

    def exchange(self, phase, chosen=None):
        sent = self.method.send(self.server, phase)
        uploads = []
        for client in self.clients if chosen is None else [self.clients[k] for k in chosen]:
            message = sent.get(client.id, sent)
            uploads.append(Upload(client.id, client.samples, self.method.client_update(client, phase, message)))
        self.method.server_update(self.server, phase, iter(uploads))
        return sent, uploads

    def sizes(self):
        """Return the numbers of parameters up to the encoders' end, and after it."""
        flat = FlatParameters(self.context.networks.build())
        begin = min(place.start for name, place in flat.places()["parameters"].items() if name.startswith(PARTS[2:]))
        return begin, len(flat.parameters) - begin
