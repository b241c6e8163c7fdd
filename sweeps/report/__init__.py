"""The report on runs and sweeps: one self-contained page, or tables for a paper's appendix."""
