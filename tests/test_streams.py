"""Test the standard streams of commands (closed, or of another encoding) and the encoding of files."""

import ast
import io
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from processes import environment

from cifar_flax.runtime import streams

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}
# Binary by default, unlike those of built-in `open` and `Path`.
BINARY = ("os", "gzip", "tarfile", "Image", "archive")


@pytest.mark.parametrize("closed", CLOSED)
def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path, closed):
    """Descriptors below 3 are open, also in new processes, and writes to the streams end nowhere."""
    code = (
        "import os, subprocess, sys\n"
        "from cifar_flax.runtime import streams\n"
        "streams.prepare()\n"
        "file = open('opened', 'w')\n"
        "for name in ('stdin', 'stdout', 'stderr'):\n"
        "    getattr(sys, name).fileno()\n"
        "print('mine', file=sys.stdout, flush=True), print('mine', file=sys.stderr, flush=True)\n"
        "child = 'import os; [os.fstat(i) for i in range(3)]'\n"
        "print(file.fileno() > 2 and not subprocess.call([sys.executable, '-c', child]), file=file)\n"
    )
    command = ["sh", "-c", f'exec "$0" -c "$1" {CLOSED[closed]}', sys.executable, code]
    variables = environment(PYTHONPATH=str(REPOSITORY))
    subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=True)
    assert (tmp_path / "opened").read_text() == "True\n"


def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    streams.prepare()
    print("caf\u00e9 \udcff")
    assert terminal.getvalue() == b"caf? ?\n"


def test_streams_of_a_notebook_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    streams.prepare()
    print("caf\u00e9")
    assert sys.stdout.getvalue() == "caf\u00e9\n"


def test_a_run_without_stderr_in_an_ascii_locale(tmp_path):
    """Also expand `~` in --workdir, which its shell does not do."""
    options = "--config quickstart --config.train.epochs=1 --config.optim.warmup_epochs=0 --config.model.width=2"
    command = f"exec {sys.executable} {REPOSITORY / 'main.py'} {options} --workdir=~/caf\u00e9 2>&-"
    variables = environment(PYTHONIOENCODING="ascii", HOME=str(tmp_path))
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert f"written: {tmp_path}/caf" in done.stdout
    assert (tmp_path / "caf\u00e9" / "eval.json").exists()
    assert not (tmp_path / "~").exists()


def is_text(call):
    """Return whether `call` reads or writes text in the encoding of the locale."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    if name not in ("open", "read_text", "write_text") or owner in BINARY:
        return False
    settings = [keyword.arg for keyword in call.keywords]
    values = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    is_binary = any("b" in str(value) for value in values) if name == "open" else "utf-8" in values
    return "encoding" not in settings and not is_binary


def test_text_files_are_utf8_in_every_locale():
    for path in (REPOSITORY / "cifar_flax").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert [call.lineno for call in calls if is_text(call)] == [], path
