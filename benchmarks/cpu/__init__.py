"""What is timed and counted on the CPU, by `make bench` or by name."""
