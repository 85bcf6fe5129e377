"""One denoising step of a batch of blocks: which masked positions are revealed."""

from __future__ import annotations

from torch import Tensor

from simsd_kernels import dispatch
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.reveal import reference
from simsd_kernels.reveal.arguments import MAX_LENGTH, SIGNATURE, STRATEGIES

OP = SIGNATURE.op

__all__ = ["MAX_LENGTH", "STRATEGIES", "reveal"]


@SIGNATURE.document
def reveal(*given, backend: str | None = None, **named) -> Tensor:
    """Reveals masked positions of each slot's block by its strategy, in place.

    All but the last step reveal masked positions of the leftmost sub-block that has any; n = schedule[step], capped by
    their number:

    - sequential: the leftmost n.
    - low_confidence_static: the n of largest log_odds.
    - low_confidence_dynamic: all with prob > threshold if they are at least n, else the n of largest log_odds.
    - entropy_bounded: in order of rising entropy, as many as have a running sum < threshold, at least one.

    The last step (step == steps - 1) reveals whatever is still masked in the block, by every strategy. Ties go to the
    lowest position, NaN ranks last. Positions revealed before never change.

    Args:
        {arguments}
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        int64 [B], the bitmask of newly revealed positions.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given; nothing is
            written then.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.

    Source: the reveal strategies of SDAR's generate.py, ranked by log-odds instead of probability: the same order in
    exact arithmetic, and still one where probabilities round to 1.
    """
    arguments = SIGNATURE.bind(given, named)
    SIGNATURE.check(*arguments)
    refuse_gradients(OP, *arguments)
    backend = dispatch.choose(OP, backend, arguments[0].device, lambda _: None)
    if backend == "reference":
        return reference.reveal(*arguments)
    return dispatch.operator(OP, backend)(*arguments)


def _reference(*arguments):
    SIGNATURE.check(*arguments)
    return reference.reveal(*arguments)


implement(OP, _reference)
