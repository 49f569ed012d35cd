"""A federation in Flower's simulation: ``python flower_peer.py TASK.json`` prints a line of JSON.

``FedAvg`` over what PEFT trains; every client answers every round. The actors are as ``run_simulation`` makes them
unless the setting names workers and threads.
"""

import json
import sys
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()
server = ServerApp()


def trained(model):
    """The parameters that travel."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@client.train()
def train(message: Message, context: Context) -> Message:
    """The steps of one client."""
    import work  # by name: what an actor unpickles with this function would be new each time

    task, model = work.loaded(message.content["config"]["task"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    ids, mask, labels = task.client(int(context.node_config["partition-id"]))
    optimizer = task.optimizer(model.parameters())
    for rows in torch.randperm(len(ids)).split(task.batch):
        with task.autocast():
            loss = work.loss_of(model, ids[rows], mask[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(ids), "loss": float(loss.detach())})
    return Message(content=RecordDict({"arrays": ArrayRecord(trained(model)), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that knows when its rounds began and ended, and how many clients take part in which."""

    def __init__(self, task):
        super().__init__(fraction_evaluate=0.0, min_available_nodes=task.clients)
        self.task, self.seconds, self.ready, self.loss = task, [], None, 0.0

    def configure_train(self, server_round, arrays, config, grid):
        self.min_train_nodes = self.task.cohort(server_round - 1)
        self.fraction_train = self.min_train_nodes / self.task.clients
        self.begun = time.perf_counter()
        self.ready = self.ready or time.time()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if failed := [reply for reply in replies if reply.has_error()]:
            raise RuntimeError(failed[0].error.reason)
        assert len(replies) == self.task.cohort(server_round - 1)
        result = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.begun)
        self.loss = result[1]["loss"]
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds."""
    import work

    task, model = work.Work(sys.argv[1]), None
    strategy, model = Timed(task), task.model()
    start = ArrayRecord(trained(model))
    count = sum(value.numel() for value in trained(model).values())
    del model
    strategy.start(grid, start, task.rounds + 1, train_config=ConfigRecord({"task": sys.argv[1]}))
    result = {"seconds": strategy.seconds, "ready": strategy.ready, "trained": count, "loss": strategy.loss}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import work

    task = work.Work(sys.argv[1])
    workers, threads = task.setting["workers"], task.setting["threads"]
    config = None
    if workers:
        config = {"init_args": {"num_cpus": workers * threads}, "client_resources": {"num_cpus": threads}}
    run_simulation(server_app=server, client_app=client, num_supernodes=task.clients, backend_config=config)
