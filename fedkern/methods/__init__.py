"""Federated methods: one file each, written against the protocol of :mod:`fedkern.methods.base`."""

from fedkern.methods.base import (
    METHODS,
    Backgrounds,
    Batch,
    Client,
    Federation,
    LocalTraining,
    Message,
    Method,
    Objective,
    Received,
    Round,
    Samples,
    Server,
    Step,
    Upload,
    get,
    option,
    register,
)
from fedkern.methods.centralised import Centralised
from fedkern.methods.fedavg import FedAvg
from fedkern.methods.feddyn import FedDyn
from fedkern.methods.fedgid import FedGID
from fedkern.methods.fedlpfm import FedLPFM
from fedkern.methods.fedntd import FedNTD
from fedkern.methods.fedproto import FedProto
from fedkern.methods.fedprox import FedProx
from fedkern.methods.fml import FML
from fedkern.methods.fusefl import FuseFL
from fedkern.methods.local import Local
from fedkern.methods.moon import Moon
from fedkern.methods.scaffold import Scaffold

__all__ = [
    "FML",
    "METHODS",
    "Backgrounds",
    "Batch",
    "Centralised",
    "Client",
    "FedAvg",
    "FedDyn",
    "FedGID",
    "FedLPFM",
    "FedNTD",
    "FedProto",
    "FedProx",
    "Federation",
    "FuseFL",
    "Local",
    "LocalTraining",
    "Message",
    "Method",
    "Moon",
    "Objective",
    "Received",
    "Round",
    "Samples",
    "Scaffold",
    "Server",
    "Step",
    "Upload",
    "get",
    "option",
    "register",
]  # fmt: skip
