"""Load a checkpoint, walk its layers one by one, turn text into calibration tokens."""
