"""The runtime: engines, drafters, verification and the decode loop."""
