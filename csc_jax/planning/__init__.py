"""`--mode=plan`: a step compiled for hardware that is not there, and read."""
