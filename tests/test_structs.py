import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.digits import get_config
from experiments.config import DataConfig, DenseConfig, ExperimentConfig, read
from tapvit_jax.data.partition import PartitionConfig
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.importance.criteria import CriterionConfig
from tapvit_jax.importance.layers import LayerConfig
from tapvit_jax.importance.neurons import NeuronConfig, TermWeights
from tapvit_jax.models.convnet import ConvNetConfig
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import SwinConfig
from tapvit_jax.models.vit import ViTConfig, vit_config
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.proxy.features import ExtractorConfig
from tapvit_jax.proxy.gmm import GmmConfig
from tapvit_jax.proxy.select import SelectConfig
from tapvit_jax.prune.allocate import AllocateConfig, RoundTo
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.structs import from_plain, to_plain
from tapvit_jax.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"size is {self.size}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner(1)
    several: tuple[Inner, ...] = ()
    share: float = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    stride: Literal[1, 2] = 1
    pair: tuple[int, str] = (1, "x")
    maybe: int | None = None
    either: int | str | tuple[float, ...] = 0
    perhaps: Inner | None = None
    table: Mapping[str, Inner] = dataclasses.field(default_factory=dict)
    rows: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None


def refused(cls, value, name="config"):
    with pytest.raises(InputError) as caught:
        from_plain(cls, value, name)
    return str(caught.value)


def there_and_back(value):
    return from_plain(type(value), json.loads(json.dumps(to_plain(value))))


def test_models_come_back_from_json():
    dense = vit_config(depth=2, num_heads=2, embed_dim=8, image_size=8, patch_size=4, num_classes=3)
    blocks = (*dense.blocks, BlockConfig(1, 0, 3, 7, attn=False))
    config = dataclasses.replace(dense, blocks=blocks, pool="mean", dtype="bfloat16")
    back = there_and_back(config)
    assert back == config and hash(back) == hash(config)
    assert isinstance(back.blocks, tuple) and isinstance(back.blocks[2], BlockConfig)


def test_every_field_comes_back_from_json():
    value = Outer(
        inner=Inner(3, "y"),
        several=(Inner(1), Inner(2)),
        share=1.0,
        flag=True,
        kind="b",
        stride=2,
        pair=(5, "z"),
        maybe=0,
        either=(1.0, 2.5),
        perhaps=Inner(9),
        table={"k": Inner(4)},
        rows={"r": 1.5},
        anything={"free": [1, {"x": None}]},
    )
    assert {f.name for f in dataclasses.fields(value) if f.default == getattr(value, f.name)} == (
        set()
    )
    assert there_and_back(value) == value
    assert there_and_back(Outer()) == Outer()


def test_a_whole_experiment_comes_back_from_json_and_from_ml_collections():
    config = read(get_config())
    assert isinstance(config, ExperimentConfig) and isinstance(config.budgets, tuple)
    assert there_and_back(config) == config
    assert read(ConfigDict(json.loads(json.dumps(to_plain(config))))) == config
    changed = get_config()
    changed.lock()
    changed.recover.epochs = 7
    assert read(changed).recover.epochs == 7
    assert read(changed) != config


def test_what_is_a_dataclass_already_is_kept():
    inner = Inner(2)
    assert from_plain(Outer, {"inner": inner}).inner is inner
    assert "expected a mapping of Inner's fields" in refused(Outer, {"inner": Outer()})


def test_unknown_fields_are_named_with_what_may_have_been_meant():
    assert refused(Outer, {"flg": True}) == "unknown field config.flg: did you mean flag?"
    assert refused(Outer, {"inner": {"size": 1, "naem": "x"}}, "model.json") == (
        "unknown field model.json.inner.naem: did you mean name?"
    )
    assert refused(Inner, {"size": 1, "zzz": 1}) == (
        "unknown field config.zzz: expected one of size, name"
    )
    assert "unknown field config.7: expected one of" in refused(Inner, {"size": 1, 7: 1})
    assert refused(Inner, {}) == "missing field config.size"


def test_all_problems_are_named_at_once():
    config = get_config().to_dict()
    config["seeed"] = 1
    del config["name"]
    config["dense"]["arguments"] = "six"
    config["dense"]["train"]["epochs"] = 1.5
    config["data"]["preprocess"]["image_size"] = 0
    config["budgets"] = ("macs=0.5", 3)
    problems = refused(ExperimentConfig, config).split("; ")
    assert sorted(problems) == sorted(
        [
            "unknown field config.seeed: did you mean seed?",
            "missing field config.name",
            "config.dense.arguments is 'six', expected a mapping",
            "config.dense.train.epochs is 1.5, expected int",
            "config.data.preprocess: image_size is 0, expected 1 or more",
            "config.budgets[1] is 3, expected str",
        ]
    )


def test_what_post_init_refuses_gets_the_path():
    assert refused(Outer, {"inner": {"size": 0}}) == ("config.inner: size is 0, expected 1 or more")
    assert refused(Outer, {"several": [{"size": 1}, {"size": -1}]}) == (
        "config.several[1]: size is -1, expected 1 or more"
    )
    plain = to_plain(
        vit_config(depth=2, num_heads=2, embed_dim=8, image_size=8, patch_size=4, num_classes=3)
    )
    plain["blocks"][1]["mlp_dim"] = -4
    assert refused(ViTConfig, plain, "m: config") == (
        "m: config.blocks[1]: mlp_dim is -4, expected 0 to 1048576"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inner", 3, "config.inner is 3, expected a mapping of Inner's fields"),
        ("inner", None, "config.inner is None, expected a mapping of Inner's fields"),
        ("inner", {"size": True}, "config.inner.size is True, expected int"),
        ("inner", {"size": "1"}, "config.inner.size is '1', expected int"),
        ("inner", {"size": 3.0}, "config.inner.size is 3.0, expected int"),
        ("inner", {"size": None}, "config.inner.size is None, expected int"),
        ("inner", {"size": 1, "name": 1}, "config.inner.name is 1, expected str"),
        ("several", "ab", "config.several is 'ab', expected a list"),
        ("several", {"size": 1}, "config.several is {'size': 1}, expected a list"),
        ("share", "0.5", "config.share is '0.5', expected float"),
        ("share", True, "config.share is True, expected float"),
        ("share", [0.5], "config.share is [0.5], expected float"),
        ("flag", 1, "config.flag is 1, expected bool"),
        ("flag", "true", "config.flag is 'true', expected bool"),
        ("kind", "c", "config.kind is 'c', expected one of 'a', 'b'"),
        ("kind", ["a"], "config.kind is ['a'], expected one of 'a', 'b'"),
        ("kind", None, "config.kind is None, expected one of 'a', 'b'"),
        ("stride", 3, "config.stride is 3, expected one of 1, 2"),
        ("stride", True, "config.stride is True, expected one of 1, 2"),
        ("stride", 1.0, "config.stride is 1.0, expected one of 1, 2"),
        ("pair", [1], "config.pair has 1 entries, expected 2"),
        ("pair", [1, "x", 2], "config.pair has 3 entries, expected 2"),
        (
            "pair",
            ["x", 1],
            "config.pair[0] is 'x', expected int; config.pair[1] is 1, expected str",
        ),
        ("maybe", "1", "config.maybe is '1', expected int"),
        ("maybe", False, "config.maybe is False, expected int"),
        ("either", None, "config.either is None, expected int"),
        ("either", 1.5, "config.either is 1.5, expected int"),
        ("perhaps", {"size": 0}, "config.perhaps: size is 0, expected 1 or more"),
        ("table", [1], "config.table is [1], expected a mapping"),
        ("table", {"k": {"size": 0}}, "config.table.k: size is 0, expected 1 or more"),
        ("rows", {"r": "x"}, "config.rows.r is 'x', expected float"),
    ],
)
def test_values_of_another_type_are_refused(field, value, message):
    assert refused(Outer, {field: value}) == message


def test_whole_numbers_serve_as_floats_but_not_the_reverse():
    found = from_plain(Outer, json.loads('{"share": 1, "either": [1, 2.5], "rows": {"r": 2}}'))
    assert isinstance(found.share, float) and found.share == 1.0
    assert [type(x) for x in found.either] == [float, float]
    assert isinstance(found.rows["r"], float)
    assert refused(Outer, {"share": 10**400}).endswith("expected a smaller number")
    assert refused(Outer, {"maybe": 3.0}) == "config.maybe is 3.0, expected int"


def test_the_whole_value_may_be_of_any_kind():
    for value in (None, [], "x", 3, True):
        assert f"config is {value!r}, expected a mapping" in refused(ViTConfig, value)
    assert from_plain(Literal["a", "b"], "b") == "b"
    assert (
        refused(Literal["a", "b"], {}, "spec: kind") == "spec: kind is {}, expected one of 'a', 'b'"
    )


def test_messages_stay_readable_whatever_a_file_holds():
    value = {"k" * 10**6: 1} | {f"n{i}": 1 for i in range(10**4)} | {"depth": "x" * 10**6}
    message = refused(ConvNetConfig, value)
    assert len(message) < 10**4 and message.endswith(" more")
    assert "unknown field config." + "k" * 100 + ":" in message
    assert len(refused(Outer, {"several": ["x" * 10**3] * 10**4})) < 10**4


def checked_configs():
    """A config of every kind that checks its own fields, as their defaults or small ones."""
    preprocess = Preprocess(8, (0.5,), (0.5,), channels=1)
    return [
        preprocess,
        ConvNetConfig(image_size=8, num_classes=3),
        ResNetConfig(image_size=32, num_classes=3, bottleneck=False, depths=(1,)),
        vit_config(depth=1, num_heads=2, embed_dim=8, image_size=8, patch_size=4, num_classes=3),
        SwinConfig(8, 4, 3, 8, (4,), (1,), 2, (BlockConfig(2, 4, 4, 8),)),
        BlockConfig(2, 4, 4, 8),
        PartitionConfig(),
        ExtractorConfig(),
        GmmConfig(),
        SelectConfig(),
        CriterionConfig(),
        LayerConfig(),
        NeuronConfig(),
        NeuronConfig().mlp,
        AllocateConfig(),
        RoundTo(),
        Budget(macs=0.5),
        RecoverConfig(),
        PruneConfig(),
        TrainConfig(),
        DataConfig("digits", preprocess, PartitionConfig()),
        DenseConfig(),
        read(get_config()),
    ]


@pytest.mark.parametrize("config", checked_configs(), ids=lambda config: type(config).__name__)
def test_every_config_checks_all_its_fields(config):
    for field in dataclasses.fields(config):
        with pytest.raises(InputError, match=rf"^{field.name} is <object .*, expected"):
            dataclasses.replace(config, **{field.name: object()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainConfig(epochs=1.5, batch_size=2.5),
            "epochs is 1.5, expected int; batch_size is 2.5, expected int",
        ),
        (lambda: AllocateConfig(alpha=np.nan), "alpha is nan, expected a number"),
        (lambda: AllocateConfig(alpha=np.inf), "alpha is inf, expected a finite number"),
        (lambda: AllocateConfig(min_dim=1.5), "min_dim is 1.5, expected int"),
        (lambda: AllocateConfig(round_to=1.5), "round_to is 1.5, expected int"),
        (lambda: TermWeights(0.5, np.nan, 0.5), "redundancy is nan, expected a number"),
        (lambda: TermWeights(0.5, np.inf, 0.5), "term weights are .* all finite"),
        (lambda: CriterionConfig(max_batches=1.5), "max_batches is 1.5, expected int"),
        (lambda: Budget(macs="0.5"), "macs is '0.5', expected float"),
        (lambda: Budget(macs=np.nan), "macs is nan, expected a number"),
        (lambda: ExtractorConfig(kind="Pooled"), "kind is 'Pooled', expected one of 'embedding'"),
        (lambda: ExtractorConfig(dim=0), "dim is 0, expected 1 or more"),
        (lambda: ExtractorConfig(widths=(4, 0)), r"widths is \(4, 0\), expected one width"),
    ],
)
def test_what_no_config_may_hold(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_numpy_scalars_and_lists_become_what_a_config_holds():
    half, two = np.float32(0.5), np.int64(2)
    budget = Budget(macs=half, params=two)
    assert (budget.macs, budget.params) == (0.5, 2)
    assert (type(budget.macs), type(budget.params)) == (float, int)
    recipe = TrainConfig(epochs=two, learning_rate=half, warmup_epochs=1, feature_blocks=[two])
    assert recipe == TrainConfig(2, learning_rate=0.5, warmup_epochs=1.0, feature_blocks=(2,))
    assert hash(recipe) and json.dumps(recipe.identity())
    assert type(recipe.warmup_epochs) is float


def test_plain_values_are_dicts_and_lists():
    plain = to_plain({"a": (Inner(1), [Inner(2)]), 3: None})
    assert plain == {
        "a": [{"size": 1, "name": "x"}, [{"size": 2, "name": "x"}]],
        "3": None,
    }
