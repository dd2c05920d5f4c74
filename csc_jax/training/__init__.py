"""Training: the host loop, the step it calls, and what lets a run stop and go on."""
