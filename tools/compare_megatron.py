"""What another release of Megatron changed of what RMT touches, by their sources alone.

    python tools/compare_megatron.py Megatron-LM    # a checkout
    python tools/compare_megatron.py --list         # the symbols, as docs/releases.md has them

The symbols are the patches, what they rely on, and every name that the package imports from
``megatron``. Nothing is imported from the checkout, and nothing of it is run. Exit code 1 if a
symbol is gone or lacks a parameter that RMT names; what else differs is for a person to read.
"""

import argparse
import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron.core

from megatron_rmt.job.patches import PATCHES, RELIED_ON

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_rmt"
INSTALLED = Path(megatron.core.__path__[0]).parents[1]
# A name may be imported from one module after another.
_DEEPEST = 8


@dataclass(frozen=True, order=True)
class Touched:
    """module, name: where RMT looks for it. kind: "replaced", "relied on" or "used". needed:
    parameters that RMT names."""

    module: str
    name: str
    kind: str
    needed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def touched_symbols() -> list[Touched]:
    """All symbols of Megatron that the package touches, each once, sorted."""
    found: dict[str, Touched] = {}
    for kind, symbols in (("replaced", PATCHES), ("relied on", RELIED_ON)):
        for one in symbols:
            own = Touched(one.module, one.name, kind, tuple(one.parameters.split()))
            found.setdefault(str(own), own)
    for path in sorted(PACKAGE.rglob("*.py")):
        for module, name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            own = Touched(module, name, "used")
            found.setdefault(str(own), own)
    return sorted(found.values())


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) that a file imports from Megatron; of a module that it imports, what it uses
    of it."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "megatron":
            continue
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if _file(INSTALLED, whole) is None:
                yield node.module, alias.name
            else:
                modules[alias.asname or alias.name] = whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None:
                yield module, node.attr


def _file(root: Path, module: str) -> Path | None:
    place = root / module.replace(".", "/")
    return next(
        (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None
    )


def definition(root: Path, module: str, name: str, depth: int = 0) -> ast.AST | None:
    """What defines ``name`` for who imports it from ``module``, in the sources below ``root``: a
    function, a class, or an assignment; None if nothing does."""
    path = _file(root, module)
    if path is None or depth > _DEEPEST:
        return None
    first, _, rest = name.partition(".")
    found: ast.AST | None = None
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            # A module may define it in two ways, of which the first stands for both.
            found = found or node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == first for target in targets):
                found = found or node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if found is None and (alias.asname or alias.name) == first:
                    source = _absolute(module, path, node)
                    found = definition(root, source, alias.name, depth + 1)
    if rest and isinstance(found, ast.ClassDef):
        own = (node for node in found.body if isinstance(node, ast.FunctionDef))
        return next((node for node in own if node.name == rest), None)
    return found


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *filter(None, [node.module])])


def parameters(node: ast.AST | None) -> list[str]:
    """Names of the parameters of a function, or of what makes an object of a class."""
    if isinstance(node, ast.ClassDef):
        own = (one for one in node.body if isinstance(one, ast.FunctionDef))
        node = next((one for one in own if one.name == "__init__"), None)
    if not isinstance(node, ast.FunctionDef):
        return []
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [one.arg for one in every if one.arg != "self"]


def difference(symbol: Touched, root: Path, base: Path = INSTALLED) -> str | None:
    """How ``symbol`` below ``root`` differs from the one below ``base``; None if it does not."""
    before, now = (definition(place, symbol.module, symbol.name) for place in (base, root))
    if now is None:
        return None if before is None else "gone"
    lacking = sorted(set(symbol.needed) - set(parameters(now)))
    if lacking and before is not None:
        return f"gone: parameter {', '.join(lacking)}"
    then, here = parameters(before), parameters(now)
    added, left = ([one for one in a if one not in b] for a, b in ((here, then), (then, here)))
    if added or left:
        return "parameters: " + ", ".join([*(f"+{one}" for one in added), *(f"-{o}" for o in left)])
    return None if _code(before) == _code(now) else "code"


def _code(node: ast.AST | None) -> str:
    """The code of a definition without its texts, which are documentation for the most part."""
    if node is None:
        return ""
    for one in ast.walk(node):
        body = getattr(one, "body", None)
        if isinstance(body, list):
            one.body = [
                line
                for line in body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return ast.dump(node)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison; exit code 1 if something is gone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, help="folder that holds megatron/")
    parser.add_argument("--list", action="store_true", help="print the symbols as a table")
    args = parser.parse_args(argv)
    symbols = touched_symbols()
    if args.list:
        print("| symbol | how |\n|---|---|")
        for symbol in symbols:
            print(f"| `{symbol}` | {symbol.kind} |")
        return
    if args.checkout is None or _file(args.checkout, "megatron.core") is None:
        parser.exit(2, f"{args.checkout} holds no megatron/core; pass a checkout of Megatron-LM.\n")
    found = {str(symbol): difference(symbol, args.checkout) for symbol in symbols}
    for name, text in found.items():
        if text is not None:
            print(f"{name}: {text}")
    changed = [text for text in found.values() if text is not None]
    gone = [text for text in changed if text.startswith("gone")]
    print(f"{len(found)} symbols: {len(found) - len(changed)} the same, {len(gone)} gone")
    sys.exit(bool(gone))


if __name__ == "__main__":
    main()
