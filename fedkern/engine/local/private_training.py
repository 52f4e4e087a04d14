"""Local training with differential privacy: Poisson-sampled batches, per-sample gradients, noise."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedkern.engine.batches.reader import Reader
from fedkern.engine.local.training import Diverged, ReceivedMessage, Schedule
from fedkern.methods.base import Client, Objective, Phase
from fedkern.models.precision import compute_in
from fedkern.privacy import DPSGD, LEDGER, Accountant, dpsgd
from fedkern.process.interrupts import check


@compute_in("fp32")  # clipping bounds the computed gradients, so they are not rounded to bf16 before it
def train_privately(
    client: Client,
    method: Objective,
    phase: Phase,
    module: nn.Module,
    data: Reader,
    received: ReceivedMessage,
    schedule: Schedule,
    spending: DPSGD,
    rows: np.ndarray | None,
) -> dict[str, float]:
    """Book the release in the client's ledger, then train ``module`` in place on the client's samples at ``rows``.

    Every step draws each sample independently with probability batch size / samples. There are as many steps as in
    training without privacy.

    With patients as the unit of privacy, patients are drawn with all of their images, and the sum of a patient's
    gradients is clipped. The number of a patient's images affects neither the probability nor the number of steps.

    ``method.loss`` must be a mean over samples of losses that do not depend on the other samples; batches have
    ``per_sample`` set to say so. The usual segmentation loss, a mean over all known pixels of a batch, is no such mean:
    a sample's gradient is larger if fewer pixels of the other samples are known.

    Raises:
        UserError: the network has no gradient per sample, or opacus is not installed.
        Diverged: a parameter is NaN or infinite at the end. A non-finite loss on the way raises nothing, because the
            error and its batch would leak samples, while the parameters are differentially private.
    """
    dpsgd.check_network(module, "this one")

    # Numbers of steps and draws depend only on declared sizes, as a patient's number of images is private.
    size = count_declared(len(data), rows, spending)
    rows = np.arange(len(data)) if rows is None else rows
    steps_per_epoch = math.ceil(size / schedule.batch_size)
    steps = steps_per_epoch * schedule.epochs if schedule.max_steps is None else schedule.max_steps
    rate = min(1.0, schedule.batch_size / size)
    owners = None if spending.patients is None else np.unique(spending.patients[rows], return_inverse=True)[1]
    count = size // spending.images  # number of samples, or of patients

    # With a secret, nobody who knows the seed can repeat draws and noise.
    noise = spending.noise(rate, steps)
    secret = spending.secret
    draws = client.rng(dpsgd.stream_name("batches", secret), phase)
    augmentation = client.rng("augmentation", phase) if data.fresh else None

    # The plain optimiser of torch, whose gradients the private steps clip and noise.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if schedule.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            trained, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
    module.train()
    total, batches = 0.0, 0
    device = next(module.parameters()).device
    generator = dpsgd.generator_of(
        client.rng(dpsgd.stream_name("dp-sgd", secret), phase), device, full_state=bool(secret)
    )
    # Booked before the first step: however the training ends, and whatever is disclosed, costs no more.
    accountant = Accountant(client.state.get(LEDGER))
    accountant.dp_sgd(spending.channel, noise, rate=rate, steps=steps)
    client.state[LEDGER] = accountant.state
    with dpsgd.private_steps(
        module, optimizer, max_norm=spending.max_norm, noise=noise, batch=rate * count, generator=generator
    ) as private:
        for done in range(steps):
            check()  # may end the run, whose ledger already has the whole cost
            optimizer.param_groups[0]["lr"] = schedule.lr_at(done // steps_per_epoch)
            chosen = draws.random(count) < rate
            drawn = rows[chosen if owners is None else chosen[owners]]
            private.zero_grad()
            if len(drawn):
                batch = replace(data.batch(drawn, phase, done // steps_per_epoch, augmentation), per_sample=True)
                with torch.no_grad():
                    batch.drawn = method.prepare(module, batch, received)
                result = method.loss(module, batch, received)
                loss = result[0] if isinstance(result, tuple) else result
                loss.backward()
                dpsgd.check_rows(module, len(drawn))
                dpsgd.keep_finite(module)
                if spending.patients is not None:
                    dpsgd.sum_patients(module, spending.patients[drawn])
                if math.isfinite(value := float(loss.detach())):
                    total, batches = total + value, batches + 1
            else:
                dpsgd.empty_batch(module)
            private.step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise Diverged(client.id, phase.round, steps, "the parameters are not finite")
    return {"loss": total / max(batches, 1), "noise": noise}


def count_declared(samples: int, rows: np.ndarray | None, spending: DPSGD) -> int:
    """Return the number of samples that a schedule may depend on, counting each patient's largest allowed number."""
    if spending.patients is None:
        return samples if rows is None else len(rows)
    patients = spending.patients if rows is None else spending.patients[rows]
    return spending.images * len(np.unique(patients))
