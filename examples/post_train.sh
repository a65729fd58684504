#!/usr/bin/env bash
# Post-train with GRPO on questions and their answers, by the engine that mid-trains: the question is
# the trunk, a group of 8 thinks about it within a fixed budget, and a response that then says the
# answer earns 1. No next-token loss, no length reward.
#
#   bash examples/post_train.sh [flags]
#
#   CHECKPOINT  folder written by tools/convert_checkpoint.py
#   START       weights to begin with, such as the SAVE of a mid-training (those of CHECKPOINT)
#   DATA        prefix of token files with one question in each document, see docs/jobs.md
#   MARKER      what stands between question and answer ("#### ")
#   TEMPLATE    prompt of the thought (examples/templates/solved.json)
#   SAVE        where checkpoints go, and where a resumed run starts (runs/post_train)
#   RECIPE      file of flags (examples/post_train.args); [flags] replace those of the same name
#
# All else is as in examples/pretrain_rmt.sh, which this starts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CHECKPOINT:?is not set: name a folder written by tools/convert_checkpoint.py}"
export CHECKPOINT START=${START:-$CHECKPOINT} SAVE=${SAVE:-runs/post_train}
export MARKER=${MARKER:-"#### "} TEMPLATE=${TEMPLATE:-$here/templates/solved.json}
export RECIPE=${RECIPE:-$here/post_train.args} PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
exec bash "$here/pretrain_rmt.sh" "$@"
