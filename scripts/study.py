"""Compare all policies at equal compute: one backbone, one loop, one budget, several seeds, and two controls.

    python scripts/study.py --out study_digits

Each run is an ordinary run folder below --out. A killed study goes on with the same command. After each run report.html
and results.csv are brought up to date.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from studying.settings import OTHER_SEEDS, QUICK_BUDGET, QUICK_SAMPLES, SAMPLES, SETTINGS, Study, held_out_of

from masked_diffusion.choices import PIXEL_SPACE
from masked_diffusion.script_util import finite_float, main_of


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare all policies at equal compute.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; the same one goes on")
    parser.add_argument(
        "--setting",
        default="tokens16",
        choices=SETTINGS,
        help="network, budget and seeds: 16 or 64 tokens (%(default)s)",
    )
    parser.add_argument("--arms", default="all", help="comma list of policies, such as none,tread,sprint (%(default)s)")
    parser.add_argument("--data_dir", default="builtin:digits", help="data to train on (%(default)s)")
    parser.add_argument("--held_out_dir", default="", help="data to measure on; for built-in data its held-out part")
    parser.add_argument(
        "--vae_path", default="none", help="autoencoder of the latents; none is pixel space (%(default)s)"
    )
    parser.add_argument("--image_size", type=int, default=8, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--model", default=None, help="plain network of all arms, such as DiT_S_2; the setting's")
    parser.add_argument(
        "--budget",
        type=finite_float,
        default=None,
        help="compute of each run, in steps without a policy; the setting's",
    )
    parser.add_argument("--seeds", type=int, default=None, help="runs of each arm; the setting's")
    parser.add_argument(
        "--first_seed",
        type=int,
        default=0,
        help="seed of an arm's first run; other seeds need another --out (%(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--held_out_images", type=int, default=360, help="images to measure on, at most (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=None,
        help="samples of each run of digits or shapes for the classifier to read, at most as many as are held out; 0 = "
        f"none (360, with --quick {QUICK_SAMPLES})",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--launcher", default="", help='starts each training, such as "srun --gpus 1"')
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="a short look at the report, one seed; it claims nothing")
    parser.add_argument(
        "--report_only", action="store_true", help="train nothing; report, or --publish, the runs that are finished"
    )
    parser.add_argument(
        "--require_ranking", "--require-ranking", action="store_true",
        help="end with status 4 where an arm shows no difference to training without a policy",
    )  # fmt: skip
    parser.add_argument(
        "--publish", type=Path, default=None, help="folder for the table and a figure, as in docs/study"
    )
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    setting = SETTINGS[args.setting]
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else setting.seeds
    if not 0 <= args.first_seed <= OTHER_SEEDS - seeds:
        raise ValueError(f"--first_seed {args.first_seed}: must be in 0 ... {OTHER_SEEDS - seeds}")
    for name, number in (("seeds", seeds), ("jobs", args.jobs)):
        if number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    samples = args.samples if args.samples is not None else QUICK_SAMPLES if args.quick else SAMPLES
    if samples < 0 or samples == 1:
        raise ValueError(f"--samples {samples}: must be 0 (none), or at least 2")
    budget = args.budget if args.budget is not None else QUICK_BUDGET if args.quick else setting.budget
    names = ("data_dir", "vae_path", "image_size", "batch_size", "held_out_images")
    study = Study(
        model=args.model or setting.model,
        held_out_dir=args.held_out_dir or held_out_of(args.data_dir),
        budget=budget,
        normalize="channel" if args.vae_path.lower() == PIXEL_SPACE else "none",
        **{name: getattr(args, name) for name in names},
    )
    from studying.course import Asked, begin  # with torch, which takes seconds to import

    own = ("out", "arms", "jobs", "launcher", "device", "quick", "report_only", "require_ranking", "publish")
    return begin(
        study,
        Asked(
            seeds=range(args.first_seed, args.first_seed + seeds),
            samples=samples,
            name=args.setting,
            **{name: getattr(args, name) for name in own},
        ),
    )


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())
