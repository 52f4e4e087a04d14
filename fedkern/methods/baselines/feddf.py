"""FedDF with one round of communication."""

from dataclasses import dataclass

import torch
from torch import nn

from fedkern.errors import UserError
from fedkern.methods.common.oneshot_distill import Distilled, Pool, build_generator, synthesise, torch_stream
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Phase
from fedkern.methods.roles import Server
from fedkern.models.networks.network_ensemble import Ensemble
from fedkern.typed_option import option

IMAGES = 2048
"""Number of images that the generator makes."""


@register("feddf")
class FedDF(Distilled):
    """One-shot FedAvg, then the clients' ensemble distilled into the average (FedDF, arXiv 2006.07242).

    With the members' logits t_k and the student's logits s of an unlabelled image:

        L = T^2 KL( softmax(mean_k t_k / T) || softmax(s / T) )

    The student trains by Adam, whose rate falls along a cosine to 0.  The paper's settings are the defaults: rate 1e-3,
    batch 128, T = 1.  The images are the public split (``--public-samples``, by default 1000, and 200 on ``digits``).
    ``source=generator`` needs no images: a generator trained against the ensemble makes 2,048.

    Differences from the paper:

    - One round.  The paper distils in every round.
    - ``distill_epochs`` is fixed.  The paper stops on a validation plateau, for which a server needs labels.
    - ``source=generator`` trains its generator, without a term of the student.  The paper takes a generator that exists
      (section 4.3).  Segmentation refuses this source.

    Source: Lin et al., NeurIPS 2020.
    """

    requires = frozenset({"classes"})

    @dataclass(frozen=True)
    class Options(Distilled.Options):
        """Options of the distillation."""

        source: str = option(
            "public",
            "images for the distillation of the ensemble: public ones, or a generator's",
            choices=("public", "generator"),
        )
        distill_epochs: int = option(20, "epochs over the images", low=1)
        distill_lr: float = option(1e-3, "learning rate of the distillation (Adam, cosine to 0)", above=0)

    def start(self, server: Server) -> None:
        public = 0 if server.public is None else len(server.public)
        if self.options.source == "public" and public < 2:
            raise UserError(
                f"feddf distils on at least 2 public images and this run sets {public or 'none'} aside: give "
                "--public-samples N, or in Python beside data sets public=DATASET, or take a generator's images with "
                "--method-option source=generator."
            )
        if self.options.source == "generator" and "pixels" in server.task.offers:
            raise UserError("source=generator makes images of one class each: segmentation needs --public-samples N.")
        if self.options.source == "generator":
            _ = server.mean  # other samples have none, and the run ends here
        super().start(server)

    def distil(self, server: Server, phase: Phase, teachers: Ensemble, student: nn.Module) -> None:
        o = self.options
        pool = self._pool(server, phase, teachers)
        draw = torch_stream(server, "distil", phase)
        optimiser = torch.optim.Adam(student.parameters(), o.distill_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, o.distill_epochs * -(-len(pool) // o.distill_batch)
        )
        for _ in range(o.distill_epochs):
            batches = map(pool.take, pool.batches(o.distill_batch, draw))
            server.report.update(self.follow(student, teachers, batches, optimiser, schedule))
        server.report["distil_images"] = float(len(pool))

    def _pool(self, server: Server, phase: Phase, teachers: Ensemble) -> Pool:
        o, classes = self.options, server.federation.classes
        if o.source == "public" and server.public is not None:
            pool = Pool(teachers, len(server.public))
            # Logits of a segmentation have a value per pixel and class: smaller batches.
            for batch in server.public.batches(min(server.task.outside, 500)):
                pool.add(batch.inputs)
            return pool
        pool = Pool(teachers, IMAGES)
        draw = torch_stream(server, "generator", phase)
        generator = build_generator(server, draw, nz=o.nz, ngf=o.ngf)
        while len(pool) < IMAGES:
            images, _ = synthesise(generator, teachers, None, o, draw, classes)
            pool.add(images[: IMAGES - len(pool)])
        return pool
