"""Federated methods, written against the protocol of :class:`Method`, and the registries of methods and aggregators."""

from fedkern.methods.aggregators import AGGREGATORS, register_aggregator
from fedkern.methods.base import LocalTraining, Method
from fedkern.methods.baselines.afl import AFL
from fedkern.methods.baselines.alone import Local
from fedkern.methods.baselines.ccvr import CCVR
from fedkern.methods.baselines.centralised import Centralised
from fedkern.methods.baselines.client_ensemble import Ensemble
from fedkern.methods.baselines.dense import DENSE
from fedkern.methods.baselines.ditto import Ditto
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.baselines.fedcgs import FedCGS
from fedkern.methods.baselines.feddf import FedDF
from fedkern.methods.baselines.feddyn import FedDyn
from fedkern.methods.baselines.fedlora import FedLoRA
from fedkern.methods.baselines.fedntd import FedNTD
from fedkern.methods.baselines.fedper import FedPer
from fedkern.methods.baselines.fedproto import FedProto
from fedkern.methods.baselines.fedprox import FedProx
from fedkern.methods.baselines.fml import FML
from fedkern.methods.baselines.moon import Moon
from fedkern.methods.baselines.oneshot_fedavg import OneShotFedAvg
from fedkern.methods.baselines.qffl import QFFL
from fedkern.methods.baselines.scaffold import Scaffold
from fedkern.methods.feddra import FedDRA
from fedkern.methods.fedgid import FedGID
from fedkern.methods.fediod import FedIOD
from fedkern.methods.fedlpfm import FedLPFM
from fedkern.methods.fusefl import FuseFL
from fedkern.methods.method_registry import METHODS, get, register
from fedkern.methods.protocol import Backgrounds, Batch, Federation, Message, Phase, Received, Round, Samples, Upload
from fedkern.methods.roles import Client, Objective, Server
from fedkern.methods.terms import GradientSum, Terms
from fedkern.methods.uploads import Maybe, Number, Values, like
from fedkern.tasks.figure_names import METRICS, register_metric
from fedkern.typed_option import option

__all__ = [
    "AFL",
    "AGGREGATORS",
    "CCVR",
    "DENSE",
    "FML",
    "METHODS",
    "METRICS",
    "QFFL",
    "Backgrounds",
    "Batch",
    "Centralised",
    "Client",
    "Ditto",
    "Ensemble",
    "FedAvg",
    "FedCGS",
    "FedDF",
    "FedDRA",
    "FedDyn",
    "FedGID",
    "FedIOD",
    "FedLPFM",
    "FedLoRA",
    "FedNTD",
    "FedPer",
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
    "Phase",
    "Received",
    "Round",
    "Samples",
    "Scaffold",
    "Server",
    "Terms",
    "Upload",
    "Values",
    "get",
    "like",
    "option",
    "register",
    "register_aggregator",
    "register_metric",
]  # fmt: skip
