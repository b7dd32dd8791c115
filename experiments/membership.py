"""What payloads give away: whether an image was among those that a device fitted its mixture on.

    python -m experiments.membership --config=configs/digits.py --workdir=runs/membership

Likelihood membership inference: images are ranked by their density under the device's mixture, the
private-train images that it was fitted on against the private-test images that it never saw. The
area under the ROC curve is 0.5 where nothing is given away and 1 where every member is told.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import flags
from jaxtyping import Float

from experiments import arguments
from experiments.config import ExperimentConfig, identity
from experiments.preparation import UNITS, Preparation
from experiments.statistics import mean_interval
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import write_json
from tapvit_jax.progress import Progress
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.payload import CovarianceType
from tapvit_jax.runtime import run_program, set_up_jax
from tapvit_jax.stages import Stages, claim_workdir, on_main
from tapvit_jax.versions import library_versions


def areas(
    gmms: Sequence[Gmm], members: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]
) -> list[float]:
    """Area under the ROC curve of telling members from others by their density, for each mixture.

    Source: likelihood membership inference; the curve is scikit-learn's.
    """
    # Imported here: it takes a second, and only this function needs it.
    from sklearn.metrics import roc_auc_score

    values = log_likelihood(gmms, np.concatenate([members, others]))
    is_member = np.arange(values.shape[1]) < len(members)
    return [float(roc_auc_score(is_member, row)) for row in values]


def measure(
    config: ExperimentConfig, workdir: Path, kinds: Sequence[CovarianceType], quiet: bool = False
) -> dict[str, Any]:
    """Fit every device's mixture with each kind of covariance, attack it, and write the results.

    Returns:
      what `membership.json` holds: for each kind the devices' `auc`, `components`, numbers in the
      payload (`parameters`) and private images (`members`).

    Raises:
      InputError: an unknown kind, splits that leak, a work directory of another config, or a
        mixture that cannot be fitted.
    """
    if config.data.partition.leaks:
        raise InputError(
            "data.partition.leaks: private-test images are members as well, none are others"
        )
    options = [dataclasses.replace(config.gmm, covariance_type=kind) for kind in kinds]
    plain = {"program": "experiments.membership", **identity(config)}
    distributed.check_agreement({"config": plain}, "the hosts")
    on_main(lambda: claim_workdir(workdir, plain))
    devices = config.data.partition.num_devices
    # A network trained for its features needs no dense model.
    first = ("data", "extractor" if config.extractor.kind == "embedding" else "dense")
    total = sum(UNITS[name] for name in first)
    progress = Progress(total + devices * UNITS["device"], quiet or not distributed.is_main())
    job = Preparation(config, Stages(workdir / "stages"), workdir / "payloads", progress)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for d, split in enumerate(job.parts.devices):
        with progress.step(f"device {d}: mixtures", UNITS["device"]):
            members, others = (
                job.compute_features(images) for images in (split.private_train, split.private_test)
            )
            gmms = [Gmm.fit(members, job.seeded(option, d)) for option in options]
            for kind, gmm, area in zip(kinds, gmms, areas(gmms, members, others), strict=True):
                rows[kind].append(
                    {
                        "auc": area,
                        "components": gmm.components,
                        "parameters": gmm.num_parameters,
                        "members": len(members),
                    }
                )
    progress.close()
    results = {"config": identity(config), "libraries": library_versions(), "kinds": rows}
    on_main(lambda: write_json(workdir / "membership.json", results))
    return results


def table(results: dict[str, Any]) -> str:
    """A Markdown table of the means over devices."""
    lines = [
        "| covariances | AUC | components | numbers in the payload | private images |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, rows in results["kinds"].items():
        found = mean_interval([row["auc"] for row in rows])
        width = "" if found.half_width is None else f" ± {found.half_width:.3f}"
        others = (
            f"{np.mean([row[name] for row in rows]):.0f}"
            for name in ("components", "parameters", "members")
        )
        lines.append(f"| {kind} | {found.mean:.3f}{width} | {' | '.join(others)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measure what the arguments name and print the table.

    Raises:
      InputError: unknown or missing arguments, or anything wrong in the config or the data.
    """
    set_up_jax()
    flags.adopt_module_key_flags(arguments)
    every = list(get_args(CovarianceType))
    kinds = flags.DEFINE_list("covariances", every, f"Kinds of covariances: {', '.join(every)}.")
    config, workdir = arguments.parse(argv)
    named = list(dict.fromkeys(kinds.value))
    if not named or not set(named) <= set(every):
        found = ",".join(named)
        raise InputError(f"--covariances is {found!r}, expected some of {','.join(every)}")
    results = measure(config, workdir, named)
    if distributed.is_main():
        print(table(results))


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv)))
