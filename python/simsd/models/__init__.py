"""Block-diffusion models: stock transformers modules with interval attention, their KV cache and their loading."""

import logging

# transformers imports torchao where it is installed, which then warns of each binary of its own that this torch or this
# machine cannot load, and torch of what torchao registers. Quantized weights need neither.
_UNASKED = {"torchao": "Failed to load", "torch.utils._pytree": "is an Enum subclass"}


def _filtered(name: str, text: str) -> None:
    logging.getLogger(name).addFilter(lambda record: text not in record.getMessage())


for _name, _text in _UNASKED.items():
    _filtered(_name, _text)
