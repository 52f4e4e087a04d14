"""A real SuperLink and real SuperNodes for tests: processes on free ports, with all files in one folder."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import fedkern
from python_tests.flower.flower_processes import end_all, free_port, processes_of

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "examples/flower_deployment/deploy.py"
TRIES = 5
TAKEN = "address already in use"
CONNECTION = "fedkern"
"""Name of the SuperLink in the configuration of a federation's home."""


@dataclass
class Node:
    """A SuperNode.

    Attributes:
        number: its place in the federation.
        id: Flower's number of the node.
        process: the process.
        log: its output, with that of its ClientApps.
    """

    number: int
    id: int
    process: subprocess.Popen = field(repr=False)
    log: Path = field(repr=False)

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        run: its number.
        status: Flower's status, for example ``"finished:completed"``.
        details: why it failed, in Flower's words.
        log: the log of the ServerApp.
    """

    run: str
    status: str
    details: str
    log: str

    @property
    def is_completed(self) -> bool:
        return self.status == "finished:completed"


class Federation:
    """A SuperLink and its SuperNodes, which end with the block.

    Args:
        folder: an existing folder for all their files, and the SuperLink's working folder, so that a ServerApp's own
            files are there too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._nodes: dict[int, Node] = {}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> "Federation":
        try:
            commands(self.folder / "bin")
            self.superlink, self.superlink_log, self.port = self._superlink()
            self.home = self._make_folder("home")
            (self.home / "config.toml").write_text(
                f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
                f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.terminate()
        limit = time.monotonic() + 8
        for process in reversed(self._started):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, limit - time.monotonic()))
        end_all(self.folder)
        for process in self._started:
            process.wait()

    # -- processes -----------------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Return all processes of this federation."""
        return processes_of(self.folder)

    def pids_of(self, program: str) -> list[int]:
        """Return the processes of one of Flower's commands."""
        found = []
        for pid in self.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found += [pid] if any(word.endswith(b"/" + program.encode()) for word in words[:3]) else []
        return found

    def environment(self, home: Path) -> dict[str, str]:
        """Return Flower's environment: separate files, nothing sent, this interpreter, this fedkern."""
        return surroundings(self.folder / "bin") | {"FLWR_HOME": str(home)}

    def _make_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _started_process(self, name: str, command: list[str], home: Path, log: Path) -> subprocess.Popen:
        with log.open("ab") as file:
            process = subprocess.Popen(
                [str(self.folder / "bin" / name), *command], cwd=self.folder, env=self.environment(home),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def _superlink(self):
        for attempt in range(TRIES):
            port, home, log = free_port(), self._make_folder("superlink"), self.folder / f"superlink-{attempt}.log"
            words = ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
            process = self._started_process("flower-superlink", [*words, "--insecure"], home, log)
            if wait_for(process, log, r"Uvicorn running on"):
                return process, log, port
            self._end(process)
            if TAKEN not in log.read_text(errors="replace"):
                break
        raise AssertionError(f"the SuperLink has not started:\n{log.read_text(errors='replace')}")

    def start_node(self, number: int, **config: object) -> Node:
        """Start a SuperNode and wait until it is connected.

        Args:
            number: its place.
            **config: its ``node_config``, beside ``partition-id``; underscores stand for hyphens.
        """
        config = {"partition_id": number, **config}
        listed = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items())
        home = self._make_folder(f"node-{number}")
        for _ in range(TRIES):
            log = self.folder / f"node-{number}-{len(self._started)}.log"
            words = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()), "--node-config", listed]
            process = self._started_process("flower-supernode", [*words, "--insecure"], home, log)
            found = wait_for(process, log, r"SuperNode ID: (\d+)")
            if found:
                node = self._nodes[number] = Node(number, int(found[1]), process, log)
                return node
            self._end(process)
            if TAKEN not in log.read_text(errors="replace"):
                break
        raise AssertionError(f"the SuperNode has not connected:\n{log.read_text(errors='replace')}")

    def start_nodes(self, *configs: dict) -> list[Node]:
        """Start SuperNodes 0, 1, ... side by side.

        Args:
            *configs: the ``node_config`` of each; see :meth:`start_node`.
        """
        with ThreadPoolExecutor(len(configs)) as pool:
            return list(pool.map(lambda number: self.start_node(number, **configs[number]), range(len(configs))))

    def running(self) -> list[Node]:
        """Return the SuperNodes, by place."""
        return [self._nodes[number] for number in sorted(self._nodes)]

    def node(self, id: int) -> Node:
        """Return the SuperNode with this number in Flower."""
        return next(node for node in self._nodes.values() if node.id == id)

    def _end(self, process: subprocess.Popen) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    # -- runs ----------------------------------------------------------------------------------------------------------

    def flwr(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run Flower's command."""
        return subprocess.run(
            [str(self.folder / "bin/flwr"), *words], cwd=self.folder, env=self.environment(self.home),
            capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, *words: str) -> dict:
        """Return the answer of one of Flower's commands."""
        done = self.flwr(*words, "--format", "json", timeout=180)
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        assert answer["success"], done.stdout + done.stderr
        return answer

    def submit(self, project: Path, **run_config: object) -> str:
        """Submit a project.

        Underscores in the names of its settings stand for hyphens.

        Returns:
            The number of the run.
        """
        listed = [f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in run_config.items()]
        words = [word for text in listed for word in ("--run-config", text)]
        return str(self.ask("run", str(project), CONNECTION, *words)["run-id"])

    def wait_for(self, run: str, patience: float = 300) -> Outcome:
        """Wait for the end of a run."""
        limit = time.monotonic() + patience
        while not (found := self.ask("ls", CONNECTION, "--run-id", run)["runs"][0])["status"].startswith("finished"):
            assert time.monotonic() < limit, found
            time.sleep(1)
        log = self.flwr("log", run, CONNECTION).stdout
        return Outcome(run, found["status"], found["status-details"], log)

    def run(self, project: Path, *, patience: float = 300, **run_config: object) -> Outcome:
        """Submit a project and wait for the end of its run."""
        return self.wait_for(self.submit(project, **run_config), patience)


def wait_for(process: subprocess.Popen, log: Path, pattern: str, patience: float = 90) -> re.Match | None:
    """Wait for words in a log.

    Returns None if the process ends before, or the time is over.
    """
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        found = re.search(pattern, log.read_text(errors="replace"))
        if found or process.poll() is not None:
            return found
        time.sleep(0.1)
    return None


def deployment() -> ModuleType:
    """Return the script of examples/flower_deployment as a module, which makes certificates and keys."""
    spec = importlib.util.spec_from_file_location("flower_deployment", SCRIPT)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def surroundings(programs: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: this interpreter with this fedkern, and nothing sent.

    Args:
        programs: the folder of :func:`commands`.
    """
    flwr = importlib.util.find_spec("flwr").submodule_search_locations[0]
    places = [str(Path(fedkern.__file__).parents[1]), str(Path(flwr).parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    }


def commands(folder: Path) -> None:
    """Write Flower's commands for this interpreter, as those on PATH may belong to another environment."""
    folder.mkdir(parents=True)
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.group == "console_scripts":
            path = folder / entry.name
            path.write_text(
                f"#!{sys.executable}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
            )
            path.chmod(0o755)


def write_project(folder: Path, files: dict[str, str], **config: object) -> Path:
    """Write a Flower project with ``server_app.py`` and ``client_app.py``.

    Args:
        folder: a new folder.
        files: content of the modules, by file name.
        **config: ``[tool.flwr.app.config]``; underscores stand for hyphens.
    """
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    listed = "\n".join(f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in config.items())
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "project"\nversion = "1.0.0"\ndescription = "An app of a test"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "fedkern"\n\n[tool.flwr.app.components]\nserverapp = "server_app:app"\n'
        f'clientapp = "client_app:app"\n\n[tool.flwr.app.config]\n{listed}\n'
    )
    return folder
