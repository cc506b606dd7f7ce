"""layers/__init__.py: the package's face."""

import subprocess
import sys

import layers


def test_the_public_parts_are_there() -> None:
    from layers import DropPath, drop_path, drop_path_rates
    from layers.drop_path import DropPath as in_its_file

    assert DropPath is in_its_file and callable(drop_path) and callable(drop_path_rates)
    assert {"DropPath", "drop_path", "drop_path_rates"} < set(layers.__all__)
    assert layers.__all__ == sorted(set(layers.__all__))
    assert all(callable(getattr(layers, name)) for name in layers.__all__)


def test_it_imports_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from layers import *; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'layers'}"
