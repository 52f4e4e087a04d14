"""Apple's pfl-research: FederatedAveraging on its simulated backend, in one process."""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.context import LocalResultMetaData
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from .task import Contest, Task, contest


class Trained(PyTorchModel):
    """Model whose local epochs are those of all programs."""

    task: Task
    round = -1

    def do_multiple_epochs_of(
        self, user_dataset: Any, train_params: Any, train_step_fn: Any, **kwargs: Any
    ) -> LocalResultMetaData:
        self.task.train(self._model, int(user_dataset.user_id), self.round)
        return LocalResultMetaData(num_steps=1)

    def evaluate(self, *rest: Any, **named: Any) -> Metrics:
        """Return no figures, because pfl evaluates the first round's clients with any setting."""
        return Metrics()


class Marked(FederatedAveraging):
    """Algorithm that notes when a round begins."""

    contested: Contest

    def get_next_central_contexts(self, model: Any, *rest: Any) -> Any:
        contexts = super().get_next_central_contexts(model, *rest)
        if contexts[0] is not None:
            self.contested.begin()
            model.round += 1
        return contexts


def main() -> None:
    """Play the task's rounds.

    pfl averages parameters alone: batch norm's running statistics stay those of the client that trained last.
    """
    contested = contest()
    task = Trained.task = contested.task
    Marked.contested = contested
    module = task.network()
    module.loss = module.metrics = None  # pfl wants both names; nothing calls them
    users = [str(k) for k in range(task.clients)]

    def user(name: str) -> PyTorchTensorDataset:
        return PyTorchTensorDataset((task.images[int(name)], task.labels[int(name)]), user_id=name)

    data = FederatedDataset(user, get_user_sampler("minimize_reuse", users))
    model = Trained(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    Marked().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.rounds,
            evaluation_frequency=task.rounds + 1,
            train_cohort_size=task.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=task.epochs, local_learning_rate=task.lr, local_batch_size=task.batch_size
        ),
    )
    contested.finish(module.state_dict())


if __name__ == "__main__":
    main()
