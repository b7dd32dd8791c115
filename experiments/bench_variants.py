"""How fast many variants train in one program, beside one after the other; prints ratios.

    python -m experiments.bench_variants

On a GPU also in bfloat16, and the forward pass beside timm's under torch.compile.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import alternate, note, report
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.models.vit import ViTConfig, vit_config
from tapvit_jax.runtime import set_up_jax
from tapvit_jax.train.finetune import TrainConfig, TrainData, train
from tapvit_jax.train.variants import Variant, train_variants

COUNTS, REPEATS = (1, 2, 4, 8), 3
STEPS, CLASSES = 4, 10


def networks() -> dict[str, tuple[ViTConfig, int]]:
    """What is trained, and its batch size."""
    digits = vit_config(
        image_size=8,
        patch_size=2,
        in_channels=1,
        num_classes=CLASSES,
        depth=6,
        num_heads=4,
        embed_dim=64,
    )
    tiny, _ = create("deit_tiny_patch16_224", img_size=64, num_classes=CLASSES)
    return {"digits ViT, 8 px": (digits, 64), "DeiT-T, 64 px": (tiny, 16)}


def training(name: str, config: ViTConfig, batch_size: int, count: int) -> None:
    """One epoch of every variant, validation included, in one program and one by one."""
    rng = np.random.default_rng(0)
    side, channels, size = config.image_size, config.in_channels, STEPS * batch_size
    images = rng.standard_normal((2 * size, side, side, channels)).astype(np.float32)
    source = MemorySource(images, rng.integers(0, CLASSES, 2 * size), list("abcdefghij"))
    preprocess = Preprocess(side, (0.0,) * channels, (1.0,) * channels, channels=channels)
    options = TrainConfig(epochs=1, batch_size=batch_size, learning_rate=1e-4)
    masks = jax.tree.map(lambda _: np.ones((), np.float32), backbone.param_shapes(config))
    variants = [
        Variant(
            params=backbone.init(config, jax.random.key(v)),
            train=rng.permutation(2 * size)[:size],
            validation=np.arange(batch_size),
            masks=masks,
            seed=v,
        )
        for v in range(count)
    ]

    def one_by_one() -> None:
        for variant in variants:
            data = TrainData(source, preprocess, variant.train, variant.validation)
            train(config, variant.params, data, options, seed=variant.seed, masks=masks)

    def together() -> None:
        train_variants(config, variants, source, preprocess, options)

    times = alternate({"one after the other": one_by_one, "one program": together}, REPEATS)
    report(f"{name}, {config.dtype}, batch {batch_size}, {count} variants", times)
    rates = ", ".join(f"{name} {count * size / t:,.0f}" for name, t in times.items())
    note(f"images/s: {rates}")


def forward(preset: str, batch_size: int = 256) -> None:
    """The forward pass in bfloat16 beside timm's under torch.compile."""
    import timm
    import torch

    config, _ = create(preset)
    config = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), backbone.init(config, jax.random.key(0))
    )
    shape = (batch_size, config.image_size, config.image_size, 3)
    images = jnp.zeros(shape, jnp.bfloat16)
    ours = jax.jit(backbone.apply, static_argnums=0)
    theirs = timm.create_model(preset).cuda().bfloat16().eval()
    compiled = torch.compile(theirs, mode="max-autotune")
    batch = torch.zeros(shape, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)

    def torch_run() -> None:
        with torch.inference_mode():
            compiled(batch)
        torch.cuda.synchronize()

    runs: dict[str, Callable[[], object]] = {
        "timm, torch.compile": torch_run,
        "ours": lambda: ours(config, params, images),
    }
    times = alternate(runs, 20)
    report(f"forward pass, {preset}, bfloat16, batch {batch_size}", times)
    note("images/s: " + ", ".join(f"{n} {batch_size / t:,.0f}" for n, t in times.items()))


def main() -> None:
    """Run all comparisons."""
    set_up_jax()
    gpu = jax.default_backend() == "gpu"
    for name, (config, batch_size) in networks().items():
        for dtype in ("float32", "bfloat16") if gpu else ("float32",):
            for count in COUNTS:
                training(name, dataclasses.replace(config, dtype=dtype), batch_size, count)
    if not gpu:
        note("bfloat16 and the forward pass beside timm: no GPU: skipped")
    elif importlib.util.find_spec("torch") is None or importlib.util.find_spec("timm") is None:
        note("the forward pass beside timm: no torch and timm: skipped")
    else:
        for preset in ("deit_small_patch16_224", "deit_base_patch16_224"):
            forward(preset)


if __name__ == "__main__":
    main()
