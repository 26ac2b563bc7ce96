"""`klquant serve` as a process: it says where it is, answers, and ends at Ctrl-C."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from klquant.cli.main import main

DEMO = str(Path(__file__).resolve().parents[2] / "demo" / "model")


def run(*arguments):
    return CliRunner().invoke(main, ["serve", DEMO, "--devices", "cpu", *map(str, arguments)])


@contextmanager
def killed(process):
    """Nothing outlives a test that fails."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_it_serves_until_ctrl_c():
    command = [sys.executable, "-m", "klquant", "serve", DEMO, "--devices", "cpu", "--port", "0", "--name", "small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KLQUANT_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server, killed(server):
        where = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/v1", line)))
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        body = {"messages": [{"role": "user", "content": "def test_open("}], "max_tokens": 5, "model": "small"}
        request = urllib.request.Request(f"{where}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        endless = json.dumps(body | {"max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(request.full_url, endless, headers), timeout=60) as answer:
            assert answer.readline().startswith(b"data:")
            server.send_signal(signal.SIGINT)
            assert b"the server is going down" in answer.read()
        assert server.wait(30) == 0
        assert "Traceback" not in server.stderr.read()


def test_a_port_in_use_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("klquant.cli.serve.open_engine", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("--port", taken.getsockname()[1])
    assert done.exit_code == 2 and "cannot listen at 127.0.0.1:" in done.output and "--port" in done.output


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run()
    assert done.exit_code == 2 and "pip install 'klquant[serve]'" in done.output


def test_limits_are_named_as_options():
    done = run("--max-context", 1 << 30)
    assert done.exit_code == 2 and "--max-context 1,073,741,824 is beyond" in done.output
