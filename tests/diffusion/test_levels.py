"""The laws of continuous levels, and the weights that are learned beside them."""

import numpy as np
import pytest
import torch

from masked_diffusion.diffusion.levels import InverseLaw, Uncertainty, normal_quantile


def sigma_of(u):
    return (-1.2 + 1.2 * normal_quantile(u)).exp().float()


def mean_loss(levels):
    return 0.2 + 3 * levels / (1 + levels)


def learned(steps=400, seed=0):
    """An uncertainty after so many steps of 32 noisy losses."""
    law, rng = Uncertainty(sigma_of), np.random.default_rng(seed)
    for _ in range(steps):
        levels, _ = law.from_uniform(torch.from_numpy(rng.random(32)), "cpu")
        losses = mean_loss(levels.double()).numpy() * rng.gamma(4, 1 / 4, 32)
        law.update_with_all_losses(levels.tolist(), losses.tolist())
    return law


def test_the_weight_is_one_over_the_mean_loss_of_the_level():
    law = learned()
    levels, weights = law.from_uniform((torch.arange(64, dtype=torch.float64) + 0.5) / 64, "cpu")
    weighted = weights * mean_loss(levels)
    assert weights.dtype == torch.float32 and weights.max() > 3 * weights.min()
    assert (weighted - 1).abs().mean() < 0.05 and (weighted - 1).abs().max() < 0.25
    assert torch.equal(levels, InverseLaw(sigma_of).from_uniform((torch.arange(64).double() + 0.5) / 64, "cpu")[0])


def test_before_any_loss_and_after_one_that_is_not_finite_the_weight_is_1():
    law, u = Uncertainty(sigma_of), torch.rand(100, dtype=torch.float64)
    levels, _ = law.from_uniform(u, "cpu")
    law.update_with_all_losses(levels.tolist(), [float("nan"), float("inf")] * 50)
    assert torch.equal(law.from_uniform(u, "cpu")[1], torch.ones(100))
    law.update_with_all_losses(levels.tolist(), [0.0] * 100)
    assert law.from_uniform(u, "cpu")[1].isfinite().all()


def test_each_level_teaches_the_bin_that_it_was_drawn_from():
    law = Uncertainty(sigma_of)
    u = (torch.arange(64, dtype=torch.float64)) / 64  # where one bin begins
    levels, _ = law.from_uniform(u, "cpu")
    law.update_with_all_losses(levels.tolist(), [float(i + 1) for i in range(64)])
    torch.testing.assert_close(law.from_uniform(u, "cpu")[1], 1 / torch.arange(1, 65).float())


def test_the_state_goes_on_and_of_another_kind_is_refused():
    law, other = learned(20), Uncertainty(sigma_of)
    other.load_state_dict(law.state_dict())
    u = torch.rand(50, dtype=torch.float64)
    for one in (law, other):
        one.update_with_all_losses(one.from_uniform(u, "cpu")[0].tolist(), [2.0] * 50)
    assert torch.equal(law.from_uniform(u, "cpu")[1], other.from_uniform(u, "cpu")[1])
    with pytest.raises(ValueError, match="was trained without --learned_uncertainty True; go on without it"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="was trained with --learned_uncertainty True; go on with it"):
        InverseLaw(sigma_of).load_state_dict(law.state_dict())
