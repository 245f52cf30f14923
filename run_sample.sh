#!/usr/bin/env bash
# Sample 50,000 images of a trained model twice, with guidance and without, and score both against a reference batch.
# Settings are environment variables, which --help lists; arguments go to both samplings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/help.sh
source scripts/help.sh
help_if_asked run_sample.sh scripts/published.sh -- "$@"
# shellcheck source=scripts/say_and_run.sh
source scripts/say_and_run.sh

MODEL_PATH="${MODEL_PATH:-output_mdt_xl2/mdt_xl2_v1_ckpt.pt}"
export OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_mdt_xl2_eval}"
NUM_GPUS="${NUM_GPUS:-8}"
MODEL="${MODEL:-MDT_XL_2}"
# shellcheck source=scripts/published.sh
source scripts/published.sh
NUM_SAMPLES="${NUM_SAMPLES:-50000}"
NUM_SAMPLING_STEPS="${NUM_SAMPLING_STEPS:-250}"
BATCH_SIZE="${BATCH_SIZE:-32}"
case "$MODEL" in
  DiT_* | SiT_*) CFG_SCALE="${CFG_SCALE:-1.5}" ;;
  *) CFG_SCALE="${CFG_SCALE:-3.8}" ;;
esac
REFERENCE="${REFERENCE:-../dataeval/VIRTUAL_imagenet256_labeled.npz}"
GRAPH="${GRAPH:-}"

[ -f "$MODEL_PATH" ] || { echo "run_sample.sh: error: MODEL_PATH $MODEL_PATH: no such file; README.md says where to get it" >&2; exit 2; }
[ -f "$REFERENCE" ] || {
  echo "run_sample.sh: error: REFERENCE $REFERENCE: no such file; evaluations/README.md says where to get it" >&2
  exit 2
}

sample_and_score() {
  local report=$1 samples="$OPENAI_LOGDIR/samples_${NUM_SAMPLES}x${IMAGE_SIZE}x${IMAGE_SIZE}x3.npz"
  shift
  run python -m torch.distributed.launch --nproc_per_node="$NUM_GPUS" --master_port="${MASTER_PORT:-29500}" \
    scripts/image_sample.py --model_path "$MODEL_PATH" "${model_flags[@]}" \
    --num_sampling_steps "$NUM_SAMPLING_STEPS" --num_samples "$NUM_SAMPLES" --batch_size "$BATCH_SIZE" "$@"
  run python evaluations/evaluator.py "$REFERENCE" "$samples" --out "$OPENAI_LOGDIR/$report" \
    ${GRAPH:+--graph "$GRAPH"}
}

sample_and_score scores_guided.json --cfg_cond True --cfg_scale "$CFG_SCALE" "$@"
sample_and_score scores_unguided.json "$@"
