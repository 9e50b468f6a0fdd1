"""Training processes: starting them through the ``deepspeed`` launcher, and stopping or failing together."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from dgmr_tp.errors import DgmrError, Preempted
from dgmr_tp.utils.cpus import available_cpus
from dgmr_tp.utils.distributed import is_main_process
from dgmr_tp.utils.files import DirectoryLocked, lock_directory
from dgmr_tp.utils.lazy_imports import require_installed

PARENT_VARIABLE = "DGMR_TP_PARENT"
"""Environment variable with the process id of the process that waits for the launched ones."""
STOP_FILE = "stop"
"""File in the directory of a training that asks it to save a checkpoint and exit."""
FAILURE_FILE = "failed"
"""File in the directory of a training that a process creates when it fails."""
EXIT_DELAY_S = 10.0
"""Seconds for which the other processes may report a failure themselves before they are ended."""
LAUNCHER_KILL_DELAY_S = 30
"""Seconds from SIGTERM to SIGKILL in the deepspeed launcher."""


def launch(arguments: list[str], processes: int, batch_size: int, stop: Path, hostfile: str | None = None) -> None:
    """Run ``python -m dgmr_tp ARGUMENTS`` in several processes through the ``deepspeed`` launcher, and wait for them.

    On SIGTERM this process creates the file ``stop``. Rank 0 looks for it after every step; then all processes save a
    checkpoint and exit.

    Args:
        arguments: the command line of each process.
        processes: number of processes on this machine. With fewer GPUs, the largest number of GPUs that divides
            ``batch_size``; the global batches, and so the result, are the same.
        batch_size: global batch size.
        stop: the file that asks the training to stop. Its folder is the directory of the training.
        hostfile: a DeepSpeed host file, which replaces ``processes``.

    Raises:
        DgmrError: deepspeed is not installed, or a process failed (after it printed its own message).
        Preempted: SIGTERM came, and the processes left a checkpoint.
    """
    require_installed("deepspeed", "distill")
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        PARENT_VARIABLE: str(os.getpid()),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    hosts = ["--num_accelerators", str(processes)]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that earlier stages cached here is needed by the processes
    if hostfile:
        del environment[PARENT_VARIABLE]  # this process does not run on every machine
        hosts = ["--hostfile", hostfile]
    elif torch.cuda.is_available():
        devices = min(processes, torch.cuda.device_count())
        processes = next(count for count in range(devices, 0, -1) if batch_size % count == 0)
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if names := [name for name in visible if not name.isdigit()]:
            raise DgmrError(
                f"CUDA_VISIBLE_DEVICES names {names[0]}, but the deepspeed launcher takes only device numbers. "
                "Set it to numbers, such as 0,1."
            )
        devices_used = ",".join(visible[:processes])
        hosts = ["--include", f"localhost:{devices_used}"] if devices_used else ["--num_accelerators", str(processes)]
    else:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // processes)))
    if not hostfile:  # a port that is free here may be taken on the first machine of a host file
        hosts += ["--master_port", str(_free_port())]
    command = [str(scripts / "deepspeed"), *hosts, "--quiet", "--no_local_rank"]
    command += ["--module", "dgmr_tp", *arguments]
    stop.unlink(missing_ok=True)
    terminated = threading.Event()

    def request_stop(*_: Any) -> None:
        terminated.set()
        stop.touch()

    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    previous_handler = signal.signal(signal.SIGTERM, request_stop)
    try:
        code = launcher.wait()
        if terminated.is_set():  # a launcher that got SIGTERM too may exit before the processes have saved
            wait_for_lock_release(stop.parent)
    except BaseException:
        os.killpg(launcher.pid, signal.SIGTERM)
        launcher.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    if code == Preempted.code or terminated.is_set():
        stop.unlink(missing_ok=True)
        raise Preempted("preempted. Run again to resume.")
    if code:
        raise DgmrError(
            f"the training failed with exit code {code}; its message is above. "
            "Run again to resume from the last checkpoint."
        )


def wait_for_lock_release(directory: Path) -> None:
    """Wait until no process holds the lock of ``directory``, which rank 0 of a training holds."""
    while True:
        try:
            with lock_directory(directory, "process is training"):
                return
        except DirectoryLocked:
            time.sleep(0.2)


def is_worker() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_parent() -> None:
    """End this process within a second of the process that waits for it, however that one ended."""
    if PARENT_VARIABLE not in os.environ:
        return
    parent = int(os.environ[PARENT_VARIABLE])

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_requested(file: Path) -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM, and give a function that returns whether the training must stop.

    It must stop after a SIGTERM to this process, or, in rank 0, when the waiting process has created ``file``. All
    processes compare their answers at the end of a step.
    """
    terminated = threading.Event()
    main_process = is_main_process()
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield lambda: terminated.is_set() or (main_process and file.exists())
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


@contextmanager
def fail_together(file: Path) -> Iterator[None]:
    """End this process when another one fails. Each failing process creates ``file``, which all others watch.

    Without it, processes on GPUs would wait for the failed one until NCCL's timeout.
    """
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(1):
            if file.exists():
                if not finished.wait(EXIT_DELAY_S):
                    os._exit(1)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            file.touch()
        raise
    finally:
        finished.set()


def ignore_sigterm_until(finished: Event, worker: int) -> None:
    """Make a data loading worker ignore SIGTERM until ``finished`` is set.

    A SIGTERM to all processes of a job must not end the workers before the last step has its images.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if finished.is_set() else None)


class _Terminated(BaseException):
    """Raised by SIGTERM. Not an Exception, so that code which turns a library's errors into messages lets it pass."""


@contextmanager
def preemptible() -> Iterator[None]:
    """Turn SIGTERM into :class:`~dgmr_tp.errors.Preempted`, wherever the code in the context is.

    Trainings handle SIGTERM themselves, to save a checkpoint first.
    """
    process = os.getpid()

    def leave(*_: object) -> None:
        if os.getpid() != process:  # a data loading worker, which inherited the handler
            os._exit(Preempted.code)
        raise _Terminated

    previous_handler = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _Terminated:
        raise Preempted("preempted. Run again to resume.") from None
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
