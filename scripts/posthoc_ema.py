"""Make a weight average of any length after a training, from the snapshots that --ema_power kept.

    python scripts/posthoc_ema.py --run output_mdt_s2 --std 0.07 --out output_mdt_s2/posthoc_0.07.pt

In the run's folder, sampling finds the model's config.json beside the new file.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from masked_diffusion.files import atomic_write
from masked_diffusion.script_util import finite_float, run_script


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a weight average of any length after a training.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a training with --ema_power")
    parser.add_argument(
        "--std", type=finite_float, required=True, help="length of the average as a share of the training, such as 0.07"
    )
    parser.add_argument("--step", type=int, help="step of a snapshot to end at (default: the last one)")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .pt or .safetensors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args))


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Raises ValueError or OSError for what cannot be made or written."""
    run, out = args.run.expanduser(), args.out.expanduser()
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--out {out}: expected a name that ends in .pt or .safetensors")
    if out.exists():
        raise ValueError(f"--out {out}: it exists; give another name")
    if not run.is_dir():
        raise FileNotFoundError(f"--run {run}: no such folder; give the output folder of a training")
    # With torch, which takes seconds to import.
    from masked_diffusion.runs.posthoc_ema import Snapshots

    state, step = Snapshots(run).reconstruct(args.std, args.step)

    def work() -> None:
        with atomic_write(out) as file:
            if out.suffix == ".safetensors":
                from safetensors.torch import save

                file.write(save({name: value.contiguous() for name, value in state.items()}))
            else:
                import torch

                torch.save(state, file)
        sys.stdout.write(f"{out.absolute()}: the average of length {args.std} at step {step}\n")

    return work


if __name__ == "__main__":
    sys.exit(main())
