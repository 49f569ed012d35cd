"""Tables for people: the result of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedlora.study.run import Result


def megabytes(count: float) -> str:
    """Bytes for people, decimal units.

    >>> megabytes(1_234_000), megabytes(2_000)
    ('1.23 MB', '2.0 kB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def number(value: float | None) -> str:
    """A score with four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def table(result: Result) -> Group:
    """The scores of a run, per variant, and where its files are."""
    summary: Mapping[str, Any] = result.summary
    personal = summary["personal"]
    arrow = "higher is better" if summary["higher_is_better"] else "lower is better"
    rows = Table(title=f"{summary['algorithm']}: {summary['metric']} ({arrow})", title_justify="left")
    for heading in ("model", "mean", "std", "worst tenth"):
        rows.add_column(heading, justify="left" if heading == "model" else "right")
    for position, (name, scores) in enumerate(personal["variants"].items()):
        label = f"{name} (deployed)" if position == 0 else name
        rows.add_row(label, *(number(scores[key]) for key in ("mean", "std", "worst_decile")))
    if summary["global"] is not None:
        rows.add_row("global, all test data", number(summary["global"]["score"]), "", "")
    sent = summary["bytes"]
    setup = sent["setup_up"] + sent["setup_down"]
    facts = (
        f"{summary['clients']} clients, {summary['rounds']} rounds, {summary['seconds']:.1f} s, "
        f"{summary['client_steps_per_second']:.1f} client-steps/s; "
        f"sent up {megabytes(sent['up'])}, down {megabytes(sent['down'])}"
        + (f", introductions {megabytes(setup)}" if setup else "")
    )
    warnings = [Text(f"warning: {warning}", "yellow") for warning in summary.get("warnings", ())]
    wrote = Text(f"wrote {result.folder}")
    return Group(rows, *_prior(summary), *_missing(result.history), *warnings, Text(facts), wrote)


def _missing(history: Sequence[Mapping[str, Any]]) -> list[Text]:
    """How many replies no round could use: a table alone would not show that nobody has trained."""
    lost = sum(len(line["lost"]) + len(line["rejected"]) for line in history)
    asked = lost + sum(line["participants"] for line in history)
    return [Text(f"{lost} of {asked} replies were lost or refused: run.log says whose and why", "bold")] if lost else []


def _prior(summary: Mapping[str, Any]) -> list[Text]:
    """What a model that reads nothing would score, or why that is not known; nothing where there are no classes."""
    prior = summary.get("class_prior")
    if not prior:
        return []
    known = number(prior["mean"]) if "unknown" not in prior else f"not known: {prior['unknown']}"
    return [Text(f"class prior (each client's most frequent label): {known}")]
