"""A federation in pfl's simulation: ``python pfl_peer.py TASK.json`` prints a line of JSON (under torchrun, the first
process does)."""

import json
import os
import sys
import time
from itertools import pairwise

import torch
import work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import HyperParam, NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Classifier(torch.nn.Module):
    """PEFT's model with the two functions that pfl asks for."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def loss(self, ids, mask, labels):
        self.last = work.loss_of(self.inner, ids, mask, labels)
        return self.last

    @torch.no_grad()
    def metrics(self, ids, mask, labels):
        return {"loss": Weighted(float(work.loss_of(self.inner, ids, mask, labels)) * len(ids), len(ids))}


class Clock(TrainingProcessCallback, HyperParam):
    """The moments at which rounds end; as a parameter, how many clients take part in the coming one."""

    def __init__(self, task):
        self.task, self.moments, self.ready = task, [], None

    def value(self):
        return self.task.cohort(max(0, len(self.moments) - 1))

    def on_train_begin(self, *, model):
        self.ready = time.time()
        self.moments.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.moments.append(time.perf_counter())
        return False, Metrics()


def main():
    """The rounds. Rank 0's clock is everyone's: a round ends with a sum over the processes."""
    task = work.Work(sys.argv[1])
    module = Classifier(task.model())
    parameters = [value for value in module.parameters() if value.requires_grad]
    model = PyTorchModel(
        module,
        lambda parameters, lr: task.optimizer(parameters),
        torch.optim.SGD(parameters, lr=1.0),
        amp_dtype=torch.bfloat16 if task.setting["autocast"] else None,
    )
    data = FederatedDataset(
        lambda name: PyTorchTensorDataset(task.client(name), user_id=str(name)),
        MinimizeReuseUserSampler(range(task.clients)),
    )
    clock, rounds = Clock(task), task.rounds + 1
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds, train_cohort_size=clock, val_cohort_size=0
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=task.steps,
            local_learning_rate=task.lr,
            local_batch_size=task.batch,
        ),
        NNEvalHyperParams(local_batch_size=task.batch),
        callbacks=[clock],
    )
    if os.environ.get("RANK", "0") == "0":
        seconds = [end - begin for begin, end in pairwise(clock.moments)]
        count = sum(value.numel() for value in parameters)
        loss = float(module.last.detach())
        print(json.dumps({"seconds": seconds, "ready": clock.ready, "trained": count, "loss": loss}))


if __name__ == "__main__":
    main()
