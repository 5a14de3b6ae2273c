"""Private names stay in their module, and long parameter lists become dataclasses."""

import ast

from torch import nn

from tests.rules.test_architecture import modules

MOST = 8
# More than eight parameters (self does not count): this list only gets shorter, and its numbers smaller.
LONG = {
    "obsdiff.data.images.ImageCaptionDataModule.__init__": 10,
    "obsdiff.data.trajectories.TrajectoryDataModule.__init__": 11,
    "obsdiff.embedded.pretrain_sd3.DigitsSD3Pretraining.__init__": 9,
    "obsdiff.pruning.calibrate.calibrate": 12,
    "obsdiff.pruning.oneshot.prune": 15,
    "obsdiff.pruning.stream.stream": 10,
    "obsdiff.training.recovery.Recovery.__init__": 11,
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in modules()}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def definitions(tree):
    """Private names that a module defines: functions, classes, variables, and attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


PRIVATE = {module: {name for name in definitions(tree) if is_private(name)} for module, tree in TREES.items()}


def test_private_names_are_not_imported():
    wrong = [
        f"{module} imports {name.name} of {node.module}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "obsdiff"
        for name in node.names
        if is_private(name.name)
    ]
    assert not wrong


def test_private_names_of_other_modules_are_not_used():
    """``x._name`` where x is not the object itself: whatever x is, ``_name`` must not be another module's of ours."""
    wrong = [
        f"{module}:{node.lineno} uses {ast.unparse(node)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and ast.unparse(node.value) not in ("self", "cls", "super()")
        and node.attr not in PRIVATE[module]
        and not hasattr(nn.Module(), node.attr)  # such as _parameters, which is torch's
        and any(node.attr in names for names in PRIVATE.values())
    ]
    assert not wrong


def functions(tree, prefix):
    """Every function of a module with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            name = f"{prefix}.{node.name}"
            if isinstance(node, FUNCTIONS):
                yield name, node
            yield from functions(node, name)
        else:
            yield from functions(node, prefix)


def test_parameter_lists_are_short():
    found = {}
    for module, tree in TREES.items():
        for name, node in functions(tree, module):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            if count > MOST:
                found[name] = count
    longer = {name: count for name, count in found.items() if count > LONG.get(name, MOST)}
    assert not longer, "make a dataclass of what belongs together"
    shorter = {name: found.get(name) for name, count in LONG.items() if found.get(name) != count}
    assert not shorter, "these got shorter: write so into LONG"
