"""The files of a run folder: metrics, trajectories, pictures, and a page that shows them."""
