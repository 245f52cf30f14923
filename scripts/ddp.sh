# shellcheck shell=bash
# What run_ddp_master.sh and run_ddp_worker.sh share: the settings, and the start of one machine's processes.

MODEL="${MODEL:-MDT_XL_2}"
case "$MODEL" in # both of 256 images in a step
  MDTv2_*) : "${NUM_NODE:=4}" "${BATCH_SIZE:=8}" ;;
  *) : "${NUM_NODE:=8}" "${BATCH_SIZE:=4}" ;;
esac
# shellcheck source=scripts/published.sh
source scripts/published.sh
export OPENAI_LOGDIR="${OPENAI_LOGDIR:-output_$run_name}"

# shellcheck source=scripts/launcher.sh
source scripts/launcher.sh
# shellcheck source=scripts/say_and_run.sh
source scripts/say_and_run.sh

train_on_this_node() {
  run "${launcher[@]}" \
    --nnodes="$NUM_NODE" --nproc_per_node="${GPU_PRE_NODE:-8}" --node_rank="$RANK" \
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" \
    --rdzv_conf="timeout=${JOIN_SECONDS:-300}" \
    scripts/image_train.py --data_dir "${DATA_PATH:-/dataset/imagenet}" "${model_flags[@]}" "${training_flags[@]}" \
    --batch_size "$BATCH_SIZE" "$@"
}
