"""Cases of ``scripts/benchmark.py`` that measure what the scripts do, alone."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking.settings import FULL_SAMPLING_STEPS, Settings
from benchmarking.setup import (
    Timing,
    UndecodedLatents,
    choose_precision,
    common,
    fresh_model,
    make_first_stage,
    make_jpegs,
    make_loop,
    peak_memory,
    timed,
    timed_in_turn,
    train_step_flops,
    training_batch,
    utilisation,
    view_of,
)
from torch import Tensor
from torch.profiler import profile

from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.image_datasets import load_data
from masked_diffusion.randomness import STREAM, SampleNoise, training_draws
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.sample_set import SampleSet, generate
from masked_diffusion.sampling.sampler_config import SamplerConfig

# Guidance weights of 1 are as frequent among 10 steps as among 250: a tenth of them, or four tenths within a hundredth.
SKIP_TOLERANCES, LEAST_STEPS_TO_SKIP = (0.0, 0.01), 10

# Each returns the fields of common() and what is its own.


def train_step(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A step of the training loop: both views, AdamW, EMA; then each view alone, forward and backward."""
    precision = choose_precision(settings, ranks.device, tf32=False)
    loop = make_loop(settings, ranks)
    batch = training_batch(settings)
    step = timed(lambda: loop.train_step(*batch), settings, ranks.device)

    views: dict[str, float] = {}
    for view in loop.views:
        timing = timed(view_of(loop, batch, view), settings, ranks.device)
        views |= timing.fields(f"{'masked' if view.drops else 'full'}_view_")
    if settings.trace and ranks.is_main:
        with profile() as profiler:
            loop.train_step(*batch)
        profiler.export_chrome_trace(settings.trace)
    flops = train_step_flops(loop, batch)
    return {
        **common(step, ranks.device, settings.batch_size),
        **views,
        "step_gflop": flops / 1e9,
        **utilisation(flops, step.median, settings, ranks.device, precision["tf32"]),
        **precision,
    }


def sample(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Guided steps of the sampler, extrapolated to a published run; with an autoencoder, decoding beside them.

    In turn with them, where there are steps enough to leave some out, the published schedule with ``cfg_skip_tol``.
    """
    precision = choose_precision(settings, ranks.device, tf32=True)
    sampling = sampling_with(settings, ranks)
    tolerances = SKIP_TOLERANCES if settings.num_sampling_steps >= LEAST_STEPS_TO_SKIP else ()
    skipping = [
        dataclasses.replace(settings.sampler_config, guidance="power_cosine", cfg_skip_tol=tolerance)
        for tolerance in tolerances
    ]
    samplers = [settings.sampler_config, *skipping]
    steps, *skipped = timed_in_turn([sampling(sampler) for sampler in samplers], settings, ranks.device)
    fields = {
        **common(steps, ranks.device, settings.batch_size),
        "num_sampling_steps": settings.num_sampling_steps,
    }
    for tolerance, timing in zip(tolerances, skipped, strict=True):
        name = f"cfg_skip_tol_{tolerance}_speedup"
        fields |= {**timing.fields(f"cfg_skip_tol_{tolerance}_"), name: steps.ratios(timing, name)[name]}
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
        "images_per_second": settings.batch_size / seconds,  # of a whole run
        "seconds_per_step": steps.median / settings.num_sampling_steps,
        "seconds_per_image": seconds / settings.batch_size,
        "extrapolated_to_steps": FULL_SAMPLING_STEPS,  # holds for the two per image
        **precision,
    }


def sampling_with(settings: Settings, ranks: Ranks) -> Callable[..., Callable[[], Any]]:
    """From a sampler's settings, and perhaps the stream of its noise, what samples a batch with one fresh model."""
    model = fresh_model(settings).to(ranks.device).eval().requires_grad_(False)
    model.expand_bias()  # as the scripts do

    def network(*args: Any, **kwargs: Any) -> Tensor:
        enabled = settings.dtype != torch.float32
        with torch.autocast(ranks.device.type, dtype=settings.dtype, enabled=enabled):
            return model(*args, **kwargs).float()

    undecoded = UndecodedLatents(settings.in_channels)
    indices = range(settings.batch_size)
    labels = [i % settings.num_classes for i in indices]

    def sampling(sampler: SamplerConfig, stream: int = STREAM) -> Callable[[], Any]:
        make = ImageSampler(network, settings.run_config, sampler, undecoded, ranks.device, stream=stream)
        return lambda: make(indices, labels)

    return sampling


def noise(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Guided steps of the sampler in turn with the same under the former stream of random numbers, and the noise of
    both alone."""
    precision = choose_precision(settings, ranks.device, tf32=True)
    sampling, streams = sampling_with(settings, ranks), (STREAM, STREAM - 1)

    def drawing(stream: int) -> Callable[[], Any]:
        def draw() -> None:
            source = SampleNoise(0, range(settings.batch_size), stream=stream)
            for _ in range(settings.num_sampling_steps + 1):
                source.randn(settings.model_config.latent_shape, ranks.device)

        return draw

    works = [*(sampling(settings.sampler_config, stream) for stream in streams), *map(drawing, streams)]
    new, former, new_draws, former_draws = timed_in_turn(works, settings, ranks.device)
    return {
        **common(new, ranks.device, settings.batch_size),
        **former.fields("former_"),
        **new_draws.fields("draws_"),
        **former_draws.fields("former_draws_"),
        **new.ratios(former, "to_former"),
        "num_sampling_steps": settings.num_sampling_steps,
        **precision,
    }


def data(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Batches of JPEG files, with the random numbers of a training step, on the CPU; files are in the disk's cache.

    In turn with them, without loader processes, the same with --fast_decode True: the two's processes would read ahead
    in each other's time.
    """
    # Workers deliver in turn, and so in bursts: a repeat is a whole round of them.
    in_a_round, batch_size = max(1, settings.num_workers), settings.batch_size
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        mean_file_bytes = make_jpegs(Path(folder))

        def rounds(fast_decode: bool) -> Callable[[], Any]:
            batches = load_data(
                data_dir=folder,
                batch_size=batch_size,
                image_size=settings.image_size,
                class_cond=True,
                num_workers=settings.num_workers,
                fast_decode=fast_decode,
                draws=settings.draw_spec,
            )
            stack.callback(batches.close)
            return lambda: [next(batches) for _ in range(in_a_round)]

        spec = settings.draw_spec
        works = [rounds(fast_decode=False)]
        if not settings.num_workers:
            works += [rounds(fast_decode=True), lambda: [training_draws(spec, 0, 0, i) for i in range(batch_size)]]
        measured = timed_in_turn(works, settings, torch.device("cpu"))
    exact = measured[0].divided(in_a_round)
    return {
        **common(exact, torch.device("cpu"), batch_size),
        **(against_exact(exact, *measured[1:]) if measured[1:] else {}),
        "num_workers": settings.num_workers,  # their memory is not in the peak
        "mean_file_bytes": mean_file_bytes,
        "dtype": "float32",
    }


def against_exact(exact: Timing, fast: Timing, draws: Timing) -> dict[str, float]:
    """How much faster --fast_decode True loads: in all, and without the random numbers, which are the same work."""
    return {
        **fast.fields("fast_decode_"),
        **draws.fields("draws_"),
        **exact.ratios(fast, "fast_decode_speedup"),
        **exact.without(draws).ratios(fast.without(draws), "fast_decode_speedup_without_draws"),
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
        generate(samples, make, labels, Ranks(Place(), cpu))
        written = time.perf_counter()
        samples.assemble(labels)
        end = time.perf_counter()
        npz_bytes = samples.path.stat().st_size
    timing = Timing([end - begin], peak_memory(cpu))
    return {
        **common(timing, cpu, number),
        "num_samples": number,
        "assemble_seconds": end - written,
        "npz_bytes": npz_bytes,
        "dtype": "uint8",
    }
