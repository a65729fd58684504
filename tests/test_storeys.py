"""The house has storeys: a module imports only what stands below it."""

import ast
import sys

from tests.distributed import REPOSITORY

PACKAGE = REPOSITORY / "megatron_rmt"
# From the ground up; what stands on one storey does not import its neighbours.
STOREYS = (
    "algorithm cpu prompt",
    "model",
    "rollout",
    "update",
    "mid_training",
    "step probe",
    "job",
    "",
)
LEVELS = {place: level for level, places in enumerate(STOREYS) for place in places.split()}
ROOF = len(STOREYS)


def test_imports_run_downwards_only():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node):
                if name != place and LEVELS.get(name, ROOF) >= LEVELS.get(place, ROOF):
                    upward.append(f"{path.relative_to(PACKAGE)}:{node.lineno} imports {name}")
    assert upward == []


def test_the_algorithm_needs_torch_alone():
    for path in (PACKAGE / "algorithm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {module.split(".")[0] for module in modules}
            assert roots <= {"torch", "megatron_rmt", *sys.stdlib_module_names}, path.name


def _imported(node: ast.AST) -> list[str]:
    """The folders or modules of the package, by first name, that an import statement reads."""
    if isinstance(node, ast.ImportFrom) and node.module == "megatron_rmt":
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    else:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return [parts[1] for m in modules if (parts := m.split("."))[0] == "megatron_rmt" and parts[1:]]
