"""export, bench-latency: from a model directory to what a device runs."""

import argparse
import functools
import os
from collections.abc import Iterator
from typing import get_args

import numpy as np

from tapvit_jax.commands.common import (
    Command,
    add_image_options,
    add_model_options,
    is_onnx,
    open_images,
    open_labelled,
    open_runnable,
    seed,
)
from tapvit_jax.data.pipeline import batches
from tapvit_jax.errors import InputError
from tapvit_jax.export import timm
from tapvit_jax.export.check import BATCH_SIZES, Precision, spec_path
from tapvit_jax.export.latency import load_models, measure_latency_model
from tapvit_jax.export.onnx import OPSET, OPSETS, export_onnx
from tapvit_jax.export.runtime import OnnxModel, measure_latency
from tapvit_jax.export.stablehlo import export_stablehlo
from tapvit_jax.files import check_directory, check_file
from tapvit_jax.models import store
from tapvit_jax.models.backbone import check_prunable
from tapvit_jax.models.registry import preprocess_of
from tapvit_jax.progress import Progress

# More than machines have cores.
_MOST_THREADS = 1024
_FORMATS = {
    "float32": ("onnx", "stablehlo", "timm"),
    "float16": ("onnx", "stablehlo"),
    "int8": ("onnx",),
}


def register(command: Command) -> None:
    """Add the commands of this module."""
    c = command("export", export)
    c.add_argument("model", help="a model's directory")
    c.add_argument("--format", choices=_FORMATS["float32"], required=True)
    c.add_argument("--precision", choices=get_args(Precision), default="float32")
    c.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        help=f"of ONNX: {OPSET}, the lowest, runs in the oldest runtimes and is the default",
    )
    c.add_argument(
        "--images",
        metavar="IMAGES",
        help="what the artefact is checked on; for onnx and stablehlo its accuracy is measured on "
        "them too, if they have labels",
    )
    c.add_argument("--out", required=True, help="the file, or for timm the folder")
    add_image_options(c)

    c = command("bench-latency", bench_latency)
    add_model_options(c, onnx=True)
    c.add_argument(
        "--pruned",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model's directory or .onnx file, repeatable",
    )
    c.add_argument("--batch", type=int, action="append", help="repeatable; 1 and 8 by default")
    c.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, _MOST_THREADS))
    c.add_argument("--repeats", type=int, default=40)
    c.add_argument(
        "--fit",
        type=int,
        default=0,
        metavar="N",
        help="measure N random prunings too (at the first batch size) and fit the latency model "
        "that prune --latency-table takes",
    )
    c.add_argument("--round-to", type=int, default=1, help="multiple of the random widths")
    c.add_argument("--seed", type=seed, default=0)
    c.add_argument("--out", help="where the latency model goes, with --fit")


def export(args: argparse.Namespace) -> None:
    """Write a model as ONNX, StableHLO or for timm, checked on images before it gets its name."""
    if args.format == "timm":
        check_directory(args.out, (timm.CONFIG_FILE, timm.WEIGHTS_FILE))
    else:
        check_file(args.out)
        check_file(spec_path(args.out))
    formats = _FORMATS[args.precision]
    if args.format not in formats:
        raise InputError(
            f"--precision {args.precision} is for {' and '.join(formats)}, --format is "
            f"{args.format}"
        )
    if args.opset is not None and args.format != "onnx":
        raise InputError(f"--opset is for onnx, --format is {args.format}")
    if args.images is None:
        raise InputError(f"--format {args.format} is checked on real images: give --images")
    model = store.load(args.model)
    preprocess = preprocess_of(model)
    source = open_labelled(args.images, model)
    images = open_images(source, preprocess, split=args.split, skip_corrupt=args.skip_corrupt)
    checked = source.load(images.indices[: max(BATCH_SIZES)], preprocess)
    if args.format == "timm":
        timm.export_timm(model, args.out, images=checked)
        print(f"{args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
        return
    write = export_stablehlo
    if args.format == "onnx":
        write = functools.partial(export_onnx, opset=args.opset or OPSET)
    progress = Progress(1.0, lines=False)
    with progress.step("export and check", 1) as step:

        def read() -> Iterator[dict[str, np.ndarray]]:
            for batch in batches(source, images.indices, preprocess, 32):
                yield batch
                step.advance(float(batch["mask"].sum()) / len(images.indices))

        report = write(model, args.out, images=checked, precision=args.precision, batches=read)
    progress.close()
    print(report)


def bench_latency(args: argparse.Namespace) -> None:
    """Time dense and pruned models side by side in ONNX Runtime; fit a latency model."""
    if args.fit and not args.out:
        raise InputError("--fit needs --out")
    if not 1 <= args.threads <= _MOST_THREADS:
        raise InputError(f"--threads is {args.threads}, expected 1 to {_MOST_THREADS}")
    sizes = args.batch or [1, 8]
    for name, value in {"batch": min(sizes), "repeats": args.repeats}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, expected 1 or more")
    if args.round_to < 1:
        raise InputError(f"--round-to is {args.round_to}, expected 1 or more")
    if args.fit and args.fit < 3:
        raise InputError(f"--fit is {args.fit}, expected 3 or more random prunings")
    if args.fit:
        check_file(args.out)
    dense = open_runnable(args, args.threads)
    if args.fit and isinstance(dense, OnnxModel):
        raise InputError(f"--fit prunes the model, expected a model's directory, not {args.model}")
    if args.fit:
        check_prunable(dense.config)
    models = {args.model: dense}
    for path in args.pruned:
        models[path] = OnnxModel(path, args.threads) if is_onnx(path) else store.load(path)
    exported = {name: model for name, model in models.items() if not isinstance(model, OnnxModel)}
    models |= load_models(exported, args.threads)
    for size in sizes:
        found = measure_latency(models, batch_size=size, repeats=args.repeats)
        first = found[args.model].median
        for name, latency in found.items():
            print(
                f"batch {size}, {args.threads} threads, {name}: {latency.median:.2f} ms "
                f"({latency.low:.2f} to {latency.high:.2f}), ratio {latency.median / first:.3f}"
            )
    if not args.fit:
        return
    progress = Progress(1.0)
    with progress.step("measure random prunings", 1) as step:
        fitted = measure_latency_model(
            dense.config,
            args.fit,
            batch_size=sizes[0],
            threads=args.threads,
            round_to=args.round_to,
            seed=args.seed,
            on_share=step.advance,
        )
    progress.close()
    fitted.save(args.out)
    print(
        f"{args.out}: {args.fit + 1} measurements; predictions of left-out ones are off by "
        f"{100 * fitted.error_median:.1f} % in the median, {100 * fitted.error_max:.1f} % at most"
    )
