"""Starting the distillation processes through the real ``deepspeed`` launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require_installed


def launch(arguments: list[str], processes: int) -> None:
    """Run ``python -m dgmr_tp ARGUMENTS`` in ``processes`` processes on this machine and wait.

    By hand, on a cluster, the same is ``deepspeed --hostfile HOSTS --no_local_rank --module dgmr_tp ARGUMENTS``.

    Raises:
        DgmrError: deepspeed is not installed, or a process failed (its own message stands above).
    """
    require_installed("deepspeed", "distill")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [
        str(scripts / "deepspeed"),
        "--num_accelerators",
        str(processes),
        "--master_port",
        str(_free_port()),
        "--quiet",
        "--no_local_rank",
    ]
    command += ["--module", "dgmr_tp", *arguments]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if code:
        raise DgmrError(f"the distillation ended with code {code}; its message stands above; run again to go on from the last checkpoint")


def is_worker() -> bool:
    """Whether this process was started by a launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """Have Linux end the launcher when this process is killed: nothing may go on training behind the user's back."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
