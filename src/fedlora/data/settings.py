"""The `[data]` section of a study file, validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Sources = str | tuple[str, ...]

# What each way of partitioning reads; a key that it would ignore is refused.
_READS: dict[str, tuple[str, ...]] = {
    "iid": ("clients",),
    "dirichlet": ("clients", "alpha", "column"),
    "pathological": ("clients", "classes_per_client", "column"),
    "column": ("column",),
}
_DEFAULTS: dict[str, object] = {"clients": 10, "alpha": 0.5, "classes_per_client": 2}


class PartitionSettings(BaseModel):
    """How the training examples become clients.

    `iid`: equal random shares. `dirichlet`: of every class, shares drawn from Dirichlet(alpha).
    `pathological`: each client sees `classes_per_client` classes. `column`: one client per value of `column`.
    The classes of the middle two are `data.label`, or the values of `column` where given.
    Where `by` is left out it follows from the other keys.

    >>> PartitionSettings(column="hospital").by, PartitionSettings(alpha=0.1).by, PartitionSettings().clients
    ('column', 'dirichlet', 10)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["iid", "dirichlet", "pathological", "column"] = "iid"
    clients: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    column: str | None = None
    classes_per_client: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        if "by" not in given:
            by = {"alpha": "dirichlet", "classes_per_client": "pathological", "column": "column"}
            given["by"] = next((way for key, way in by.items() if key in given), "iid")
        reads = _READS.get(given["by"]) if isinstance(given["by"], str) else None
        if reads is None:
            return given  # pydantic reports the unknown name
        for key in ("clients", "alpha", "column", "classes_per_client"):
            if key in given and key not in reads:
                raise ValueError(f"partition by {given['by']!r} does not use {key!r}: leave it out")
            if key in reads and key in _DEFAULTS:
                given.setdefault(key, _DEFAULTS[key])
        if given["by"] == "column" and "column" not in given:
            raise ValueError("partition by 'column' needs the column's name: partition = {by = 'column', column = ...}")
        return given


class DataSettings(BaseModel):
    """`[data]`: where the examples are, which columns matter, who owns them.

    `train`, `validation` and `test` are each a file (.jsonl, .json, .csv, .tsv, .parquet), a folder (of such files, of
    images, or that `datasets` saved to disk), a hub id (`name`, `owner/name@config`), or a list of them; `:split` at
    the end takes that split of a hub or saved dataset, or the rows of a file whose column `split` says so. Without
    `test`, each client's examples are split 70/10/20.
    `text`, `image`, `label`, and `prompt` and `response` of instruction data: columns. `labels`: the label set, where
    it is not what the training examples have. `label_space = "client"`: clients with labels of their own. `max_length`:
    tokens of a text, or of a language model's window. `holdout_clients`: how many never train, or which.
    `per_client`: at most so many examples of each client and of each given part, drawn by the seed, distinct ones
    before copies.

    >>> DataSettings(train="reviews.csv", text="review", label="stars").partition.by
    'iid'
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    train: Sources = ()
    validation: Sources | None = None
    test: Sources | None = None
    text: str | None = None
    image: str | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    label_space: Literal["union", "client"] = "union"
    max_length: PositiveInt | None = None
    per_client: PositiveInt | None = None
    holdout_clients: NonNegativeInt | tuple[str, ...] = ()
    partition: PartitionSettings = PartitionSettings()
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _labels_differ(self) -> DataSettings:
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
            raise ValueError(f"data.labels names {', '.join(map(repr, twice))} twice")
        return self
