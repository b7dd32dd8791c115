"""What a state dict looks like, in a few words and as timm's arguments; for error messages."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_VIT_BLOCKS = r"blocks\.(\d{1,4})\.(.+)"
_SWIN_BLOCKS = r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.(.+)"

Shapes = Mapping[str, tuple[int, ...]]
"""Names of tensors, and their shapes."""

# Places of blocks (by stage, if there are any), with the shapes below them.
_Blocks = dict[tuple[int, ...], dict[str, tuple[int, ...]]]

# Libraries whose names are not timm's.
_FOREIGN = {
    r"(.+\.)?embeddings\.patch_embeddings?\.": "a Hugging Face transformers model",
    r"(.+\.)?embedder\.embedder\.convolution\.": "a Hugging Face transformers ResNet",
    r"encoder\.layers\.encoder_layer_\d": "a torchvision ViT",
    r"features\.\d+\.\d+\.attn\.": "a torchvision Swin",
    r"visual\.": "a CLIP model",
}
# Where a backbone within a larger model begins.
_ANCHORS = ("patch_embed.proj.weight", "layer1.0.conv1.weight")


def describe(shapes: Shapes) -> str:
    """Say what architecture the names and shapes of a state dict suggest."""
    for name in shapes:
        for pattern, text in _FOREIGN.items():
            if re.match(pattern, name):
                return f"{text} ({_short(name)}, ...): bring it under timm's names first"
    prefix = backbone_prefix(shapes)
    inner = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    found = _swin(inner) or _resnet(inner) or _vit(inner)
    if found:
        return found + (f", all under the prefix {_short(prefix)}" if prefix else "")
    names = ", ".join(_short(name) for name in list(shapes)[:3])
    return f"nothing that we know ({f'first names: {names}' if names else 'no tensors'})"


def sizes(shapes: Shapes) -> dict[str, Any]:
    """timm's arguments as far as shapes tell them; nothing for what is no dense ViT or Swin.

    A ViT's number of heads leaves no trace; a Swin's image size neither.
    """
    stages, blocks = _blocks(shapes, _SWIN_BLOCKS), _blocks(shapes, _VIT_BLOCKS)
    known = stages if _is_transformer(stages) else blocks
    if not _is_transformer(known) or _is_pruned(known):
        return {}
    proj, first = "patch_embed.proj.weight", known[min(known)]
    patch = _size(shapes, proj, -1, 4)
    hidden, dim = (_size(first, "mlp.fc1.weight", axis, 2) for axis in (0, 1))
    classes = (_size(shapes, f"{head}.weight", 0, 2) for head in ("head.fc", "head"))
    found = {
        "in_chans": _size(shapes, proj, 1, 4),
        "patch_size": patch,
        "embed_dim": _size(shapes, proj, 0, 4),
        "mlp_ratio": hidden / dim if hidden and dim else None,
        "num_classes": next((count for count in classes if count is not None), None),
    }
    if known is stages:
        table = "attn.relative_position_bias_table"
        rows = _size(first, table, 0, 2)
        heads = {place[0]: _size(block, table, 1, 2) for place, block in sorted(stages.items())}
        found["window_size"] = None if rows is None else (math.isqrt(rows) + 1) // 2
        found["depths"] = [int(depth) for depth in _depths(stages).split("-")]
        found["num_heads"] = None if None in heads.values() else list(heads.values())
    else:
        found["depth"] = len(blocks)
        # The tokens before the patches may have positions or not.
        positions = _size(shapes, "pos_embed", 1, 3) or 0
        grids = [math.isqrt(positions - i) for i in range(3) if positions > i]
        grid = next((g for i, g in enumerate(grids) if g and g**2 == positions - i), None)
        found["img_size"] = grid * patch if grid and patch else None
    return {name: value for name, value in found.items() if value is not None}


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")


def backbone_prefix(names: Iterable[str]) -> str:
    """What stands before a backbone's names within a larger model; "" if nothing or no backbone."""
    for name in names:
        for anchor in _ANCHORS:
            if name.endswith(f".{anchor}"):
                return name.removesuffix(anchor)
    return ""


def _blocks(shapes: Shapes, pattern: str) -> _Blocks:
    """Group the tensors of blocks; every group of the pattern but the last is a place."""
    found: _Blocks = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(pattern, name):
            *place, rest = match.groups()
            found.setdefault(tuple(map(int, place)), {})[rest] = shape
    return found


def _size(shapes: Shapes, name: str, axis: int, rank: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == rank else None


def _listed(*details: tuple[str, int | None] | str) -> str:
    """Join details, where pairs of a format and a number that is not known are left out."""
    texts = [detail if isinstance(detail, str) else _number(*detail) for detail in details]
    return ", ".join(text for text in texts if text)


def _number(text: str, number: int | None) -> str:
    return "" if number is None else text.format(number)


def _classes(shapes: Shapes, *heads: str) -> str:
    counts = (_size(shapes, f"{head}.weight", 0, 2) for head in heads)
    return next((f"{count} classes" for count in counts if count is not None), "no classifier")


def _depths(blocks: _Blocks) -> str:
    stages = [place[0] for place in blocks]
    return "-".join(str(stages.count(stage)) for stage in sorted(set(stages)))


def _is_transformer(blocks: _Blocks) -> bool:
    known = ("attn.qkv.weight", "mlp.fc1.weight", "mlp.w12.weight")
    return any(name in block for block in blocks.values() for name in known)


def _is_pruned(blocks: _Blocks) -> bool:
    """Whether blocks of one stage differ or have fewer heads' rows than a whole attention."""
    widths: dict[tuple[int, ...], set] = {}
    for place, block in blocks.items():
        qkv = block.get("attn.qkv.weight", ())
        if len(qkv) == 2 and qkv[0] != 3 * qkv[1]:
            return True
        widths.setdefault(place[:-1], set()).add((qkv, block.get("mlp.fc1.weight")))
    return any(len(found) > 1 for found in widths.values())


def _swin(shapes: Shapes) -> str | None:
    blocks = _blocks(shapes, _SWIN_BLOCKS)
    if not _is_transformer(blocks):
        return None
    version = " V2" if any("attn.logit_scale" in block for block in blocks.values()) else ""
    tables = (_size(block, "attn.relative_position_bias_table", 0, 2) for block in blocks.values())
    rows = next((rows for rows in tables if rows is not None), None)
    return _listed(
        f"a {'pruned or ragged ' if _is_pruned(blocks) else ''}Swin{version} "
        f"with stage depths {_depths(blocks)}",
        ("embed_dim {}", _size(shapes, "patch_embed.proj.weight", 0, 4)),
        ("patch {}", _size(shapes, "patch_embed.proj.weight", -1, 4)),
        ("window {}", None if rows is None else (math.isqrt(rows) + 1) // 2),
        _classes(shapes, "head.fc", "head"),
        "in the original repository's names" if "head.weight" in shapes else "",
    )


def _resnet(shapes: Shapes) -> str | None:
    blocks = _blocks(shapes, r"layer(\d{1,4})\.(\d{1,4})\.(.+)")
    if not any("conv1.weight" in block for block in blocks.values()):
        return None
    kind = "bottleneck" if any("conv3.weight" in block for block in blocks.values()) else "basic"
    inner = {}
    for place, block in blocks.items():
        inner.setdefault(place[0], set()).add(_size(block, "conv1.weight", 0, 4))
    ragged = any(len(widths) > 1 for widths in inner.values())
    grouped = any(
        _size(block, "conv2.weight", 1, 4) != _size(block, "conv1.weight", 0, 4)
        for block in blocks.values()
    )
    return _listed(
        f"a {'pruned or ragged ' if ragged else ''}ResNet with {kind} blocks {_depths(blocks)}",
        "grouped convolutions" if grouped else "",
        "a deep stem" if "conv1.0.weight" in shapes else "",
        _classes(shapes, "fc"),
    )


def _vit(shapes: Shapes) -> str | None:
    blocks = _blocks(shapes, _VIT_BLOCKS)
    if not _is_transformer(blocks):
        return None
    depth = max(place[0] for place in blocks) + 1
    pruned = _is_pruned(blocks) or depth != len(blocks)
    below = {name for block in blocks.values() for name in block}
    scaled = not below.isdisjoint(("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2"))
    positions = _size(shapes, "pos_embed", 1, 3)
    return _listed(
        f"a {'pruned or ragged ' if pruned else ''}{_vit_kind(shapes, scaled)} of {depth} blocks",
        "with layer scale" if scaled else "",
        ("embed_dim {}", _size(shapes, "patch_embed.proj.weight", 0, 4)),
        ("patch {}", _size(shapes, "patch_embed.proj.weight", -1, 4)),
        "no position embedding" if positions is None else f"{positions} positions",
        ("{} registers", _size(shapes, "reg_token", 1, 3)),
        ("{} registers", _size(shapes, "register_tokens", 1, 3)),
        _classes(shapes, "head"),
        "distilled" if "dist_token" in shapes else "",
        "without class token" if "cls_token" not in shapes else "",
    )


def _vit_kind(shapes: Shapes, scaled: bool) -> str:
    if any("relative_position_bias_table" in name for name in shapes):
        return "BEiT-like ViT"
    if any(name.startswith("decoder_blocks.") for name in shapes):
        return "masked autoencoder's ViT"
    if not scaled:
        return "ViT"
    dino = {"mask_token", "reg_token", "register_tokens"} & shapes.keys()
    if dino or _size(shapes, "patch_embed.proj.weight", -1, 4) == 14:
        return f"{'DINOv2' if 'pos_embed' in shapes else 'DINOv3'}-like ViT"
    return "DeiT-III-like ViT"
