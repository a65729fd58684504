"""The checks of ``accept_gpu.py``, in the order in which they are carried out."""

import functools

import torch

from acceptance import decoding, draws, engine, numbers, timings, training
from acceptance.check import Check

of = functools.partial
REPORT = "paste acceptance.json into an issue"
DRAWS = (
    "Rollouts follow another distribution than the policy's: do not train; run with --only "
    f"random sampler on another GPU or driver, and {REPORT}."
)
HEAD = f"Losses and gradients would be wrong: do not train; {REPORT}, with the head's errors."


def _layouts() -> tuple[Check, ...]:
    flags = {
        "tp2": "--tensor-model-parallel-size 2",
        "pp2": "--pipeline-model-parallel-size 2",
        "dp2": "--overlap-grad-reduce",
    }
    return tuple(
        Check(
            f"layout-{name}",
            "the curve of one rank",
            of(training.layout, ranks=2, flags=own),
            f"Train without {own} on this cluster; look at --only layout with NCCL_DEBUG=INFO.",
            gpus=2,
            runs=True,
            limit=600,
        )
        for name, own in flags.items()
    )


CHECKS: tuple[Check, ...] = (
    Check(
        "versions",
        "card, versions, allocator",
        numbers.surroundings,
        "The installation is incomplete: see README.md, and tools/setup_environment.sh.",
    ),
    Check("random", "uniform numbers, bit for bit", numbers.random_numbers, DRAWS),
    Check("sampler", "draws against softmax, chi-square", draws.distribution, DRAWS),
    Check(
        "sampler-split",
        "the same draws on two ranks",
        draws.split_vocabulary,
        f"Train without tensor parallelism, whose ranks would draw other tokens; {REPORT}.",
        gpus=2,
        runs=True,
    ),
    Check(
        "head-fp32",
        "head against float64",
        of(numbers.head, dtype=torch.float32, bound=3e-6),
        f"{HEAD} TF32 would explain 1e-3: unset NVIDIA_TF32_OVERRIDE.",
    ),
    Check(
        "head-bf16",
        "head against float64",
        of(numbers.head, dtype=torch.bfloat16, bound=6e-3),
        HEAD,
    ),
    Check(
        "head-main-grad",
        "weight gradient in fp32",
        numbers.main_grad,
        f"Pass --no-gradient-accumulation-fusion, and {REPORT}.",
    ),
    Check(
        "sdpa",
        "tree attention against float64",
        of(numbers.tree_attention, backend="sdpa"),
        f"Pass --rmt-attention flex if that check holds, and {REPORT}.",
    ),
    Check(
        "lse",
        "tree attention against float64",
        of(numbers.tree_attention, backend="lse"),
        f"Pass --rmt-attention sdpa, and {REPORT}.",
    ),
    Check(
        "flex",
        "tree attention against float64",
        of(numbers.tree_attention, backend="flex"),
        "Pass --rmt-attention sdpa. Too many graphs: a step recompiles; wrong numbers: report.",
        gpus=1,
        limit=300,
    ),
    *(
        Check(
            f"decode-std{std}",
            "decode attention against float64",
            of(numbers.decode_attention, std=float(std)),
            f"Rollouts would read other keys or round them: do not train; {REPORT}.",
        )
        for std in (1, 3, 6, 10)
    ),
    Check(
        "decode-store",
        "rotated and stored tokens against float64",
        numbers.rotate_and_store,
        f"Rollouts would read other keys: do not train; {REPORT}.",
    ),
    Check(
        "decode-graph",
        "recorded steps draw the same",
        decoding.graph,
        "Pass --rmt-no-decode-graph (slower). Steps that were not recorded only cost time.",
    ),
    Check(
        "repeated-rows",
        "gradient of rows read many times",
        numbers.repeated_rows,
        "A resumed run is not bit for bit the same: pass --deterministic-mode if that matters.",
    ),
    Check(
        "waits",
        "the head waits for nothing",
        timings.waits,
        "The update is slower than need be, not wrong; the message names the operation.",
        gpus=1,
    ),
    Check(
        "te-layers",
        "Transformer Engine against local layers",
        engine.layers,
        "Pass --transformer-impl local, or the version of Transformer Engine in docs/support.md.",
        gpus=1,
    ),
    *(
        Check(
            f"fp8-{recipe}",
            "rollouts see new weights; control",
            of(engine.fp8_weights, recipe=recipe),
            "Leave out --fp8-format: rollouts would run on weights of an earlier step. If only the "
            "control is small, the check cannot tell, and Transformer Engine has changed.",
            gpus=1,
        )
        for recipe in ("tensorwise", "blockwise")
    ),
    Check(
        "speed-decode",
        "token step, 4 and 16 samples",
        decoding.speed,
        "Out of memory: another program uses the GPU. Else see decode-graph.",
        limit=300,
    ),
    Check(
        "speed-flex",
        "forward and backward",
        timings.flex_speed,
        f"Pass --rmt-attention sdpa, and {REPORT}.",
        gpus=1,
        limit=300,
    ),
    Check(
        "speed-head",
        "chunks of 384 and 4096",
        timings.head_speed,
        "Out of memory: another program uses the GPU.",
        gpus=1,
    ),
    Check(
        "run-inputs",
        "a tiny model, converted",
        training.inputs,
        "The checks of runs need it: see the message; tools/convert_checkpoint.py may be missing "
        "a package.",
        runs=True,
        limit=400,
    ),
    Check(
        "run-fp32",
        "rollouts and update agree",
        of(training.rollouts_and_update, flags=(), bound=1e-4),
        "Rollouts are off policy: do not train. If decode-std and flex or sdpa hold, the rotary "
        f"embedding or a norm differs; {REPORT}.",
        runs=True,
        limit=600,
    ),
    Check(
        "run-bf16",
        "rollouts and update agree",
        of(training.rollouts_and_update, flags=("--bf16",), bound=5e-2),
        "See run-fp32; if only bf16 fails, watch 'rmt logprob difference' in a run of your own.",
        runs=True,
        limit=600,
    ),
    Check(
        "run-te",
        "the same, Transformer Engine",
        of(training.rollouts_and_update, flags=training.ENGINE, bound=5e-2),
        "Pass --transformer-impl local, or see te-layers.",
        gpus=1,
        runs=True,
        limit=600,
    ),
    Check(
        "run-fp8",
        "the same, FP8 by tensors",
        of(
            training.rollouts_and_update,
            flags=(*training.ENGINE, "--fp8-format", "e4m3", "--fp8-recipe", "tensorwise"),
            bound=0.3,
        ),
        "Leave out --fp8-format, or try blockwise, whose scales do not depend on the batch.",
        gpus=1,
        runs=True,
        limit=600,
    ),
    Check(
        "run-resumed",
        "goes on as if it had not stopped",
        training.resumed,
        f"Do not resume runs on this machine before it is understood; {REPORT}.",
        runs=True,
        limit=900,
    ),
    Check(
        "run-twice",
        "the same seed again, bf16",
        training.repeated,
        "A run ended with an error: see its log in the folder of --keep.",
        runs=True,
        limit=600,
    ),
    Check(
        "memory",
        "peak of a run against the planner",
        training.memory,
        "Plan with --memory-gib lowered by the difference; a planner that says too little can end "
        f"a run. {REPORT[0].upper()}{REPORT[1:]}.",
        runs=True,
        limit=600,
    ),
    *_layouts(),
    Check(
        "layout-ep2",
        "the curve of one rank",
        training.experts,
        "Train mixtures of experts without --expert-model-parallel-size on this cluster.",
        gpus=2,
        runs=True,
        limit=900,
    ),
    Check(
        "uneven-dp2",
        "30 steps of uneven rollouts end",
        training.uneven,
        "Ranks wait for each other: set TORCH_NCCL_TRACE_BUFFER_SIZE=2000, run "
        f"--only uneven again, and {REPORT} with the trace.",
        gpus=2,
        runs=True,
        limit=600,
    ),
)
