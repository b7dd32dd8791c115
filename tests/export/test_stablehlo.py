"""StableHLO files give the model's logits for any batch size."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.export.stablehlo import export_stablehlo, load_stablehlo


@pytest.mark.parametrize("family", ["tiny_model", "swin_model"])
def test_round_trip(request, images, tmp_path, family):
    model = request.getfixturevalue(family)
    report = export_stablehlo(model, tmp_path / "model.hlo", images=images)
    assert report.difference <= 1e-5
    run = load_stablehlo(tmp_path / "model.hlo")
    for size in (1, 2, 7):
        batch = np.resize(images, (size, *images.shape[1:]))
        np.testing.assert_allclose(run(batch), model.apply(batch), atol=1e-5)
    exported = jax.export.deserialize(bytearray((tmp_path / "model.hlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    spec = json.loads((tmp_path / "model.hlo.json").read_text())
    assert spec["kind"] == "stablehlo"
    assert spec["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_precision_is_compared_in_float32(tiny_model, images, tmp_path, dtype):
    model = tiny_model.replace(config=dataclasses.replace(tiny_model.config, dtype=dtype))
    report = export_stablehlo(model, tmp_path / "model.hlo", images=images)
    assert report.difference <= 1e-5
    run = load_stablehlo(tmp_path / "model.hlo")
    np.testing.assert_allclose(run(images), tiny_model.apply(images), atol=1e-5)


def test_float16_is_smaller_and_close(tiny_model, images, tmp_path):
    full = export_stablehlo(tiny_model, tmp_path / "full.hlo", images=images)
    half = export_stablehlo(tiny_model, tmp_path / "half.hlo", images=images, precision="float16")
    assert half.bytes < full.bytes
    assert 0 < half.difference < 0.02 * half.scale


def test_what_cannot_be_exported_leaves_nothing(tiny_model, images, tmp_path):
    with pytest.raises(InputError, match="int8 is for ONNX"):
        export_stablehlo(tiny_model, tmp_path / "model.hlo", images=images, precision="int8")
    with pytest.raises(InputError, match="not written"):
        export_stablehlo(tiny_model, tmp_path / "model.hlo", images=images, tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_stablehlo(tmp_path / "model.hlo")
    (tmp_path / "model.hlo").write_bytes(b"nothing at all")
    with pytest.raises(InputError, match="no serialised StableHLO"):
        load_stablehlo(tmp_path / "model.hlo")


def test_a_damaged_module_is_refused_when_it_is_read(tiny_model, images, tmp_path):
    path = tmp_path / "model.hlo"
    export_stablehlo(tiny_model, path, images=images)
    data = bytearray(path.read_bytes())
    # Within the module, which JAX's own reader takes as it is until it is called.
    data[data.index(b"StableHLO") + 20] ^= 255
    path.write_bytes(data)
    jax.export.deserialize(data)
    with pytest.raises(InputError, match=r"model\.hlo: is no serialised StableHLO"):
        load_stablehlo(path)
