"""Measure the peak memory and the time of streaming pruning on a checkpoint with EVA-CLIP-8B's shapes.

    python benchmarks/streaming_memory.py --scratch /a/disk/with/40/GB --out benchmarks/results/streaming_memory.json

The script writes 7.5 billion random bf16 values (15 GB, in shards). It prunes them to hidden width 4096, once all 32
blocks with L2 and once two blocks with DGMR. The reported memory is RssAnon of the pruning process, read every 10 ms.
RssAnon counts allocated memory without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

import dgmr_tp.encoders.timm_models  # noqa: F401  (registers EVA-CLIP-8B with timm)

NAME = "eva_clip_8b_patch14_224"


def write_checkpoint(directory: Path) -> None:
    """Write random bf16 shards and their index."""
    with torch.device("meta"):
        tower = timm.create_model(NAME)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, str] = {}
    shard_tensors: dict[str, torch.Tensor] = {}
    names = list(tower.state_dict())
    for name, tensor in tower.state_dict().items():
        shard_tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16()
        if sum(t.numel() for t in shard_tensors.values()) > 4e8 or name == names[-1]:
            shard = f"model-{len(set(shards.values())):05d}.safetensors"
            save_file(shard_tensors, directory / shard)
            shards |= dict.fromkeys(shard_tensors, shard)
            shard_tensors = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), "utf-8")


PROGRAM = """
import time, dgmr_tp
from dgmr_tp.utils.progress import listen_to_progress
started = time.time()
def progress(title, done, total):
    print(title, done, time.time() - started, flush=True)
with listen_to_progress(progress):
    dgmr_tp.prune_streaming("timm:{name}", "{out}", "{index}", criterion="{criterion}", keep={keep})
"""


def measure(index: Path, out: Path, criterion: str, keep: dict[str, int]) -> dict[str, float]:
    """Prune in a new process and return its peak memory (GB), its time (s) and the size of its output (GB).

    Args:
        index: the ``.index.json`` of the checkpoint.
        out: output directory. It is deleted after the measurement.
        criterion: name of the criterion.
        keep: site pattern to the number of neurons to keep.
    """
    program = PROGRAM.format(name=NAME, out=out, index=index, criterion=criterion, keep=keep)
    peak, started = 0, time.time()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    assert process.returncode == 0 and process.stdout
    lines = map(str.split, process.stdout.read().splitlines())
    end_times = {(title, int(done)): float(seconds) for title, done, seconds in lines}
    size = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    result = {"peak_anonymous_gb": peak * 1024 / 1e9, "seconds": time.time() - started, "written_gb": size / 1e9}
    return {**result, "seconds_to_select_the_second_block": end_times["select", 2] - end_times["select", 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = args.scratch / "eva_clip_8b"
    source.mkdir(parents=True, exist_ok=True)
    index = source / "model.safetensors.index.json"
    if not index.exists():
        write_checkpoint(source)
    size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
    result: dict[str, Any] = {"checkpoint_gb": size, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
    result["l2_all_32_blocks"] = measure(index, args.scratch / "l2", "l2", {"*": 4096})
    print(json.dumps(result, indent=1), flush=True)
    two_blocks = measure(index, args.scratch / "dgmr", "dgmr", {"blocks.0.*": 4096, "blocks.1.*": 4096})
    seconds = 32 * two_blocks["seconds_to_select_the_second_block"] + result["l2_all_32_blocks"]["seconds"]
    result["dgmr_2_blocks"] = {**two_blocks, "all_32_blocks_extrapolated_seconds": seconds}
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
