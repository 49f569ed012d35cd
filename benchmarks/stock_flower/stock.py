"""The stock way: FedAvg of LoRA factors with Flower's own strategy; every message loads the base, as tutorials do."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def build(labels):
    """The base with fresh adapters and a head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from fedlora.learning.loading import load_backbone

    backbone = load_backbone("minilm", "text-classification", labels=labels, adapt=False)
    model = get_peft_model(
        backbone.module, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
    )
    return model, backbone.processor or AutoTokenizer


def trained(model):
    """The parameters that travel."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@client.train()
def train(message: Message, context: Context) -> Message:
    """One epoch."""
    rows = [json.loads(line) for line in Path(context.node_config["data"]).read_text().splitlines()]
    labels = sorted({row["label"] for row in rows})
    model, tokenizer = build(labels)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    start = time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    total = 0.0
    for at in range(0, len(rows), 16):
        batch = rows[at : at + 16]
        inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
        targets = torch.tensor([labels.index(row["label"]) for row in batch])
        keep = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        loss = torch.nn.functional.cross_entropy(model(**keep).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(batch)
    numbers = {"seconds": time.perf_counter() - start, "num-examples": len(rows), "loss": total / len(rows)}
    reply = RecordDict({"arrays": ArrayRecord(trained(model)), "metrics": MetricRecord(numbers)})
    return Message(content=reply, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds; a line of time for each."""
    config = context.run_config
    log = Path(config["log"])

    done = []

    class Timed(FedAvg):
        def configure_train(self, *args):
            self.begun = time.time()
            return super().configure_train(*args)

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seconds = [reply.content["metrics"]["seconds"] for reply in replies if reply.has_content()]
            done.append({"seconds": time.time() - self.begun, "training": max(seconds)})
            return super().aggregate_train(server_round, replies)

    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    model, _ = build(["animals", "fruit", "tools"])
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy.start(grid, ArrayRecord(trained(model)), num_rounds=int(config["rounds"]))
    log.write_text("".join(json.dumps(line) + "\n" for line in [*done, {"finished": True}]))
