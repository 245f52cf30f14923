"""Measure the speed and the peak memory of training, sampling, data loading and the writing of samples.

    python scripts/benchmark.py --case train_step,sample,data,assemble --model MDT_S_2 --image_size 256 --batch_size 4

Prints one JSON object per case, a line each; a case that is alone is measured in this process, several in one child
process each, so that a peak of memory is its own. A new case is a function and a line in CASES.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from masked_diffusion import dist_util
from masked_diffusion.bad_images import BadImages
from masked_diffusion.checkpoint import Start
from masked_diffusion.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.first_stage import Autoencoder, FirstStage, PixelSpace
from masked_diffusion.image_datasets import ImageDataset, load_data, no_classes
from masked_diffusion.logger import Logger
from masked_diffusion.models import LatentTransformer
from masked_diffusion.randomness import (
    DrawSpec,
    global_generator,
    numpy_generator,
    torch_generator,
    training_draws,
)
from masked_diffusion.resample import UniformSampler
from masked_diffusion.sample_util import ImageSampler, SamplerConfig, SampleSet, generate
from masked_diffusion.script_util import add_dict_to_argparser, args_to_dict, optional, run_script, str2bool
from masked_diffusion.train_util import Batch, TrainConfig, TrainLoop

# A published sampling run: figures of a few steps are extrapolated to it.
FULL_SAMPLING_STEPS = 250
# Guidance weights of 1 are as frequent among 10 steps as among 250: a tenth of them, or four tenths within a hundredth.
SKIP_TOLERANCES, LEAST_STEPS_TO_SKIP = (0.0, 0.01), 10
SD_DOWNSAMPLE, SD_CHANNELS = 8, 4
JPEG_SIZE, JPEG_COUNT = (500, 375), 64  # the most frequent size in ImageNet

HELPS = {
    "case": "comma list of what to measure",
    "downsample": "image side / latent side; 1 for pixel space",
    "in_channels": "channels of the latents",
    "mask_ratio": "share of the tokens masked in the second view; None measures training without masking",
    "decode_layer": "decoder blocks; None means 2",
    "batch_size": "images per step",
    "repeats": "measurements, of which median, minimum and maximum are printed",
    "warmup": "rounds before the first measurement",
    "num_sampling_steps": f"steps that are measured, and extrapolated to {FULL_SAMPLING_STEPS}",
    "num_samples": "images of the assemble case",
    "num_workers": "loader processes of the data case; 0 loads in the measured process",
    "with_vae": "encode and decode with a Stable Diffusion autoencoder of random weights; False takes latents as given",
    "use_fp16": "autocast to float16",
    "use_bf16": "autocast to bfloat16",
    "tf32": "allow TF32 on CUDA; None does as the scripts do: not in training, but in sampling",
    "device": "auto, cpu, cuda or cuda:N",
    "out": "append the lines to this file, too",
}


@dataclass(frozen=True)
class Settings:
    """What is measured, named as the flags. Raises ValueError for what cannot be, before anything is."""

    model: str = "MDT_S_2"
    image_size: int = 256
    downsample: int = SD_DOWNSAMPLE
    in_channels: int = SD_CHANNELS
    num_classes: int = 1000
    mask_ratio: float | None = 0.30
    decode_layer: int | None = None
    batch_size: int = 4
    repeats: int = 5
    warmup: int = 2
    num_sampling_steps: int = 4
    num_samples: int = 1000
    num_workers: int = 0
    with_vae: bool = False
    use_fp16: bool = False
    use_bf16: bool = False
    tf32: bool | None = None

    def __post_init__(self) -> None:
        for name in ("downsample", "in_channels", "batch_size", "repeats", "num_sampling_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("warmup", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.with_vae and (self.downsample, self.in_channels) != (SD_DOWNSAMPLE, SD_CHANNELS):
            raise ValueError(
                f"--downsample {self.downsample} --in_channels {self.in_channels}: the autoencoder of --with_vae True "
                f"has {SD_DOWNSAMPLE} and {SD_CHANNELS}; leave them out, or use --with_vae False"
            )
        with torch.device("meta"):  # checked without the memory and the time that a model takes
            self.model_config.build()
        self.train_config, self.sampler_config.build_diffusion(self.run_config)

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in self.__dataclass_fields__ if name in MODEL_FIELDS})

    @property
    def run_config(self) -> RunConfig:
        return RunConfig(self.model_config, DiffusionConfig(), first_stage={})

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(batch_size=self.batch_size, use_fp16=self.use_fp16, use_bf16=self.use_bf16)

    @property
    def sampler_config(self) -> SamplerConfig:
        """A sampler that guides at every step."""
        return SamplerConfig(num_sampling_steps=self.num_sampling_steps, cfg_cond=True, guidance="constant")

    @property
    def draw_spec(self) -> DrawSpec:
        with torch.device("meta"):
            num_tokens = self.model_config.build().num_tokens
        return DrawSpec(self.model_config.latent_shape, num_tokens, posterior=self.with_vae)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; parameters and losses are float32."""
        return torch.float16 if self.use_fp16 else torch.bfloat16 if self.use_bf16 else torch.float32


MODEL_FIELDS = ModelConfig.__dataclass_fields__
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}


# What is measured


def fresh_model(settings: Settings) -> LatentTransformer:
    """A model whose gates and output are not zero, as in training: a GPU is faster on zeros than on numbers."""
    with global_generator(0, "init"):
        model = settings.model_config.build()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model


def make_first_stage(settings: Settings, device: torch.device) -> FirstStage:
    """Stable Diffusion's autoencoder with random weights, or none: latents as they are given."""
    if not settings.with_vae:
        return PixelSpace(settings.in_channels)
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    with global_generator(0, "autoencoder"):
        vae: Any = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=2,
            latent_channels=SD_CHANNELS,
            norm_num_groups=32,
            sample_size=256,
        )
    return Autoencoder(vae.to(device), "random weights")


def training_batch(settings: Settings) -> tuple[Tensor, Batch]:
    """What the loader delivers for one step: images, or latents in their place, and the draws of each."""
    count, spec = settings.batch_size, settings.draw_spec
    shape = (3, settings.image_size, settings.image_size) if settings.with_vae else spec.latent_shape
    images = torch.randn(count, *shape, generator=torch_generator(0, "images"))
    extras = default_collate([training_draws(spec, 0, 0, i) for i in range(count)])
    index = torch.arange(count)
    labels, epoch = index % settings.num_classes, torch.zeros_like(index)
    return images, {**extras, "y": labels, "index": index, "used": index, "epoch": epoch}


class UndecodedLatents(PixelSpace):
    """Lets the sampler end at the latents: of their channels it gets one, which it takes for a grey image."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :1]


def make_jpegs(folder: Path) -> int:
    """Smooth colours under noise; files about as large as photographs of that size. Returns their mean size, bytes."""
    for i in range(JPEG_COUNT):
        rng = numpy_generator("benchmark", "jpeg", i)
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype("uint8")).resize(JPEG_SIZE)
        noise = Image.fromarray(rng.normal(128, 32, JPEG_SIZE[::-1]).clip(0, 255).astype("uint8")).convert("RGB")
        Image.blend(smooth, noise, 0.48).save(folder / f"class{i % 4}_{i}.jpg", quality=90)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return round(statistics.mean(sizes))


# How it is measured


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and the peak of memory up to the last one."""

    seconds: list[float]
    peak_memory_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Timing") -> float:
        """The median over the rounds of this one's seconds divided by the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def fields(self, prefix: str = "") -> dict[str, float]:
        values = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return {f"{prefix}{name}_seconds": value for name, value in values.items()}


def timed(work: Callable[[], Any], settings: Settings, device: torch.device) -> Timing:
    """Run ``work`` warmup + repeats times; on CUDA, to the end of what it started."""
    return timed_in_turn([work], settings, device)[0]


def timed_in_turn(works: Sequence[Callable[[], Any]], settings: Settings, device: torch.device) -> list[Timing]:
    """The same for several in each round, so that whatever else the machine does slows all of them alike."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for work in [*works] * settings.warmup:
        work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(settings.repeats):
        for work, measured in zip(works, seconds, strict=True):
            finish()
            start = time.perf_counter()
            work()
            finish()
            measured.append(time.perf_counter() - start)
    return [Timing(measured, peak_memory(device)) for measured in seconds]


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU; on a CPU, of the whole process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage's peak: a child process starts with that of its parent.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# The cases: each returns the fields of common() and what is its own


def train_step(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A step of the training loop: both views, AdamW, EMA; then each view alone, forward and backward."""
    precision = choose_precision(settings, ranks.device, tf32=False)
    diffusion = settings.run_config.diffusion.build()
    no_data = ImageDataset(settings.image_size, *no_classes(0))
    loop = TrainLoop(
        config=settings.train_config,
        run_config=settings.run_config,
        model=fresh_model(settings),
        diffusion=diffusion,
        schedule_sampler=UniformSampler(diffusion),
        first_stage=make_first_stage(settings, ranks.device),
        data=iter(()),
        bad_images=BadImages(no_data, seed=0, max_bad_share=0.0, ranks=ranks, path=Path()),
        ranks=ranks,
        logger=Logger(),
        folder=Path(),
        start=Start(0, Path()),
        position=0,
    )
    images, extras = training_batch(settings)
    step = timed(lambda: loop.train_step(images, extras), settings, ranks.device)

    draws = {name: value.to(ranks.device) for name, value in extras.items() if name != "t"}
    z = loop.first_stage.encode(images.to(ranks.device), draws.get("posterior"))
    t, _ = loop.schedule_sampler.from_uniform(extras["t"], ranks.device)

    def view(prefix: str, enable_mask: bool) -> dict[str, float]:
        def forward_backward() -> None:
            # The loop's own losses, so that what is measured is what it does.
            loop._losses(z, t, draws, prefix, enable_mask)["loss"].mean().backward()
            loop.optimizer.zero_grad()

        return timed(forward_backward, settings, ranks.device).fields(f"{'masked' if enable_mask else 'full'}_view_")

    return {
        **common(step, ranks.device),
        "images_per_second": settings.batch_size / step.median,
        **view("", False),
        **(view("m_", True) if loop.masks else {}),
        **precision,
    }


def sample(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Guided steps of the sampler, extrapolated to a published run; with an autoencoder, decoding beside them.

    In turn with them, where there are steps enough to leave some out, the published schedule with ``cfg_skip_tol``.
    """
    precision = choose_precision(settings, ranks.device, tf32=True)
    model = fresh_model(settings).to(ranks.device).eval().requires_grad_(False)
    model.expand_bias()  # as the scripts do

    def network(*args: Any, **kwargs: Any) -> Tensor:
        enabled = settings.dtype != torch.float32
        with torch.autocast(ranks.device.type, dtype=settings.dtype, enabled=enabled):
            return model(*args, **kwargs).float()

    undecoded = UndecodedLatents(settings.in_channels)
    indices = range(settings.batch_size)
    labels = [i % settings.num_classes for i in indices]

    def sampling(sampler: SamplerConfig) -> Callable[[], Any]:
        make = ImageSampler(network, settings.run_config, sampler, undecoded, ranks.device)
        return lambda: make(indices, labels)

    tolerances = SKIP_TOLERANCES if settings.num_sampling_steps >= LEAST_STEPS_TO_SKIP else ()
    skipping = [
        dataclasses.replace(settings.sampler_config, guidance="power_cosine", cfg_skip_tol=tolerance)
        for tolerance in tolerances
    ]
    samplers = [settings.sampler_config, *skipping]
    steps, *skipped = timed_in_turn([sampling(sampler) for sampler in samplers], settings, ranks.device)
    fields = {**common(steps, ranks.device), "num_sampling_steps": settings.num_sampling_steps}
    for tolerance, timing in zip(tolerances, skipped, strict=True):
        fields |= {
            **timing.fields(f"cfg_skip_tol_{tolerance}_"),
            f"cfg_skip_tol_{tolerance}_speedup": steps.over(timing),
        }
    seconds = FULL_SAMPLING_STEPS * steps.median / settings.num_sampling_steps
    if settings.with_vae:
        first_stage = make_first_stage(settings, ranks.device)
        z = torch.randn(settings.batch_size, *settings.model_config.latent_shape, device=ranks.device)
        decoding = timed(lambda: first_stage.decode(z), settings, ranks.device)
        seconds += decoding.median
        peak = max(steps.peak_memory_bytes, decoding.peak_memory_bytes)
        fields |= {**decoding.fields("decode_"), "peak_memory_bytes": peak}
    return {
        **fields,
        "images_per_second": settings.batch_size / seconds,
        "seconds_per_step": steps.median / settings.num_sampling_steps,
        "seconds_per_image": seconds / settings.batch_size,
        "extrapolated_to_steps": FULL_SAMPLING_STEPS,  # holds for the two per image
        **precision,
    }


def data(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Batches of JPEG files, with the random numbers of a training step, on the CPU; files are in the disk's cache.

    In turn with them, without loader processes, the same with --fast_decode True: the two's processes would read ahead
    in each other's time.
    """
    # Workers deliver in turn, and so in bursts: a repeat is a whole round of them.
    in_a_round = max(1, settings.num_workers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        mean_file_bytes = make_jpegs(Path(folder))

        def rounds(fast_decode: bool) -> Callable[[], Any]:
            batches = load_data(
                data_dir=folder,
                batch_size=settings.batch_size,
                image_size=settings.image_size,
                class_cond=True,
                num_workers=settings.num_workers,
                fast_decode=fast_decode,
                draws=settings.draw_spec,
            )
            stack.callback(batches.close)
            return lambda: [next(batches) for _ in range(in_a_round)]

        ways = [False] if settings.num_workers else [False, True]
        measured = timed_in_turn([rounds(fast_decode) for fast_decode in ways], settings, torch.device("cpu"))
    exact = Timing([seconds / in_a_round for seconds in measured[0].seconds], measured[0].peak_memory_bytes)
    fast_decode = {}
    for fast in measured[1:]:
        fast_decode = {**fast.fields("fast_decode_"), "fast_decode_speedup": exact.over(fast)}
    return {
        **common(exact, torch.device("cpu")),
        "images_per_second": settings.batch_size / exact.median,
        **fast_decode,
        "num_workers": settings.num_workers,  # their memory is not in the peak
        "mean_file_bytes": mean_file_bytes,
        "dtype": "float32",
    }


def assemble(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A sample set of noise, which stands in for a model's images, written in parts and put together, once."""

    def make(indices: Sequence[int], labels: Sequence[int]) -> np.ndarray:
        shape = (len(indices), settings.image_size, settings.image_size, 3)
        return np.random.default_rng(indices[0]).integers(0, 256, shape, dtype=np.uint8)

    number, cpu = settings.num_samples, torch.device("cpu")
    labels = np.arange(number, dtype=np.int64) % settings.num_classes
    with tempfile.TemporaryDirectory() as folder:
        samples = SampleSet(Path(folder), number, settings.image_size, settings.batch_size, {})
        samples.open({})
        begin = time.perf_counter()
        generate(samples, make, labels, rank=0, world_size=1)
        written = time.perf_counter()
        samples.assemble(labels)
        end = time.perf_counter()
        npz_bytes = samples.path.stat().st_size
    timing = Timing([end - begin], peak_memory(cpu))
    return {
        **common(timing, cpu),
        "images_per_second": number / timing.median,
        "num_samples": number,
        "assemble_seconds": end - written,
        "npz_bytes": npz_bytes,
        "dtype": "uint8",
    }


def common(timing: Timing, device: torch.device) -> dict[str, Any]:
    """Fields of every case."""
    place = {"device": device.type, "device_name": device_name(device)}
    return {**place, **timing.fields(), "peak_memory_bytes": timing.peak_memory_bytes}


def choose_precision(settings: Settings, device: torch.device, tf32: bool) -> dict[str, Any]:
    """Allow TF32 as asked, else ``tf32``, the script's default; the fields that say how the network computes."""
    tf32 = device.type == "cuda" and (tf32 if settings.tf32 is None else settings.tf32)
    dist_util.allow_tf32(tf32)
    return {"dtype": str(settings.dtype).removeprefix("torch."), "tf32": tf32}


CASES: dict[str, Callable[[Settings, Ranks], dict[str, Any]]] = {
    "train_step": train_step,
    "sample": sample,
    "data": data,
    "assemble": assemble,
}


# The script


def record(case: str, settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Measure a case."""
    shared = ("model", "image_size", "batch_size", "mask_ratio", "with_vae", "repeats", "warmup")
    return {
        "case": case,
        **{name: getattr(settings, name) for name in shared},
        **CASES[case](settings, ranks),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def in_child(case: str, argv: Sequence[str]) -> str:
    """The line of a case measured by this script in a process of its own, which ends this one if it fails."""
    command = [sys.executable, __file__, *argv, "--case", case, "--out", ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise SystemExit(f"case {case}: ended by signal {-done.returncode} (9: probably out of memory)")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return done.stdout


def create_argparser() -> argparse.ArgumentParser:
    defaults = {"case": ",".join(CASES), **DEFAULTS, "device": "auto", "out": ""}
    types = {"mask_ratio": optional(float), "decode_layer": optional(int), "tf32": optional(str2bool)}
    parser = argparse.ArgumentParser(description="Measure speed and peak memory; prints a JSON object per case.")
    add_dict_to_argparser(parser, defaults, types, HELPS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args, argv, stack))


def prepare(args: argparse.Namespace, argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    cases = [name.strip() for name in args.case.split(",")]
    for name in cases:
        if name not in CASES:
            raise ValueError(f"--case {name}: unknown; choose of {', '.join(CASES)}")
    settings = Settings(**args_to_dict(args, DEFAULTS))
    device = dist_util.choose_device(args.device)
    outputs = [sys.stdout]
    if args.out:
        try:
            outputs.append(stack.enter_context(Path(args.out).expanduser().open("a", encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"--out {args.out}: cannot write there ({error.strerror})") from error

    def work() -> None:
        for case in cases:
            if len(cases) > 1:
                line = in_child(case, argv)
            else:
                with dist_util.joined_ranks(Place(), device) as ranks:
                    line = json.dumps(record(case, settings, ranks)) + "\n"
            for output in outputs:
                output.write(line)
                output.flush()

    return work


if __name__ == "__main__":
    sys.exit(main())
