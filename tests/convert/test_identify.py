"""What state dicts look like, from shapes alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapvit_jax.convert.identify import describe, sizes


def block(dim, mlp_dim=None, qkv=None):
    mlp_dim, qkv = mlp_dim or 4 * dim, qkv or 3 * dim
    return {
        "norm1.weight": (dim,),
        "attn.qkv.weight": (qkv, dim),
        "attn.proj.weight": (dim, qkv // 3),
        "mlp.fc1.weight": (mlp_dim, dim),
        "mlp.fc2.weight": (dim, mlp_dim),
    }


def below(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def vit(*, dim=384, depth=12, patch=16, positions=197, classes=1000, change=None, **more):
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, positions, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "norm.weight": (dim,)}
    for i in range(depth):
        shapes |= below(f"blocks.{i}", (change or {}).get(i, block(dim)))
    return shapes | ({"head.weight": (classes, dim)} if classes else {}) | more


def swin(*, head="head.fc", dim=96, window=7, change=None):
    shapes = {"patch_embed.proj.weight": (dim, 3, 4, 4), f"{head}.weight": (1000, 8 * dim)}
    for stage, depth in enumerate((2, 2, 6, 2)):
        table = {"attn.relative_position_bias_table": ((2 * window - 1) ** 2, 3 * 2**stage)}
        for i in range(depth):
            shapes |= below(f"layers.{stage}.blocks.{i}", block(dim * 2**stage) | table)
    return shapes | (change or {})


def resnet(depths, bottleneck, **more):
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 2048)}
    for stage, depth in enumerate(depths, start=1):
        width = 32 * 2**stage
        for i in range(depth):
            convs = {"conv1.weight": (width, 64, 1, 1), "conv2.weight": (width, width, 3, 3)}
            convs |= {"conv3.weight": (4 * width, width, 1, 1)} if bottleneck else {}
            shapes |= below(f"layer{stage}.{i}", convs)
    return shapes | more


STARTS = ("blocks.", "layers.0.blocks.", "layer1.")
SCALE = {"blocks.0.ls1.gamma": (384,)}
VIT = "of 12 blocks, embed_dim 384, patch 16, 197 positions, 1000 classes"
SCALED = VIT.replace("blocks", "blocks, with layer scale")
SWIN = "Swin with stage depths 2-2-6-2, embed_dim 96, patch 4, window 7, 1000 classes"
CASES = {
    "plain": (vit(), f"a ViT {VIT}"),
    "distilled": (
        vit(positions=198, dist_token=(1, 1, 384)),
        "a ViT of 12 blocks, embed_dim 384, patch 16, 198 positions, 1000 classes, distilled",
    ),
    "small": (
        vit(dim=12, depth=2, patch=4, positions=5, classes=0),
        "a ViT of 2 blocks, embed_dim 12, patch 4, 5 positions, no classifier",
    ),
    "deit3": (vit(**SCALE), f"a DeiT-III-like ViT {SCALED}"),
    "deit3_original": (vit(**{"blocks.0.gamma_1": (384,)}), f"a DeiT-III-like ViT {SCALED}"),
    "dinov2": (
        vit(patch=14, positions=1370, classes=0, **SCALE),
        "a DINOv2-like ViT of 12 blocks, with layer scale, embed_dim 384, patch 14, "
        "1370 positions, no classifier",
    ),
    "registers": (
        vit(reg_token=(1, 4, 384), **SCALE),
        f"a DINOv2-like ViT {SCALED}".replace("positions", "positions, 4 registers"),
    ),
    "mae": (vit(**{"decoder_blocks.0.norm1.bias": (1,)}), f"a masked autoencoder's ViT {VIT}"),
    "beit": (
        vit(**{"blocks.0.attn.relative_position_bias_table": (732, 12)}),
        f"a BEiT-like ViT {VIT}",
    ),
    "ragged_mlp": (vit(change={3: block(384, 100)}), f"a pruned or ragged ViT {VIT}"),
    "ragged_attention": (vit(change={3: block(384, qkv=600)}), f"a pruned or ragged ViT {VIT}"),
    "pruned_alike": (
        vit(change={i: block(384, qkv=600) for i in range(12)}),
        f"a pruned or ragged ViT {VIT}",
    ),
    "no_attention": (
        vit(change={3: {"mlp.fc1.weight": (1536, 384)}}),
        f"a pruned or ragged ViT {VIT}",
    ),
    "no_block": (vit(change={3: {}}), f"a pruned or ragged ViT {VIT}"),
    "within": (below("backbone", vit()), f"a ViT {VIT}, all under the prefix 'backbone.'"),
    "swin": (swin(), f"a {SWIN}"),
    "swin_window": (swin(window=12), f"a {SWIN}".replace("window 7", "window 12")),
    "swin_original": (swin(head="head"), f"a {SWIN}, in the original repository's names"),
    "swin_ragged": (
        swin(change={"layers.2.blocks.3.mlp.fc1.weight": (99, 384)}),
        f"a pruned or ragged {SWIN}",
    ),
    "swin_v2": (
        swin(change={"layers.0.blocks.0.attn.logit_scale": (3, 1, 1)}),
        f"a {SWIN}".replace("Swin", "Swin V2"),
    ),
    "resnet50": (
        resnet((3, 4, 6, 3), True),
        "a ResNet with bottleneck blocks 3-4-6-3, 1000 classes",
    ),
    "resnet18": (
        resnet((2, 2, 2, 2), False),
        "a ResNet with basic blocks 2-2-2-2, 1000 classes",
    ),
    "resnet_ragged": (
        resnet((2, 2), False)
        | {"layer1.1.conv1.weight": (5, 64, 3, 3), "layer1.1.conv2.weight": (64, 5, 3, 3)},
        "a pruned or ragged ResNet with basic blocks 2-2, 1000 classes",
    ),
    "resnext": (
        resnet((1,), True, **{"layer1.0.conv2.weight": (64, 2, 3, 3)}),
        "a ResNet with bottleneck blocks 1, grouped convolutions, 1000 classes",
    ),
    "resnet_d": (
        resnet((2, 2), False, **{"conv1.0.weight": (32, 3, 3, 3)}),
        "a ResNet with basic blocks 2-2, a deep stem, 1000 classes",
    ),
    "transformers": (
        {"vit.embeddings.patch_embeddings.projection.weight": (384, 3, 16, 16)},
        "a Hugging Face transformers model ('vit.embeddings.patch_embeddings.projection.weight', "
        "...): bring it under timm's names first",
    ),
    "torchvision": (
        {"encoder.layers.encoder_layer_0.ln_1.weight": (768,)},
        "a torchvision ViT ('encoder.layers.encoder_layer_0.ln_1.weight', ...): "
        "bring it under timm's names first",
    ),
    "unknown": (
        {"stem.0.weight": (1,), "stem.0.bias": (1,), "a" * 90: (1,), "last": (1,)},
        f"nothing that we know (first names: 'stem.0.weight', 'stem.0.bias', '{'a' * 57}...')",
    ),
    "endless": (
        {f"{start}{'9' * 5000}.mlp.fc1.weight": (1, 1) for start in STARTS},
        "nothing that we know (first names: "
        + ", ".join(f"'{start}{'9' * (57 - len(start))}...'" for start in STARTS)
        + ")",
    ),
    "empty": ({}, "nothing that we know (no tensors)"),
}


@pytest.mark.parametrize("case", CASES)
def test_describe(case):
    shapes, expected = CASES[case]
    assert describe(shapes) == expected


PARTS = [*vit(depth=1), *swin(), *resnet((1, 1), True), "head.fc.weight", "dist_token", "\n", ""]
NAMES = st.one_of(
    st.text(),
    st.sampled_from(PARTS),
    st.from_regex(r"(x\.)?(blocks\.\d+|layers\.\d+\.blocks\.\d+|layer\d+\.\d+)\.(attn\.qkv|mlp)"),
    st.tuples(st.sampled_from(["blocks.", "layer"]), st.sampled_from(PARTS)).map("".join),
)


@given(st.dictionaries(NAMES, st.lists(st.integers(0, 50), max_size=5).map(tuple)))
def test_any_names_and_shapes_are_described_in_one_line(shapes):
    text = describe(shapes)
    assert text
    assert "\n" not in text
    assert None not in sizes(shapes).values()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("small", {"embed_dim": 12, "patch_size": 4, "depth": 2, "img_size": 8}),
        ("distilled", {"img_size": 224, "num_classes": 1000, "depth": 12}),
        ("swin", {"depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}),
        ("ragged_mlp", None),
        ("swin_ragged", None),
        ("resnet50", None),
        ("unknown", None),
    ],
)
def test_sizes(case, expected):
    found = sizes(CASES[case][0])
    if expected is None:
        assert found == {}
    else:
        assert {name: found[name] for name in expected} == expected
        assert (found["in_chans"], found["mlp_ratio"]) == (3, 4.0)


def test_positions_of_patches_alone():
    assert sizes(vit(positions=196))["img_size"] == 224
    assert "img_size" not in sizes(vit(positions=199))
