"""Command line of tapvit.

    tapvit convert | evaluate | inspect          models as files
    tapvit train                                 a dense model of your classes
    tapvit extractor | device-fit | select       from private images to a choice of public ones
    tapvit prune                                 the cloud's work for one device
    tapvit export | bench-latency                deployment

IMAGES is a folder with a folder of images per class, a flat folder of images, Tiny-ImageNet in its
own layout, CIFAR-10 or CIFAR-100 in their binary layouts, "digits", or "tfds:NAME". Bad input ends
with one line and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from tapvit_jax.commands import deploy, devices, models, prune, train
from tapvit_jax.data.preprocess import ImageError
from tapvit_jax.distributed import process_count
from tapvit_jax.errors import InputError
from tapvit_jax.runtime import run_program, set_up_jax


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapvit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Callable) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        found.set_defaults(function=function)
        return found

    for module in (models, train, devices, prune, deploy):
        module.register(command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    args = _parser().parse_args(argv)
    set_up_jax()
    if process_count() > 1:
        raise InputError(
            f"tapvit runs in one process, found {process_count()}: set TAPVIT_DISTRIBUTED=0, or "
            "use experiments.run and experiments.sweep, which share the work"
        )
    try:
        args.function(args)
    except ImageError as error:
        if getattr(args, "skip_corrupt", True):
            raise
        raise InputError(f"{error} (--skip-corrupt leaves such images out)") from error


def run() -> int:
    """Entry point of the console script."""
    return run_program(main, "nothing half-written is left behind")


if __name__ == "__main__":
    sys.exit(run())
