#!/usr/bin/env bash
'''':
# Mid-train with RMT. This file is bash AND Python, so that each of these works:
#
#   bash examples/pretrain_rmt.sh [flags]                                   starts torchrun itself
#   torchrun --nproc-per-node 8 examples/pretrain_rmt.sh [flags]            torchrun runs it as Python
#   torchrun --nproc-per-node 8 --no-python examples/pretrain_rmt.sh [flags]
#
#   CHECKPOINT  folder written by tools/convert_checkpoint.py
#   DATA        prefix of the .bin and .idx written by tools/preprocess_data.py
#   SAVE        where checkpoints go, and where a resumed run starts (runs/pretrain_rmt)
#   RECIPE      file of flags (examples/pretrain_rmt.args); [flags] replace those of the same name
#   ENTRY_POINT the script to run (examples/pretrain_rmt.py)
#   WANDB_MODE  offline unless set (sync later with: wandb sync)
#   NPROC_PER_NODE (number of GPUs, else 1); on several nodes, run it on each with the same NNODES,
#   MASTER_ADDR (a node of them), MASTER_PORT (29500), RDZV_ID (rmt) and MAX_RESTARTS (3). Run it
#   again on a node that was lost, within 10 minutes, and all resume from the last checkpoint; but
#   the node at MASTER_ADDR must stay. torchrun's other flags are PET_<NAME>, as PET_LOCAL_ADDR.
#   A torchrun of your own on several nodes wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 as well
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_megatron() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("megatron") is None)' 2>/dev/null
}
python=${PYTHON:-python}
if ! has_megatron "$python"; then
    python="$here/../.venv/bin/python"
    if ! has_megatron "$python"; then
        echo "No Python with megatron-core: activate its environment, or set PYTHON." >&2
        exit 1
    fi
fi

if [[ -n ${LOCAL_RANK:-} ]]; then
    exec "$python" -u "$here/recipe.py" "$@"
fi

# With --exit-signal-handler a rank that is told to stop saves first; torchrun would wait for 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
launcher=("$python" -m torch.distributed.run
    --nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}")
if [[ ${NNODES:-1} == 1 && -z ${MASTER_PORT:-} ]]; then
    launcher+=(--standalone)
else
    # A node that is lost and comes back joins again, and training resumes from its checkpoint. The
    # ranks then meet in a store of that time: torchrun's shared one may have died with the node.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    launcher+=(--nnodes "${NNODES:-1}" --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d
        --rdzv-id "${RDZV_ID:-rmt}" --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}")
fi
echo "+ ${launcher[*]} $here/recipe.py $*"
exec "${launcher[@]}" "$here/recipe.py" "$@"
'''
if __name__ == "__main__":
    import recipe

    recipe.main()
