"""The package's public names, which are imported when they are first used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tapvit_jax as tap


def test_every_public_name_is_there_for_programs_and_for_type_checkers():
    tree = ast.parse(Path(tap.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {name: f"tapvit_jax.{home}" for name, home in tap._HOME.items()}
    assert set(declared) == set(tap.__all__) <= set(dir(tap))
    for name, home in declared.items():
        found = getattr(tap, name)
        assert found is getattr(sys.modules[home], name)
    with pytest.raises(AttributeError, match="no attribute 'recovery'"):
        _ = tap.recovery


def test_every_public_function_says_where_it_is_from():
    functions = filter(inspect.isfunction, (getattr(tap, name) for name in tap.__all__))
    assert [found.__name__ for found in functions if "Source:" not in found.__doc__] == []


def test_reading_images_needs_no_jax():
    code = (
        "import sys, tapvit_jax.data.sources, tapvit_jax.data.workers; print('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
