"""`graftlens` as a command: what it prints and how it ends, without an interpreter of its own."""

import contextlib
import io
import sys
from pathlib import Path
from subprocess import CompletedProcess

import jaxtyping
import pytest

from graftlens.cli import main


def graftlens(*words: object, cwd: Path | None = None) -> "CompletedProcess[str]":
    """What a process with these words would have printed, run in `cwd`."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    arguments = [str(word) for word in words]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        # Only tests check annotations, and typer gives None for what was not said.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(sys, "argv", ["graftlens", *arguments])
        for name, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as ended:
            main()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return CompletedProcess(arguments, int(ended.value.code or 0), out, err)
