"""`osmium plan`: its flags, and what it prints."""

import argparse
import json

from osmium.cli.flags import engine_options
from osmium.cli.values import number
from osmium.errors import ConfigError

__all__ = ["add_plan_flags", "plan"]


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The machine to plan for, and the form of the answer."""
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
    """What a model needs and does here, or on another machine, before anything is downloaded.

    Raises: ConfigError, after the report, where the model does not run.
    """
    from osmium.cli.local import named_model
    from osmium.cli.progress import progress_bar  # here, so that --help does not wait for NumPy
    from osmium.planning import plan_report
    from osmium.planning.text import report_text

    model, options = engine_options(args)
    model = named_model(model, args.cache_dir)
    with progress_bar() as progress:
        found = plan_report(model, gpu=args.gpu, link_gb_s=args.link, progress=progress, **options)
    print(json.dumps(found.as_dict()) if args.json else report_text(found))
    if found.plan is None:
        raise ConfigError(f"{found.model.name} does not fit {found.hardware.name}.")
