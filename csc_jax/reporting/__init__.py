"""What a person sees of a run: metrics, progress, panels and curves."""
