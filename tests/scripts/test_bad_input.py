"""Bad input: one sentence that names the file or flag and the remedy, exit status 2, before any work."""

import argparse
import json
import pickle

import pytest
import torch
from support import TINY_DIGITS, call, few_steps

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Run a script that must refuse. Returns the sentence."""

    def run(script, *arguments, folder=None):
        folder = folder or tmp_path / "out"
        assert call(monkeypatch, script, folder, *arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if "error: " in line]
        assert len(errors) == 1 and lines[-1] == errors[0], lines
        assert not list(folder.glob("model*.pt")) and not list(folder.glob("samples*"))
        return errors[0].split("error: ", 1)[1]

    return run


@pytest.mark.usefixtures("no_home")
def test_a_tilde_without_a_home_is_refused_and_all_else_works(refused, tmp_path, monkeypatch, colour_folder):
    assert "home directory" in refused(TRAIN, *TINY_DIGITS, "--init_from", "~/model.pt")
    # As torchrun's ranks do, the training lists the folder and looks for a kept list.
    flags = [*TINY_DIGITS, "--data_dir", str(colour_folder), "--max_steps", "1"]
    assert call(monkeypatch, TRAIN, tmp_path / "run", *flags) == 0


@pytest.fixture
def trained(monkeypatch, tmp_path):
    folder = tmp_path / "trained"
    assert call(monkeypatch, TRAIN, folder, *TINY_DIGITS, "--max_steps", "1") == 0
    return folder / "ema_0.9999_000001.pt"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data_dir", "no/such/folder"], "no/such/folder"),
        (["--data_dir", ""], "--data_dir"),
        (["--data_dir", "builtin:letters"], "builtin:digits"),
        (["--model", "MDT_S2"], "--model MDT_S2: unknown; choose one of MDT_XL_2"),
        (["--decode_layer", "0"], "--decode_layer 0: must be in 1 ... 3"),
        (["--decode_layer", "4"], "--decode_layer 4: must be in 1 ... 3"),
        (["--mask_ratio", "1"], "--mask_ratio 1.0: must be in [0, 1)"),
        (["--mask_ratio", "-0.5"], "--mask_ratio -0.5: must be in [0, 1)"),
        (["--mask_ratio", "0.99"], "--mask_ratio 0.99: keeps none of the 16 tokens"),
        (["--image_size", "9"], "--image_size 9 --model MDT_Ti_2"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--microbatch", "0"], "--microbatch 0"),
        (["--max_bad_share", "2"], "--max_bad_share 2.0: must be in [0, 1]"),
        (["--lr", "0"], "--lr 0.0: must be positive"),
        (["--adam_beta2", "1"], "--adam_beta2 1.0: must be in [0, 1), such as 0.99"),
        (["--ema_rate", "0.9,1.5"], "--ema_rate 0.9,1.5: expected numbers in [0, 1)"),
        (["--ema_rate", "none"], "--ema_rate none: without --ema_power there would be no average"),
        (["--ema_power", "0.1,long"], "--ema_power 0.1,long: expected numbers in (0, 0.28]"),
        (["--ema_power", "0.29"], "--ema_power 0.29: expected numbers in (0, 0.28]"),
        (["--ema_snapshot_interval", "0"], "--ema_snapshot_interval 0: must be at least 1"),
        (["--preview_guide_from", "best"], "--preview_guide_from best: unknown; choose one of null_label"),
        (["--eval_guide_from", "best"], "--eval_guide_from best: unknown; choose one of null_label"),
        (["--preview_samples", "2", "--preview_guide_from", "path_drop"], "--preview_guide_from path_drop: this model"),
        (["--guide_path", "weak.pt"], "--guide_path and --preview_guide_from checkpoint or --eval_guide_from"),
        (["--preview_guide_from", "checkpoint"], "--guide_path and --preview_guide_from checkpoint or"),
        (
            ["--guide_ratio", "0.5"],
            "--guide_ratio 0.5: needs --preview_guide_from or --eval_guide_from masked or routed",
        ),
        (["--guide_labels", "null"], "--guide_labels null: needs --preview_guide_from or --eval_guide_from checkpoint"),
        (["--eval_guide_from", "masked", "--guide_strong_ratio", "0.1"], "--guide_strong_ratio 0.1: needs --preview_"),
        (["--eval_guide_from", "routed", "--guide_strong_ratio", "-1"], "--guide_strong_ratio -1.0: must be in [0, 1)"),
        (["--preview_cfg_scale", "-1"], "--preview_cfg_scale -1.0: must be 0 or more"),
        (["--guidance", "cosine"], "--guidance cosine: unknown; choose one of power_cosine"),
        (["--guidance", "interval"], "--guidance interval: give the timesteps to guide at"),
        (
            ["--preview_samples", "2", "--guidance", "interval", "--cfg_interval", "0-1000"],
            "--cfg_interval 0-1000: timesteps are 0 ... 999",
        ),
        (
            ["--preview_samples", "2", "--preview_guide_from", "checkpoint", "--guide_path", "weak.pt"],
            "--guide_path weak.pt: no such file; give the checkpoint of the weaker model",
        ),
        (["--num_classes", "9"], "--num_classes 9: the data has 10"),
        (["--device", "cuda"], "no CUDA device"),
        (["--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["--vae_path", "./no_vae"], "--vae_path ./no_vae: not a folder with a diffusers AutoencoderKL"),
        (["--objective", "best"], "--objective best: unknown; choose one of ddpm"),
        (["--schedule_sampler", "best"], "choose one of uniform, loss-second-moment"),
        (["--noise_schedule", "best"], "--noise_schedule best: unknown"),
        (["--timestep_respacing", "1001"], "cannot take 1001 timesteps"),
        (["--resume_checkpoint", "none/model000001.pt"], "none/model000001.pt: no such file"),
        (["--init_from", "none.pt"], "--init_from none.pt: no such file"),
        (["--use_fp16", "True", "--use_bf16", "True"], "choose one"),
        (["--num_workers", "-2"], "--num_workers -2"),
        (["--rank", "3", "--world_size", "2"], "--rank 3 --world_size 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_refuses(refused, flags, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in refused(TRAIN, *TINY_DIGITS, *flags)


def test_training_refuses_an_unknown_log_format(refused, monkeypatch):
    from support import script

    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv,xml")
    monkeypatch.setenv("OPENAI_LOGDIR", "unused")
    assert script(TRAIN).main(TINY_DIGITS) == 2


def test_training_refuses_an_empty_folder_and_one_of_links_in_a_circle(refused, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert "no images" in refused(TRAIN, *TINY_DIGITS, "--data_dir", data)
    (data / "loop").symlink_to(data, target_is_directory=True)
    assert "no images" in refused(TRAIN, *TINY_DIGITS, "--data_dir", data)


def test_training_refuses_a_first_batch_of_truncated_images_and_names_one(refused, tmp_path, colour_folder):
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        path = data / f"a_{i}.jpg"
        Image.effect_noise((64, 64), 50).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:300])
    assert "a_" in refused(TRAIN, *TINY_DIGITS, "--data_dir", data)


def test_training_refuses_images_without_a_class(refused, tmp_path):
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "picture.png")
    sentence = refused(TRAIN, *TINY_DIGITS, "--data_dir", data)
    assert "--class_from" in sentence and "--class_cond False" in sentence


def test_training_refuses_a_folder_it_may_not_write_to(refused, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "OPENAI_LOGDIR" in refused(TRAIN, *TINY_DIGITS, folder=blocker / "run")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--image_size", "12"], "--image_size 8, this one 12"),
        (["--learn_sigma", "False"], "--learn_sigma True, this one False"),
        (["--diffusion_steps", "500"], "--diffusion_steps 1000, this one 500"),
        (["--decode_layer", "1"], "--decode_layer 2, this one 1"),
        (["--resume_checkpoint", ""], "--overwrite True"),
    ],
)
def test_a_resumed_run_must_not_silently_become_another(monkeypatch, trained, capsys, flags, sentence):
    assert call(monkeypatch, TRAIN, trained.parent, *TINY_DIGITS, "--max_steps", "9", *flags) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("source", ["--resume_checkpoint", "--init_from"])
def test_a_run_from_elsewhere_does_not_describe_the_weights_of_another(monkeypatch, trained, tmp_path, capsys, source):
    """The folder holds an incomplete checkpoint of another decoder."""
    model = next(trained.parent.glob("model*.pt"))
    content = trained.with_name("config.json").read_text().replace('"decode_layer": 2', '"decode_layer": 1')
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model000007.pt").write_bytes(b"")
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, source, model) == 2
    sentence = f"OPENAI_LOGDIR {tmp_path}: model000007.pt is of a run with --decode_layer 1, this one 2; "
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == content


def test_weights_of_grey_images_start_a_training_on_colour_images_which_says_so(
    monkeypatch, trained, colour_folder, tmp_path, capsys
):
    flags = ["--data_dir", colour_folder, "--init_from", next(trained.parent.glob("model*.pt")), "--max_steps", 1]
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *flags, sinks="log") == 0
    said = (tmp_path / "log.txt").read_text()
    assert "of grey images (1 channel), the training is of colour images (3 channels): its input and output" in said
    back = ["--grey", "True", "--data_dir", colour_folder, "--init_from", tmp_path / "model000001.pt", "--max_steps", 1]
    assert call(monkeypatch, TRAIN, tmp_path / "grey", *TINY_DIGITS, *back, sinks="log") == 0
    assert "input and output channels are averaged" in (tmp_path / "grey" / "log.txt").read_text()
    assert json.loads((tmp_path / "grey" / "config.json").read_text())["model"]["in_channels"] == 1


def test_grey_images_are_for_pixel_space(refused, colour_folder, tiny_vae):
    flags = [*TINY_DIGITS, "--grey", "True", "--data_dir", colour_folder]
    assert f"--grey True: the autoencoder of --vae_path {tiny_vae} reads colour" in refused(
        TRAIN, *flags, "--vae_path", tiny_vae, "--image_size", 16
    )


def test_training_refuses_a_folder_with_the_configuration_of_another_program(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "not a configuration of this code" in refused(TRAIN, *TINY_DIGITS, folder=tmp_path)
    assert "AutoencoderKL" in (tmp_path / "config.json").read_text()


def sample_flags(path, *flags):
    return ["--model_path", path, "--num_samples", "2", *few_steps(2), *flags]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model_path", ""], "--model_path: give the checkpoint"),
        (["--model_path", "none.pt"], "none.pt: no such file"),
        (["--model", "MDT_S_2"], "--model MDT_S_2"),
        (["--image_size", "16"], "--image_size 16"),
        (["--decode_layer", "1"], "--decode_layer 1"),
        (["--num_classes", "11"], "--num_classes 11"),
        (["--learn_sigma", "False"], "--learn_sigma False"),
        (["--diffusion_steps", "100"], "--diffusion_steps 100"),
        (["--labels", "3,10"], "--labels 10: no class of this name; here numbers are names"),
        (["--labels", "ten"], "--labels ten: no class of this name"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--num_sampling_steps", "1001"], "--num_sampling_steps 1001"),
        (["--cfg_cond", "True", "--class_cond", "False"], "--cfg_cond True: guidance needs classes"),
        (["--vae_decoder", "best"], "--vae_decoder best"),
        (["--sampler", "rk4"], "--sampler rk4: unknown; choose one of ddpm"),
        (["--sampler", "unipc", "--use_ddim", "True"], "--sampler unipc and --use_ddim True contradict each other"),
        (["--sampler", "ddim", "--use_ddim", "False"], "--sampler ddim and --use_ddim False contradict each other"),
        (["--guidance", "cosine"], "--guidance cosine: unknown"),
        (["--guide_from", "noise"], "--guide_from noise: unknown; choose one of null_label"),
        (["--guidance", "interval"], "--guidance interval: give the timesteps"),
        (["--cfg_channels", "5"], "--cfg_channels 5: choose 3"),
        (["--cfg_skip_tol", "-1"], "--cfg_skip_tol -1.0: must be 0 or more"),
        (["--cfg_cond", "True", "--guidance", "interval", "--cfg_interval", "0-1000"], "timesteps are 0 ... 999"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sampling_refuses(refused, trained, flags, sentence):
    assert sentence in refused(SAMPLE, *sample_flags(trained), *flags)


def test_sampling_refuses_files_that_are_no_checkpoint_of_this_model(refused, trained):
    state = torch.load(trained, weights_only=True)
    folder = trained.parent

    def damaged(name, content):
        torch.save(content, folder / name)
        return refused(SAMPLE, *sample_flags(folder / name))

    missing = {name: value for name, value in state.items() if name != "mask_token"}
    assert "1 names are missing, such as mask_token" in damaged("missing.pt", missing)
    assert "1 names are not this model's, such as extra" in damaged("extra.pt", {**state, "extra": torch.zeros(1)})
    other = {**state, "pos_embed": torch.zeros(1, 4, 128)}
    assert "2 x 2 tokens, this model has 4 x 4; give the --image_size" in damaged("resolution.pt", other)
    other = {**state, "mask_token": torch.zeros(1, 1, 64)}
    assert "mask_token (1, 1, 64) instead of (1, 1, 128)" in damaged("other.pt", other)
    assert "not a model's state dict" in damaged("list.pt", [1, 2])
    assert "run code" in damaged("pickled.pt", {"ema": state, "args": argparse.Action(["--x"], "x")})


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.marker,)


def test_pickled_code_is_never_run(refused, tmp_path, trained):
    marker = tmp_path / "code_was_run"
    path = tmp_path / "evil.pt"
    torch.save({"pos_embed": Malicious(marker)}, path)
    assert "run code" in refused(SAMPLE, *sample_flags(path))
    path.write_bytes(pickle.dumps({"pos_embed": Malicious(marker)}))
    refused(SAMPLE, *sample_flags(path))
    assert not marker.exists()


def test_an_lfs_pointer_and_a_torn_file_are_told_apart(refused, trained):
    pointer = trained.parent / "pointer.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(SAMPLE, *sample_flags(pointer))
    pointer.write_bytes(trained.read_bytes()[:1000])
    assert "cut off" in refused(SAMPLE, *sample_flags(pointer))


@pytest.mark.parametrize(
    "flags, warning",
    [
        (["--cfg_scale", "2"], "--cfg_scale is ignored without --cfg_cond True"),
        (["--timestep_respacing", "10"], "--timestep_respacing is ignored"),
        (["--mask_ratio", "0.3"], "--mask_ratio is ignored"),
        (["--vae_decoder", "mse"], "--vae_decoder mse is ignored"),
        (["--class_cond", "False", "--labels", "3"], "--labels is ignored"),
        (["--device", "cpu", "--tf32", "False"], "--tf32 is ignored on a CPU"),
        (["--guidance", "constant"], "--guidance is ignored without --cfg_cond True"),
        (["--guide_from", "null_label"], "--guide_from is ignored without --cfg_cond True"),
        (["--cfg_skip_tol", "0.01"], "--cfg_skip_tol is ignored without --cfg_cond True"),
        (
            ["--cfg_cond", "True", "--guidance", "constant", "--scale_pow", "2"],
            "--scale_pow is ignored with --guidance",
        ),
        (["--cfg_cond", "True", "--cfg_interval", "1-2"], "--cfg_interval is ignored with --guidance power_cosine"),
        (["--cfg_cond", "True", "--cfg_channels", "4"], "--cfg_channels is ignored: the latents have 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_without_effect_warns(monkeypatch, tmp_path, trained, capsys, flags, warning):
    assert call(monkeypatch, SAMPLE, tmp_path / "out", *sample_flags(trained), *flags) == 0
    assert f"warning: {warning}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["470", "470-80", "-80", "a-b", "80,470", "0.7-0.1", "nan-1", "0.1-", "1e2-3"])
def test_an_interval_that_is_none_is_refused(monkeypatch, tmp_path, trained, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, SAMPLE, tmp_path / "out", *sample_flags(trained), f"--cfg_interval={text}")
    assert "expected two timesteps or two shares of noise" in capsys.readouterr().err
