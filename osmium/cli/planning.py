"""`osmium plan`: its flags and its output."""

import argparse
import json

from osmium.cli.flags import engine_options
from osmium.cli.values import number
from osmium.errors import ConfigError

__all__ = ["add_plan_flags", "plan"]


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the machine to plan for, and of the output."""
    flags = parser.add_argument_group("plan")
    flags.add_argument(
        "--gpu", metavar="NAME", help="plan for this GPU, as 'RTX 4090' (the one in this machine)"
    )
    flags.add_argument(
        "--link",
        type=number(0, 10_000, above=True),
        metavar="GB/S",
        help="rate of the GPU's PCIe link, as 25 (as measured; of --gpu as specified)",
    )
    flags.add_argument("--json", action="store_true", help="print one JSON line")


def plan(args: argparse.Namespace) -> None:
    """Print the memory and speed of a model on this or another machine, without its download.

    Raises: ConfigError, after the report, if the model does not fit.
    """
    from osmium.cli.local import named_model
    from osmium.cli.progress import progress_bar  # imports NumPy, which --help does not need
    from osmium.planning import plan_report
    from osmium.planning.text import report_text

    model, options = engine_options(args)
    model = named_model(model, args.cache_dir)
    with progress_bar() as progress:
        report = plan_report(model, gpu=args.gpu, link_gb_s=args.link, progress=progress, **options)
    print(json.dumps(report.as_dict()) if args.json else report_text(report))
    if report.plan is None:
        raise ConfigError(f"{report.model.name} does not fit {report.hardware.name}.")
