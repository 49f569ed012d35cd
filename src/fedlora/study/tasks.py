"""From ``[model] task`` and ``[data]`` to a task value."""

from __future__ import annotations

from fedlora.data.population import Population
from fedlora.learning.backbone import Backbone
from fedlora.learning.tasks import Task
from fedlora.study.config import RunConfig


def task_of(config: RunConfig, population: Population, backbone: Backbone) -> Task:
    raise NotImplementedError
