"""What the command line says where the system refuses: one line, no traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fedlora import cli
from fedlora.errors import UserError
from fedlora.federation import checkpoint
from fedlora.study import export
from fedlora.study.run import resume, run
from study import tiny

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def _raises(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (checkpoint, "_place", FULL),
        (export, "write", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: Exception
) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 1\nsteps = 1\n", data="partition = {clients = 2}\n")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, _raises(error))
        with pytest.raises(UserError, match=r"run: the run stopped: No space left on device\n.*fedlora resume .*run"):
            run(file, out=tmp_path / "run")
    assert resume(tmp_path / "run").summary["rounds"] == 1


def test_a_path_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.run_file(tmp_path)
    capsys.readouterr()
    assert _main(monkeypatch, "run", file, "--out", tmp_path / "mine.jsonl" / "run") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {tmp_path}/mine.jsonl/run: Not a directory"
    assert lines[1].startswith("  -> check the path")


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError("no path"), OSError("a library's own")])
def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(cli, "app", _raises(error))
    with pytest.raises(type(error)):
        cli.main()


def test_a_terminal_without_umlauts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny.run_file(tmp_path, data='partition = {by = "column", column = "hospital"}\n')
    lines = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    rows = [row | {"hospital": row["hospital"].replace("St.", "Zürich")} for row in lines]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert _main(monkeypatch, "data", file) == 0
    sys.stdout.flush()
    assert b"Z?rich A/ward 0" in shown.getvalue()
