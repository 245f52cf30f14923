import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_diffusion.randomness import (
    STREAM,
    STREAMS,
    DrawSpec,
    SampleNoise,
    global_generator,
    key_bytes,
    numpy_generator,
    recorded_stream,
    training_draws,
)

SPEC = DrawSpec(latent_shape=(4, 8, 8), num_tokens=16, posterior=True)


def test_a_key_gives_the_same_numbers_in_another_process():
    code = "from masked_diffusion.randomness import numpy_generator as g; print(g(0, 'noise', 3, 17).random())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) == numpy_generator(0, "noise", 3, 17).random()


def test_keys_with_equal_sums_or_digits_give_different_streams():
    keys = [(0, "noise", 1, 2), (0, "noise", 2, 1), (1, "noise", 0, 2), (0, "noise", 12), (0, "noise", 1, 21)]
    assert len({numpy_generator(*key).random() for key in keys}) == len(keys)


def times(a, constant):
    """High and low 64 bits of the product of uint64 numbers and a constant."""
    low_half, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high = a & low_half, a >> half
    c_low, c_high = np.uint64(constant & 0xFFFFFFFF), np.uint64(constant >> 32)
    middle = a_high * c_low + (a_low * c_low >> half)
    crossed = a_low * c_high + (middle & low_half)
    return a_high * c_high + (middle >> half) + (crossed >> half), a * np.uint64(constant)


def first_64_bits(keys):
    """What Philox 4x64-10 gives first, for many keys at once. keys: (n, 2) uint64, the low words first."""
    zero = np.zeros(len(keys), np.uint64)
    state, (k0, k1) = [zero + np.uint64(1), zero, zero, zero], keys.T
    for _ in range(10):
        high0, low0 = times(state[0], 0xD2E7470EE14C6C93)
        high1, low1 = times(state[2], 0xCA5A826395121157)
        state = [high1 ^ state[1] ^ k0, low1, high0 ^ state[3] ^ k1, low0]
        k0, k1 = k0 + np.uint64(0x9E3779B97F4A7C15), k1 + np.uint64(0xBB67AE8584CAA73B)
    return state[0]


def test_of_two_million_keys_no_two_generators_begin_alike():
    """Samples of four seeds, and what trainings draw: 32 bits of them would meet hundreds of times."""
    keys = [(seed, "noise", sample) for seed in range(4) for sample in range(50_000)]
    keys += [(0, name, epoch, i) for name in ("noise", "token_noise") for epoch in range(9) for i in range(100_000)]
    words = np.frombuffer(b"".join(key_bytes(*key)[:16] for key in keys), ">u8").reshape(-1, 2)[:, ::-1]
    drawn = np.concatenate([first_64_bits(part.astype(np.uint64)) for part in np.array_split(words, 100)])
    for i in range(0, len(keys), 20_011):  # the generators themselves
        assert numpy_generator(*keys[i]).bit_generator.random_raw() == drawn[i]
    assert len(keys) == 2_000_000 == len(np.unique(drawn))


# Pairs of samples, (seed, index, index), that torch's generator could not tell apart.
ALIKE = [(1, 24_991, 30_402), (1, 29_597, 33_267), (2, 2_613, 9_064)]


@pytest.mark.parametrize("seed, one, other", ALIKE)
def test_samples_that_had_the_same_noise_have_it_in_the_first_stream_alone(seed, one, other):
    first, second = SampleNoise(seed, [one, other], stream=1).randn((4, 8, 8))
    assert torch.equal(first, second)
    first, second = SampleNoise(seed, [one, other]).randn((4, 8, 8))
    assert (first != second).all()


def test_the_noise_of_a_sample_is_what_its_own_philox_generator_draws():
    noise = SampleNoise(3, [7, 8], "halves")
    expected = numpy_generator(3, "halves", 8).standard_normal((2, 2, 5), dtype=np.float32)
    assert np.array_equal([noise.randn((2, 5))[1].numpy() for _ in range(2)], expected)


DIGESTS = {1: "5b48c4d5a0b81d6d", 2: "5f18c1a31e9a4294"}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_never_changes(stream):
    """A new way of drawing is a new stream: what was begun under an old one has to go on to the byte."""
    drawn = SampleNoise(5, [0, 123_456], stream=stream).randn((2, 3)).double().numpy()
    # torch rounds the last bits by the processor.
    assert hashlib.sha256(np.round(drawn * 1000).astype(np.int64).tobytes()).hexdigest()[:16] == DIGESTS[stream]
    assert max(STREAMS) == STREAM


def test_a_run_under_a_stream_of_a_later_version_is_refused_naming_its_file():
    assert recorded_stream({}, Path("state.pt")) == 1 and recorded_stream({"stream": 2}, Path("state.pt")) == 2
    with pytest.raises(ValueError, match=r"^state000002\.pt: .* stream 3 .* this code has 1, 2; go on with"):
        recorded_stream({"stream": 3}, Path("state000002.pt"))


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_is_standard_normal(stream):
    drawn = SampleNoise(0, range(50), stream=stream).randn((4, 32, 32))
    assert abs(drawn.mean().item()) < 0.01 and abs(drawn.std().item() - 1) < 0.01
    assert abs((drawn.abs() < 1.0).double().mean().item() - 0.6827) < 0.005


def test_training_draws_depend_on_seed_epoch_and_index_alone():
    draws = training_draws(SPEC, seed=0, epoch=2, index=5)
    again = training_draws(SPEC, seed=0, epoch=2, index=5)
    for name, value in draws.items():
        np.testing.assert_array_equal(value, again[name])
        for other in (training_draws(SPEC, 1, 2, 5), training_draws(SPEC, 0, 3, 5), training_draws(SPEC, 0, 2, 6)):
            assert not np.array_equal(value, other[name]), name


def test_the_two_views_and_the_posterior_have_noise_of_their_own():
    draws = training_draws(SPEC, 0, 0, 0)
    assert not np.array_equal(draws["noise"], draws["m_noise"])
    assert not np.array_equal(draws["noise"], draws["posterior"])
    assert draws["label_noise"] != draws["m_label_noise"]


def test_a_deterministic_first_stage_changes_no_other_draw():
    with_posterior = training_draws(SPEC, 0, 0, 0)
    without = training_draws(DrawSpec((4, 8, 8), 16, posterior=False), 0, 0, 0)
    assert "posterior" not in without
    for name, value in without.items():
        np.testing.assert_array_equal(value, with_posterior[name])


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    together, alone = SampleNoise(7, [3, 4, 5]), SampleNoise(7, [4])
    x = torch.zeros(3, 2, 2)
    for _ in range(3):
        assert torch.equal(together.randn_like(x)[1:2], alone.randn_like(x[:1]))


def test_seeding_the_global_generator_leaves_those_of_gpus_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with global_generator(1, "init"):
        inside = torch.rand(3)
    assert not seeded
    torch.manual_seed(int.from_bytes(key_bytes(1, "init")[:8], "big"))
    assert torch.equal(inside, torch.rand(3))
