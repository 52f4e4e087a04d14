"""Every effective setting of a run, checked in one place and written to ``config.toml``."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from fedkern import named_code
from fedkern import plugins as plugin_room
from fedkern.data import AUGMENTATIONS, DATASETS
from fedkern.data.registry import read_options
from fedkern.errors import UserError, nearest
from fedkern.files import absolute, absolute_folder, check_text
from fedkern.inputs import read_text, special
from fedkern.methods import given_classes, registry
from fedkern.methods.aggregators import AGGREGATORS, MEAN, Rule
from fedkern.methods.options import Knob, knobs, option
from fedkern.methods.server_rules import SERVER_RULES, ServerRule
from fedkern.models import MODELS
from fedkern.models.precision import PRECISIONS
from fedkern.models.towers import IMAGE_ENCODERS, TEXT_ENCODERS
from fedkern.named_code import FORMS
from fedkern.privacy import IMAGE, UNITS, Unit
from fedkern.settings import toml
from fedkern.settings.defaults import COMMON, default_data, defaults
from fedkern.settings.run_format import check_format

NAME = "config.toml"
PATIENT_IMAGES = 4
"""Default of ``--patient-images``: the most images of a patient that ``--privacy-unit patient`` uses."""
MOST_WORKERS = 1024
USUAL_DELTA = 1e-5
_SHIPPED_DATA, _SHIPPED_MODELS, _SHIPPED_AGGREGATORS = (", ".join(each) for each in (DATASETS, MODELS, AGGREGATORS))
ANYHOW = ("data_root", "workers", "cache")
"""Settings that change no bit of a run; they may differ when the run is resumed."""
UNSTORED = ("cache",)
"""Settings that a run folder does not keep: a folder that comes from anyone must not say where files are written."""
BY_DATA = ("partition", "clients", "client_test")
"""Settings whose default the data may decide: sites that they name are the clients, and may have test sets."""
PARTS = {"backdoor_target": "backdoor_clients", "backdoor_size": "backdoor_clients", "cue_size": "cue_clients"}
"""Data options that only say more about another one."""
FOUND = (
    "model_sha256", "model_layout", "init_sha256", "method_sha256", "served", "training", "training_sha256", "identity",
    "main", "better",
)  # fmt: skip
"""What a run found in the data, files and code that its settings name; a resumed run compares them by itself."""


def _encoder(name: str) -> str:
    return name if name in (*IMAGE_ENCODERS, *TEXT_ENCODERS) else absolute_folder(name)


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run.  Make it with :meth:`make`, which fills in the defaults, or :meth:`load`.

    ``left_open`` are the settings of `BY_DATA` that nobody gave: they hold the data set's usual defaults until the data
    are loaded.  A stored run has all settings.  ``main`` and ``better`` are those of the data's task (`fedkern.tasks`),
    and those of classification until the data are loaded.
    """

    method: str = option("fedavg", "name of the method")
    data: str = option(COMMON["data"], f"data set: {', '.join(DATASETS)}, {FORMS}")
    data_root: str | None = option(None, "folder that holds the data files", type=str, path=absolute)
    cache: str | None = option(
        None, "folder that keeps the decoded images of a data set of image files, for later runs and runs beside this",
        type=str, path=absolute,
    )  # fmt: skip
    train_samples: int | None = option(None, "number of training samples to use instead of all", low=1, type=int)
    public_samples: int = option(
        0, "number of public training samples, drawn before the partition; no client owns them", low=0
    )
    partition: str | None = option(
        None,
        "split of the samples over clients: iid, stratified, dirichlet:ALPHA, classes:S, attribute (the default where "
        "the data name sites)",
        type=str,
    )
    clients: int = option(
        DATASETS[COMMON["data"]].clients, "number of clients; that of the sites, where the data name sites", low=1
    )
    correlation: float | None = option(
        None, "how strongly the background colour tells the class", low=0, high=1, type=float
    )
    held_out_client: str | None = option(
        None, "name or number of a client that never trains; its data become the test set held_out", type=str
    )
    client_test: float = option(
        COMMON["client_test"], "share of every client's samples set aside as its own test set; 0 leaves the data set's",
        low=0, high=0.9,
    )  # fmt: skip
    sample_fraction: float = option(1.0, "share of the clients that takes part in a round", above=0, high=1)
    rounds: int = option(COMMON["rounds"], "communication rounds", low=1, high=100_000)
    local_epochs: int = option(COMMON["local_epochs"], "epochs a client trains per round", low=1)
    local_steps: int | None = option(
        None, "optimiser steps a client trains per round, instead of local epochs", low=1, type=int
    )
    batch_size: int = option(COMMON["batch_size"], "samples per mini-batch", low=1)
    optimizer: str = option(COMMON["optimizer"], "optimiser of the clients", choices=("sgd", "adamw"))
    optimizer_state: str = option(
        "new", "the optimiser's momenta in the next round: new, or those that the client keeps", choices=("new", "keep")
    )
    lr: float = option(COMMON["lr"], "learning rate of the clients' optimiser", above=0)
    lr_decay: float = option(1.0, "factor on the learning rate after every round", above=0, high=1)
    lr_steps: str | None = option(
        None,
        "epochs of the whole run (round x local epochs + epoch), with --local-steps rounds, at which the learning rate "
        "drops: 200,400",
        type=str,
    )
    lr_step_factor: float = option(0.1, "factor on the learning rate at each of the lr-steps", above=0, high=1)
    momentum: float = option(COMMON["momentum"], "momentum of the clients' SGD", low=0, high=1)
    weight_decay: float = option(COMMON["weight_decay"], "weight decay of the clients' optimiser", low=0)
    clip_norm: float = option(0.0, "largest gradient norm of a step; 0 clips nothing", low=0)
    model: str = option(COMMON["model"], f"network: {', '.join(MODELS)}, {FORMS}", path=named_code.absolute)
    width: int | None = option(
        None,
        "channels of the network's first stage, or of a token of the built-in encoders",
        low=1,
        high=65536,
        type=int,
    )  # fmt: skip
    init: str | None = option(
        None,
        "initial weights of the network: the folder of a finished run, or a state dict with the network's names and "
        "shapes in a .safetensors or .pt file",
        type=str,
        path=absolute,
    )
    init_partial: bool = option(False, "take what of --init fits the network, and list what does not")
    freeze: str | None = option(
        None,
        "parameters of the network that stay as they are and never travel, by name: backbone.*,head.bias",
        type=str,
    )
    features: str | None = option(
        None, "submodule of your own network whose output is the features of methods that compare them", type=str
    )
    stages: str | None = option(
        None, "submodules of your own network, in order, after which feature maps can be mixed: conv1,conv2", type=str
    )
    accelerate: str = option(
        "auto", "your own network's convolutions computed with what follows them: auto, where right and faster, or off",
        choices=("auto", "off"),
    )  # fmt: skip
    image_encoder: str = option(
        COMMON["image_encoder"],
        "image-text data: " + ", ".join(IMAGE_ENCODERS) + ", or a transformers model's folder",
        path=_encoder,
    )
    text_encoder: str = option(
        COMMON["text_encoder"],
        "image-text data: " + ", ".join(TEXT_ENCODERS) + ", or a transformers model's folder",
        path=_encoder,
    )
    augment: str | None = option(
        None, "augmentation of training images instead of the data set's", choices=tuple(AUGMENTATIONS), type=str
    )
    buffers: str = option(
        "average",
        "batch norm's running statistics: average, local (every client keeps its own), drop, or pool (image-text"
        " data: computed anew for the global network over all clients' samples)",
        choices=("average", "local", "drop", "pool"),
    )
    fix_statistics: int | None = option(
        None,
        "rounds after which batch norm trains with the received running statistics, which then stay (FixBN)",
        low=0,
        type=int,
    )
    on_nan: str = option(
        "stop",
        "reaction to a client that diverges (NaN or Inf) or whose upload is refused: stop the run, or skip the client",
        choices=("stop", "skip"),
    )
    on_error: str = option(
        "stop",
        "reaction to an exception in a client's part of the method: stop the run, or skip the client",
        choices=("stop", "skip"),
    )
    max_update_norm: float = option(
        0.0,
        "averaging methods: largest Euclidean norm of a client's update (its parameters minus those sent); a "
        "larger update is refused; 0: no limit",
        low=0,
    )
    clip_update_norm: float = option(
        0.0,
        "averaging methods: largest Euclidean norm of a client's update; a larger update is scaled down; 0: no limit",
        low=0,
    )
    aggregator: str = option(
        MEAN,
        "averaging methods: rule that combines the clients' networks, as NAME or NAME:key=value,...: "
        + ", ".join(AGGREGATORS),
    )
    server_rule: str = option(
        MEAN,
        "averaging methods: server optimiser that steps towards the clients' average, as NAME or NAME:key=value,...: "
        + ", ".join(SERVER_RULES),
    )
    server_lr: float | None = option(
        None,
        "averaging methods: learning rate of the server; open: 1 for mean and momentum, 0.1 for adam and adagrad, 0.01 "
        "for yogi",
        above=0,
        type=float,
    )
    dropout_rate: float = option(
        0.0, "averaging methods: chance that a client of a round fails before it uploads", low=0, high=1
    )
    straggler_rate: float = option(
        0.0,
        "averaging methods: chance that a client is slow in a round, at a speed drawn from (0, 1) of the others'",
        low=0,
        high=1,
    )
    deadline: float = option(
        1.0, "end of a round for slow clients, in multiples of the time that the others need", low=1
    )
    late_work: str = option(
        "count",
        "what a slow client has done by the deadline: count the part, or drop the client from the round",
        choices=("count", "drop"),
    )
    dp_clip: float | None = option(
        None,
        "averaging methods: differential privacy of whole clients, with --dp-noise. Largest Euclidean norm of all that "
        "a client changes in a round; a larger change is scaled down to it, and all clients weigh the same. Choose it "
        "near the median change: a run on public data of the same kind with --dp-noise 0 tells every client's as "
        "update_norm in metrics.jsonl",
        above=0,
        type=float,
    )
    dp_noise: float | None = option(
        None,
        "averaging methods: standard deviation of the Gaussian noise that the server adds to the sum of the clients' "
        "changes, in multiples of --dp-clip; 0 only clips and promises nothing. More noise makes epsilon smaller; more "
        "clients in a round make the noise on their mean smaller",
        low=0,
        type=float,
    )
    dp_delta: float | None = option(
        None, "delta at which the epsilon of --dp-noise is told; open: 1e-5, or clients^-1.1 where that is smaller",
        above=0, high=0.5, type=float,
    )  # fmt: skip
    dp_draws: str = option(
        "secret",
        "source of the noise of --dp-noise: 128 bits that the server draws and keeps, or the run's seed. With the seed "
        "a run can be repeated, and epsilon holds only while the seed is secret",
        choices=("secret", "seed"),
    )
    teachers: str | None = option(
        None,
        "trained networks of the clients, which then do not train: a run folder, or a folder with "
        "client-0.safetensors, client-1.safetensors, ...",
        type=str,
        path=absolute,
    )
    privacy_unit: str = option(
        UNITS[0],
        "unit that differential privacy protects: an image, or a patient with all images. The data must name "
        "patients; an image without a patient counts as a patient of its own",
        choices=UNITS,
    )
    patient_images: int | None = option(
        None, f"images of a patient that are used at most, drawn once, with --privacy-unit patient; {PATIENT_IMAGES} "
        "where open", low=1, type=int,
    )  # fmt: skip
    eval_every: int = option(1, "evaluate every so many rounds, and always after the last", low=1)
    checkpoint_every: int = option(1, "write a checkpoint every so many rounds", low=1)
    stop_at: str | None = option(
        None, "figure of the records and its value with which the run ends: accuracy>=0.9, loss<=0.1", type=str
    )
    patience: int | None = option(
        None,
        "evaluations without a better main figure on the validation set after which the run ends; the best round's "
        "network stays in best.safetensors",
        low=1,
        type=int,
    )
    max_seconds: float | None = option(
        None, "seconds of work, over all resumptions: a round that would pass them is not begun", above=0, type=float
    )
    max_bytes: float | None = option(
        None,
        "bytes up and down, set-up rounds included: a round that would pass them is not begun",
        above=0,
        type=float,
    )
    grad_cam: int = option(200, "test images for the share of Grad-CAM inside the object; 0: no Grad-CAM", low=0)
    sums: str = option(
        "ordered",
        "how the server adds uploads up: ordered, in the order of the clients; exact, without regard to the order, so "
        "that ranks of torchrun send sums instead of uploads",
        choices=("ordered", "exact"),
    )
    records: str | None = option(
        None,
        "what records, pictures and the terminal show: all, or private (nothing of single clients and nothing "
        "outside epsilon). Open: private where a method option or --dp-noise asks for differential privacy",
        choices=("all", "private"),
        type=str,
    )
    precision: str = option(
        "fp32", "what networks compute in: fp32, or bf16 by autocast with fp32 weights", choices=PRECISIONS
    )
    seed: int = option(0, "root of all random streams")
    device: str = option(
        "auto", "device to run on; auto: cuda where there is a GPU", choices=("auto", "cpu", "cuda", "cuda:N")
    )
    threads: int = option(
        0, "CPU threads of the server's work and of evaluations; 0 for PyTorch's own choice", low=0, high=1024
    )
    client_threads: int = option(
        0, "CPU threads while a client works; 0 for the threads divided by the clients of a round, at least 1", low=0,
        high=1024,
    )  # fmt: skip
    workers: str = option(
        "auto",
        "processes in which clients work side by side; the bits are the same for any number. auto: by threads, "
        "cores, memory and the length of the run",
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    left_open: frozenset[str] = field(default=frozenset(), compare=False)
    plugins: Mapping[str, str] = field(default_factory=dict)
    model_sha256: str | None = None
    model_layout: str | None = None
    init_sha256: str | None = None
    method_sha256: str | None = None
    served: str | None = None
    training: str | None = None
    training_sha256: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    main: str = "accuracy"
    better: str = "max"

    def __post_init__(self) -> None:
        for knob in self.knobs():
            value = knob.convert(getattr(self, knob.field))
            if value == "":
                raise UserError(f"{knob.label} is given without a value: give it one, or leave it out.")
            object.__setattr__(self, knob.field, value)
        parsed = registry.get(self.method).Options.parse(self.options, method=self.method)
        object.__setattr__(self, "options", parsed.to_dict())
        object.__setattr__(self, "data_options", dict(self.data_options))
        object.__setattr__(self, "plugins", dict(self.plugins))
        object.__setattr__(self, "model", named_code.absolute(self.model))
        object.__setattr__(self, "data", named_code.absolute(self.data))
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device} needs a CUDA GPU and PyTorch sees none; use --device cpu.")
        if (number := self.device.partition(":")[2]) and int(number) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {self.device}: PyTorch sees {count} GPUs, the last is cuda:{count - 1}.")
        if self.threads == 0:
            object.__setattr__(self, "threads", torch.get_num_threads())
        if self.workers != "auto" and not (self.workers.isdecimal() and 1 <= int(self.workers) <= MOST_WORKERS):
            raise UserError(f'--workers must be auto, or a number in [1, {MOST_WORKERS}], not "{self.workers}".')
        if self.lr_steps is not None:
            object.__setattr__(self, "lr_steps", ",".join(str(epoch) for epoch in self.lr_epochs))
        if self.fix_statistics is not None and self.buffers == "drop":
            raise UserError(
                "--fix-statistics trains with received running statistics, of which --buffers drop leaves nobody any: "
                "leave one of the two out."
            )
        kind = registry.get(self.method)
        if self.buffers in ("local", "drop") and not kind(parsed).takes_buffers:
            raise UserError(
                f"--buffers {self.buffers} is not for {self.method} with these options, which keeps every client's "
                "running statistics: leave it out."
            )
        if self.records is None:
            promised = kind.promises(parsed) or bool(self.dp_noise)
            object.__setattr__(self, "records", "private" if promised else "all")
        if self.fix_statistics is not None and (kind.one_shot or kind.takes_teachers):
            raise UserError(
                f"--fix-statistics is not for {self.method}, whose clients' networks are not trained round by round."
            )
        if kind.one_shot and self.sample_fraction != 1:
            raise UserError(
                f"--sample-fraction is not for {self.method}, a one-shot method, in which every client trains once."
            )
        for name in ("stop_at", "patience", "max_seconds", "max_bytes"):
            if kind.one_shot and getattr(self, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} is not for {self.method}, a one-shot method, whose rounds belong "
                    "together: leave it out."
                )
        object.__setattr__(self, "aggregator", Rule(self.aggregator).text)
        object.__setattr__(self, "server_rule", ServerRule(self.server_rule).text)
        averaging = "that average the clients' parameters"
        once = "whose server averages the clients' parameters once a round"
        for names, able, what in (
            (
                ("aggregator", "max_update_norm", "clip_update_norm", "dp_clip", "dp_noise"),
                lambda method: method.averages,
                averaging,
            ),
            (("server_rule", "server_lr"), lambda method: method.steps_once, once),
            (
                ("dropout_rate", "straggler_rate"),
                lambda method: method.averages and not method.one_shot,
                f"{averaging} round by round",
            ),
        ):
            given = [name for name in names if getattr(self, name) not in (MEAN, None, 0)]
            if given and not able(kind(parsed)):
                raise UserError(
                    f"--{given[0].replace('_', '-')} is for methods {what}, which {self.method} with these options "
                    "does not do: leave it out."
                )
        if self.straggler_rate and kind.promises(parsed):
            raise UserError(
                f"--straggler-rate is not for {self.method} with differential privacy, whose epsilon counts all steps "
                "of a client: leave one of the two out."
            )
        for name, plain in (("deadline", 1.0), ("late_work", "count")):
            if getattr(self, name) != plain and not self.straggler_rate:
                raise UserError(
                    f"--{name.replace('_', '-')} is about slow clients: give --straggler-rate too, or leave it out."
                )
        if self.clip_update_norm and kind.follows_own_update:
            raise UserError(
                f"--clip-update-norm is not for {self.method}, whose clients keep a gradient of their whole update: "
                "take --max-update-norm, which refuses an update that is too large."
            )
        _check_client_level(self)
        if self.patient_images is not None and self.privacy_unit != "patient":
            raise UserError("--patient-images is for --privacy-unit patient: give that too, or leave it out.")
        if self.momentum >= 1:
            raise UserError("--momentum must be below 1; at 1 the velocity never decays.")
        texts = (*self.to_dict().items(), *self.options.items(), *self.data_options.items(), *self.plugins.items())
        for name, value in texts:
            if isinstance(value, str):
                check_text(value, f"the setting {name}")

    @property
    def trained_clients(self) -> int:
        """The clients that take part in the training."""
        return self.clients - (self.held_out_client is not None)

    @property
    def sampled_clients(self) -> int:
        """How many of the trained clients a round draws."""
        return max(1, math.floor(self.sample_fraction * self.trained_clients + 0.5))

    @property
    def unit(self) -> Unit:
        """The unit of privacy."""
        return Unit("patient", self.patient_images or PATIENT_IMAGES) if self.privacy_unit == "patient" else IMAGE

    @property
    def statistics(self) -> bool:
        """Whether the global network has running statistics."""
        return self.buffers in ("average", "pool")

    @property
    def accelerated(self) -> bool:
        """Whether the run serves its network by operators, as its record says."""
        return (self.served or "").startswith("served")

    @property
    def lr_epochs(self) -> tuple[int, ...]:
        """``lr_steps`` as numbers."""
        words = [word.strip() for word in (self.lr_steps or "").split(",")] if self.lr_steps is not None else []
        epochs = [int(word) if word.isdecimal() else 0 for word in words]
        if any(epoch < 1 for epoch in epochs) or sorted(set(epochs)) != epochs:
            raise UserError(
                f'--lr-steps must be epochs of at least 1 in rising order, such as 200,400, not "{self.lr_steps}".'
            )
        return tuple(epochs)

    @classmethod
    def knobs(cls) -> tuple[Knob, ...]:
        """All settings but ``options``, ``data_options`` and ``plugins``, with type, default, range and a line of help.

        The help of ``data``, ``model`` and ``aggregator`` lists what is registered now, plugins' included.
        """
        now = {
            "data": (_SHIPPED_DATA, ", ".join(DATASETS)),
            "model": (_SHIPPED_MODELS, ", ".join(MODELS)),
            "aggregator": (_SHIPPED_AGGREGATORS, ", ".join(AGGREGATORS)),
        }
        return tuple(
            dataclasses.replace(knob, help=knob.help.replace(*now[knob.field])) if knob.field in now else knob
            for knob in knobs(cls, "--{}")
        )

    @classmethod
    def make(
        cls,
        method: str,
        *,
        options: Mapping[str, Any] | Iterable[str] = (),
        data_options: Mapping[str, Any] | None = None,
        plugins: Iterable[str] | Mapping[str, str] = (),
        **settings: Any,
    ) -> Self:
        """Makes the settings of a run: the given ones, and for the rest the method's defaults on the data set.

        Args:
            method: a registered method.
            options: method options, a mapping or ``key=value`` words.
            data_options: options of the data set (for example ``protocol``, ``boxes``, ``detector``).
            plugins: files and modules to load first (:func:`fedkern.plugins.given`).  The run stores these, and those
                loaded before that registered what the run uses.
            **settings: any other field; ``None`` means not given.

        Raises:
            UserError: an unknown name, a value out of range, or a plugin that cannot be loaded.
        """
        plugin_room.load_installed()
        loaded = plugin_room.given(plugins)
        kind = registry.get(method)
        known = cls._stored()
        for name in settings:
            if name not in known:
                raise UserError(f'Unknown setting "{name}".{nearest(name, known)}')
        by_field = {knob.field: knob for knob in cls.knobs()}
        given = {
            name: by_field[name].convert(value) if name in by_field else value
            for name, value in settings.items()
            if value is not None
        }
        if kind.one_shot and "rounds" in given:
            raise UserError(
                f"--rounds is not for {method}, a one-shot method whose plan has the rounds it needs: give a client's "
                "whole budget with --local-epochs."
            )
        if kind.one_shot and "local_steps" in given:
            raise UserError(
                f"--local-steps is not for {method}, a one-shot method: give its budget with --local-epochs."
            )
        usual = defaults(method, str(given.get("data", default_data(method))))
        base = {**usual, **given}
        check_networks({name: value for name, value in base.items() if value != usual.get(name)}, str(base["data"]))
        if "width" not in given and base["model"] != usual["model"]:
            base.pop("width", None)  # the default width belongs to the default network
        if "local_epochs" in given and "local_steps" not in given:
            base.pop("local_steps", None)  # the default steps give way to the user's epochs
        if kind.one_shot:
            base["rounds"] = 1
        default_options = kind.Options.parse(base.pop("options", {}), method=method).to_dict()
        explicit = kind.Options.parse(options, method=method).given()
        merged = kind.Options.settled({**default_options, **explicit}, explicit.keys())
        typed = [pair for part in read_options(str(base["data"]), data_options or {}) for pair in part.items()]
        merged_data = {key: value for key, value in typed if key in (data_options or {})}
        for name, whole in PARTS.items():
            if name in merged_data and not merged_data.get(whole):
                raise UserError(f"Data option {name} has no effect without {whole}: give that too, or leave it out.")
        rule = str(base.get("aggregator", MEAN)).partition(":")[0].strip()
        used = plugin_room.used(
            {"method": method, "data set": str(base["data"]), "model": str(base["model"]), "aggregator": rule}
        )
        config = {**base, "method": method, "options": merged, "data_options": merged_data}
        config["plugins"] = {**loaded, **used}
        if method in registry.GIVEN:
            config["method_sha256"] = given_classes.fingerprint(kind)
        if config.get("width") is None and config["model"] in MODELS:
            config["width"] = MODELS[config["model"]].width
        return cls(**config, left_open=frozenset(BY_DATA) - set(given))

    @classmethod
    def _stored(cls) -> set[str]:
        """Names of the settings in a config file; a run stores all but those of `UNSTORED`."""
        return {f.name for f in dataclasses.fields(cls)} - {"left_open"}

    def replace(self, **settings: Any) -> Self:
        """A copy with some settings changed, which are then no longer left open."""
        return dataclasses.replace(self, **{"left_open": self.left_open - set(settings), **settings})

    def to_dict(self) -> dict[str, Any]:
        """Plain values; settings that are ``None``, and those of `UNSTORED`, are left out."""
        names = self._stored() - set(UNSTORED)
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        table["options"] = {name: value for name, value in self.options.items() if value is not None}
        table["data_options"] = dict(self.data_options)
        table["plugins"] = dict(self.plugins) or None
        table["identity"] = dict(self.identity) or None
        return {name: value for name, value in table.items() if value is not None}

    def to_publish(self) -> dict[str, Any]:
        """What may be published of :meth:`to_dict`: with private records, hashes and sizes of data are left out.

        Whoever guesses the last unknown label could otherwise check the guess.  Checkpoints keep them.
        """
        table = self.to_dict()
        if self.records == "private":
            table["identity"] = {name: text for name, text in self.identity.items() if name == "version"}
        return {name: value for name, value in table.items() if name != "identity" or value}

    def to_toml(self) -> str:
        """TOML text, for ``config.toml``, of the settings that :meth:`to_publish` tells; :meth:`table` reads it."""
        return toml.dumps(self.to_publish())

    @classmethod
    def table(cls, text: str, *, source: str = NAME) -> dict[str, Any]:
        """The settings named in TOML text, for ``make(**table)`` of a partial config file.

        Raises:
            UserError: not TOML or an unknown key.
        """
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
            raise UserError(f"{source} is not a valid TOML file: {error}.") from None
        known = cls._stored()
        plain: dict[str, Any] = {}
        for written, value in table.items():
            name = written.replace("-", "_")
            if name not in known:
                raise UserError(f'{source} has an unknown setting "{name}".{nearest(name, known)}')
            if name in plain:
                raise UserError(f'{source} has {name} twice, with "_" and with "-": leave one out.')
            plain[name] = value
        for name in ("options", "data_options", "identity"):
            if not isinstance(plain.get(name, {}), Mapping):
                raise UserError(f"{source}: [{name}] must be a table of key = value lines.")
        if "plugins" in plain:
            plain["plugins"] = _plugin_table(plain["plugins"], source)
        return plain

    @classmethod
    def stored(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """The settings named in ``config.toml`` of a run folder; raises UserError where it is missing or damaged."""
        path = Path(folder) / NAME
        try:
            text = read_text(path, "utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from None
        return cls.table(text, source=str(path))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, trusted: Collection[str] = (), given: Any = None, **replaced: Any
    ) -> Self:
        """The settings of a run folder, some of them ``replaced``; loads the run's plugins.

        Args:
            trusted: plugins that may be executed in any case (see :func:`fedkern.plugins.restore`).
            given: the class of the run's method, where a script gave it (`fedkern.methods.given_classes`).
            **replaced: settings.

        Raises:
            UserError: there is no such folder, it holds no run or one of another format, its ``config.toml`` is
                damaged, a plugin of the run may not be executed or cannot be loaded, or the run's method is a class
                that nobody gives or that has other code now.
        """
        check_run_folder(folder)
        check_format(Path(folder))
        table = cls.stored(folder)
        plugin_room.load_installed()
        plugin_room.restore(table.get("plugins", {}), folder, trusted)
        table = {name: value for name, value in table.items() if name not in UNSTORED}
        method, sha256 = str(table.get("method", cls.method)), table.get("method_sha256")
        if given is not None:
            given_classes.give_again(given, method, sha256, folder)
        given_classes.check(method, sha256, folder)
        return cls(**{**table, **replaced})

    def settled(self) -> Self:
        """The settings with ``client_threads`` filled in, which depends on how many clients the data have."""
        if self.client_threads:
            return self
        return self.replace(client_threads=max(1, self.threads // clients_of_a_round(self)))

    def check_code(self, folder: str | os.PathLike[str], trusted: Collection[str]) -> None:
        """Raises UserError where the settings of a run folder name code that is not ``trusted``.

        A run folder is data and may come from anyone.
        """
        named = {named_code.absolute(part) for part in trusted}
        for flag, part in self.code():
            if part not in named:
                raise UserError(
                    f"{Path(folder) / NAME} names code to run, {part}, and a run folder may come from anyone: where "
                    f"you trust that code, give the option again, {flag}."
                )

    def code(self) -> list[tuple[str, str]]:
        """Code that the settings name and a run imports: pairs of the flag that names the code, and the code's name."""
        options = registry.get(self.method).Options.code(self.options)
        found = [(f"--method-option {shlex.quote(f'{name}={self.options[name]}')}", part) for name, part in options]
        own = named_code.parse(self.model) is not None
        return [*found, *([(f"--model {shlex.quote(self.model)}", self.model)] if own else [])]

    def differences(self, stored: RunConfig) -> list[str]:
        """Differences from a stored run, as ``name: stored -> now``; empty where there are none.

        Not compared are:

        * the method options of two different methods;
        * the data folder, which may have moved: a resumed run compares the data themselves;
        * the plugins: :func:`fedkern.plugins.restore` checks those of a stored run;
        * the number of workers and the cache of decoded images, which change no bit;
        * what was found in files that the settings name.
        """
        mine, theirs = (_flat({**each.to_dict(), "plugins": {}, "identity": {}}) for each in (self, stored))
        if self.method != stored.method:
            mine, theirs = (
                {name: value for name, value in table.items() if not name.startswith("options.")}
                for table in (mine, theirs)
            )
        names = [name for name in dict.fromkeys([*theirs, *mine]) if name not in (*ANYHOW, *FOUND)]
        return [
            f"{name}: {theirs.get(name, 'unset')} -> {mine.get(name, 'unset')}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


def load_plugins(folder: str | os.PathLike[str], trusted: Collection[str] = ()) -> None:
    """Loads the plugins of a run folder; does nothing where its ``config.toml`` is missing or damaged.

    Raises:
        UserError: see :func:`fedkern.plugins.restore`.
    """
    try:
        table = RunConfig.stored(folder)
    except UserError:
        return
    plugin_room.load_installed()
    plugin_room.restore(table.get("plugins", {}), folder, trusted)


def _plugin_table(given: Any, source: str) -> dict[str, str]:
    """Identities of plugins by name, from a table of a config file or from a list of names there."""
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return dict.fromkeys(given, "")
    if not isinstance(given, Mapping) or not all(isinstance(identity, str) for identity in given.values()):
        raise UserError(f'{source}: plugins must be a list of names, or a table of lines "NAME" = "IDENTITY".')
    return dict(given)


def clients_of_a_round(config: RunConfig) -> int:
    """Number of clients in a round; 1 for a pooled method, whose single client has all data."""
    return 1 if registry.get(config.method).pooled else config.sampled_clients


def delta_of(config: RunConfig) -> float:
    """The delta at which epsilon is told: ``dp_delta``, or where that is open 1e-5 or clients^-1.1, the smaller."""
    return min(USUAL_DELTA, config.trained_clients**-1.1) if config.dp_delta is None else config.dp_delta


def _check_client_level(config: RunConfig) -> None:
    """Raises UserError where settings of client-level privacy do not fit together.

    What depends on the method's plan is checked before the run starts.
    """
    if (config.dp_clip is None) != (config.dp_noise is None):
        given, other = ("--dp-clip", "--dp-noise") if config.dp_noise is None else ("--dp-noise", "--dp-clip")
        raise UserError(f"{given} needs {other}: give both, or leave both out.")
    if config.dp_clip is None:
        for flag, there in (("--dp-delta", config.dp_delta is not None), ("--dp-draws", config.dp_draws != "secret")):
            if there:
                raise UserError(f"{flag} is about the noise of --dp-noise: give --dp-clip and --dp-noise too, or leave "
                                "it out.")  # fmt: skip
        return
    if config.aggregator != MEAN:
        raise UserError(
            f"--aggregator {config.aggregator} is not for --dp-clip, which bounds what a client changes in a sum of "
            "updates: leave one of the two out."
        )
    if config.clip_update_norm:
        raise UserError("--clip-update-norm clips what --dp-clip clips already: leave it out.")
    if config.fix_statistics is not None and config.dp_noise:
        raise UserError(
            "--fix-statistics keeps batch norm's running statistics as they are, and the noise of --dp-noise moves "
            "them: leave one of the two out."
        )
    if config.privacy_unit != "image":
        raise UserError(
            f"--privacy-unit {config.privacy_unit} is for methods that protect a client's samples, and --dp-noise "
            "protects whole clients: leave one of the two out."
        )


def check_regular(folder: str | os.PathLike[str]) -> None:
    """Raises UserError where a run folder has a named pipe, a socket or a device: reading it might block for ever."""
    for path in (*Path(folder).glob("*"), *Path(folder).glob("checkpoints/*")):
        if what := special(path):
            raise UserError(f"{path} is {what}, not a regular file: remove it, or put back the run's own file.")


def check_run_folder(folder: str | os.PathLike[str]) -> None:
    """Raises UserError where the folder is missing, holds no run, or holds anything but files and folders."""
    check_regular(folder)
    if not Path(folder).exists():
        raise UserError(f"The run folder {folder} does not exist: name one that a run was written to with --out.")
    if not (Path(folder) / NAME).exists():
        raise UserError(f"{folder} is not a run folder: it has no {NAME}.")


def check_networks(given: Mapping[str, Any], data: str) -> None:
    """Raises UserError where ``given`` settings choose a kind of network that the data set ``data`` does not use.

    Such a setting would have no effect, and the user would take the result for that network's.
    """
    pairs = [name for name, info in DATASETS.items() if "pairs" in info.task.offers]
    if data in pairs and "model" in given:
        raise UserError(
            f'--model {given["model"]} has no effect on the data set "{data}", whose network is a pair of encoders: '
            "leave model out and choose them with --image-encoder and --text-encoder."
        )
    for name in ("image_encoder", "text_encoder"):
        if data not in pairs and name in given:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]} is for image-text data ({', '.join(pairs)}), and the data "
                f'set "{data}" has no texts: leave {name} out and choose the network with --model.'
            )


def check_effect(given: Collection[str], config: RunConfig) -> None:
    """Raises UserError where a setting has no effect beside the others: the user would take the result for its own.

    Args:
        given: names of the settings that the user gave; a stored run or a config file of one names all of them.
        config: the run's settings.
    """
    for name, unused, way in (
        ("local_epochs", config.local_steps is not None, "beside --local-steps: leave one of the two out"),
        ("lr_step_factor", config.lr_steps is None, "without --lr-steps: give that too, or leave it out"),
        ("init_partial", config.init is None, "without --init: give that too, or leave it out"),
    ):
        if unused and name in given:
            raise UserError(f"--{name.replace('_', '-')} has no effect {way}.")


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            result.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            result[name] = value
    return result
