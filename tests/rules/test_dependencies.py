"""What the package imports is what it declares."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.rules.test_architecture import ROOT, imports, modules

EXTRAS = {  # of modules that nothing else imports but inside a function that looks first
    "obsdiff.embedded.draw_emoji": "emoji",
    "obsdiff.evaluation.imagenet": "perceptual",
}
ASKED_FOR = {  # by libraries, for what we ask of them
    "tensorboard": "Lightning's TensorBoardLogger writes with it",
}


def names(requirements):
    return {re.match(r"[\w.-]+", name)[0].lower().replace("_", "-") for name in requirements}


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = names(project["dependencies"])
    own = {"obsdiff", "obsdiff_shrunk"}
    homes = packages_distributions()
    missing = set()
    for module, path in modules():
        extra = names(project["optional-dependencies"][EXTRAS[module]]) if module in EXTRAS else set()
        for top in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - own:
            if not (declared | extra) & names(homes.get(top, [top])):
                missing.add(f"{module} imports {top}")
    assert not missing


def test_every_declaration_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    homes = packages_distributions()
    tops = {name.split(".")[0] for _, path in modules() for name in imports(path)}
    used = {home for top in tops for home in names(homes.get(top, [top]))}
    extras = [project["optional-dependencies"][extra] for extra in EXTRAS.values()]
    unused = names([*project["dependencies"], *(name for extra in extras for name in extra)]) - used
    assert unused == ASKED_FOR.keys()


def at_the_top(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_what_needs_an_extra_is_imported_by_nothing():
    assert not [module for module, path in modules() if EXTRAS.keys() & set(at_the_top(path))]
