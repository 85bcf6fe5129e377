"""What the kernels do on a GPU: built, tested and timed beside their peers by `make gpu`."""
