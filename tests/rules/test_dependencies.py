"""What the package imports is what it declares."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.rules.test_architecture import ROOT, imports, modules


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", name)[0].lower() for name in project["dependencies"]}
    own = {"obsdiff", "obsdiff_shrunk"}
    homes = packages_distributions()
    missing = set()
    for module, path in modules():
        for top in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - own:
            if not declared & {name.lower() for name in homes.get(top, [top])}:
                missing.add(f"{module} imports {top}")
    assert not missing
