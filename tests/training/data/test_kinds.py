"""The table of data kinds: each is one module, imported when it is asked for."""

import subprocess
import sys
from importlib import import_module

import pytest

from training.data.kinds import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_the_module_of_a_kind_gives_what_is_asked_of_it(name: str) -> None:
    module = import_module(KINDS[name].module)
    assert callable(module.sources) and callable(module.class_names)
    assert KINDS[name].description and not KINDS[name].description.endswith(".")


def test_nobody_waits_for_what_another_kind_needs() -> None:
    code = (
        "import sys, training.config; from training.data.build import class_names_of_data; "
        "before = [name for name in ('training.data.digits', 'training.data.folder') if name in sys.modules]; "
        "names = class_names_of_data(training.config.load_config(None).data); "
        "print(before, 'sklearn' in sys.modules, len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False 10"
