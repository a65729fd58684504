#!/usr/bin/env bash
# From nothing to a model that thinks where it helps: SmolLM2-135M reads sums, half of them with the
# work shown, and is mid-trained with RMT to do the work where the text does not. On CPU or GPU.
# Does its own set-up. A second run reuses every stage that is complete; remove runs/quickstart to
# start afresh.
# Usage: bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_environment.sh

run=runs/quickstart
pretraining_steps=80
steps=25
seed=1234
train_documents=3000
heldout_documents=60

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
    printf '\n[%d/10] %s\n' "$number" "$title"
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

# The thought stands behind the raw document and ends as shown work ends in this corpus, so that its
# form need not be taught: no warm-up. Departs from the paper in that, in the short budget that does
# not decay (the work of a question takes 16 tokens), the learning rate, the weight of the next-token
# loss, and the positions: hard ones only, but none that is as good as random.
reasoning=(--rmt-template examples/templates/worked.json --rmt-force-close --rmt-answer-tokens 1)
answers=(--rmt-eval-data "$run/corpus/heldout.jsonl" --rmt-eval-positions answers)
# train START SAVE STEPS FLAGS...
train() {
    local start=$1 save=$2 iterations=$3
    shift 3
    CHECKPOINT="$run/smollm2" DATA="$run/tokens/train" SAVE="$save" NPROC_PER_NODE=1 \
        bash examples/pretrain_rmt.sh --pretrained-checkpoint "$start" --seed "$seed" \
        --train-iters "$iterations" --save-interval "$iterations" --logging-level 30 \
        --seq-length 256 --global-batch-size 2 "$@"
}
# A training run's folder does not say what the model is; the converted checkpoint does.
evaluate=(
    python tools/evaluate.py --model-flags "$run/smollm2" --data "$run/corpus/heldout.jsonl"
    --budget 16 --bf16 "${reasoning[@]}"
)

stage "Convert SmolLM2-135M-Instruct to a Megatron checkpoint" "$run/smollm2" \
    python tools/convert_checkpoint.py to-megatron --source smollm2 --target "$run/smollm2"

stage "Write a corpus of sums, half of them with the work shown" "$run/corpus" \
    python tools/generate_computed_corpus.py --output "$run/corpus" --seed "$seed" \
    --train-documents "$train_documents" --heldout-documents "$heldout_documents"

stage "Tokenize the corpus" "$run/tokens" \
    python tools/preprocess_data.py --input "$run/corpus/train.jsonl" \
    --output-prefix "$run/tokens/train" --tokenizer "$run/smollm2/huggingface"

stage "Pre-train $pretraining_steps steps on the next token alone" "$run/pretrained" \
    train "$run/smollm2" "$run/pretrained" "$pretraining_steps" --rmt-no-rl \
    --lr 2e-4 --min-lr 5e-5 --lr-decay-style linear --lr-warmup-iters 4

stage "Evaluate at held-out answers whose work is not shown" "$run/before.json" \
    "${evaluate[@]}" --load "$run/pretrained" --positions answers --documents 40 \
    --positions-per-document 3 --output "$run/before.json"

stage "Mid-train $steps steps with RMT" "$run/checkpoint" \
    train "$run/pretrained" "$run/checkpoint" "$steps" "${reasoning[@]}" "${answers[@]}" \
    --lr 5e-5 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 2 \
    --rmt-ntp-coefficient 1 --rmt-initial-budget 16 --rmt-no-budget-decay \
    --rmt-positions-per-sample 4 --rmt-entropy-thresholds 0.5 1.0 1.7 --rmt-entropy-ceiling 2.15 \
    --rmt-start-probabilities 0 0 1 --rmt-end-probabilities 0 0 1 \
    --rmt-eval-interval 10 --rmt-eval-documents 20 --rmt-eval-positions-per-document 2

stage "Evaluate at the same answers" "$run/after.json" \
    "${evaluate[@]}" --load "$run/checkpoint" --positions-from "$run/before.json" \
    --output "$run/after.json"

stage "Draw the curves" "$run/curves.png" \
    python tools/plot_curves.py "$run/checkpoint/rmt_metrics.jsonl" --output "$run/curves.png" \
    --title "SmolLM2-135M, $steps steps of RMT"

stage "Write the report" "$run/report.html" \
    python tools/report.py "$run/checkpoint" "before=$run/before.json" "after=$run/after.json" \
    --output "$run/report.html" --title "SmolLM2-135M, $steps steps of RMT"

printf '\n[10/10] Before and after\n'
python tools/evaluate.py --compare "$run/before.json" "$run/after.json"
printf '\nCheckpoint: %s\nCurves:     %s\nReport:     %s\n' \
    "$run/checkpoint" "$run/curves.png" "$run/report.html"
