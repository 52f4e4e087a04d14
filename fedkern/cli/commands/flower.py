"""``flower PROJECT_DIR``: ``flwr run --stream`` that ends as the run does.

In flwr 1.41 and 1.42 ``flwr run`` returns 0 for a run that fails, does not stop the run at Ctrl-C, and sends a
simulation to whatever answers at a fixed port, else to a SuperLink that outlives the command.
"""

import importlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from fedkern.cli.finished_runs import run_folder
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.errors import RunFailed, UserError, make_printable
from fedkern.flower.runs.project import simulation_settings
from fedkern.process.extras import install

_FLWR = ("-m", "flwr.cli.app")
_SUPERLINK = ("-c", "from flwr.superlink.cli import flower_superlink as main; main()", "--insecure", "--simulation",
              "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port")  # fmt: skip


def add_flags(parser: Parser) -> None:
    parser.description = f"Run a Flower project to its end. Needs {install('flower')}."
    parser.usage = f"{parser.prog} PROJECT_DIR [flags]"
    parser.add_folder("a Flower project", "folder of the Flower project", "PROJECT_DIR")
    add_arguments(parser, {
        "superlink": ("NAME", "connection of Flower's configuration, instead of its default"),
        "run_config": ("'key=value ...'", "settings of the project, in TOML; repeatable", []),
        "federation_config": (
            "'key=value ...'", "settings of a simulation, such as num-supernodes=3, in TOML; repeatable", []
        ),
    })  # fmt: skip


def play(request: Request) -> int:
    importlib.import_module("fedkern.flower.adapter")  # says which flwr is needed
    project, arguments = run_folder(request), request.arguments
    name, settings = arguments["superlink"], arguments["federation_config"]
    simulated, where = _is_simulation(name), [name] if name else []
    if settings and not simulated:
        raise UserError("--federation-config is for simulations: a SuperLink has the nodes that connect to it.")
    words = [f"--run-config={text}" for text in arguments["run_config"]]
    words += [f"--federation-config={text}" for text in (simulation_settings(project, settings) if simulated else ())]
    if simulated and not hasattr(select, "poll"):
        raise UserError("fedkern flower cannot simulate nodes on Windows: name a SuperLink with --superlink.")
    with _simulator() if simulated else nullcontext():
        _play([str(project), *where, *words], where)
    return 0


def _is_simulation(name: str | None) -> bool:
    """Return whether a connection of Flower's configuration (None: its default) simulates on this machine."""
    with suppress(OSError, ValueError, LookupError, AttributeError):  # Flower writes the file, or says what is wrong
        path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
        connections = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"]
        return connections[name or connections["default"]].get("address", ":local:") in (":local:", ":local-in-memory:")
    return name in (None, "local")


@contextmanager
def _simulator() -> Iterator[None]:
    """Run a SuperLink that simulates its nodes, and point Flower's local connections at it inside the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = os.environ["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(probe.getsockname()[1])
    with tempfile.NamedTemporaryFile() as log, _python([*_SUPERLINK, port], log.file) as process:
        try:
            while b"Uvicorn running on" not in (output := Path(log.name).read_bytes()):
                if process.poll() is not None:
                    raise RunFailed(f"Flower's SuperLink has not started: {output[-500:].decode(errors='replace')}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            (pipe := select.poll()).register(process.stdin, 0)  # type: ignore[arg-type]
            pipe.poll(15_000)  # all processes of the simulation hold its other end: it breaks when the last has ended
            process.kill()


def _play(words: Sequence[str], where: Sequence[str]) -> None:
    """Submit a run, print its log and wait for its end. Ctrl-C stops the run."""
    with _python([*_FLWR, "run", "--stream", *words]) as process:
        run, output = "", bytearray()
        try:
            run = _await_run_number(process, output)
            for line in process.stdout or ():
                print(make_printable(re.sub(r"\x1b\[[0-9;]*m", "", line.decode(errors="replace"))), end="", flush=True)
            _end(run, where)
        except KeyboardInterrupt:
            run = run or _await_run_number(process, output)  # a run that is submitted by now must not go on unseen
            print(f"stopping run {run} ...", file=sys.stderr)
            _python([*_FLWR, "stop", run, *where], cwd=os.sep).communicate()
            raise
        finally:
            process.kill()


def _await_run_number(process: subprocess.Popen[bytes], output: bytearray) -> str:
    """Return the number of the run from Flower's output, or raise UserError if Flower refuses the run."""
    while not (match := re.search(r"Successfully started run (\d+)", text := output.decode(errors="replace"))):
        for line in process.stdout or ():
            output += line
            break
        else:
            raise UserError(f"Flower: {' '.join(re.findall(r'│ (.*?) *│', text)) or text}")
    return match[1]


def _end(run: str, where: Sequence[str]) -> None:
    """Wait for the end of a run, whose log ends earlier if the connection is lost. Raises RunFailed."""
    record = {"status": ""}
    while not record["status"].startswith("finished"):
        # Flower takes a folder that has the connection's name for a project.
        output, _ = _python([*_FLWR, "ls", *where, "--run-id", run, "--format", "json"], cwd=os.sep).communicate()
        try:
            record = json.loads(output[output.index(b"{") :])["runs"][0]
        except (ValueError, LookupError):
            raise RunFailed(f"The SuperLink does not tell how run {run} goes on: ask it with flwr ls.") from None
    if record["status"] != "finished:completed":
        raise RunFailed(f"Run {run} {record['status'].rpartition(':')[2]}: {record['status-details']}")


def _python(
    words: Sequence[str], output: int | IO[bytes] = subprocess.PIPE, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """Start Python in its own session, so that a terminal's Ctrl-C only reaches this process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", *words], env={**quiet, **os.environ, "PYTHONUNBUFFERED": "1", "PATH": path},
        cwd=cwd, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
