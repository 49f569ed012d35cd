"""The contract: what an algorithm is, what it may ask for, and what travels.

An algorithm is a value written once. It never knows where it runs: it takes state in and gives state out, and where it
needs training or scoring it *yields an order*. Whoever drives the generator executes the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import Field

from fedlora.federation.orders import Model, Work
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Sums, Tree

State = TypeVar("State")
Memory = TypeVar("Memory")
Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
Acc = TypeVar("Acc")
Kind = Literal["introduce", "train", "evaluate"]
Evaluated = Literal["test", "validation", "holdout", "fit"]
"""What may be scored from outside. The sums of the first split asked for have plain names ("accuracy"), a second one's
have the split before them ("validation/accuracy")."""
# Types of hyper-parameters that say their range; it is checked where a run file states a value.
Whole = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean: what it forgets must be something
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, eq=False)
class Update:
    """What a client sends: arrays, the weight they count with, and sums that merge exactly.

    Where the aggregator is linear the arrays are differences from the payload, so that clipping clips the update.
    """

    arrays: Tree
    weight: float
    sums: Sums


class Aggregator(Protocol[Acc, Value_co]):
    """A commutative monoid over updates; accumulators are plain values. Reports are float64, unless the algorithm asks
    for less (``Products(wide=False)``)."""

    @property
    def streaming(self) -> bool:
        """Memory does not grow with the number of clients."""
        ...

    @property
    def linear(self) -> bool:
        """The accumulator is ``sum(weight * lift(update))``: it may be clipped, noised and summed under masks."""
        ...

    def zero(self) -> Acc: ...
    def accumulate(self, acc: Acc, client: Client, update: Update) -> Acc: ...
    def merge(self, a: Acc, b: Acc) -> Acc: ...
    def report(self, acc: Acc) -> Value_co:
        """What the server learns from a round; never called on an empty one."""
        ...


class Algorithm(Generic[State, Memory, Value]):
    """A federated algorithm. Subclasses are frozen dataclasses (fields = hyper-parameters) and inherit nothing else.

    ``State``, ``Memory`` and accumulators are plain values: nested mappings and lists of tensors, numbers, strings and
    None, so that they checkpoint, travel and compare. No method changes its inputs.
    """

    introduce_everyone: ClassVar[bool] = False
    """Introduce all available clients before round 1, not only the newcomers of each cohort."""
    given_start: ClassVar[bool] = True
    """Its one adapter begins at ``ModelSpec.adapter``, which may hold a given one (``[adapter] from``)."""
    private_backbones: ClassVar[bool] = False
    """Clients may have models of their own (``Client.backbone``)."""
    adapts: ClassVar[bool] = True
    """False: adapters on the base mean nothing to it, so that any model will do."""
    federated: ClassVar[bool] = True
    """False: a bound to compare with (all data pooled); it is trained on one client that owns everybody's examples."""

    @property
    def aggregator(self) -> Aggregator[Any, Value]:
        """How the updates of a round are combined (a class attribute will do)."""
        raise NotImplementedError

    @property
    def introduction(self) -> Aggregator[Any, Any] | None:
        """How introductions are combined; None: nothing travels at first contact."""
        return None

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        """The server's state before anybody is heard."""
        raise NotImplementedError

    def client_init(self, local: Local) -> Work[tuple[Update | None, Memory]]:
        """A client's first memory: a function of the client alone, at introduction or before its first training."""
        return None, {}  # type: ignore[return-value]
        yield

    def server_introduce(self, state: State, value: Any, round: int) -> State:
        """The state after introductions; late joiners come here too."""
        return state

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        """What this client receives, also one never seen; slices, never decomposes."""
        raise NotImplementedError

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        """One round of a client: its update and its new memory."""
        raise NotImplementedError

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        """The exact names of an update's arrays and their shapes (-1: any size of this dimension; None: any shape)."""
        raise NotImplementedError

    def objection(self, state: State, client: Client, update: Update, kind: Kind) -> str | None:
        """Why an update of the right names and shapes must not be folded: where its values have a meaning that the
        server's own step relies on. It must never raise, whatever a stranger sent."""
        return None

    def server_update(self, state: State, value: Value, round: int) -> State:
        """The state after a round; what is kept and served is cast to the spec's type."""
        raise NotImplementedError

    def server_model(self, state: State) -> Model | None:
        """What "global" scores, data only; None where no single model exists."""
        return None

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        """The models of one client by name: the first is deployed and judged, the others are variants."""
        raise NotImplementedError

    def measures(self, state: State) -> Mapping[str, float]:
        """What the server learnt about itself (FlexLoRA's truncation error, say)."""
        return {}


@dataclass(frozen=True, eq=False)
class Request:
    """One question to one client.

    ``base_version``: the memory version to start from (None: none yet). ``keep_from``: the version that the last
    durable server checkpoint would ask for (None: it would ask for none). ``judge``: the server's model, scored as
    "global" when evaluating. ``splits``: what an evaluation scores (see ``Evaluated``).
    """

    run_id: str
    kind: Kind
    round: int
    rounds: int
    base_version: int | None
    keep_from: int | None
    payload: Tree
    judge: Model | None = None
    splits: tuple[Evaluated, ...] = ("test",)


@dataclass(frozen=True, eq=False)
class Reply:
    """Echoes what it answers, so that a late reply to an earlier round is recognised and dropped."""

    run_id: str
    kind: Kind
    round: int
    update: Update | None = None
    sums: Mapping[str, Sums] | None = None  # evaluate only: per variant, the deployed one first
