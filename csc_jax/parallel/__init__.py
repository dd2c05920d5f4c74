"""One program on many devices and processes."""
