"""The README's Python example runs as it stands, on small stand-ins for the user's files."""

import re
from pathlib import Path

import jax
import numpy as np

import tapvit_jax as tap
from tapvit_jax.__main__ import _parser
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.models import backbone, vit
from tapvit_jax.models.registry import Model

README = Path(__file__).parent.parent / "README.md"


def small_model(*_):
    """What stands for DeiT-S: a network for the digits that scikit-learn brings."""
    config = vit.vit_config(
        image_size=8,
        patch_size=4,
        in_channels=1,
        num_classes=10,
        depth=2,
        num_heads=2,
        embed_dim=16,
    )
    params = backbone.init(config, jax.random.key(0))
    return Model(config, params, Preprocess(8, (0.3,), (0.4,), channels=1), name="dense")


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tap, "load_timm", small_model)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(re.sub('"(public|private)-images"', '"digits"', code), names)
    dense, small = tap.cost(names["model"].config), tap.cost(names["small"].config)
    assert 0.45 < small.macs / dense.macs <= 0.5
    np.testing.assert_array_equal(
        names["logits"], names["small"].apply(names["batches"][0]["image"])
    )
    written = {"extractor", "device.gmm", "pool-features", "small", "recovered-timm"}
    written |= {"small.onnx", "small.onnx.json", "small.hlo", "small.hlo.json"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_every_command_in_the_readme_is_one():
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    tapvit (\S+) +(.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert {name for name, _ in commands} >= {"convert", "extractor", "device-fit", "prune"}
    options = {
        name: {flag for action in parser._actions for flag in action.option_strings}
        for action in _parser()._actions
        if hasattr(action, "choices") and isinstance(action.choices, dict)
        for name, parser in action.choices.items()
    }
    for name, arguments in commands:
        assert set(re.findall(r"--[a-z-]+", arguments)) <= options[name], name
