"""One decoding iteration on the device: its state, and the functions that it is made of."""
