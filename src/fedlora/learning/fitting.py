"""Training in lanes: each lane takes its own next batch, all lanes share the pass, every lane has its own optimiser."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.lora import Dropout
from fedlora.federation.orders import Batch, Fit, Optimizer, Outputs, Tuned, cross_entropy
from fedlora.learning.batches import Group, rows_of
from fedlora.learning.lanes import Stack, finite, own_part, padded, place, working
from fedlora.learning.optim import Stepper, clip, plan

if TYPE_CHECKING:
    from fedlora.learning.learner import Learner, Ready


class Diverged(RuntimeError):
    """A client's training met a number that is not finite."""

    def __init__(self, client: str, step: int, what: str, value: float) -> None:
        super().__init__(f"client {client!r}, step {step}: the {what} is {value}")
        self.client, self.step, self.value = client, step, value


@dataclass(eq=False)
class Lane:
    """A job in training."""

    ready: Ready
    order: Fit
    batches: list[Tensor]
    stepper: Stepper
    anchor: Tensor | None
    anchored: Tensor | None
    step: int = 0
    total: float = 0.0
    seen: int = 0


class Fits:
    """Compatible fits in lanes.

    Trained values, their gradients and moments are one flat row per lane, (lanes, P), zero-padded to common ranks:
    norm, clipping and optimiser are row operations. A lane that ends is taken by the next job, whose moments are fresh.
    """

    def __init__(self, learner: Learner, first: Ready, lanes: int) -> None:
        self.learner, self.count = learner, lanes
        self.objective = first.job.order.objective  # type: ignore[union-attr]
        self.lanes: list[Lane | None] = [None] * lanes
        ranks = learner.spec.ranks if lanes > 1 else {}
        self.blocks: list[tuple[str, str, tuple[int, ...], int, int]] = []  # model, key, padded shape, first, last
        size = 0
        for name, held in first.models.items():
            for key in held.trained:
                shape = padded(key, tuple(held.params[key].shape), ranks)
                self.blocks.append((name, key, shape, size, size + math.prod(shape)))
                size += math.prod(shape)
        device = learner.backbones[next(iter(first.models.values())).model.backbone].device
        self.values, self.grads = (
            torch.zeros(lanes, size, dtype=working(learner.spec.dtype), device=device) for _ in range(2)
        )
        self.leaves = [self._view(self.values, block).detach().requires_grad_() for block in self.blocks]
        self.views = [self._view(self.grads, block) for block in self.blocks]
        self.steppers: dict[Optimizer, Stepper] = {}  # lanes mostly agree: one call steps them all
        self.stacks: dict[str, Stack] = {}
        for name, held in first.models.items():
            leaves = {block[1]: leaf for block, leaf in zip(self.blocks, self.leaves) if block[0] == name}
            backbone = learner.backbones[held.model.backbone]
            self.stacks[name] = Stack(backbone, learner.spec, learner.head, learner.merges, held, lanes, leaves)

    def _view(self, rows: Tensor, block: tuple[str, str, tuple[int, ...], int, int]) -> Tensor:
        """(lanes, *shape): one entry of a model in all lanes."""
        return rows[:, block[3] : block[4]].view(self.count, *block[2])

    @property
    def tickets(self) -> list[int]:
        return [lane.ready.ticket for lane in self.lanes if lane is not None]

    def fill(self, queue: deque[Ready]) -> list[tuple[int, Any]]:
        """Waiting jobs take the free lanes; those without a single batch are done at once."""
        done: list[tuple[int, Any]] = []
        for k in range(self.count):
            while self.lanes[k] is None and queue:
                self._load(k, queue.popleft())
                lane = self.lanes[k]
                if lane is not None and not lane.batches:
                    done.append(self._finish(k))
        return done

    def step(self) -> list[tuple[int, Any]]:
        """One optimiser step in every active lane."""
        active = {k: lane for k, lane in enumerate(self.lanes) if lane is not None}
        if not active:
            return []
        sums = self._gradients(active)
        self.learner.steps += len(active)
        done: list[tuple[int, Any]] = []
        going: dict[Stepper, dict[int, Lane]] = {}
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        for (k, lane), norm in zip(active.items(), norms[list(active)].tolist()):
            for what, value in (("loss", sums[k]), ("gradient's norm", norm)):
                if not math.isfinite(value):
                    self._leave(k, lane)
                    done.append((lane.ready.ticket, Diverged(lane.ready.job.client, lane.step + 1, what, value)))
                    break
            else:
                if lane.order.optimizer.clip is not None:
                    clip(self.grads[k], norms[k], lane.order.optimizer.clip)
                going.setdefault(lane.stepper, {})[k] = lane
        for stepper, lanes in going.items():
            stepper.step(lanes)
            for k, lane in lanes.items():
                lane.total += sums[k]
                lane.seen += len(lane.batches[lane.step])
                lane.step += 1
                if lane.step == len(lane.batches):
                    done.append(self._finish(k))
        return done

    # -- a lane

    def _load(self, k: int, ready: Ready) -> None:
        order = ready.job.order
        assert isinstance(order, Fit)
        for name, held in ready.models.items():
            self.stacks[name].load(k, held)
        self.grads[k].zero_()
        anchor, anchored = self._anchor(order)
        generator = torch.Generator().manual_seed(ready.job.seed)
        self.lanes[k] = Lane(
            ready,
            order,
            plan(len(ready.units), order, generator),
            self._stepper(order.optimizer),
            anchor,
            anchored,
        )

    def _stepper(self, optimizer: Optimizer) -> Stepper:
        """The optimiser of these settings; a new one takes the place of those that no lane uses any more."""
        if optimizer not in self.steppers:
            used = {lane.stepper for lane in self.lanes if lane is not None}
            blocks = [(key, start, stop) for _, key, _, start, stop in self.blocks]
            self.steppers = {known: stepper for known, stepper in self.steppers.items() if stepper in used}
            self.steppers[optimizer] = Stepper(optimizer, blocks, self.values, self.grads)
        return self.steppers[optimizer]

    def _leave(self, k: int, lane: Lane) -> None:
        """The lane is free: nothing is left of its job but numbers that the next one replaces."""
        self.lanes[k] = None
        lane.stepper.forget(k)

    def _anchor(self, order: Fit) -> tuple[Tensor | None, Tensor | None]:
        """The proximal term's anchor as a flat row, and 1 where there is one."""
        if order.proximal is None:
            return None, None
        anchor, anchored = torch.zeros_like(self.values[0]), torch.zeros_like(self.values[0])
        for name, key, shape, start, stop in self.blocks:
            if name == "model" and key in order.proximal.anchor:
                place(anchor[start:stop].view(shape), order.proximal.anchor[key])
                anchored[start:stop] = 1
        return anchor, anchored

    def _finish(self, k: int) -> tuple[int, Tuned]:
        """The lane's result in the shapes, types and places of what was given; the lane is free."""
        lane = self.lanes[k]
        assert lane is not None
        models = {name: dict(held.params) for name, held in lane.ready.models.items()}
        for name, key, shape, start, stop in self.blocks:
            given = models[name][key]
            value = own_part(self.values[k, start:stop].view(shape), tuple(given.shape))
            # each on its own: a view of a copied row would keep all of it where one entry is kept
            models[name][key] = value.to(given.device, given.dtype, copy=True).contiguous()
        self._leave(k, lane)
        sums = {"train_loss": (lane.total, float(lane.seen))}
        return lane.ready.ticket, Tuned(models, sums, lane.step)

    # -- gradients

    def _gradients(self, active: Mapping[int, Lane]) -> list[float]:
        """Accumulates every lane's gradient of its mean loss in its row; the sums of losses, per lane."""
        self.grads.zero_()
        work = {k: lane.ready.units[lane.batches[lane.step].numpy()] for k, lane in active.items()}
        sums = torch.zeros(self.count, dtype=torch.float64)
        first = next(iter(self.stacks))
        names = [self._backbone(name) for name in self.stacks]
        clients = ["" if lane is None else lane.ready.job.client for lane in self.lanes]
        kind = next(iter(active.values())).ready.kind
        for stack in self.stacks.values():
            stack.merge()
        together = all(stack.joins for stack in self.stacks.values())
        backbone = self.stacks[first].backbone
        for group in self.learner.groups(backbone, self._backbone(first), work, self.learner.tokens):
            with self.learner.watched(kind, names, group, clients, together):
                losses = self._backward(group, active, work, together)
            sums.index_add_(0, torch.from_numpy(group.lanes), losses.double().cpu())
        for k, lane in active.items():
            if lane.anchor is not None and lane.anchored is not None:
                strength = lane.order.proximal.strength  # type: ignore[union-attr]
                self.grads[k].add_((self.values[k] - lane.anchor) * lane.anchored, alpha=strength)
        return sums.tolist()

    def _backward(
        self, group: Group, active: Mapping[int, Lane], work: Mapping[int, np.ndarray], together: bool
    ) -> Tensor:
        """Adds the gradients of a group's rows, each a share of its lane's batch; its losses, one per row."""
        losses = self._losses(group, active, together)
        share = torch.tensor([1.0 / len(work[k]) for k in group.lanes], dtype=losses.dtype, device=losses.device)
        if losses.requires_grad:
            found = torch.autograd.grad((losses * share).sum(), self.leaves, allow_unused=True)
            if together and not finite(found):  # whose it is only separate products say
                return self._backward(group, active, work, False)
            for into, gradient in zip(self.views, found):
                if gradient is not None:
                    into.add_(gradient)
        return losses.detach()  # and not the graph: the next group's forward pass would run beside it

    def _losses(self, group: Group, active: Mapping[int, Lane], together: bool) -> Tensor:
        """One loss per row."""
        masks = [None if lane is None else self.learner.label_mask(lane.ready.job.client) for lane in self.lanes]
        outputs: dict[str, Outputs] = {}
        batches: dict[str, tuple[Mapping[str, Tensor], Tensor]] = {}
        for name, stack in self.stacks.items():
            source = self._backbone(name)
            if source not in batches:
                batches[source] = self.learner.batch(stack.backbone, source, group)
            inputs = batches[source][0]
            outputs[name] = stack.outputs(inputs, group.segments, masks, self._dropout(group, active), together)
        inputs, labels = batches[self._backbone(next(iter(self.stacks)))]
        if self.objective is cross_entropy:
            return cross_entropy(outputs, {}, Batch(inputs, labels))
        parts: list[Tensor] = []
        for segment in group.segments:
            mine = {n: Outputs(rows_of(o.logits, segment), rows_of(o.features, segment)) for n, o in outputs.items()}
            params = {name: stack.params(segment[0]) for name, stack in self.stacks.items()}
            batch = Batch({n: rows_of(v, segment) for n, v in inputs.items()}, rows_of(labels, segment))
            parts.append(self.objective(mine, params, batch))
        return torch.cat(parts)

    def _backbone(self, name: str) -> str:
        held = next(lane for lane in self.lanes if lane is not None).ready.models[name]
        return held.model.backbone

    def _dropout(self, group: Group, active: Mapping[int, Lane]) -> Dropout | None:
        """Masks keyed by (job, step, unit): the same whatever else is in the pass."""
        if not self.learner.dropout:
            return None
        keys = np.array(
            [active[k].ready.job.seed + 2654435761 * active[k].step for k in group.lanes.tolist()], dtype=np.uint64
        )
        keys = keys * np.uint64(6364136223846793005) + group.units.astype(np.uint64)
        device = self.values.device
        return Dropout(self.learner.dropout, torch.from_numpy(keys.view(np.int64)).to(device))
