"""Random numbers keyed by what they are for, never by who draws them or when.

A key is a tuple of plain values such as ``(seed, "sample", 17)``. It is hashed with SHA-256 (not added up, and not
with Python's ``hash``, which differs between processes), so neighbouring keys give unrelated streams, and image 17
is image 17 whatever the batch size, the number of processes, the number of loader workers, or the restart.

==========================  =====================================================
what is drawn               key
==========================  =====================================================
order of an epoch           ``(seed, "order", epoch)``
crop and flip of an image   ``(seed, "augment", epoch, index)``
what replaces an image      ``(seed, "replacement", epoch, index)``
training draws of an image  ``(seed, NAME, epoch, index)``, see :func:`training_draws`
a generated image           ``(seed, "label" | "noise" | "halves", sample_index)``
shared by all ranks         ``(seed, NAME, step)``
==========================  =====================================================

Every key sets all 128 bits of a Philox generator's key, so that no two of them meet. torch's generator on the CPU heeds
32 bits of its seed: among 50,000 samples of one seed, two had the same noise. :data:`STREAM` counts such changes. What
was begun under an older stream goes on with it.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masked_diffusion.choices import FIRST_STREAM, STREAM


def key_bytes(*key: int | str) -> bytes:
    """SHA-256 of a key of integers and strings; the same in every process and on every machine."""
    return hashlib.sha256(repr(key).encode()).digest()


def numpy_generator(*key: int | str) -> np.random.Generator:
    """Counter-based numpy generator (Philox, 128-bit key) for one key. Used where images are loaded."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key_bytes(*key)[:16], "big")))


@contextlib.contextmanager
def global_generator(*key: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator from a key inside the block, for library code that draws from it.

    torch heeds 32 bits of the seed. Use it for what is drawn once in a run, such as fresh weights, never per image.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the generators of all GPUs, too, which nothing would restore.
        torch.default_generator.manual_seed(int.from_bytes(key_bytes(*key)[:8], "big"))
        yield


# Normal draws of one key: shape -> float32 tensor on the CPU.
Normals = Callable[[tuple[int, ...]], torch.Tensor]


def _mersenne_normals(*key: int | str) -> Normals:
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key_bytes(*key)[:8], "big"))
    return lambda shape: torch.randn(shape, generator=generator)


def _philox_normals(*key: int | str) -> Normals:
    generator = numpy_generator(*key)
    return lambda shape: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


# What the noise of generated images is drawn from, by the version that config.json, manifests and checkpoints record.
STREAMS: dict[int, Callable[..., Normals]] = {1: _mersenne_normals, 2: _philox_normals}


def recorded_stream(state: Mapping[str, Any], source: Path) -> int:
    """The stream that the run of a checkpoint's state was begun under.

    Raises ValueError, naming ``source``, for one that this code does not have.
    """
    stream = state.get("stream", FIRST_STREAM)
    if stream not in STREAMS:
        raise ValueError(
            f"{source}: the run draws from stream {stream} of random numbers, and this code has "
            f"{', '.join(map(str, STREAMS))}; go on with the version of masked-diffusion that began the run"
        )
    return int(stream)


def stream_entry(stream: int) -> dict[str, int]:
    """What settings that are compared say of a stream: nothing of the first, as when there was no other."""
    return {} if stream == FIRST_STREAM else {"stream": stream}


@dataclass(frozen=True)
class DrawSpec:
    """Shapes of the numbers one training image needs besides its crop and flip.

    latent_shape: (C, h, w) of a latent. num_tokens: L of the model's token grid.
    posterior: whether the first stage samples a posterior and so needs noise of its own. path_drop: whether the policy
    drops paths. second_level: whether some tokens have a noise level of their own.
    """

    latent_shape: tuple[int, int, int]
    num_tokens: int
    posterior: bool
    path_drop: bool = False
    second_level: bool = False


def training_draws(spec: DrawSpec, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
    """All draws of one image in one epoch, float32 but for ``t`` (SPEC 6: randomness by identity).

    Returns ``t``: () float64 uniform in [0, 1), made a timestep by the schedule sampler; ``noise``, ``m_noise``:
    (C, h, w) normal, of the full and of the masked view; ``label_noise``, ``m_label_noise``: () uniform, decide the
    label dropout of the two views; ``token_noise``: (L,) uniform, its ranks decide which tokens are kept; where
    paths are dropped, ``path_noise``: () uniform, decides whose; where images have two noise levels, ``second_t``: ()
    as ``t``; and, where the first stage is stochastic, ``posterior``: (C, h, w) normal. Each name has a stream of its
    own, so that a new name changes none of the others.
    """

    def stream(name: str) -> np.random.Generator:
        return numpy_generator(seed, name, epoch, index)

    draws: dict[str, np.ndarray] = {
        "t": np.asarray(stream("t").random(), dtype=np.float64),
        "noise": stream("noise").standard_normal(spec.latent_shape, dtype=np.float32),
        "m_noise": stream("m_noise").standard_normal(spec.latent_shape, dtype=np.float32),
        "label_noise": np.asarray(stream("label_noise").random(dtype=np.float32)),
        "m_label_noise": np.asarray(stream("m_label_noise").random(dtype=np.float32)),
        "token_noise": stream("token_noise").random(spec.num_tokens, dtype=np.float32),
    }
    if spec.path_drop:
        draws["path_noise"] = np.asarray(stream("path_noise").random(dtype=np.float32))
    if spec.second_level:
        draws["second_t"] = np.asarray(stream("second_t").random(), dtype=np.float64)
    if spec.posterior:
        draws["posterior"] = stream("posterior").standard_normal(spec.latent_shape, dtype=np.float32)
    return draws


class SampleNoise:
    """Noise of generated images: one generator per sample index, drawn from in the order the sampler asks.

    The i-th row of every draw belongs to ``indices[i]`` and to nothing else, so a sample does not depend on its
    neighbours in the batch. purpose: what is drawn; other purposes have other draws. stream: a key of ``STREAMS``.
    """

    def __init__(self, seed: int, indices: Sequence[int], purpose: str = "noise", stream: int = STREAM) -> None:
        self._rows = [STREAMS[stream](seed, purpose, int(index)) for index in indices]

    def randn(self, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """(N, *shape) float32 normal on ``device``, N the number of samples."""
        drawn = torch.stack([normals(tuple(shape)) for normals in self._rows])
        return drawn.to(device, non_blocking=True)  # the next draws need not wait for a GPU's step

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Normal noise of x's shape (N, ...), for use as a sampler's noise source."""
        return self.randn(x.shape[1:], x.device).to(x.dtype)
