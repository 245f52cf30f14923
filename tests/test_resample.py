import zlib

import numpy as np
import pytest
import torch
from golden_arrays import SEED, golden_npz

from masked_diffusion import create_diffusion
from masked_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler


def test_loss_second_moment_weights_equal_the_golden():
    sampler = LossSecondMomentResampler(create_diffusion("20"), history_per_term=10)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{SEED}:lsm".encode())))
    for expected in golden_npz("loss_second_moment.npz")["weights"]:
        ts, losses = generator.integers(0, 20, 4), generator.random(4) * 3
        sampler.update_with_all_losses(ts, losses)
        np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-9)


def skewed_sampler():
    sampler = LossSecondMomentResampler(create_diffusion("4"), history_per_term=2)
    sampler.update_with_all_losses([0, 1, 2, 3] * 2, [1.0, 2.0, 3.0, 4.0] * 2)
    return sampler


def test_importance_weights_keep_the_mean_unbiased():
    sampler = skewed_sampler()
    t, weights = sampler.from_uniform((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, "cpu")
    values = torch.tensor([1.0, -2.0, 5.0, 3.0])
    assert (weights * values[t]).mean().item() == pytest.approx(values.mean().item(), abs=1e-3)
    frequencies = t.bincount(minlength=4) / len(t)
    np.testing.assert_allclose(frequencies, sampler.weights() / sampler.weights().sum(), atol=1e-4)


def test_sample_draws_from_the_global_generator():
    sampler = UniformSampler(create_diffusion(""))
    torch.manual_seed(1)
    t, weights = sampler.sample(10_000, "cpu")
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(10_000, "cpu")[0], t)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999 and 480 < t.float().mean() < 520
    assert (weights == 1).all()


def test_the_largest_uniform_below_one_is_the_last_timestep():
    u = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert UniformSampler(create_diffusion("")).from_uniform(u, "cpu")[0].tolist() == [0, 999]


def test_history_survives_saving():
    sampler, other = skewed_sampler(), LossSecondMomentResampler(create_diffusion("4"), history_per_term=2)
    other.load_state_dict(sampler.state_dict())
    sampler.update_with_all_losses([1], [9.0])
    other.update_with_all_losses([1], [9.0])
    np.testing.assert_array_equal(sampler.weights(), other.weights())


def test_the_state_of_another_sampler_is_refused():
    uniform = UniformSampler(create_diffusion("4"))
    with pytest.raises(ValueError, match="schedule_sampler"):
        uniform.load_state_dict(skewed_sampler().state_dict())
    with pytest.raises(ValueError, match="schedule_sampler"):
        skewed_sampler().load_state_dict(uniform.state_dict())


def test_an_unknown_sampler_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="choose one of uniform, loss-second-moment"):
        create_named_schedule_sampler("importance", create_diffusion("4"))


def test_a_loss_that_is_not_finite_teaches_nothing():
    sampler = skewed_sampler()
    before = sampler.weights().copy()
    sampler.update_with_all_losses([0, 1, 2], [float("nan"), float("inf"), 3.0])
    np.testing.assert_allclose(sampler.weights(), before)
