"""Publishing a run's exports as revisions: what a revision holds, and where it goes."""
