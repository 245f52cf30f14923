# shellcheck shell=bash
# The published settings of MODEL, for the scripts beside this folder. What is set in the environment stays.
# model_flags: the flags that describe the model to image_train.py and image_sample.py. training_flags: those that only
# a training takes. run_name: what its folder is named after, mdt_xl2 for MDT_XL_2.

lower=$(printf '%s' "$MODEL" | tr '[:upper:]' '[:lower:]')
# shellcheck disable=SC2034  # for the scripts that source this
run_name="${lower%_*}${lower##*_}"
case "$MODEL" in
  MDTv2_Ti_*) : "${DECODE_LAYER:=2}" ;;
  MDTv2_S_*) : "${DECODE_LAYER:=6}" "${LR:=5e-4}" ;;
  MDTv2_*) : "${DECODE_LAYER:=4}" ;;
  *) : "${DECODE_LAYER:=2}" ;;
esac
model_flags=(--model "$MODEL" --image_size "${IMAGE_SIZE:=256}")
training_flags=(--diffusion_steps "${DIFFUSION_STEPS:=1000}" ${LR:+--lr "$LR"})
case "$MODEL" in
  DiT_* | SiT_*) ;; # mask nothing and have no decoder
  *)
    model_flags+=(--decode_layer "$DECODE_LAYER")
    training_flags+=(--mask_ratio "${MASK_RATIO:=0.30}")
    ;;
esac
