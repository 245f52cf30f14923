# shellcheck shell=bash
# What run_ddp_master.sh and run_ddp_worker.sh share: the settings, and the start of one machine's processes.

export OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_mdt_xl2}"

# shellcheck source=scripts/launcher.sh
source scripts/launcher.sh

train_on_this_node() {
  local command=(
    "${launcher[@]}"
    --nnodes="${NUM_NODE:-8}" --nproc_per_node="${GPU_PRE_NODE:-8}" --node_rank="$RANK"
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}"
    --rdzv_conf="timeout=${JOIN_SECONDS:-300}"
    scripts/image_train.py --data_dir "${DATA_PATH:-/dataset/imagenet}" --image_size "${IMAGE_SIZE:-256}"
    --mask_ratio "${MASK_RATIO:-0.30}" --decode_layer "${DECODE_LAYER:-2}" --model "${MODEL:-MDT_XL_2}"
    --diffusion_steps "${DIFFUSION_STEPS:-1000}" --batch_size "${BATCH_SIZE:-4}" "$@"
  )
  printf '+'; printf ' %q' "${command[@]}"; printf '\n'
  "${command[@]}"
}
