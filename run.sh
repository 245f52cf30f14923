#!/usr/bin/env bash
# Train an MDT on this machine.
#   DATA_PATH=/dataset/imagenet bash run.sh    the published MDT-S/2 training, or that of MODEL, on NUM_GPUS GPUs
#   bash run.sh                                the whole story in minutes, without data or GPU: train on handwritten
#                                              digits, sample, and see how many of them can be read
#   OBJECTIVE=flow bash run.sh                 either of them under another objective: x0, v, flow or edm
# Settings are environment variables, which --help lists; arguments go to image_train.py, with DATA_PATH only.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/help.sh
source scripts/help.sh
help_if_asked run.sh scripts/published.sh scripts/launcher.sh -- "$@"
# shellcheck source=scripts/say_and_run.sh
source scripts/say_and_run.sh

objective="${OBJECTIVE:-ddpm}" objective_flags=() suffix=""
case "$objective" in
  ddpm) ;;
  x0 | v | flow | edm) objective_flags=(--objective "$objective") suffix="_$objective" ;;
  *) echo "run.sh: error: OBJECTIVE $objective: it is ddpm, x0, v, flow or edm" >&2; exit 2 ;;
esac

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
export OMP_NUM_THREADS=1 OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_digits$suffix}" OPENAI_LOG_FORMAT="${OPENAI_LOG_FORMAT:-log,csv}"
steps=${STEPS:-2000}
samples=355
launch=(python -m torch.distributed.run --standalone "--nproc_per_node=$processes")

echo "1/4 training a small MDT on 8 x 8 handwritten digits, in pixel space, on $processes processes"
run "${launch[@]}" scripts/image_train.py --data_dir builtin:digits --vae_path none --image_size 8 \
  --model MDT_Ti_2 --mask_ratio 0.30 --decode_layer 2 --batch_size $((64 / processes)) --lr 2e-3 \
  --lr_anneal_steps "$steps" --ema_rate 0.99 --log_interval 50 --save_interval 500 --device cpu \
  ${objective_flags[@]+"${objective_flags[@]}"}

echo "2/4 sampling $samples digits with guidance"
run "${launch[@]}" scripts/image_sample.py \
  --model_path "$OPENAI_LOGDIR/$(printf 'ema_0.99_%06d.pt' "$steps")" --cfg_cond True --cfg_scale 4 \
  --num_sampling_steps 50 --num_samples "$samples" --batch_size 60 --labels balanced --device cpu

echo "3/4 reading them"
file="$OPENAI_LOGDIR/samples_${samples}x8x8x3.npz"
run python scripts/read_digits.py "$file" --graph "$OPENAI_LOGDIR/digits.pb" --reference "$OPENAI_LOGDIR/digits_test.npz"

echo "4/4 scoring them against the held-back digits, with the digit classifier's features in place of Inception's"
run python evaluations/evaluator.py "$OPENAI_LOGDIR/digits_test.npz" "$file" --graph "$OPENAI_LOGDIR/digits.pb"
echo "training log: $OPENAI_LOGDIR/progress.csv"
echo "pictures:     ${file%.npz}.png"
say_how_to_activate
