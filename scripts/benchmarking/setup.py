"""What ``scripts/benchmark.py`` measures, and with what clock."""

import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking.settings import SD_CHANNELS, Settings
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from masked_diffusion import dist_util
from masked_diffusion.data.bad_images import BadImages
from masked_diffusion.data.data_stream import ReadAhead
from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import Autoencoder, FirstStage, PixelSpace
from masked_diffusion.image_datasets import no_classes
from masked_diffusion.logger import HumanSink, Logger
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.policies import View
from masked_diffusion.randomness import global_generator, numpy_generator, training_draws
from masked_diffusion.runs.checkpoint import Start
from masked_diffusion.train_util import Batch, TrainLoop
from masked_diffusion.training.sharding import no_sync

MLP_RATIO, PRODUCTS = 4, 50
JPEG_SIZE, JPEG_COUNT = (500, 375), 64  # the most frequent size in ImageNet


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
    images = torch.from_numpy(numpy_generator(0, "images").standard_normal((count, *shape), dtype=np.float32))
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


def make_loop(settings: Settings, ranks: Ranks) -> TrainLoop:
    """The training loop of a fresh model, without data."""
    objective = settings.run_config.build_objective()
    no_data = ImageDataset(settings.image_size, *no_classes(0))
    return TrainLoop(
        config=settings.train_config,
        run_config=settings.run_config,
        model=fresh_model(settings),
        objective=objective,
        schedule_sampler=objective.levels("uniform"),
        first_stage=make_first_stage(settings, ranks.device),
        data=ReadAhead(iter(())),
        bad_images=BadImages(no_data, seed=0, max_bad_share=0.0, ranks=ranks, path=Path()),
        ranks=ranks,
        logger=Logger([HumanSink(sys.stderr)]),
        folder=Path(),
        start=Start(0, Path()),
        position=0,
    )


def view_of(loop: TrainLoop, batch: tuple[Tensor, Batch], view: View) -> Callable[[], None]:
    """Forward and backward of one view alone."""
    images, extras = batch
    device = loop.ranks.device
    draws = {name: value.to(device) for name, value in extras.items() if name != "t"}
    z = loop.first_stage.encode(images.to(device), draws.get("posterior"))
    t, _ = loop.schedule_sampler.from_uniform(extras["t"], device)

    def forward_backward() -> None:
        # The loop's own losses, so that what is measured is what it does. One view alone does not reach all parameters,
        # for whose gradients several processes would wait.
        with no_sync(loop.shared_model):
            loop._losses(z, t, draws, view)["loss"].mean().backward()
        loop.optimizer.zero_grad()

    return forward_backward


def train_step_flops(loop: TrainLoop, batch: tuple[Tensor, Batch]) -> int:
    """Operations of a step's matrix products, two for each multiply-add; made by making the step."""
    with FlopCounterMode(display=False) as counter:
        loop.train_step(*batch)
    return counter.get_total_flops()


def matrix_product(settings: Settings, device: torch.device) -> tuple[Callable[[], None], int]:
    """Products of the model's largest shape, tokens by width by the MLP's width; and how many operations they are."""
    with torch.device("meta"):
        model = settings.model_config.build()
    width = model.pos_embed.shape[-1]
    a = torch.randn(settings.batch_size * model.num_tokens, width, device=device, dtype=settings.dtype)
    b = torch.randn(width, MLP_RATIO * width, device=device, dtype=settings.dtype)
    out = a @ b

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return products, PRODUCTS * 2 * len(a) * b.numel()


# How it is measured


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and the peak of memory up to the last one."""

    seconds: list[float]
    peak_memory_bytes: int
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)  # of all threads

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing", name: str, scale: float = 1.0) -> dict[str, float]:
        """Medians of the rounds' ratios of this one to another, by the clock and (``_cpu``) by the processor's time."""
        pairs = {name: (self.seconds, other.seconds), f"{name}_cpu": (self.cpu_seconds, other.cpu_seconds)}
        return {
            key: scale * statistics.median(a / max(b, 1e-9) for a, b in zip(*both, strict=True))
            for key, both in pairs.items()
        }

    def without(self, part: "Timing") -> "Timing":
        """The same less what a part of the work took in the same round."""
        pairs = (self.seconds, part.seconds), (self.cpu_seconds, part.cpu_seconds)
        seconds, cpu_seconds = ([a - b for a, b in zip(*both, strict=True)] for both in pairs)
        return Timing(seconds, self.peak_memory_bytes, cpu_seconds)

    def divided(self, parts: int) -> "Timing":
        """The same per one of equal parts."""
        seconds = [value / parts for value in self.seconds]
        return Timing(seconds, self.peak_memory_bytes, [value / parts for value in self.cpu_seconds])

    def fields(self, prefix: str = "") -> dict[str, float]:
        values = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        if self.cpu_seconds:
            values["cpu"] = statistics.median(self.cpu_seconds)
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
    rounds: list[list[tuple[float, float]]] = [[] for _ in works]
    for _ in range(settings.repeats):
        for work, measured in zip(works, rounds, strict=True):
            finish()
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            finish()
            measured.append((time.perf_counter() - start, time.process_time() - cpu_start))
    peak = peak_memory(device)
    return [Timing([clock for clock, _ in one], peak, [cpu for _, cpu in one]) for one in rounds]


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU; on a CPU, of the whole process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's peak: a child process starts with that of its parent.
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_held(device: torch.device) -> int:
    """Bytes at this moment, as :func:`peak_memory` counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or peak_memory(device)


def _status(name: str) -> int | None:
    """What Linux says of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def common(timing: Timing, device: torch.device, images: int) -> dict[str, Any]:
    """Fields of every case. images: how many a repeat makes, or takes."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        **timing.fields(),
        "peak_memory_bytes": timing.peak_memory_bytes,
        "images_per_second": images / timing.median,
    }


def choose_precision(settings: Settings, device: torch.device, tf32: bool) -> dict[str, Any]:
    """Allow TF32 as asked, else ``tf32``, the script's default; the fields that say how the network computes."""
    tf32 = device.type == "cuda" and (tf32 if settings.tf32 is None else settings.tf32)
    dist_util.allow_tf32(tf32)
    return {"dtype": str(settings.dtype).removeprefix("torch."), "tf32": tf32}


# Operations per second of dense products, in units of 10^12, from the makers' data sheets: bfloat16 or float16, TF32,
# float32. The first name that is part of the device's counts.
PEAK_TFLOPS = {
    "H200": (989, 494, 67),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "A10G": (70, 35, 31.2),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}


def peak_flops(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Of a device by its name, for products of ``dtype``; None for one that is not in the table."""
    column = 0 if dtype != torch.float32 else 1 if tf32 else 2
    return next((peaks[column] * 1e12 for part, peaks in PEAK_TFLOPS.items() if part in name), None)


def utilisation(flops: int, seconds: float, settings: Settings, device: torch.device, tf32: bool) -> dict[str, Any]:
    """Share of a GPU's peak that the model's operations reach (MFU); nothing for a CPU or an unknown card."""
    peak = peak_flops(device_name(device), settings.dtype, tf32) if device.type == "cuda" else None
    return {"mfu": flops / seconds / peak} if peak else {}
