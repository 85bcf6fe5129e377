"""`simsd batch PROMPTS OUTPUT`: `simsd.ray.batch` of a file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from simsd.cli import options as opt
from simsd.cli.prompts import read_requests
from simsd.errors import SimsdError
from simsd.ray.job import SHARD_ROWS

LOADING = (
    *("quantize", "family", "mask_token_id", "shift", "revision", "local_files_only"),
    *("draft_family", "draft_shift", "draft_revision"),
)


def batch(
    prompts: Annotated[
        Path,
        typer.Argument(help='One prompt per line, or JSON lines with "prompt" or "messages" and, if you like, "id".'),
    ],
    output: Annotated[Path, typer.Argument(help="The folder of results: a new one, or that of the same job before.")],
    target: opt.Target = opt.TARGET,
    draft: opt.Draft = None,
    dtype: opt.Dtype = "auto",
    device: Annotated[str, typer.Option("--device", help="Of a worker: auto, cpu or cuda (one GPU).")] = "auto",
    quantize: opt.Quantize = None,
    family: opt.Family = None,
    block_length: opt.BlockLength = None,
    mask_token_id: opt.MaskTokenId = None,
    shift: opt.Shift = None,
    draft_family: opt.DraftFamily = None,
    draft_shift: opt.DraftShift = None,
    revision: opt.Revision = None,
    draft_revision: opt.DraftRevision = None,
    local_files_only: opt.LocalFilesOnly = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes, each with an engine.")] = 1,
    cpus: Annotated[int, typer.Option("--cpus", help="CPUs of a worker.")] = 1,
    max_batch: Annotated[
        int, typer.Option("--batch", help="Texts that a worker decodes at a time, at most.")
    ] = opt.DEFAULTS.max_batch,
    shard_rows: Annotated[int, typer.Option("--shard-rows", help="Rows that a worker gets at a time.")] = SHARD_ROWS,
    max_new_tokens: opt.MaxNewTokens = opt.DEFAULTS.max_new_tokens,
    verify: opt.Verify = opt.DEFAULTS.verify,
    drafter: opt.Drafter = opt.DEFAULTS.drafter,
    lookahead: opt.Lookahead = opt.DEFAULTS.lookahead,
    max_rows: opt.MaxRows = None,
    order_head: opt.OrderHead = opt.DEFAULTS.order_head,
    strategy: opt.Strategy = opt.DEFAULTS.strategy,
    steps: opt.Steps = None,
    sub_block_length: opt.SubBlockLength = None,
    draft_steps: opt.DraftSteps = None,
    threshold: opt.Threshold = opt.DEFAULTS.threshold,
    entropy_bound: opt.EntropyBound = opt.DEFAULTS.entropy_bound,
    temperature: opt.Temperature = opt.DEFAULTS.temperature,
    top_k: opt.TopK = opt.DEFAULTS.top_k,
    top_p: opt.TopP = opt.DEFAULTS.top_p,
    seed: opt.Seed = 0,
) -> None:
    """Decode a file of prompts on a Ray cluster (that of RAY_ADDRESS, else one on this machine).

    Called again after an interrupt, it does what is missing.
    """
    given = dict(locals())
    config = opt.config_from(given)
    requests = read_requests(prompts)
    with_ids = [request for request in requests if "id" in request.given]
    if with_ids and len(with_ids) < len(requests):
        raise SimsdError(
            f"{prompts}: {len(with_ids)} of {len(requests)} prompts have an id: give all of them one, or none"
        )
    rows = [{"prompt": request.prompt} | request.given for request in requests]

    from simsd import ray

    try:
        report = ray.batch(
            rows,
            target,
            opt.draft_name(target, draft),
            config,
            output=output,
            id="id" if with_ids else None,
            workers=workers,
            cpus=cpus,
            device=device,
            dtype=dtype,
            shard_rows=shard_rows,
            **{name: given[name] for name in LOADING},
        )
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from what is in {output}", file=sys.stderr)
        raise
    print(f"{report.rows} rows in {report.output}, {report.failed} failed", file=sys.stderr)
