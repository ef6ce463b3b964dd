"""dash-profile: measures a bundle's costs on this machine and stores them in it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace

from dash_onnx.cli.common import (
    Parser,
    add_bundle_argument,
    add_json_option,
    add_threads_option,
    run,
    tell,
)
from dash_onnx.cli.plans import plans_table

_EXAMPLES = """\
  dash-profile out/
  dash-profile out/ --threads 1 --dry-run --json"""


def _parser() -> Parser:
    parser = Parser(
        "dash-profile",
        "Time every layer in each precision, and its skip, on this machine, and write the times "
        "into the bundle; budgets and presets are based on them. A profile that other work "
        "disturbed is refused.",
        _EXAMPLES,
    )
    add_bundle_argument(parser)
    add_threads_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="do not change the bundle")
    parser.add_argument(
        "--force", action="store_true", help="write the times even if other work disturbed them"
    )
    add_json_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    nothing = "does not go with --dry-run, which writes nothing"
    parser.refuse(arguments, (arguments.dry_run, "--force", nothing))
    return run("dash-profile", lambda: _profile(arguments))


def _profile(arguments: argparse.Namespace) -> None:
    import dash_onnx
    from dash_onnx.core.atomic import TRAINING, locked
    from dash_onnx.core.budget import reference_ms
    from dash_onnx.core.bundle import Bundle, replace_manifest
    from dash_onnx.core.card import update_card
    from dash_onnx.core.contract import FUSED_FOLDER
    from dash_onnx.core.errors import DashError
    from dash_onnx.core.recost import with_costs
    from dash_onnx.runtime.profile import checked
    from dash_onnx.runtime.profile_whole import plan_times

    # Checks that the device is available, and sets the threads.
    dash_onnx.load(arguments.bundle, threads=arguments.threads)
    # A training needs a writable folder around the bundle.
    trainable = os.access(arguments.bundle.resolve().parent, os.W_OK)
    writes = trainable and not arguments.dry_run
    with locked(arguments.bundle, TRAINING) if writes else nullcontext():
        bundle = Bundle(arguments.bundle)
        costs, disturbed = checked(bundle, bundle.manifest.target.device)
        manifest = with_costs(bundle.manifest, costs)
        costs = plan_times(Bundle(bundle.folder, manifest), manifest.target.device)
        manifest = replace(manifest, costs=costs)
        if not arguments.dry_run:
            if disturbed and not arguments.force:
                raise DashError(
                    f"{disturbed}; stop it and try again, set --threads if CPU time is limited, or "
                    "write the costs with --force"
                )
            if Bundle(bundle.folder).manifest != bundle.manifest:  # an export does not wait
                raise DashError(f"{bundle.folder} was replaced meanwhile: profile it again")
            replace_manifest(bundle.folder, manifest)
            update_card(bundle.folder, bundle.manifest, manifest)
    if disturbed:
        print(f"dash-profile: warning: {disturbed}", file=sys.stderr)
    if not arguments.dry_run and (fused := bundle.folder / FUSED_FOLDER).is_dir():
        out = shlex.quote(str(bundle.folder))
        print(
            f"dash-profile: {fused} still has the previous costs; update it with "
            f"dash-fuse {out} --overwrite and the same options as before",
            file=sys.stderr,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(costs)))
        return
    print(
        f"{costs.machine}, {costs.threads} threads; a typical run took {costs.spread:.0%} longer "
        "than these figures"
    )
    best = manifest.variants[0]
    print(f"a token, all layers {best:<6} {reference_ms(manifest):8.3f} ms")
    print(f"embedding                  {costs.embed_ms:8.3f} ms")
    for action in manifest.actions:
        middle = statistics.median(layer[action] for layer in costs.layers_ms)
        print(f"one layer, {action:<15} {middle:8.3f} ms")
    for head, ms in costs.heads_ms.items():
        print(f"LM head, {head:<17} {ms:8.3f} ms")
    if manifest.scorer is not None:
        print(f"all decisions of a token   {costs.scorer_ms:8.3f} ms")
    print(f"one graph saves a layer    {costs.join_ms:8.3f} ms")
    tell(*plans_table(manifest))
