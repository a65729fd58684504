"""What a run asks the model: the template in token ids, and how long its answers may get."""

from argparse import Namespace
from typing import Any

from megatron_rmt.prompt.template import Template, chat_template, load_template


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of prompt by Megatron's ``tokenizer``, no special tokens added."""
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    if hasattr(inner, "add_special_tokens"):
        return list(inner.encode(text, add_special_tokens=False)) if text else []
    return list(tokenizer.tokenize(text)) if text else []


def prompt_template(args: Namespace, tokenizer: Any) -> Template:
    """The template that the flags ask for, with the tokenizer's chat markers where it has them.

    Raises:
        ValueError: no such template, or the chat markers do not go round it.
    """
    template = load_template(args.rmt_template)
    if args.rmt_no_chat:
        return template
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    return chat_template(template, inner)


def longest_position(args: Namespace, tokenizer: Any, template: Template) -> int:
    """A bound on every position id: documents with their heads, stem, thought, answer."""
    budget = max(args.rmt_initial_budget, args.rmt_minimum_budget)
    prompt = len(encode_prompt(tokenizer, template.head))
    prompt += len(encode_prompt(tokenizer, template.stem_text(budget)))
    # A forced end of thought and, in the warm-up, a written answer, whatever its length.
    close = len(encode_prompt(tokenizer, template.close))
    return args.seq_length + prompt + 2 * budget + 2 * close + args.rmt_answer_tokens + 16


def position_problem(args: Namespace, longest: int) -> str | None:
    """One sentence if the model has no position ids for ``longest`` of them."""
    limit = args.max_position_embeddings
    if args.position_embedding_type == "none" or limit is None or longest <= limit:
        return None
    return (
        f"--max-position-embeddings is {limit} but a sample of {args.seq_length} tokens, the "
        f"prompt and 2 * {args.rmt_initial_budget} tokens of thought with their answer take "
        f"{longest}; lower --rmt-initial-budget or --seq-length, or raise "
        "--max-position-embeddings if the model allows."
    )
