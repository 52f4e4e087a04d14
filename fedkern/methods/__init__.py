"""Federated methods: one file each, written against the protocol of :mod:`fedkern.methods.base`."""

from fedkern.methods.afl import AFL
from fedkern.methods.base import (
    METHODS,
    Backgrounds,
    Batch,
    Client,
    Federation,
    LocalTraining,
    Maybe,
    Message,
    Method,
    Number,
    Objective,
    Received,
    Round,
    Samples,
    Server,
    Step,
    Upload,
    Values,
    get,
    like,
    option,
    register,
)
from fedkern.methods.ccvr import CCVR
from fedkern.methods.centralised import Centralised
from fedkern.methods.coboosting import CoBoosting
from fedkern.methods.dense import DENSE
from fedkern.methods.ensemble import Ensemble
from fedkern.methods.fedavg import FedAvg
from fedkern.methods.feddf import FedDF
from fedkern.methods.feddra import FedDRA
from fedkern.methods.feddyn import FedDyn
from fedkern.methods.fedgid import FedGID
from fedkern.methods.fediod import FedIOD
from fedkern.methods.fedlpfm import FedLPFM
from fedkern.methods.fedntd import FedNTD
from fedkern.methods.fedproto import FedProto
from fedkern.methods.fedprox import FedProx
from fedkern.methods.fml import FML
from fedkern.methods.fusefl import FuseFL
from fedkern.methods.local import Local
from fedkern.methods.moon import Moon
from fedkern.methods.oneshot import OneShotFedAvg
from fedkern.methods.scaffold import Scaffold
from fedkern.methods.terms import GradientSum, Terms

__all__ = [
    "AFL",
    "CCVR",
    "DENSE",
    "FML",
    "METHODS",
    "Backgrounds",
    "Batch",
    "Centralised",
    "Client",
    "CoBoosting",
    "Ensemble",
    "FedAvg",
    "FedDF",
    "FedDRA",
    "FedDyn",
    "FedGID",
    "FedIOD",
    "FedLPFM",
    "FedNTD",
    "FedProto",
    "FedProx",
    "Federation",
    "FuseFL",
    "GradientSum",
    "Local",
    "LocalTraining",
    "Maybe",
    "Message",
    "Method",
    "Moon",
    "Number",
    "Objective",
    "OneShotFedAvg",
    "Received",
    "Round",
    "Samples",
    "Scaffold",
    "Server",
    "Step",
    "Terms",
    "Upload",
    "Values",
    "get",
    "like",
    "option",
    "register",
]  # fmt: skip
