"""The work of ``ntkdp demo``: private training predicted before it is run."""
