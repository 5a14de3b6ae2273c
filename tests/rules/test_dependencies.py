"""What the package imports is what it declares."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.rules.test_architecture import ROOT, imports, modules

EXTRAS = {"obsdiff.embedded.draw_emoji": "emoji"}  # of modules that nothing else imports


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


def test_what_needs_an_extra_is_imported_by_nothing():
    assert not [module for module, path in modules() if module not in EXTRAS and EXTRAS.keys() & set(imports(path))]
