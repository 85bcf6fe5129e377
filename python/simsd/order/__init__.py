"""The order in which a target reveals a block, learned from its own decoding."""
