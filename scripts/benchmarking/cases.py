"""Cases of ``scripts/benchmark.py`` that compare: with the plain path, with arithmetic alone, of several processes."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from benchmarking.plain_step import PlainMDT, PlainTraining
from benchmarking.settings import Settings, with_autoencoder
from benchmarking.setup import (
    UndecodedLatents,
    choose_precision,
    common,
    fresh_model,
    make_first_stage,
    make_loop,
    matrix_product,
    timed,
    timed_in_turn,
    train_step_flops,
    training_batch,
    view_of,
)
from studying.plan import decoder_of
from torch import Tensor

from masked_diffusion import choices
from masked_diffusion.choices import family_of
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import Autoencoder, FirstStage
from masked_diffusion.models import MDT
from masked_diffusion.models.cost import cost
from masked_diffusion.models.policies import FULL, MASKED, POLICIES
from masked_diffusion.sampling.image_sampler import ImageSampler

# Ratios of the works of against_plain. A product is scaled to as many operations as a step has.
COMPARISONS = {
    "speedup": ("plain_step", "step"),
    "masked_to_full": ("masked_view", "full_view"),
    "guided_speedup": ("plain_guided", "guided"),
    "share_of_floor": ("product", "step"),
    "plain_share_of_floor": ("product", "plain_step"),
    "compiled_speedup": ("plain_step", "compiled_step"),
    "compiled_share_of_floor": ("product", "compiled_step"),
    "cached_latents_speedup": ("plain_step_on_images", "step"),
}
# Measures a case in a process of its own, or several under torchrun, with further flags.
Child = Callable[..., dict[str, Any]]


def plain_training(settings: Settings, device: torch.device) -> PlainTraining:
    model = cast(MDT, fresh_model(settings).to(device))
    first_stage = plain_first_stage(settings, device)
    return PlainTraining(model, settings.run_config.diffusion.build(), first_stage, settings.train_config.lr)


def plain_first_stage(settings: Settings, device: torch.device) -> FirstStage:
    first_stage = make_first_stage(settings, device)
    if isinstance(first_stage, Autoencoder):
        first_stage.vae.to(memory_format=torch.contiguous_format)  # channels last is one of the things to compare
    return first_stage


def encode(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A batch of images to the posterior's moments, as a latent cache keeps them; ours and the plain one in turn."""
    precision = choose_precision(settings, ranks.device, tf32=False)
    settings = with_autoencoder(settings)
    images = training_batch(settings)[0].to(ranks.device)
    ways = [make_first_stage(settings, ranks.device), plain_first_stage(settings, ranks.device)]

    def encoding(way: FirstStage) -> Callable[[], Any]:
        assert isinstance(way, Autoencoder)
        return lambda: way.moments(images)

    ours, plain = timed_in_turn([encoding(way) for way in ways], settings, ranks.device)
    return {
        **common(ours, ranks.device, settings.batch_size),
        **plain.fields("plain_"),
        **plain.ratios(ours, "encode_speedup"),
        **precision,
        "dtype": "float32",
    }


def plain_step(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A step of the plain training alone."""
    precision = choose_precision(settings, ranks.device, tf32=False)
    training = plain_training(settings, ranks.device)
    images, extras = training_batch(settings)
    step = timed(lambda: training.step(images, extras), settings, ranks.device)
    return {**common(step, ranks.device, settings.batch_size), **precision}


def against_plain(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Ours and the plain path in turn in each round: a step on latents, one on images (--with_vae True), one of ours
    compiled (--compile True), each of our views, a guided sampling step, and products of matrices as large as the
    model's largest.

    Ratios are medians of the rounds' ratios, of the clock's and of the processor's seconds.
    """
    device = ranks.device
    precision = choose_precision(settings, device, tf32=False)
    on_latents = dataclasses.replace(settings, with_vae=False, compile=False)
    loop = make_loop(on_latents, ranks)
    batch = training_batch(on_latents)
    plain = plain_training(on_latents, device)
    plain_model = PlainMDT(fresh_model(settings).to(device)).eval()  # type: ignore[arg-type]
    product, product_flops = matrix_product(settings, device)
    works: dict[str, Callable[[], Any]] = {
        "step": lambda: loop.train_step(*batch),
        "plain_step": lambda: plain.step(*batch),
        "full_view": view_of(loop, batch, FULL),
        "masked_view": view_of(loop, batch, MASKED),
        "guided": guided_steps(settings, device),
        "plain_guided": plain_guided_steps(settings, plain_model, device),
        "product": product,
    }
    if settings.compile:
        compiled = make_loop(dataclasses.replace(on_latents, compile=True), ranks)
        works["compiled_step"] = lambda: compiled.train_step(*batch)
    if settings.with_vae:
        with_vae = plain_training(settings, device)
        images = training_batch(settings)
        works["plain_step_on_images"] = lambda: with_vae.step(*images)
    timings = dict(zip(works, timed_in_turn([*works.values()], settings, device), strict=True))
    floor = train_step_flops(loop, batch) / product_flops  # products that take as many operations as a step

    fields = common(timings["step"], device, settings.batch_size)
    for name, timing in timings.items():
        fields |= timing.fields(f"{name}_")
    for name, (one, other) in COMPARISONS.items():
        if one in timings and other in timings:
            fields |= timings[one].ratios(timings[other], name, floor if one == "product" else 1.0)
    gflops = floor * product_flops / 1e9
    return {
        **fields,
        "step_gflop": gflops,
        "matrix_gflop_per_second": product_flops / timings["product"].median / 1e9,
        **precision,
    }


def policies(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """A training step under each policy, in turn with one without: ``{policy}_to_none``, medians of the rounds' ratios
    by the clock and (``_cpu``) by the processor's time, and ``{policy}_cost``, the ratio of what is computed.

    One policy at a time, so that no more than two networks are in memory. Under flow, which all policies are for.
    """
    device = ranks.device
    precision = choose_precision(settings, device, tf32=False)

    def of_policy(name: str) -> Settings:
        family = family_of(settings.model)
        fitting = choices.POLICIES[name].families
        model = settings.model if family in fitting else settings.model.replace(family, fitting[0], 1)
        own: dict[str, Any] = {
            "policy": name,
            "mask_ratio": POLICIES[name].mask_ratio,
            "model": model,
            "objective": "flow",
        }
        if name == "mdtv2":
            own |= decoder_of(model, name)
        return dataclasses.replace(settings, **own)

    def step_of(one: Settings) -> tuple[Callable[[], Any], int]:
        loop, batch = make_loop(one, ranks), training_batch(one)
        return lambda: loop.train_step(*batch), cost(loop.skeleton)

    fields: dict[str, float] = {}
    plain_step, plain_cost = step_of(of_policy("none"))
    for name in POLICIES:
        if name == "none":
            continue
        step, step_cost = step_of(of_policy(name))
        plain, timing = timed_in_turn([plain_step, step], settings, device)
        fields |= timing.ratios(plain, f"{name}_to_none")
        fields |= {f"{name}_cost": step_cost / plain_cost, f"{name}_seconds": timing.median}
    return {**common(plain, device, settings.batch_size), **fields, **precision}


def guided_steps(settings: Settings, device: torch.device) -> Callable[[], Any]:
    """Steps of the sampler, as images are drawn."""
    model = fresh_model(settings).to(device).eval()
    undecoded = UndecodedLatents(settings.in_channels)
    make = ImageSampler(model, settings.run_config, settings.sampler_config, undecoded, device)
    labels = [i % settings.num_classes for i in range(settings.batch_size)]
    return lambda: make(range(settings.batch_size), labels)


def plain_guided_steps(settings: Settings, model: PlainMDT, device: torch.device) -> Callable[[], Any]:
    """The same, with the latent carried twice and both halves computed at every step."""
    respacing = str(settings.sampler_config.num_sampling_steps)
    diffusion = dataclasses.replace(settings.run_config.diffusion, timestep_respacing=respacing).build()
    count = settings.batch_size
    labels = torch.arange(count, device=device) % settings.num_classes
    y = torch.cat([labels, torch.full_like(labels, settings.num_classes)])

    @torch.no_grad()
    def steps() -> Tensor:
        noise = torch.randn(count, *settings.model_config.latent_shape, device=device)
        return diffusion.p_sample_loop(
            lambda x, t, y: model.guided(x, t, y, settings.sampler_config.cfg_scale),
            (2 * count, *noise.shape[1:]),
            torch.cat([noise, noise]),
            clip_denoised=False,
            model_kwargs={"y": y},
            device=device,
        )

    return steps


def memory(child: Child, settings: Settings) -> dict[str, Any]:
    """Peaks of a step, each in a process of its own; net of what the process held before, which is the libraries."""
    measured = {
        "ours": child("train_step"),
        "ours_checkpointing": child("train_step", "--grad_checkpointing", "True"),
        "plain": child("plain_step"),
    }
    names = ("peak_memory_bytes", "net_memory_bytes")
    fields = {f"{who}_{name}": record[name] for who, record in measured.items() for name in names}
    return {
        **measured["ours"],
        **fields,
        **{
            f"{who}_to_plain_{name}": measured[who][name] / measured["plain"][name]
            for who in ("ours", "ours_checkpointing")
            for name in names
        },
        "grad_checkpointing_slowdown": measured["ours_checkpointing"]["median_seconds"]
        / measured["ours"]["median_seconds"],
    }


def scaling(child: Child, settings: Settings) -> dict[str, Any]:
    """Training steps in one process and in two, each on --batch_size images with the same number of threads."""
    alone, both = child("train_step"), child("train_step", processes=2)
    return {
        **both,
        "processes": 2,
        "one_process_images_per_second": alone["images_per_second"],
        "images_per_second": 2 * both["images_per_second"],
        "scaling": 2 * both["images_per_second"] / alone["images_per_second"],
    }
