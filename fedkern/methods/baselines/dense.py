"""DENSE: one-shot federated learning without any data on the server."""

from dataclasses import dataclass

import torch
from torch import nn

from fedkern.methods.common.oneshot_distill import Distilled, Pool, build_generator, synthesise, torch_stream
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Phase
from fedkern.methods.roles import Server
from fedkern.models.networks.network_ensemble import Ensemble
from fedkern.typed_option import option

MOMENTUM = 0.9
"""Momentum of the student's SGD, as in the released code."""


@register("dense")
class DENSE(Distilled):
    """One-shot FedAvg, then the ensemble distilled on images of a trained generator (DENSE, arXiv 2112.12371).

    In every epoch the server trains a generator against the frozen ensemble of the clients' networks, with mean logits
    t and random labels y, and against the student s:

        L_G = CE(t(x), y) + bn_weight L_BN(x) - adv_weight mean over images of D
        D   = KL(softmax(t) || softmax(s)) [argmax t != argmax s]

    L_BN is the distance to the members' running statistics (`fedkern.methods.common.oneshot_distill`).  The images of
    the step with the lowest L_G join a pool.  The student then makes one pass over the pool with T^2 KL(t || s) at
    temperature T, by SGD with momentum 0.9.

    As in the released code, the generator starts anew before every batch (``restart``), its noise is learned too, and
    the pool keeps all batches.  Images are not augmented here, so the members' logits of an image are computed once.

    On ``digits`` the defaults are shorter, so that the generator learns within minutes: ``ngf=16``, 10 generator steps
    at 0.01, 15 epochs at 0.01, T = 4, batches of 32 and 64, ``restart=false``.  Other data take the released code's
    settings.

    Difference from the released code: the student starts from the clients' average, and ``student_init=fresh`` starts
    it anew.

    Source: Zhang et al., NeurIPS 2022, section 3.
    """

    requires = frozenset({"classes", "images", "features"})

    @dataclass(frozen=True)
    class Options(Distilled.Options):
        """Options of DENSE, with the defaults of the released code except for ``student_init``."""

        distill_epochs: int = option(
            200,
            "epochs of the distillation; each makes a batch of images and trains the student on all images so far",
            low=1,
        )
        distill_lr: float = option(0.005, "learning rate of the student's SGD", above=0)
        temperature: float = option(20.0, "temperature of the distillation", above=0, infinite=True)
        distill_batch: int = option(256, "images per step of the distillation", low=2)
        adv_weight: float = option(
            1.0, "weight of the adversarial loss (divergence of ensemble and student on the images)", low=0
        )
        restart: bool = option(True, "reset the generator's weights before every batch")

    def start(self, server: Server) -> None:
        _ = server.mean  # images without it have no generator, and the run ends here
        super().start(server)

    def distil(self, server: Server, phase: Phase, teachers: Ensemble, student: nn.Module) -> None:
        o, classes = self.options, server.federation.classes
        draw = torch_stream(server, "generator", phase)
        generator = build_generator(server, draw, nz=o.nz, ngf=o.ngf)
        pool = Pool(teachers, o.distill_epochs * o.synthesis_batch)
        optimiser = torch.optim.SGD(student.parameters(), o.distill_lr, MOMENTUM)
        for _ in range(o.distill_epochs):
            images, _ = synthesise(generator, teachers, student, o, draw, classes, o.adv_weight, o.restart)
            pool.add(images)
            batches = map(pool.take, pool.batches(o.distill_batch, draw))
            server.report.update(self.follow(student, teachers, batches, optimiser))
        server.report["distil_images"] = float(len(pool))
