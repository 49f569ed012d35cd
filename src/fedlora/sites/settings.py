"""``site.toml``: what one site brings to a federation and what it allows. Only the site reads it; it never travels."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fedlora.algorithms import ALGORITHMS
from fedlora.data.keys import meant
from fedlora.data.settings import DataSettings, Sources
from fedlora.errors import UserError
from fedlora.study.config import BUILT_IN, Section, explained

FILE = "site.toml"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
UPLOADS = ("adapter", "head", "norm", "embedding", "backbone", "statistics")
"""Kinds of arrays that an algorithm may want to send; scores, counts and losses always go with them."""
Upload = Literal["adapter", "head", "norm", "embedding", "backbone", "statistics"]
_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def size(value: Any) -> Any:
    """Bytes, of a number or a text with a unit.

    >>> size("1.5 GB"), size("64 MiB"), size(10)
    (1500000000, 67108864, 10)
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", value)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("write a number of bytes, or one with a unit: '200 MB', '1.5 GiB'")
    return int(float(found[1]) * _UNITS[found[2].lower()])


Bytes = Annotated[int, BeforeValidator(size), Field(ge=1)]


class SiteData(Section):
    """``[data]``. Files and columns under the site's own names; ``labels``: own label name -> the run's; ``least``:
    with fewer training examples the site does not take part."""

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    text: str | None = None
    image: str | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    labels: Mapping[str, str] = {}
    least: int = Field(20, ge=1)

    def columns(self) -> DataSettings:
        """The same as a run's ``[data]``."""
        own = {key: getattr(self, key) for key in ("train", "text", "image", "prompt", "response", "label")}
        return DataSettings(**own, validation=self.validation, test=self.test)


class Resources(Section):
    """``[resources]``. ``rank``: the largest this site trains; or ``memory``, from which it follows (neither: the
    run's). ``threads``: of the CPU (default: all)."""

    rank: int | None = Field(None, ge=1)
    memory: Bytes | None = None
    device: str = "auto"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Resources:
        if self.rank is not None and self.memory is not None:
            raise ValueError("give rank or memory, not both")
        return self


class SiteModel(Section):
    """``[model]``. ``base``: where this site keeps the base (default: as the run file names it); ``own``: the model it
    brings to a run whose clients have models of their own."""

    base: str | None = None
    own: str | None = None


class ServerAddress(Section):
    """``[server]``. ``address``: host:port that the site dials; ``ca``: the certificate that vouches for it; ``key``:
    the site's private key. ``insecure``: no TLS and no key, for trials on one machine."""

    address: str
    ca: str = "ca.pem"
    key: str = "site.key"
    insecure: bool = False

    @field_validator("address")
    @classmethod
    def _with_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError("write host:port, for example fed.example.org:9092")
        return value


class Allowed(Section):
    """``[allow]``. ``algorithms``: names, or "built-in" for all that come with the package; "my_file.py:MyClass" is a
    file of this site, which the server's must equal; ``upload``: kinds of arrays; ``steps`` and ``seconds``: of
    training for one request; ``bytes``: of one reply; ``rounds``: of one run."""

    algorithms: tuple[str, ...] | Literal["built-in"] = "built-in"
    upload: tuple[Upload, ...] = ("adapter", "head", "norm", "statistics")
    steps: int = Field(100_000, ge=1)
    seconds: float = Field(3600.0, gt=0)
    bytes: Bytes = 200_000_000
    rounds: int = Field(1000, ge=1)

    @field_validator("algorithms")
    @classmethod
    def _known(cls, names: Any) -> Any:
        for name in names if isinstance(names, tuple) else ():
            if name not in ALGORITHMS and ".py:" not in name:
                raise ValueError(f"no such algorithm: {name!r} ({meant(name, ALGORITHMS)})")
        return names


class SiteSettings(Section):
    """A whole ``site.toml``. ``name`` is the site's id: its client in every run."""

    name: str = Field(pattern=NAME)
    server: ServerAddress
    data: SiteData
    resources: Resources = Resources()  # type: ignore[call-arg]
    model: SiteModel = SiteModel()
    allow: Allowed = Allowed()  # type: ignore[call-arg]


def load(place: str | Path) -> SiteSettings:
    """Reads ``site.toml`` (or the one in a folder); paths that exist beside it become absolute. A UserError names every
    wrong key, its value and the nearest known name."""
    file = Path(place)
    file = file / FILE if file.is_dir() else file
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such site file", "make one with: fedlora site init NAME") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}", "name a site's file, in UTF-8, that can be read") from None
    return parse_text(text, str(file), file.parent)


def parse_text(text: str, place: str, folder: Path | None = None) -> SiteSettings:
    """Validates the text of a ``site.toml`` that lies (or will lie) in a folder."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{place}: not valid TOML: {error}", "strings need quotes; tables look like [data]") from None
    return parse(value if folder is None else located(value, folder), place)


def require_name(name: str) -> None:
    """Refuses what cannot be a site's name: it is also a folder's and a file's."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{name!r} cannot be a site's name", "use letters, digits, dots, dashes and underscores")


def parse(value: Mapping[str, Any], place: str = FILE) -> SiteSettings:
    """Validates nested plain values."""
    try:
        return SiteSettings.model_validate(value)
    except ValidationError as error:
        problems = explained(error, SiteSettings)
    raise UserError(f"{place}: {problems}", "docs/federation.md lists the keys of site.toml")


def located(value: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Data, model and key paths beside the file become absolute; those of keys always, others where they exist."""

    def find(name: Any, always: bool) -> Any:
        if isinstance(name, list):
            return [find(item, always) for item in name]
        if not isinstance(name, str) or name in BUILT_IN or name in ALGORITHMS:
            return name
        head, colon, tail = name.rpartition(":")
        for file, rest in ((name, ""), (head, colon + tail)):
            if file and (folder / file).expanduser().exists():
                return os.path.abspath((folder / file).expanduser()) + rest
        return os.path.abspath(folder / name) if always else name

    places = {"data": ("train", "validation", "test"), "model": ("base", "own"), "server": ("ca", "key")}
    places |= {"allow": ("algorithms",)}
    result = {key: dict(table) if isinstance(table, dict) else table for key, table in value.items()}
    server = result.get("server")
    if isinstance(server, dict):
        result["server"] = {"ca": "ca.pem", "key": "site.key", **server}
    for section, keys in places.items():
        table = result.get(section)
        if isinstance(table, dict):
            table.update({key: find(table[key], section == "server") for key in keys if key in table})
    return result


TEMPLATE = """\
# What this site brings to the federation, and what it allows. This file stays here: nothing of it is sent.
name = {name}

[server]
address = {address}        # this site dials out; nothing dials in
ca = "ca.pem"
key = "site.key"

[data]
train = {train}            # .csv, .tsv, .jsonl, .parquet or a folder; paths start at this file
# test = "test.csv"        # without it, a fifth of the examples is kept for testing
{columns}
{labels}

[resources]
{rank}                # the largest rank this site trains, or:
# memory = "8 GB"          # from which the rank follows
device = "auto"            # "cpu", "cuda", "cuda:1"

[model]
# base = "models/base"     # where the base lies here, if not where the run file says
# own = "models/mine"      # the model this site brings to pfedlora, fedproto, ...

[allow]
algorithms = "built-in"    # or a list of names
upload = ["adapter", "head", "norm", "statistics"]
steps = 100000             # of training for one request
seconds = 3600             # for one request
bytes = "200 MB"           # of one reply
rounds = 1000              # of one run
"""


LABELS = """\
# [data.labels]            # where this site's label names differ from the run's: own = the run's
# "gut" = "benign\""""


def template(
    name: str,
    address: str,
    train: str,
    columns: Mapping[str, str],
    *,
    labels: Mapping[str, str] | None = None,
    rank: int | None = None,
) -> str:
    """A commented ``site.toml``."""

    def quoted(text: str) -> str:
        return tomli_w.dumps({"x": text}).removeprefix("x = ").strip()

    pairs = [f"{quoted(own)} = {quoted(target)}" for own, target in (labels or {}).items()]
    return TEMPLATE.format(
        name=quoted(name),
        address=quoted(address),
        train=quoted(train),
        columns="\n".join(f"{key} = {quoted(value)}" for key, value in columns.items()),
        labels="\n".join(["[data.labels]            # own = the run's", *pairs]) if pairs else LABELS,
        rank="# rank = 4" if rank is None else f"rank = {rank}  ",
    )
