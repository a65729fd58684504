"""Prompt templates as data.

One prompt is `head` + document prefix + `stem`; the model answers with a thought, the marker
`close`, and the answer. Documents are shared between positions (the trunk), stems between the
rollouts of a position, so that `head` must not depend on the budget.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

BUDGET = "{budget}"
BOX = b"\\boxed{"
MAXIMUM_BOX_DEPTH = 8
# The automaton that follows responses has a state for each byte of `close`, and each state a column
# for each token of the vocabulary.
LONGEST_CLOSE = 256


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
        name: what it is called on the command line.
        head: text before the document; may be empty.
        stem: text after the document's prefix; holds `{budget}`. The token that follows it is the
            first of the thought.
        close: the text that ends a thought.
        answer: "boxed" or "next" (see the module's docstring).

    Raises:
        ValueError: a field cannot be used.
    """

    name: str
    head: str
    stem: str
    close: str
    answer: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ValueError(f"template field {field.name} is {value!r}; pass a string")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(
                    f"template field {field.name} holds half of a surrogate pair, which is no "
                    "text; write the whole character"
                )
        if BUDGET not in self.stem:
            raise ValueError(f"template {self.name!r} has no {BUDGET} in its stem; add it there")
        if BUDGET in self.head:
            raise ValueError(
                f"template {self.name!r} has {BUDGET} in its head, which all budgets share; "
                "move it to the stem"
            )
        if not self.close:
            raise ValueError(f"template {self.name!r} has an empty close; pass the end marker")
        if len(self.close.encode()) > LONGEST_CLOSE:
            raise ValueError(
                f"template {self.name!r} has a close of {len(self.close.encode())} bytes; pass an "
                f"end marker of at most {LONGEST_CLOSE}"
            )
        if self.answer not in ("boxed", "next"):
            raise ValueError(
                f"template {self.name!r} has answer {self.answer!r}; pass 'boxed' or 'next'"
            )

    @property
    def opening(self) -> str:
        """The tag that opens a thought, by the one that closes it: `<think>` for `</think>`."""
        return self.close.replace("</", "<", 1)

    def stem_text(self, budget: int) -> str:
        """The stem with the budget filled in."""
        return self.stem.replace(BUDGET, str(budget))


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # RPT's form (arXiv 2506.08007): the task first, the document under a heading.
        Template(
            name="rpt",
            head=(
                'The text under "### Context" breaks off. Find out how it goes on: predict its '
                "very next token. First reason step by step between <think> and </think> about "
                "what the text says and which continuations are plausible; you are told below how "
                "long to think. Then write your prediction, and nothing but it, in \\boxed{}.\n\n"
                "### Context\n"
            ),
            stem=(
                "\n\n### Prediction\n"
                "Use exactly {budget} tokens of thought, then give the next token of the context "
                "in \\boxed{}.\n"
                "<think>\n"
            ),
            close="</think>",
            answer="boxed",
        ),
        # Nothing before the document, so that the trunk is the raw text.
        Template(
            name="raw",
            head="",
            stem=(
                "\n\n### Prediction\n"
                "The text above breaks off. Predict its very next token: reason step by step "
                "between <think> and </think>, with exactly {budget} tokens of thought, then write "
                "the token, and nothing but it, in \\boxed{}.\n"
                "<think>\n"
            ),
            close="</think>",
            answer="boxed",
        ),
        # Our deviation from the paper, for small base models: they do not follow an instruction
        # (1 % of SmolLM2-135M's answers in the paper's form are well formed), but they go on with
        # a text that a short thought interrupts. The answer is the text after the thought.
        Template(
            name="inline",
            head="",
            stem="<think budget={budget}>",
            close="</think>",
            answer="next",
        ),
    )
}


def load_template(name_or_path: str) -> Template:
    """A built-in template, or one from a JSON file with the fields of `Template`.

    Raises:
        ValueError: neither a built-in name nor a readable file with exactly these fields.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    try:
        if not path.is_file():
            raise ValueError(
                f"template {_shortened(name_or_path)!r} is neither a file nor one of "
                f"{', '.join(TEMPLATES)}"
            )
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"template file {_shortened(name_or_path)} cannot be read: {error.strerror}"
        ) from None
    try:
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"template file {name_or_path} is not JSON in UTF-8: {error}") from None
    expected = [field.name for field in dataclasses.fields(Template)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(expected):
        raise ValueError(
            f"template file {name_or_path} must be one object with exactly the fields "
            f"{', '.join(expected)}"
        )
    try:
        return Template(**fields)
    except ValueError as error:
        raise ValueError(f"template file {name_or_path}: {error}") from None


def rendered_turn(tokenizer: Any | None, content: str) -> str:
    """A user's turn that says ``content`` and the beginning of the assistant's, as the chat
    template of a Hugging Face tokenizer writes them; "" where there is none.

    A chat template that cannot do without a system turn gets an ordinary one.

    Raises:
        ValueError: the chat template cannot be rendered.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    user = {"role": "user", "content": content}
    system = {"role": "system", "content": "You are a helpful assistant."}
    problem = ""
    for turns in ([user], [system, user]):
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A chat template is a program of its author's: it may raise anything.
        except Exception as error:
            said = " ".join(str(error).split()) or "nothing"
            problem = problem or f"{type(error).__name__}: {_shortened(said)}"
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    raise ValueError(
        f"the chat template of tokenizer {name} cannot be rendered, it says {problem}; pass "
        "--rmt-no-chat, or that and a template of your own with the chat markers in it"
    )


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def chat_template(template: Template, tokenizer: Any | None) -> Template:
    """The template with the chat markers of a Hugging Face tokenizer around it.

    The instruction becomes a user's turn and the thought opens the assistant's. With a head, head
    and document and instruction are the user's turn. Without one the document stays raw text and
    the user's turn, which then holds the instruction only, follows it (a begin-of-text token that
    merely opens the chat is dropped there). The stem's last opening tag (`<think>` for the close
    `</think>`) and what follows belong to the assistant; where the chat template opens the thought
    itself, they are not repeated.

    Returned unchanged: templates with the answer "next", whose answer continues the text, and any
    template if the tokenizer is None or has no chat template.

    Raises:
        ValueError: the tokenizer's chat template cannot be rendered, or alters or repeats the
            user's text.
    """
    if template.answer == "next" or not getattr(tokenizer, "chat_template", None):
        return template
    tag = template.opening
    cut = template.stem.rfind(tag)
    cut = len(template.stem) if cut < 0 else cut
    instruction, opening = template.stem[:cut], template.stem[cut:]

    document = "[[the document]]"
    content = template.head + document + instruction if template.head else instruction.strip()
    rendered = rendered_turn(tokenizer, content)
    landmark = document if template.head else instruction.strip()
    if rendered.count(landmark) != 1:
        raise ValueError(
            f"the tokenizer's chat template does not keep the user's text as it is; use template "
            f"{template.name!r} without chat markers"
        )
    if opening and rendered.rstrip().endswith(tag):
        opening = ""
    if template.head:
        head, stem = rendered.split(document)
    else:
        head, stem = "", rendered
        begin = getattr(tokenizer, "bos_token", None)
        if begin and stem.startswith(begin) and stem.count(begin) == 1:
            stem = stem.removeprefix(begin)
    return dataclasses.replace(template, head=head, stem=stem + opening)
