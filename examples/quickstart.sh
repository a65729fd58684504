#!/usr/bin/env bash
# From nothing to a model mid-trained with RMT: SmolLM2-135M on worked mathematics, on CPU or GPU.
# Does its own set-up. A second run reuses every stage that is complete; remove runs/quickstart to
# start afresh.
# Usage: bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_environment.sh

run=runs/quickstart
steps=20
seed=1234
train_documents=2000
heldout_documents=50

mkdir -p "$run"
exec 8>>"$run/lock"
if ! flock --nonblock 8; then
    echo "Another quickstart is at work in $run: wait for it to end." >&2
    exit 1
fi

number=0
history=""
# stage TITLE OUTPUT COMMAND...: make OUTPUT with COMMAND, unless the same command after the same
# stages has made it already. The stamp is written last, so that an interrupted stage is done again.
stage() {
    local title=$1 output=$2 began=$SECONDS stamp
    shift 2
    number=$((number + 1))
    history=$(printf '%s\n' "$history" "$@" | sha256sum | cut -c 1-64)
    stamp="$run/.stages/$number"
    printf '\n[%d/8] %s\n' "$number" "$title"
    if [[ -e $output && $(cat "$stamp" 2>/dev/null) == "$history" ]]; then
        echo "Reused: $output"
        return
    fi
    rm -rf "$stamp" "${output:?}"
    if ! "$@"; then
        printf '\nStage %d (%s) failed, see above. Run this script again to go on from there.\n' \
            "$number" "$title" >&2
        exit 1
    fi
    mkdir -p "$run/.stages"
    echo "$history" >"$stamp"
    echo "Done in $((SECONDS - began)) s: $output"
}

# SmolLM2 is small and has never reasoned: the thought stands inline behind the raw document, is
# closed at its bound, and the first steps teach it to draft the text in its thought. These depart
# from the paper, as do the short budget, the higher learning rate and the weight of the next-token
# loss that keeps it from unlearning the text; everything else is as the paper has it.
reasoning=(--rmt-template inline --rmt-force-close --rmt-answer-tokens 1)
train=(
    env "CHECKPOINT=$run/smollm2" "DATA=$run/tokens/train" "SAVE=$run/checkpoint" NPROC_PER_NODE=1
    bash examples/pretrain_rmt.sh
    --seed "$seed"
    --train-iters "$steps"
    --save-interval "$steps"
    --logging-level 30
    --seq-length 256
    --global-batch-size 2
    --lr 2e-4
    --min-lr 2e-5
    --lr-decay-style cosine
    --lr-warmup-iters 3
    "${reasoning[@]}"
    --rmt-ntp-coefficient 1
    --rmt-warmup-iters 12
    --rmt-warmup-thought text
    --rmt-positions-per-sample 16
    --rmt-initial-budget 8
    --rmt-minimum-budget 3
)
# A training run's folder does not say what the model is; the converted checkpoint does.
evaluate=(
    python tools/evaluate.py --model-flags "$run/smollm2" --data "$run/corpus/heldout.jsonl"
    --budget 8 --bf16 --no-swap "${reasoning[@]}"
)

stage "Convert SmolLM2-135M-Instruct to a Megatron checkpoint" "$run/smollm2" \
    python tools/convert_checkpoint.py to-megatron --source smollm2 --target "$run/smollm2"

stage "Write a corpus of worked mathematics" "$run/corpus" \
    python tools/generate_corpus.py --output "$run/corpus" --seed "$seed" \
    --train-documents "$train_documents" --heldout-documents "$heldout_documents"

stage "Tokenize the corpus" "$run/tokens" \
    python tools/preprocess_data.py --input "$run/corpus/train.jsonl" \
    --output-prefix "$run/tokens/train" --tokenizer "$run/smollm2/huggingface"

stage "Evaluate before training" "$run/before.json" \
    "${evaluate[@]}" --load "$run/smollm2" --documents 24 --positions-per-document 8 \
    --output "$run/before.json"

stage "Mid-train $steps steps with RMT" "$run/checkpoint" "${train[@]}"

stage "Evaluate after training" "$run/after.json" \
    "${evaluate[@]}" --load "$run/checkpoint" --positions-from "$run/before.json" \
    --output "$run/after.json"

stage "Draw the curves" "$run/curves.png" \
    python tools/plot_curves.py "$run/checkpoint/rmt_metrics.jsonl" --output "$run/curves.png" \
    --title "SmolLM2-135M, $steps steps of RMT"

printf '\n[8/8] Before and after\n'
python tools/evaluate.py --compare "$run/before.json" "$run/after.json"
printf '\nCheckpoint: %s\nCurves:     %s\n' "$run/checkpoint" "$run/curves.png"
