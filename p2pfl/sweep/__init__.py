"""Many runs: a plan of combinations and seeds, its runs side by side, and what they come to."""

from p2pfl.sweep.execute import Sweep, SweepWatch, run_sweep

__all__ = ["Sweep", "SweepWatch", "run_sweep"]
