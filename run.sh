#!/usr/bin/env bash
# Train an MDT on this machine.
#   DATA_PATH=/dataset/imagenet bash run.sh    the published MDT-S/2 training, or that of MODEL, on NUM_GPUS GPUs
#   bash run.sh                                the whole story in minutes, without data or GPU: train on handwritten
#                                              digits, sample, and see how many of them can be read
#   bash run.sh --shapes                       the same with colour pictures that code draws, as latents of an
#                                              autoencoder that is trained before; EMBEDDED=shapes says the same
#   OBJECTIVE=flow bash run.sh                 each of them under another objective: ddpm, x0, v, flow or edm
# Settings are environment variables, which --help lists; arguments go to image_train.py, with DATA_PATH only.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/help.sh
source scripts/help.sh
help_if_asked run.sh scripts/published.sh scripts/launcher.sh -- "$@"
# shellcheck source=scripts/say_and_run.sh
source scripts/say_and_run.sh

embedded="${EMBEDDED:-digits}"
if [ "${1-}" = --shapes ]; then
  embedded=shapes
  shift
fi
usual=ddpm
if [ -z "${DATA_PATH:-}" ]; then
  case "$embedded" in
    digits) ;;
    shapes) usual=flow ;;
    *) echo "run.sh: error: EMBEDDED $embedded: it is digits or shapes" >&2; exit 2 ;;
  esac
elif [ "$embedded" != digits ]; then
  echo "run.sh: error: DATA_PATH $DATA_PATH and EMBEDDED $embedded are both given; choose one" >&2
  exit 2
fi
objective="${OBJECTIVE:-$usual}" objective_flags=() suffix=""
case "$objective" in
  ddpm) ;;
  x0 | v | flow | edm) objective_flags=(--objective "$objective") ;;
  *) echo "run.sh: error: OBJECTIVE $objective: it is ddpm, x0, v, flow or edm" >&2; exit 2 ;;
esac
[ "$objective" = "$usual" ] || suffix="_$objective"

# An active virtual or conda environment is used as it is; otherwise .venv is made here.
if [ -z "${VIRTUAL_ENV-}" ] && [ -z "${CONDA_PREFIX-}" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
  say_how_to_activate() {
    printf 'To use this environment in your shell, enter: source %q\n' "$PWD/.venv/bin/activate"
  }
else
  say_how_to_activate() { :; }
fi
# The digits are scored by the evaluator, which needs TensorFlow; a training does not.
needed="masked_diffusion" extra=""
if [ -z "${DATA_PATH:-}" ]; then needed="masked_diffusion tensorflow" extra="[eval]"; fi
for module in $needed; do
  if ! python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)"; then
    echo "installing masked-diffusion and what it needs (a few minutes, several GB) ..."
    python -m pip install --quiet --editable ".$extra"
    break
  fi
done

if [ -n "${DATA_PATH:-}" ]; then
  case "$DATA_PATH" in
    *:* | *\{*) ;; # a bucket, an embedded data set, or a pattern of archives
    /*) [ -e "$DATA_PATH" ] || { echo "run.sh: error: DATA_PATH $DATA_PATH: no such folder" >&2; exit 2; } ;;
    *)
      if [ ! -e "$DATA_PATH" ]; then
        hint=""
        if [ -e "$called_from/$DATA_PATH" ]; then hint="; give $called_from/$DATA_PATH"; fi
        echo "run.sh: error: DATA_PATH $DATA_PATH: no such folder in $PWD, from where it is looked for$hint" >&2
        exit 2
      fi ;;
  esac
  MODEL="${MODEL:-MDT_S_2}"
  # shellcheck source=scripts/published.sh
  source scripts/published.sh
  export OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_$run_name$suffix}"
  # shellcheck source=scripts/launcher.sh
  source scripts/launcher.sh
  say_how_to_activate # before the training, which may end by a signal
  run "${launcher[@]}" --nproc_per_node="${NUM_GPUS:-8}" --master_port="${MASTER_PORT:-29500}" \
    scripts/image_train.py --data_dir "$DATA_PATH" "${model_flags[@]}" "${training_flags[@]}" \
    ${objective_flags[@]+"${objective_flags[@]}"} --batch_size "${BATCH_SIZE:-32}" "$@"
  exit
fi

ignored=()
for name in MODEL NUM_GPUS BATCH_SIZE IMAGE_SIZE DECODE_LAYER LR MASK_RATIO DIFFUSION_STEPS; do
  [ -z "${!name-}" ] || ignored+=("$name=${!name}")
done
ignored+=("$@")
[ ${#ignored[@]} -eq 0 ] ||
  echo "run.sh: warning: ${ignored[*]} ignored: without DATA_PATH the settings are fixed" >&2
settings+=(OMP_NUM_THREADS OPENAI_LOG_FORMAT)
# One process per core, up to four, and one thread each: the result does not depend on it, and threads that share
# cores wait for each other.
cores=$(getconf _NPROCESSORS_ONLN)
processes=$((cores < 2 ? 1 : cores < 4 ? 2 : 4))
export OMP_NUM_THREADS=1 OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_$embedded$suffix}" OPENAI_LOG_FORMAT="${OPENAI_LOG_FORMAT:-log,csv}"
launch=(python -m torch.distributed.run --standalone "--nproc_per_node=$processes")
said=0
say() {
  said=$((said + 1))
  echo "$said/$parts $1"
}

case "$embedded" in
  digits)
    parts=4 steps=${STEPS:-2000} samples=355 side=8 model=MDT_Ti_2 ema_rate=0.99
    data=(--data_dir builtin:digits --vae_path none) what="8 x 8 handwritten digits, in pixel space" save_interval=500
    recipe=(--lr 2e-3)
    sampling=(--cfg_scale 4 --num_sampling_steps 50)
    reader=() ;;
  shapes)
    parts=6 steps=${STEPS:-12000} samples=500 side=32 model=MDT_Ti_4 ema_rate=0.998 save_interval=2000
    autoencoder="$OPENAI_LOGDIR/autoencoder" latents="$OPENAI_LOGDIR/latents"
    data=(--data_dir "$latents" --vae_path "$autoencoder") what="their latents"
    # One view costs half of two, so a laptop has time for twice the steps; the last fifth sees all tokens, as sampling.
    recipe=(--policy mdt_one_view --finale 0.2 --lr 2e-3 --lr_warmup 100 --grad_clip 1)
    sampling=(--guidance constant --cfg_scale 4 --num_sampling_steps 40)
    reader=(--embedded "$embedded")
    say "training an autoencoder on 32 x 32 pictures of ten things, drawn by code"
    run python scripts/train_autoencoder.py --data_dir builtin:shapes --image_size "$side" --out "$autoencoder" \
      --steps "${AUTOENCODER_STEPS:-3000}" --device cpu
    say "encoding the pictures, on $processes processes"
    run "${launch[@]}" scripts/encode_latents.py --data_dir builtin:shapes --image_size "$side" \
      --vae_path "$autoencoder" --out "$latents" --batch_size 64 --device cpu ;;
esac

say "training a small MDT on $what, on $processes processes"
run "${launch[@]}" scripts/image_train.py "${data[@]}" --image_size "$side" \
  --model "$model" --mask_ratio 0.30 --decode_layer 2 --batch_size $((64 / processes)) "${recipe[@]}" \
  --lr_anneal_steps "$steps" --ema_rate "$ema_rate" --log_interval 50 --save_interval "$save_interval" --device cpu \
  ${objective_flags[@]+"${objective_flags[@]}"}

say "sampling $samples $embedded with guidance"
run "${launch[@]}" scripts/image_sample.py \
  --model_path "$OPENAI_LOGDIR/$(printf 'ema_%s_%06d.pt' "$ema_rate" "$steps")" --cfg_cond True "${sampling[@]}" \
  --num_samples "$samples" --batch_size 60 --labels balanced --device cpu

say "reading them"
file="$OPENAI_LOGDIR/samples_${samples}x${side}x${side}x3.npz"
graph="$OPENAI_LOGDIR/$embedded.pb" reference="$OPENAI_LOGDIR/${embedded}_test.npz"
run python scripts/read_digits.py "$file" ${reader[@]+"${reader[@]}"} --graph "$graph" --reference "$reference"

say "scoring them against the held-back $embedded, with the classifier's features in place of Inception's"
run python evaluations/evaluator.py "$reference" "$file" --graph "$graph"
echo "training log: $OPENAI_LOGDIR/progress.csv"
echo "pictures:     ${file%.npz}.png"
say_how_to_activate
