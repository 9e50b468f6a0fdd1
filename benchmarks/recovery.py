"""Measure how recovery depends on the images, their number, the ridge, the token weights and the order of blocks.

    export CIFAR10_DIR=.../cifar10
    python benchmarks/recovery.py --encoder VIT.safetensors --out benchmarks/results/recovery.json

The encoder is the CIFAR-10 encoder of ``methods.py``. The criterion ``output`` on 1,024 training images keeps an eighth
or a sixteenth of the neurons in every block. One setting is varied at a time. On 2,000 test images, the benchmark
measures the accuracy of the dense model's head, the cosine to the dense embedding, and the mean cosine of the patch
tokens before the final norm.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from methods import cifar, on_cifar
from torch import Tensor, nn
from torchvision.transforms.functional import resize
from train_cifar10_clip import normalize

from dgmr_tp import prune
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.data.scenes import Scene
from dgmr_tp.encoders import adapt, wrap_tower
from dgmr_tp.pruning import Plan, TowerAdapter, last_state, recover, recovery
from dgmr_tp.pruning.calibration import record_inputs
from dgmr_tp.utils.files import atomic_write


def uniform(adapter: TowerAdapter, state: Tensor, *, last: bool) -> Tensor:
    """Give all tokens the same weight, also in the last block, where the head reads one."""
    return torch.full((state.shape[1],), 1 / state.shape[1], dtype=torch.float64)


def class_token(adapter: TowerAdapter, state: Tensor, *, last: bool) -> Tensor:
    """Give the class token nine tenths of the weight."""
    rest = torch.full((state.shape[1],), 0.1 / (state.shape[1] - 1), dtype=torch.float64)
    rest[0] = 0.9
    return rest


def from_zero(
    moments, weight: Tensor, bias: Tensor | None, damping: float, refit=recovery.refit
) -> tuple[Tensor, Tensor | None]:
    """Use a ridge towards zero instead of towards the kept columns."""
    return refit(moments, torch.zeros_like(weight), bias, damping)


def at_once(tower: nn.Module, plan: Plan, images: list[Tensor]) -> nn.Module:
    """Refit every MLP on the inputs that the *dense* tower's blocks give it."""
    recovered = prune(tower, plan=plan).model
    for name, site in plan.sites.items():
        single = prune(tower, plan=Plan("", "", {name: site})).model
        recover(adapt(tower), adapt(single), images)
        recovered.get_submodule(name).load_state_dict(single.get_submodule(name).state_dict())
    return recovered


def to_the_dense_mlp(block, consumer: nn.Linear, state: Tensor) -> None:
    """Return no gain, so that the dense MLP's output is the only target."""


def first_layer(
    block,
    mlp: nn.Module,
    dense_mlp,
    consumer: nn.Linear,
    states,
    dense_states,
    gain,
    weight: Tensor,
    plain=recovery._site_moments,
):
    """Refit, fit the first Linear's bias and a scale per input (the norm's affine) with L-BFGS, and return new moments.

    For an encoder without LayerScale.
    """
    recovery._refit_layer(
        "", consumer, gain, *plain(block, mlp, dense_mlp, consumer, states, dense_states, gain, weight), 1e-3
    )
    inputs, targets = [], []
    for state, dense_state in zip(states, dense_states, strict=True):
        with record_inputs(mlp) as mlp_inputs:
            after = block(state)
        inputs.append(mlp_inputs[mlp])
        targets.append(mlp(mlp_inputs[mlp]) + dense_state - after)
    inputs, targets = torch.cat(inputs)[:256], torch.cat(targets)[:256]
    rows = weight.to(inputs)[None, :, None]
    with torch.enable_grad():
        scale = torch.ones(inputs.shape[-1], requires_grad=True)
        bias = mlp.fc1.bias.detach().clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([bias, scale], max_iter=30, line_search_fn="strong_wolfe")

        def error() -> Tensor:
            optimizer.zero_grad()
            hidden = mlp.act(F.linear(inputs * scale, mlp.fc1.weight.detach(), bias))
            output = F.linear(hidden, consumer.weight.detach(), consumer.bias.detach())
            loss = (rows * (output - targets).square()).sum() / targets.square().mean()
            loss.backward()
            return loss

        optimizer.step(error)
    mlp.fc1.bias.copy_(bias)
    mlp.fc1.weight.mul_(scale.detach())
    return plain(block, mlp, dense_mlp, consumer, states, dense_states, gain, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    subject = on_cifar(cifar(args.encoder))
    tower, calibration = subject.tower, subject.calibration(0)
    pool = subject.train[2000:]
    scenes = torch.stack([torch.from_numpy(Scene.draw(7, i).image()).permute(2, 0, 1) for i in range(1024)])
    noise = torch.rand(1024, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    blurred = resize(resize(noise, [8, 8], antialias=True), [32, 32])

    def batches(images: Tensor) -> list[Tensor]:
        return list(images.split(128))

    def plain(**options) -> Callable[[Plan], nn.Module]:
        images = options.pop("images", calibration)
        return lambda plan: prune(tower, images, plan=plan, **options).model

    def patched(name: str, replacement: Callable) -> Callable[[Plan], nn.Module]:
        def run(plan: Plan) -> nn.Module:
            with mock.patch.object(recovery, name, replacement):
                return plain()(plan)

        return run

    variants: dict[str, Callable[[Plan], nn.Module]] = {
        "no recovery": lambda plan: prune(tower, plan=plan).model,
        "as it is: 1,024 images, ridge 1e-3, towards the kept columns, class token half": plain(),
        **{f"{count} images": plain(images=batches(pool[:count])) for count in (64, 256, 4096)},
        **{f"ridge {damping:g}": plain(damping=damping) for damping in (1e-5, 1e-4, 1e-2, 1e-1)},
        "ridge towards zero": patched("refit", from_zero),
        "tokens alike": patched("token_weights", uniform),
        "class token nine tenths": patched("token_weights", class_token),
        "all blocks at once": lambda plan: at_once(tower, plan, calibration),
        "towards the residual stream alone": patched("INTERPOLATION_WEIGHTS", (1.0,)),
        "towards the dense MLP's answers alone": patched("_gain", to_the_dense_mlp),
        "first Linear's bias and the norm's scale too": patched("_site_moments", first_layer),
        "generated scenes": plain(images=batches(normalize(resize(scenes, [32, 32], antialias=True)))),
        "coloured noise": plain(images=batches(normalize(blurred))),
        "white noise": plain(images=batches(normalize(noise))),
    }

    @torch.no_grad()
    def features(module: nn.Module) -> tuple[Tensor, Tensor]:
        adapter = adapt(module)
        states = [last_state(adapter, batch) for batch in subject.test.split(250)]
        return torch.cat([adapter.embed(state) for state in states]), torch.cat(
            [adapter.features(state)[1][:, ::8] for state in states]
        )

    dense, dense_patches = features(tower)
    rows = []
    for share in (8, 16):
        plan = make_plan(wrap_tower(tower), "output", CalibrationImages(calibration), keep=768 // share)
        for name, recovered in variants.items():
            embedding, patches = features(recovered(plan))
            with torch.no_grad():
                right = (subject.head(embedding).argmax(1) == subject.answers).float().mean()
            cosines = (
                float(F.cosine_similarity(embedding, dense).mean()),
                float(F.cosine_similarity(patches, dense_patches, dim=-1).mean()),
            )
            rows.append(
                {
                    "kept": f"1/{share}",
                    "variant": name,
                    "head": 100 * float(right),
                    "cosine": cosines[0],
                    "patches": cosines[1],
                }
            )
            print(f"| 1/{share} | {name} | {rows[-1]['head']:.1f} | {cosines[0]:.4f} | {cosines[1]:.4f} |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    atomic_write(args.out, json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
