"""Work on a GPU in a process that may hang or die: what was done is kept, and the rest goes on.

Called by `benchmarks.gpu_check`, `gpu_tune` and `gpu`, whose kernels may never have run on a chip:
a kernel can wait for ever, and one that reads where it may not takes the device of the whole
process with it. So the work is done by a child, piece by piece, and each piece is written to a
`Journal` when it begins and when it ends. `supervise` watches the journal: where nothing is written
for too long it kills the child, says so in the open piece's place, and starts another one, which
does what is not in the journal yet. A later call with the same journal goes on where this one was
stopped; `digest` names journals by what the kernels are.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What a child exits with if its device no longer answers; any other code that is not 0 will do.
BROKEN = 3
_POLL = 0.5
# Children that end without having begun anything: the next would as well.
_MOST_IDLE = 2


class Journal:
    """Results by key in a file that is only appended to.

    Attributes:
      path: the file; one line of JSON for each beginning and end.
      results: what ended, by key; `{"died": why}` for what took its process with it.
      open: the key of what began last, if that has not ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        self.open: str | None = None
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the process was killed
            if "result" in entry:
                self.results[entry["key"]] = entry["result"]
                self.open = None
            else:
                self.open = entry["key"]

    def begin(self, key: str) -> None:
        """Notes what is being done now."""
        self.open = key
        self._write({"key": key})

    def end(self, key: str, result: Any) -> None:
        """Notes what came of it."""
        self.results[key] = result
        self.open = None
        self._write({"key": key, "result": result})

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of the key, from the file if it is there."""
        if key not in self.results:
            self.begin(key)
            self.end(key, work())
        return self.results[key]

    def _write(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def digest(*suffixes: str) -> str:
    """Of the kernels' files with these suffixes: what was found with others is not gone on with."""
    kernels = Path(__file__).resolve().parent.parent / "pallas_kernels"
    found = hashlib.sha256()
    for path in sorted([*kernels.glob("*.py"), *(kernels / "gpu").rglob("*")]):
        if path.suffix in suffixes:
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def key_of(**fields: Any) -> str:
    """A key from named values."""
    return json.dumps(fields, sort_keys=True)


def supervise(command: Sequence[str], path: Path, seconds: float, patience: float) -> Journal:
    """Runs a child until it is through or the time is over, and again each time that it fails.

    Args:
      command: starts a child that works with `Journal(path)` and exits with 0 when all is done.
      path: of the journal.
      seconds: after that the child is killed; what is open then is done again by a later call.
      patience: seconds without a line in the journal, after which a child is killed.

    Returns:
      The journal as it is then.

    Raises:
      RuntimeError: the child ends twice without having begun anything; has the end of its output.
    """
    until, idle = time.monotonic() + seconds, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while idle < _MOST_IDLE:
        size = _size(path)
        log = path.with_suffix(".log")
        with log.open("w") as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            why = _wait(child, path, until, patience)
        if why == "done" or why == "time":
            return Journal(path)
        tail = log.read_text(errors="replace")[-1500:]
        _close(Journal(path), f"{why}: {tail}" if why.startswith("exit") else why)
        idle = idle + 1 if _size(path) == size else 0
    raise RuntimeError(f"{' '.join(command)} ends before it begins: {tail}")


def _close(journal: Journal, why: str) -> None:
    if journal.open is not None:
        journal.end(journal.open, {"died": why})


def _wait(child: subprocess.Popen[Any], path: Path, until: float, patience: float) -> str:
    """Why the child is no longer there: "done", "time", "exit ..." or that it did not answer."""
    size, since = _size(path), time.monotonic()
    while True:
        try:
            code = child.wait(timeout=_POLL)
        except subprocess.TimeoutExpired:
            pass
        else:
            return "done" if code == 0 else f"exit status {code}"
        now = time.monotonic()
        if _size(path) != size:
            size, since = _size(path), now
        if now > until or now - since > patience:
            os.killpg(child.pid, signal.SIGKILL)  # the child's own session: nothing else is in it
            child.wait()
            return "time" if now > until else f"no answer in {patience:g} seconds"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def leave_if_broken() -> None:
    """After a failure: ends this process if its device does not answer any more."""
    import jax
    import jax.numpy as jnp

    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except Exception:  # noqa: BLE001  (whatever it is, nothing works here any more)
        os._exit(BROKEN)
