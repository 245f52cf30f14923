import numpy as np
import pytest
import torch
from golden_arrays import SEED, assert_golden, golden_json, golden_npz, named_array, set_golden_weights

from masked_diffusion import create_diffusion
from masked_diffusion.models import MDT, MODELS, KeptTokens, create_model, sincos_position_table

INFO = golden_json("model_v1.json")
CONFIG = INFO["config"]
GOLDEN = golden_npz("model_v1.npz")


def tensor(name):
    return torch.from_numpy(GOLDEN[name])


def golden_model(mask_ratio=0.3, **kwargs):
    return set_golden_weights(MDT(**CONFIG, mask_ratio=mask_ratio, **kwargs))


@pytest.fixture
def model():
    return golden_model().eval()


def test_state_dict_has_the_published_names_shapes_and_order():
    state = MDT(**CONFIG, mask_ratio=0.3).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == INFO["state_dict"]
    assert list(state) == list(INFO["state_dict"])


def test_forward_equals_the_golden(model):
    assert_golden(model(tensor("x"), tensor("t"), tensor("y")), GOLDEN["eval_forward"])


def test_forward_of_the_null_class_equals_the_golden(model):
    null = torch.full_like(tensor("y"), CONFIG["num_classes"])
    assert_golden(model(tensor("x"), tensor("t"), null), GOLDEN["eval_forward_null_class"])


def test_masked_forward_in_eval_mode_equals_the_golden(model):
    torch.manual_seed(SEED)
    assert_golden(model(tensor("x"), tensor("t"), tensor("y"), enable_mask=True), GOLDEN["masked_forward_eval"])


@pytest.mark.parametrize("suffix", ["", "_32"])
@pytest.mark.parametrize("enable_mask", [False, True])
def test_forward_in_train_mode_drops_labels_as_the_golden(suffix, enable_mask):
    inputs = [tensor(name + suffix.replace("_", "")) for name in ("x", "t", "y")]
    model = golden_model().train()
    torch.manual_seed(SEED)
    out = model(*inputs, enable_mask=enable_mask)
    assert_golden(out, GOLDEN[("masked_forward_train" if enable_mask else "train_forward") + suffix])


@pytest.mark.parametrize("cfg_scale, scale_pow", [(3.8, 4.0), (1.0, 4.0), (4.0, 0.01), (1.5, 1.0)])
def test_guided_forward_equals_the_golden(model, cfg_scale, scale_pow):
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    null = torch.full_like(y, CONFIG["num_classes"])
    out = model.forward_with_cfg(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), cfg_scale=cfg_scale, scale_pow=scale_pow
    )
    assert_golden(out, GOLDEN[f"cfg_{cfg_scale}_{scale_pow}"])


def test_forward_with_cfg_without_a_scale_is_a_plain_forward(model):
    assert_golden(model.forward_with_cfg(tensor("x"), tensor("t"), tensor("y")), GOLDEN["cfg_none"])


def test_guided_forward_reads_only_the_first_half_of_the_latents(model):
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    labels = torch.cat([y, torch.full_like(y, CONFIG["num_classes"])])
    first = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, cfg_scale=3.8)
    assert torch.equal(model.forward_with_cfg(torch.cat([x, 7 - x]), torch.cat([t, t]), labels, cfg_scale=3.8), first)


def test_losses_and_gradient_norms_equal_the_golden(model):
    diffusion = create_diffusion("")
    kwargs = {"y": tensor("y")}
    torch.manual_seed(SEED)
    full = diffusion.training_losses(model, tensor("x"), tensor("tl"), kwargs, noise=tensor("noise"))
    masked = diffusion.training_losses(
        model, tensor("x"), tensor("tl"), {**kwargs, "enable_mask": True}, noise=tensor("noise2")
    )
    for name in ("loss", "mse", "vb"):
        assert_golden(full[name], GOLDEN[f"loss_{name}"])
        assert_golden(masked[name], GOLDEN[f"mloss_{name}"])
    (full["loss"].mean() + masked["loss"].mean()).backward()
    gradients = dict(model.named_parameters())
    assert sorted(gradients) == INFO["parameters_sorted"]
    assert_golden(torch.stack([gradients[name].grad.norm() for name in sorted(gradients)]), GOLDEN["grad_norms"])


@pytest.mark.parametrize(
    "name, respacing, eta", [("ddpm50", "50", None), ("ddpm250", "250", None), ("ddim25", "ddim25", 0.0),
                             ("ddim10_eta", "10", 0.7)]
)  # fmt: skip
def test_guided_sampling_loops_equal_the_goldens_over_their_whole_length(name, respacing, eta):
    model = golden_model(mask_ratio=None).eval()
    z = torch.from_numpy(named_array("z", (4, 4, CONFIG["input_size"], CONFIG["input_size"])))
    y = torch.cat([tensor("y"), torch.full_like(tensor("y"), CONFIG["num_classes"])])
    kwargs = {"y": y, "cfg_scale": 3.8, "scale_pow": 4.0, "diffusion_steps": 1000}
    diffusion = create_diffusion(respacing)
    torch.manual_seed(SEED)
    arguments = (model.forward_with_cfg, (8, *z.shape[1:]), torch.cat([z, z]))
    if eta is None:
        sample = diffusion.p_sample_loop(*arguments, clip_denoised=False, model_kwargs=kwargs)
    else:
        sample = diffusion.ddim_sample_loop(*arguments, clip_denoised=False, model_kwargs=kwargs, eta=eta)
    expected = GOLDEN[f"sample_{name}"]
    assert_golden(sample[:4], expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_a_fresh_model_is_initialised_as_published():
    expected = golden_json("init.json")["MDT_S_2(mask_ratio=0.3, decode_layer=2)"]
    model = create_model("MDT_S_2", mask_ratio=0.3, decode_layer=2)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["total_parameters"]
    assert set(parameters) == set(expected["parameters"])
    table = torch.from_numpy(sincos_position_table(384, 16)).float()
    for name, published in expected["parameters"].items():
        value = parameters[name].detach()
        if published == "zeros":
            assert not value.any(), name
        elif published == "sincos":
            assert torch.equal(value[0], table), name
        else:
            tolerance = 0.05 if published["n"] > 10_000 else 0.2
            assert value.numel() == published["n"], name
            assert value.std().item() == pytest.approx(published["std"], rel=tolerance), name
            is_uniform = published["absmax"] < 1.9 * published["std"]
            if is_uniform:
                assert value.abs().max().item() == pytest.approx(3**0.5 * published["std"], rel=tolerance), name
            else:
                assert value.abs().max().item() > 2 * published["std"], name


def test_position_table_equals_the_golden():
    for name, table in golden_npz("sincos.npz").items():
        width, grid_size = map(int, name.split("x"))
        np.testing.assert_allclose(sincos_position_table(width, grid_size), table, atol=1e-12)


def test_every_trained_parameter_gets_a_gradient_from_the_pass_that_ends_a_step():
    for mask_ratio in (0.3, None):
        model = golden_model(mask_ratio).train()
        model(tensor("x"), tensor("t"), tensor("y"), enable_mask=mask_ratio is not None).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_without_a_mask_ratio_the_side_interpolater_is_frozen_and_its_token_zero():
    model = MDT(**CONFIG)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("sideblocks.")} | {"mask_token"}
    assert not model.mask_token.any()
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    model = golden_model(None).eval()
    assert torch.equal(model(x, t, y, enable_mask=True), model(x, t, y))


def test_kept_tokens_come_back_to_where_they_were_and_masked_positions_get_the_filler():
    x = torch.randn(3, 10, 4)
    kept = KeptTokens.from_noise(torch.rand(3, 10), num_keep=6)
    restored = kept.come_back(kept.leave(x), torch.full((1, 1, 4), 7.0))
    assert kept.dropped.sum(dim=1).tolist() == [4, 4, 4]
    assert torch.equal(restored[~kept.dropped], x[~kept.dropped])
    assert (restored[kept.dropped] == 7).all()


def test_the_tokens_with_the_smallest_noise_are_kept():
    kept = KeptTokens.from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), num_keep=2)
    assert kept.dropped.tolist() == [[True, False, True, False]]


def test_side_interpolater_changes_masked_positions_only(model):
    N, L, D = 4, 16, CONFIG["hidden_size"]
    kept = KeptTokens.from_noise(torch.rand(N, L), num_keep=11)
    x, c = torch.randn(N, 11, D), torch.randn(N, D)
    before = kept.come_back(x, model.mask_token) + model.decoder_pos_embed
    after = model.side_interpolate(x, c, kept)
    assert torch.equal(after[~kept.dropped], before[~kept.dropped])
    assert (after[kept.dropped] != before[kept.dropped]).any(dim=1).all()


def test_masking_nothing_encodes_as_without_a_mask():
    model = golden_model(mask_ratio=0.0).eval()
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    torch.testing.assert_close(model(x, t, y, enable_mask=True), model(x, t, y), rtol=1e-4, atol=1e-4)


def test_draws_that_are_passed_in_are_the_ones_used():
    model = golden_model().train()
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    torch.manual_seed(5)
    label_noise, token_noise = torch.rand(4), torch.rand(4, 16)
    torch.manual_seed(5)
    drawn = model(x, t, y, enable_mask=True)
    assert torch.equal(model(x, t, y, enable_mask=True, label_noise=label_noise, token_noise=token_noise), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(model, dtype):
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, y, enable_mask=True, token_noise=torch.rand(4, 16))
    assert out.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, y)
    assert (out.float() - model(x, t, y)).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_every_builder_has_the_shape_its_name_says(name):
    patch_size = int(name[-1])
    with torch.device("meta"):
        model = MODELS[name](input_size=16, learn_sigma=False)
    assert model.patch_size == patch_size
    assert model.num_tokens == (16 // patch_size) ** 2
    assert model.out_channels == 4


def test_the_smallest_model_runs_on_one_token_one_class_and_a_batch_of_one():
    kwargs = {"input_size": 2, "in_channels": 1, "hidden_size": 4, "depth": 2, "num_heads": 1, "num_classes": 1}
    model = MDT(**kwargs, decode_layer=1, mask_ratio=0.0)
    assert model(torch.randn(1, 1, 2, 2), torch.tensor([3]), torch.tensor([0]), enable_mask=True).shape == (1, 2, 2, 2)


def test_decode_layer_none_means_two():
    kwargs = CONFIG | {"decode_layer": None}
    assert MDT(**kwargs).decode_layer == 2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"decode_layer": 0}, "decode_layer 0: must be in 1 ... 5"),
        ({"decode_layer": 6}, "decode_layer 6: must be in 1 ... 5"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0: must be in"),
        ({"mask_ratio": -0.1}, "mask_ratio -0.1: must be in"),
        ({"mask_ratio": 0.99}, "keeps none of the 16 tokens"),
        ({"input_size": 9}, "input_size 9: must be a multiple of patch_size 2"),
        ({"hidden_size": 50}, "multiple of"),
        ({"num_heads": 5}, "multiple of num_heads 5"),
    ],
)
def test_impossible_shapes_are_refused_with_the_value_and_the_rule(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MDT(**CONFIG | kwargs)


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="MDT_S2: unknown; choose one of MDT_XL_2, .*MDT_S_2"):
        create_model("MDT_S2")


def test_a_model_without_a_null_class_refuses_guidance():
    model = MDT(**CONFIG, class_dropout_prob=0.0)
    assert not model.has_null_class
    with pytest.raises(ValueError, match="no null class"):
        model.forward_with_cfg(tensor("x"), tensor("t"), tensor("y"), cfg_scale=2.0)


@pytest.mark.parametrize("shape", [(16, 16), (3, 11, 11)])
def test_the_attention_bias_has_the_layout_that_fused_kernels_ask_for(model, shape):
    index = torch.randint(0, 49, shape, dtype=torch.int32)
    bias = model.blocks[0].attn.rel_pos_bias(index)
    assert bias.shape == (1 if len(shape) == 2 else 3, CONFIG["num_heads"], *shape[-2:]) and bias.is_contiguous()
    table = model.blocks[0].attn.rel_pos_bias.relative_position_bias_table
    assert torch.equal(bias[-1, :, 2, 5], table[index[..., 2, 5].reshape(-1)[-1]])
