"""The commands that the shell scripts start, by a ``python`` that only says what it is asked for."""

import re
import shutil
import stat

import pytest
from support import REPO, environment, run_command

TRAINING = {
    "MDT_S_2": "--model MDT_S_2 --image_size 256 --decode_layer 2 --diffusion_steps 1000 --mask_ratio 0.30",
    "MDTv2_S_2": "--model MDTv2_S_2 --image_size 256 --decode_layer 6 --diffusion_steps 1000 --lr 5e-4 "
    "--mask_ratio 0.30",
    "MDTv2_XL_2": "--model MDTv2_XL_2 --image_size 256 --decode_layer 4 --diffusion_steps 1000 --mask_ratio 0.30",
    "MDT_XL_2": "--model MDT_XL_2 --image_size 256 --decode_layer 2 --diffusion_steps 1000 --mask_ratio 0.30",
    "DiT_XL_2": "--model DiT_XL_2 --image_size 256 --diffusion_steps 1000",
    "SiT_XL_2": "--model SiT_XL_2 --image_size 256 --diffusion_steps 1000",
}


@pytest.fixture
def start(tmp_path):
    """Run a script, or a command line, with a ``python`` that prints what it was asked for and with which variables."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nprintf "ASKED %s LOG %s\\n" "$*" "$OPENAI_LOGDIR"\n'
        'printf "WITH %s %s\\n" "$OMP_NUM_THREADS" "$OPENAI_LOG_FORMAT"\n'
    )
    python.chmod(stat.S_IRWXU)

    def run(*command, **variables):
        env = environment("", **{"VIRTUAL_ENV": "active", **variables})
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        done = run_command(["bash", *map(str, command)], env)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def asked_for(start):
    """Run a script. Returns the command lines that it would start python with, of all or of some programs."""

    def run(script, *arguments, programs="scripts/image_", **variables):
        printed = start(REPO / script, *arguments, **variables).stdout
        return [line for line in re.findall(r"^ASKED (.*)$", printed, re.MULTILINE) if programs in line]

    return run


@pytest.mark.parametrize("model, folder", [("MDT_S_2", "output_mdt_s2"), ("MDTv2_S_2", "output_mdtv2_s2")])
def test_run_sh_trains_with_the_published_settings(asked_for, model, folder):
    [line] = asked_for("run.sh", MODEL=model, DATA_PATH="bucket:images")
    assert f"image_train.py --data_dir bucket:images {TRAINING[model]} --batch_size 32 LOG {folder}" in line
    assert "--nproc_per_node=8" in line


@pytest.mark.parametrize(
    "model, nodes, batch, folder",
    [
        ("MDT_XL_2", 8, 4, "output_mdt_xl2"),
        ("MDTv2_XL_2", 4, 8, "output_mdtv2_xl2"),
        ("DiT_XL_2", 8, 4, "output_dit_xl2"),
        ("SiT_XL_2", 8, 4, "output_sit_xl2"),
    ],
)
def test_the_scripts_for_many_machines_train_with_the_published_settings(asked_for, model, nodes, batch, folder):
    for script, place in (("run_ddp_master.sh", {}), ("run_ddp_worker.sh", {"MASTER_ADDR": "first", "RANK": 1})):
        [line] = asked_for(script, MODEL=model, **place)
        assert f"/dataset/imagenet {TRAINING[model]} --batch_size {batch} LOG {folder}" in line
        assert f"--nnodes={nodes} --nproc_per_node=8" in line


@pytest.mark.parametrize(
    "model, flags, cfg_scale",
    [
        ("MDT_XL_2", " --decode_layer 2", 3.8),
        ("MDTv2_XL_2", " --decode_layer 4", 3.8),
        ("DiT_XL_2", "", 1.5),
        ("SiT_XL_2", "", 1.5),
    ],
)
def test_run_sample_sh_samples_with_the_published_settings(asked_for, tmp_path, model, flags, cfg_scale):
    weights = tmp_path / "weights.pt"
    weights.touch()
    guided, plain = asked_for("run_sample.sh", MODEL=model, MODEL_PATH=weights, REFERENCE=weights)
    for line in (guided, plain):
        assert f"--model_path {weights} --model {model} --image_size 256{flags} --num_sampling_steps 250" in line
    assert f"--cfg_cond True --cfg_scale {cfg_scale}" in guided and "--cfg" not in plain


def test_what_the_environment_says_wins(asked_for):
    [line] = asked_for("run.sh", MODEL="MDTv2_S_2", DATA_PATH="a:b", LR="1e-4", DECODE_LAYER=4, BATCH_SIZE=64)
    assert "--lr 1e-4" in line and "--decode_layer 4" in line and "--batch_size 64" in line


def test_run_sh_passes_another_objective_on_and_keeps_its_run_apart(asked_for):
    [line] = asked_for("run.sh", MODEL="MDT_S_2", DATA_PATH="bucket:images", OBJECTIVE="flow")
    assert "--objective flow" in line and line.endswith("LOG output_mdt_s2_flow")
    train, _ = asked_for("run.sh", DATA_PATH="", OBJECTIVE="edm")
    assert "--objective edm" in train and train.endswith("LOG output_digits_edm")
    for line in asked_for("run.sh", DATA_PATH=""):
        assert "--objective" not in line and line.endswith("LOG output_digits")


@pytest.mark.parametrize(
    "script, variables, programs",
    [
        ("run.sh", {"DATA_PATH": ""}, 4),
        ("run.sh", {"DATA_PATH": "", "EMBEDDED": "shapes"}, 6),
        ("run.sh", {"DATA_PATH": "bucket:images", "OPENAI_LOGDIR": "my runs"}, 1),
        ("run_ddp_master.sh", {}, 1),
        ("run_ddp_worker.sh", {"MASTER_ADDR": "first", "RANK": 1}, 1),
        ("run_sample.sh", {"MODEL_PATH": __file__, "REFERENCE": __file__}, 4),
    ],
)
def test_a_printed_command_does_the_same_when_it_is_pasted(start, script, variables, programs):
    def started(printed):
        return re.findall(r"^ASKED (.*(?:scripts|evaluations)/.*)\nWITH (.*)$", printed, re.MULTILINE)

    first = start(REPO / script, OMP_NUM_THREADS="", **variables).stdout
    lines = re.findall(r"^\+ (.*)$", first, re.MULTILINE)
    assert len(lines) == programs and started(first)
    again = [start("-c", line, OMP_NUM_THREADS="").stdout for line in lines]
    assert [found for text in again for found in started(text)] == started(first)


def test_without_data_run_sh_names_the_settings_that_it_ignores(start):
    assert start(REPO / "run.sh", DATA_PATH="").stderr == ""
    done = start(REPO / "run.sh", "--lr", "1e-4", DATA_PATH="", MODEL="MDTv2_S_2", NUM_GPUS=2, BATCH_SIZE=16)
    assert done.stderr == (
        "run.sh: warning: MODEL=MDTv2_S_2 NUM_GPUS=2 BATCH_SIZE=16 --lr 1e-4 ignored: "
        "without DATA_PATH the settings are fixed\n"
    )


@pytest.mark.parametrize("data", ["", "bucket:images"])
def test_run_sh_says_how_to_activate_the_environment_that_it_uses(start, tmp_path, data):
    hint = "To use this environment in your shell, enter: source "
    assert hint not in start(REPO / "run.sh", DATA_PATH=data).stdout
    checkout = tmp_path / "checkout"
    shutil.copytree(
        REPO / "scripts", checkout / "scripts", ignore=lambda _, names: {n for n in names if n[-3:] != ".sh"}
    )
    shutil.copy(REPO / "run.sh", checkout)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "activate").touch()
    (checkout / ".venv" / "bin" / "python").symlink_to(tmp_path / "python")
    printed = start(checkout / "run.sh", DATA_PATH=data, VIRTUAL_ENV="", CONDA_PREFIX="").stdout
    assert f"{hint}{checkout}/.venv/bin/activate\n" in printed


def test_run_sh_with_shapes_trains_an_autoencoder_and_then_on_its_latents(asked_for):
    asked = {"programs": "", "DATA_PATH": "", "STEPS": 30, "AUTOENCODER_STEPS": 20}
    lines = [line for line in asked_for("run.sh", "--shapes", **asked) if ".py" in line]
    folder = "output_shapes"
    programs = ["train_autoencoder", "encode_latents", "image_train", "image_sample", "read_digits", "evaluator"]
    assert all(f"/{name}.py" in line for name, line in zip(programs, lines, strict=True))
    assert all(line.endswith(f"LOG {folder}") for line in lines)
    autoencoder, encode, train, sample, read, score = lines
    assert f"--data_dir builtin:shapes --image_size 32 --out {folder}/autoencoder --steps 20" in autoencoder
    assert f"--vae_path {folder}/autoencoder --out {folder}/latents" in encode
    assert f"--data_dir {folder}/latents --vae_path {folder}/autoencoder --image_size 32" in train
    assert "--model MDT_Ti_4" in train and "--policy mdt_one_view --finale 0.2" in train
    assert "--objective flow" in train and "--lr_anneal_steps 30" in train
    assert f"--model_path {folder}/ema_0.998_000030.pt" in sample and "--num_samples 500" in sample
    assert "--guidance constant --cfg_scale 4" in sample
    assert f"{folder}/samples_500x32x32x3.npz --embedded shapes --graph {folder}/shapes.pb" in read
    assert f"{folder}/shapes_test.npz {folder}/samples_500x32x32x3.npz --graph {folder}/shapes.pb" in score
    assert asked_for("run.sh", **asked, EMBEDDED="shapes") == asked_for("run.sh", "--shapes", **asked)
    [train, _] = asked_for("run.sh", "--shapes", DATA_PATH="", OBJECTIVE="ddpm")
    assert "--objective" not in train and train.endswith("LOG output_shapes_ddpm")


def test_run_sh_without_shapes_trains_digits_in_pixel_space(asked_for):
    train, sample = asked_for("run.sh", DATA_PATH="")
    expected = "--data_dir builtin:digits --vae_path none --image_size 8 --model MDT_Ti_2 --mask_ratio 0.30 "
    assert expected + "--decode_layer 2 --batch_size " in train
    assert "--lr 2e-3 --lr_anneal_steps 2000 --ema_rate 0.99 --log_interval 50 --save_interval 500 --device" in train
    assert "--cfg_cond True --cfg_scale 4 --num_sampling_steps 50 --num_samples 355 --batch_size 60" in sample


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"EMBEDDED": "shape"}, "EMBEDDED shape: it is digits or shapes"),
        ({"EMBEDDED": "shapes", "DATA_PATH": "a:b"}, "DATA_PATH a:b and EMBEDDED shapes are both given; choose one"),
    ],
)
def test_run_sh_refuses_an_embedded_data_set_that_it_does_not_have_or_need(tmp_path, variables, message):
    done = run_command(["bash", str(REPO / "run.sh")], environment("", PATH="/usr/bin:/bin", **variables), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"run.sh: error: {message}\n")


def test_run_sh_refuses_an_unknown_objective_before_it_installs_anything(tmp_path):
    done = run_command(
        ["bash", str(REPO / "run.sh")], environment("", PATH="/usr/bin:/bin", OBJECTIVE="flwo"), cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "run.sh: error: OBJECTIVE flwo: it is ddpm, x0, v, flow or edm\n"


def test_a_relative_folder_that_is_missing_is_refused_with_where_it_was_looked_for(tmp_path):
    (tmp_path / "images").mkdir()
    env = environment("", VIRTUAL_ENV="active", DATA_PATH="images")
    done = run_command(["bash", str(REPO / "run.sh")], env, cwd=tmp_path)
    assert done.returncode == 2
    expected = f"DATA_PATH images: no such folder in {REPO}, from where it is looked for; give {tmp_path}/images"
    assert expected in done.stderr
