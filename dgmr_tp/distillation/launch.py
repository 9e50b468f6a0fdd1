"""Starting the training processes through the real ``deepspeed`` launcher."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.utils.files import Held, hold
from dgmr_tp.utils.lazy_imports import require_installed

PARENT = "DGMR_TP_PARENT"
"""Environment variable with the process that waits for the launched ones."""


def launch(arguments: list[str], processes: int, batch_size: int, stop: Path, hostfile: str | None = None) -> None:
    """Run ``python -m dgmr_tp ARGUMENTS`` in ``processes`` processes on this machine, or on those of ``hostfile``, and wait.

    With fewer GPUs than processes, as many run as there are GPUs (and divide ``batch_size``, which is global): the result is
    that of the same batches. SIGTERM here makes the file ``stop``, which the first process looks for after every step, wherever it
    runs; all then save a checkpoint and leave.

    Raises:
        DgmrError: deepspeed is not installed, or a process failed (its own message stands above).
        Preempted: SIGTERM came, and the processes left a checkpoint.
    """
    require_installed("deepspeed", "distill")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, PARENT: str(os.getpid()), "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    where = ["--num_accelerators", str(processes)]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what earlier stages held here is for the processes
    if hostfile:
        del environment[PARENT]  # the waiting process is not on every machine
        where = ["--hostfile", hostfile]
    elif torch.cuda.is_available():
        devices = min(processes, torch.cuda.device_count())
        processes = next(n for n in range(devices, 0, -1) if batch_size % n == 0)
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if unknown := [name for name in visible if not name.isdigit()]:
            raise DgmrError(
                f"CUDA_VISIBLE_DEVICES names {unknown[0]}, but the deepspeed launcher takes numbers only; give those, such as 0,1"
            )
        chosen = ",".join(visible[:processes])
        where = ["--include", f"localhost:{chosen}"] if chosen else ["--num_accelerators", str(processes)]
    else:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not hostfile:  # which port is free on the first of its machines, this one does not know
        where += ["--master_port", str(_free_port())]
    command = [str(scripts / "deepspeed"), *where, "--quiet", "--no_local_rank"]
    command += ["--module", "dgmr_tp", *arguments]
    stop.unlink(missing_ok=True)
    told = threading.Event()

    def tell(*_: Any) -> None:
        told.set()
        stop.touch()

    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    before = signal.signal(signal.SIGTERM, tell)
    try:
        code = child.wait()
        if told.is_set():  # where all processes of a job were told, the launcher is gone before the others have saved
            _wait_until_free(stop.parent)
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == Preempted.code or told.is_set():
        stop.unlink(missing_ok=True)
        raise Preempted("preempted; run again to go on")
    if code:
        raise DgmrError(
            f"the training ended with code {code}; its message stands above; run again to go on from the last checkpoint"
        )


def _wait_until_free(directory: Path) -> None:
    """Until the first process of a training, which holds ``directory``, has ended."""
    while True:
        try:
            return hold(directory, "process is training").close()
        except Held:
            time.sleep(0.2)


def is_worker() -> bool:
    """Whether this process was started by a launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_parent() -> None:
    """End this process within a second of the one that waits for it, however that one ended: nothing trains on unseen."""
    if PARENT not in os.environ:
        return
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
